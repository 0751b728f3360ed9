"""From a name to weights and a tokenizer, as transformers opens them: what is refused, and what to do about it.

Bundled weights are checked against their card. Weights that are a pickle are never opened. Nothing is looked for on the
hub that is in the cache, and the access token of gated models is read from the environment.
"""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path

import torch

from lenslab.paths import data_path, sha256_file

BUNDLED = {  # name -> what it is; the weights are in data/models/NAME
    "pocket-gpt": "GPT-2 architecture, 6 layers, d_model 256, trained by this project on mixed text",
    "pocket-moe": "OLMoE architecture, 6 layers, d_model 192, 16 experts, two per token, same text and tokenizer",
    "pocket-switch": "as pocket-moe, with 8 experts, one per token (Switch routing)",
}
DEFAULT = "pocket-gpt"
HUB = {  # short names for models people ask for; any other hub name works as it is
    "gpt2": "openai-community/gpt2",
    "gpt2-small": "openai-community/gpt2",
    "gemma-3-1b": "google/gemma-3-1b-pt",
    "gemma-3-1b-it": "google/gemma-3-1b-it",
    "olmoe": "allenai/OLMoE-1B-7B-0924",
}


class NotAModel(ValueError):
    """What was named cannot be loaded as a language model; the message says why and what can."""


def resolve(name: str) -> tuple[str, str]:
    """(what transformers should open, the name to show): never a path of this machine in what is shown."""
    if name in BUNDLED:
        return str(data_path("models", name)), name
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise NotAModel(
                f"The folder {name} has no config.json, so it is not a Hugging Face model folder. Save one with "
                "model.save_pretrained(folder) and tokenizer.save_pretrained(folder)."
            )
        return str(folder), folder.resolve().name
    if folder.is_absolute() or name.startswith((".", "~")):
        raise NotAModel(f"There is no folder {name}. Bundled models: {', '.join(BUNDLED)}.")
    return HUB.get(name, name), name


def open_weights(source: str, label: str, dtype: torch.dtype):
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    folder = Path(source)
    if folder.is_dir():  # local weights open in well under a second: a bar would only flicker
        logging.disable_progress_bar()
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        pickles = [f.name for f in folder.iterdir() if f.suffix in {".bin", ".pt", ".pth", ".pkl"}]
        raise NotAModel(
            f"{label} holds its weights as a pickle ({pickles[0]}), which can run code when it is opened and is never "
            "loaded here. Convert it once where you trust it: model.save_pretrained(folder, safe_serialization=True)."
            if pickles
            else f"{label} has a config.json but no weights (*.safetensors)."
        )
    if label in BUNDLED and folder.resolve() == data_path("models", label).resolve():
        _check_bundled(folder, label)
    token = os.environ.get("HF_TOKEN")  # gated models: from the environment, never from a file here
    options = {} if folder.is_dir() or not token else {"token": token}
    try:
        return fused_gelu(
            AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, attn_implementation="eager", use_safetensors=True, **options
            )
        )
    except Exception as error:  # transformers raises a dozen kinds: bad JSON, cut-off weights, no network
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        near = difflib.get_close_matches(label, [*BUNDLED, *HUB], n=1)
        meant = f"Did you mean {near[0]!r}? " if near and near[0] != label else ""
        if _refused(error):
            raise NotAModel(
                f"{label}: the hub gives it to no one it does not know. {meant}It is gated, private or misspelt. "
                f"Accept its licence on https://huggingface.co/{source} while signed in, make an access token in your "
                "settings there, and set it as HF_TOKEN" + (" (the one that is set has no access)." if token else ".")
            ) from error
        offline = " and unset HF_HUB_OFFLINE" if os.environ.get("HF_HUB_OFFLINE") else ""
        advice = (
            "Check that the folder is complete: a cut-off download leaves short files."
            if folder.is_dir()
            else f"If it is a hub name, download it while online (`.venv/bin/hf download {source}`; set HF_TOKEN for "
            f"gated models){offline}. Bundled, always here: {', '.join(BUNDLED)}."
        )
        raise NotAModel(f"{label} could not be loaded. {meant}{first} {advice}") from (None if meant else error)


def _check_bundled(folder: Path, label: str) -> None:
    """Refuse bundled weights that are not those of their card: what ships beside them was measured on the card's."""
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    if sha256_file(folder / "model.safetensors") != card["weights_sha256"]:
        raise NotAModel(
            f"The weights of {label} are not those that its card describes: damaged, or changed. Restore them with "
            f"`git checkout -- data/models/{label}`, or load them under another name from a folder of your own."
        )


def _refused(error: BaseException | None) -> bool:
    """Whether the hub was reached and said no, somewhere in what led to this error."""
    while error is not None:
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            return True
        error = error.__cause__ or error.__context__
    return False


def fused_gelu(hf_model):
    """GPT-2's GELU in one kernel instead of eight: the same function, and a sixth of a forward pass on CPU."""
    for module in hf_model.modules():
        for name, child in module.named_children():
            if type(child).__name__ == "NewGELUActivation":
                setattr(module, name, torch.nn.GELU(approximate="tanh"))
    return hf_model


def open_tokenizer(source: str, label: str):
    from transformers import AutoTokenizer

    missing = f"{label} has no tokenizer that can be opened: tokenizer.save_pretrained(folder) beside the weights."
    files = ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model", "vocab.txt")
    if Path(source).is_dir() and not any((Path(source) / file).exists() for file in files):
        raise NotAModel(missing)  # transformers would make up an empty vocabulary
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:
        raise NotAModel(missing) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token
    return tokenizer
