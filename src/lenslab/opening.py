"""From a folder or hub name to a Hugging Face model and its tokenizer, every weight from its file.

Nothing here trusts that a folder which opens is the model it says it is: transformers fills a gap
in the weights with random numbers and says so in a table that scrolls by. So the files are checked
before they are opened, and the weights by name after.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import torch
import transformers
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from safetensors import safe_open
from transformer_lens.model_bridge import TransformerBridge
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import cached_file, logging

from lenslab.files import BUNDLED, NotAModel, data_path, sha256_file

VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model", "vocab.txt")
VOCABULARIES += ("sentencepiece.bpe.model",)
FLOATS = ("F64", "F32", "F16", "BF16")
LEFT_OUT = ("attn.bias", "attention.bias", "masked_bias", "inv_freq", "position_ids")  # buffers


def text_config(model: TransformerBridge | PreTrainedModel) -> PretrainedConfig:
    """The config of the language model, also where it is one part of a model that takes images."""
    whole = model.original_model if isinstance(model, TransformerBridge) else model
    return whole.config.get_text_config(decoder=True)


def auto_class(config: PretrainedConfig) -> type:
    """What opens or builds the language model of a config: decoder-only, or encoder-decoder."""
    kind = "Seq2Seq" if config.is_encoder_decoder else "Causal"
    return getattr(transformers, f"AutoModelFor{kind}LM")


def build(config: PretrainedConfig, **options) -> PreTrainedModel:
    """A model as it is before training, with eager attention."""
    options |= dict(attn_implementation="eager", trust_remote_code=False)
    return auto_class(config).from_config(config, **options)


def check_folder(folder: Path, label: str) -> None:
    """Refuse a folder that transformers would open wrongly or not at all, and bundled weights that
    are not those of their card: what ships beside them was measured on the card's."""
    if (folder / "adapter_config.json").is_file():  # transformers may leave it out without a word
        raise NotAModel(f"{label} holds a PEFT adapter: save model.merge_and_unload() instead.")
    if not (folder / "config.json").is_file():
        raise NotAModel(f"{label} has no config.json. Make it: model.save_pretrained(folder).")
    if not any(folder.glob("*.safetensors")):
        advice = "open it where you trust it, then model.save_pretrained(folder)."
        raise NotAModel(f"{label} has no weights (*.safetensors). A pickle can run code: {advice}")
    check_files(folder, label)
    if not any((folder / file).exists() for file in VOCABULARIES):  # an empty one would be made up
        raise NotAModel(f"{label} has no tokenizer. Add it: tokenizer.save_pretrained(folder).")
    if label in BUNDLED and folder.resolve() == data_path("models", label).resolve():
        card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
        files = {"model.safetensors": "weights_sha256", "config.json": "config_sha256"}
        if any(sha256_file(folder / file) != card[key] for file, key in files.items()):
            advice = f"`git checkout -- data/models/{label}`, or load it from a folder of your own."
            raise NotAModel(f"Weights or config of {label} are not those of its card: {advice}")


def check_files(folder: Path, label: str) -> None:
    """Refuse what transformers would turn into weights without a word: pickled shards that an index
    names, and integers. Masks and positions, which it leaves out, may be anything; so may the parts
    of a quantized model, which it opens by its own rules."""
    if (index := folder / "model.safetensors.index.json").is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if foreign := sorted(name for name in shards if not name.endswith(".safetensors")):
            raise NotAModel(f"{label}: the index names {foreign[0]}, a pickle, never loaded here.")
    types = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            types |= {name: tensors.get_slice(name).get_dtype() for name in tensors.offset_keys()}
    whole = [n for n, kind in types.items() if kind not in FLOATS and not n.endswith(LEFT_OUT)]
    if whole and b"quantization_config" not in (folder / "config.json").read_bytes():
        kind = f"{whole[0]} is of type {types[whole[0]]} without a quantization_config"
        raise NotAModel(f"{label}: {kind}: its scales are lost. Save it in float32 or bfloat16.")


def open_weights(source: str, label: str, dtype: torch.dtype) -> PreTrainedModel:
    """The Hugging Face model of a folder or hub name, from safetensors only, every weight from its
    file: transformers itself makes up what is missing and leaves out what it does not expect."""
    if local := Path(source).is_dir():  # opened in well under a second: a bar would only flicker
        logging.disable_progress_bar()
    elif not isinstance(try_to_load_from_cache(source, "config.json"), str):
        # Asked once: where there is no network, transformers asks six times, in 20 seconds
        get_hf_file_metadata(hf_hub_url(source, "config.json"), timeout=5)
    options = dict(attn_implementation="eager", use_safetensors=True, trust_remote_code=False)
    options |= dict(output_loading_info=True, ignore_mismatched_sizes=True)  # told by name below
    opener = auto_class(transformers.AutoConfig.from_pretrained(source, trust_remote_code=False))
    weights, told = opener.from_pretrained(source, dtype=dtype, **options)
    folder = Path(source) if local else Path(cached_file(source, "config.json")).parent
    if not local:
        check_files(folder, label)
    wrong = {
        "missing in the file": told["missing_keys"],
        "unknown to the config": {n for n in told["unexpected_keys"] if not n.endswith(LEFT_OUT)},
        "of another shape": {name for name, *_ in told["mismatched_keys"]},
        "there twice, of which transformers takes one": _twice(folder, weights),
    }
    if wrong := {what: sorted(names) for what, names in wrong.items() if names}:
        listed = "; ".join(f"{len(n)} {what} ({', '.join(n[:3])})" for what, n in wrong.items())
        advice = "save it with model.save_pretrained(folder), plain, not compiled or wrapped"
        told = f"weights and config do not belong together: {listed}"
        raise NotAModel(f"{label}: {told}: {advice}.")
    head, config = weights.get_output_embeddings(), text_config(weights)
    if head is not None and head.weight is not weights.get_input_embeddings().weight:
        if config.tie_word_embeddings:
            warnings.warn(f"{label}: its file has a head that its config ties: used.", stacklevel=3)
        config.tie_word_embeddings = weights.config.tie_word_embeddings = False
    return weights


def _twice(folder: Path, weights: PreTrainedModel) -> set[str]:
    """Names of weights that the files hold with and without the prefix of the base model."""
    if (file := folder / "model.safetensors").is_file():
        with safe_open(file, "pt") as tensors:
            names = list(tensors.offset_keys())
    else:
        index = (folder / "model.safetensors.index.json").read_text(encoding="utf-8")
        names = list(json.loads(index)["weight_map"])
    own, known = weights.state_dict().keys(), {}
    for name in sorted(names, key=len):
        plain = re.sub(rf"^({re.escape(weights.base_model_prefix)}\.)+", "", name)
        known.setdefault(plain, []).append(name)
    return {same[-1] for same in known.values() if len(same) > 1 and not own >= set(same)}


def open_tokenizer(source: str):
    """The tokenizer of a folder or hub name; one without padding pads with EOS or BOS, one that has
    no special token at all with its first: what pads is masked, and only needs an embedding."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        ends = tokenizer.eos_token or tokenizer.bos_token
        tokenizer.pad_token = ends or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def check_vocabulary(tokenizer, n_embeddings: int, label: str) -> None:
    """Refuse a tokenizer of another model; warn of added tokens that the embedding was never
    resized for."""
    names = {i: name for name, i in tokenizer.get_vocab().items() if i >= n_embeddings}
    if base := sorted(names.keys() - tokenizer.added_tokens_decoder.keys()):
        raise NotAModel(
            f"{label}: {len(base)} tokens of its tokenizer have no embedding (of {n_embeddings}), "
            f"from {names[base[0]]!r}, id {base[0]}. It is another model's: put its own beside it."
        )
    if names:
        first = f"{names[min(names)]!r}, id {min(names)}"
        warnings.warn(f"{label}: added tokens have no embedding, from {first}.", stacklevel=3)
