"""Load a language model and look at what it is made of: the one place that builds TransformerLens
models.

`load_model` returns TransformerLens's own `TransformerBridge`, never a wrapper; hook names are
those of HookedTransformer (`blocks.3.hook_resid_post`). The weights are left as they were trained:
nothing is folded or centred, because an SAE may have been trained on either and says so itself (see
`lenslab.sae.load`).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import weakref
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pandas as pd
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from lenslab.files import BUNDLED, DEFAULT, HUB, data_path, sha256_file
from lenslab.runtime import default_device, derive_generator

VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model", "vocab.txt")


class NotAModel(ValueError):
    """What was named cannot be loaded as a language model; the message says why and what can."""


def load_model(
    name: str | Path | None = None, *, device: str | None = None, dtype: torch.dtype = torch.float32
) -> TransformerBridge:
    """A model in eval mode with eager attention, so that attention patterns can be read.

    Args:
        name: a bundled name (`pocket-gpt`), a local Hugging Face folder, or a name on the hub.
            Default: `$LENSLAB_MODEL`, else `pocket-gpt`.
        device: default a GPU where there is one.
        dtype: of the weights in memory. Two loaders agree to 1e-4 in the logits only in float32.

    Raises NotAModel for a folder without config, weights or tokenizer; weights as a pickle only; a
    hub name that is neither cached nor reachable; an architecture that TransformerLens does not
    know.

    With `LENSLAB_MODEL_TWIN=1` the random-weight twin is returned instead: the control for whole
    notebooks.
    """
    name = str(name or os.environ.get("LENSLAB_MODEL") or DEFAULT)
    folder = data_path("models", name) if name in BUNDLED else Path(name).expanduser()
    if folder.is_dir():
        source, label = str(folder), folder.resolve().name  # what is shown holds no path
        check_folder(folder, label)
    elif folder.is_absolute() or name.startswith((".", "~")):
        raise NotAModel(f"There is no folder {name}. Bundled models: {', '.join(BUNDLED)}.")
    else:
        source, label = HUB.get(name, name), name
    try:
        weights, tokenizer = open_weights(source, dtype), open_tokenizer(source)
    except Exception as error:  # of a dozen kinds: bad JSON, cut-off weights, no network
        raise NotAModel(_advice(source, label, error)) from error
    model = boot(weights, tokenizer, label, device or default_device())
    return random_twin(model, label=label) if os.environ.get("LENSLAB_MODEL_TWIN") == "1" else model


def check_folder(folder: Path, label: str) -> None:
    """Refuse a folder that transformers would open wrongly or not at all, and bundled weights that
    are not those of their card: what ships beside them was measured on the card's."""
    if not (folder / "config.json").is_file():
        raise NotAModel(f"{label} has no config.json. Make it: model.save_pretrained(folder).")
    if not any(folder.glob("*.safetensors")):
        raise NotAModel(
            f"{label} has no weights (*.safetensors). A pickle can run code when it is opened, and "
            "is never loaded here: open it where you trust it, then model.save_pretrained(folder)."
        )
    if not any((folder / file).exists() for file in VOCABULARIES):  # an empty one would be made up
        raise NotAModel(f"{label} has no tokenizer. Add it: tokenizer.save_pretrained(folder).")
    if label in BUNDLED and folder.resolve() == data_path("models", label).resolve():
        card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
        if sha256_file(folder / "model.safetensors") != card["weights_sha256"]:
            raise NotAModel(
                f"The weights of {label} are not those of its card: `git checkout -- "
                f"data/models/{label}`, or load changed weights from a folder of your own."
            )


def open_weights(source: str, dtype: torch.dtype) -> PreTrainedModel:
    """The Hugging Face model of a folder or hub name, from safetensors only."""
    if Path(source).is_dir():  # opened in well under a second: a bar would only flicker
        logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, attn_implementation="eager", use_safetensors=True
    )


def open_tokenizer(source: str):
    """The tokenizer of a folder or hub name; one without padding pads with EOS or BOS."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token
    return tokenizer


def _advice(source: str, label: str, error: BaseException | None) -> str:
    """Why a model could not be opened, and what to do."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if Path(source).is_dir():
        return (
            f"{label} could not be loaded. {reason} "
            "Check that the folder is complete: a cut-off download leaves short files."
        )
    near = [] if label in HUB else difflib.get_close_matches(label, [*BUNDLED, *HUB], n=1)
    meant = f"Did you mean {near[0]!r}? " if near else ""
    while error is not None:  # the hub's own answer is below what transformers makes of it
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            token = " (the one that is set has no access)" if os.environ.get("HF_TOKEN") else ""
            return (
                f"{label}: the hub gives it to no one it does not know. {meant}It is gated, "
                f"private or misspelt. Accept its licence on https://huggingface.co/{source} while "
                f"signed in, make an access token there, and set it as HF_TOKEN{token}."
            )
        error = error.__cause__ or error.__context__
    offline = " and unset HF_HUB_OFFLINE" if os.environ.get("HF_HUB_OFFLINE") else ""
    return (
        f"{label} could not be loaded. {meant}{reason} If it is a hub name, download it while "
        f"online (`.venv/bin/hf download {source}`; set HF_TOKEN for gated models){offline}. "
        f"Bundled, always here: {', '.join(BUNDLED)}."
    )


def boot(weights: PreTrainedModel, tokenizer, label: str, device: str) -> TransformerBridge:
    """TransformerLens's bridge over a Hugging Face model, by the name that is to be shown."""
    fused_gelu(weights)
    options = dict(hf_model=weights, tokenizer=tokenizer, device=device, dtype=weights.dtype)
    # For a model that also takes images TransformerLens asks the hub for a processor of this name,
    # and where that fails installs torchvision with pip, over the torch that is there
    no_processor = mock.patch.object(AutoProcessor, "from_pretrained", return_value=None)
    try:
        with no_processor:
            model = TransformerBridge.boot_transformers(label, **options)
    except ValueError as error:
        kind = type(weights).__name__
        raise NotAModel(f"{label}: TransformerLens has no adapter for {kind} ({error}).") from error
    model.cfg.model_name = label  # TransformerLens puts another in the place of old short names
    return model.eval()


def fused_gelu(weights: PreTrainedModel) -> None:
    """GPT-2's GELU in one kernel instead of eight: the same function, and a sixth of a forward pass
    on CPU."""
    for module in weights.modules():
        for name, child in module.named_children():
            if type(child).__name__ == "NewGELUActivation":
                setattr(module, name, torch.nn.GELU(approximate="tanh"))


def random_twin(
    model: TransformerBridge, seed: int = 0, label: str | None = None
) -> TransformerBridge:
    """The same architecture and tokenizer with random weights, spread as they are before training.

    What a finding on the twin shares with the finding on the model was not learned. `label` is the
    name the twin goes by; default the model's own, followed by "(random twin)".

    The weights are the same to the bit on every processor, so that an SAE can be kept for them:
    sums of integers (nearly normal), times the spread that the architecture begins with to two
    digits. torch's own normal numbers depend on the processor's instructions.
    """
    generator = derive_generator(seed, "random twin")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        twin = AutoModelForCausalLM.from_config(
            model.original_model.config, attn_implementation="eager", dtype=model.cfg.dtype
        )
    with torch.no_grad():
        for parameter in twin.parameters():
            spread = float(parameter.float().std()) if parameter.numel() > 1 else 0.0
            if spread > 0:  # biases and the weights of norms begin as constants
                normal = _exact_normal(parameter.shape, generator)
                parameter.copy_(normal * float(f"{spread:.2g}"))
    label = label or f"{model_name(model)} (random twin)"
    return boot(twin, model.tokenizer, label, str(model.cfg.device))


def _exact_normal(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Numbers of mean 0 and spread 1: each the sum of four integers, which no processor computes
    otherwise."""
    total = sum(
        torch.randint(1 << 16, shape, generator=generator, dtype=torch.int32) for _ in range(4)
    )
    return (total - (2 << 16)).float() / ((1 << 16) / 3**0.5)  # the variance of one is 2^32 / 12


def model_name(model: TransformerBridge) -> str:
    """The name a model was loaded by; for a folder, the folder's own name."""
    return str(model.cfg.model_name)


_KEYS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # model -> (versions, key)


def model_key(model: TransformerBridge) -> str:
    """16 hexadecimal digits of the SHA-256 of all weights: what caches of activations are keyed by.

    Computed once per state of the weights (0.02 s for pocket-gpt, seconds for a billion
    parameters).
    """
    weights = sorted(model.original_model.named_parameters())
    versions = [parameter._version for _, parameter in weights]
    if model not in _KEYS or _KEYS[model][0] != versions:
        digest = hashlib.sha256()
        for name, parameter in weights:
            digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
            values = parameter.detach().cpu().contiguous().flatten()
            digest.update(values.view(torch.uint8).numpy().data)
        _KEYS[model] = versions, digest.hexdigest()[:16]
    return _KEYS[model][1]


def check_eval(model: TransformerBridge) -> None:
    """Raise ValueError for a model in train mode: dropout would change what it computes, a little
    and at random."""
    if model.training:
        raise ValueError(f"{model_name(model)} is in train mode (dropout): call model.eval().")


def parameter_table(model: TransformerBridge, layer: int | None = None) -> pd.DataFrame:
    """Parameters (name, shape, count, trainable) of the model or of one block; tied weights appear
    once.

    Read from the architecture: the bridge holds fused query-key-value matrices twice, whole and
    split.
    """
    loaded = dict(model.original_model.named_parameters())
    trainable = {n.replace("._original_component", ""): p.requires_grad for n, p in loaded.items()}
    with torch.device("meta"):  # shapes without weights
        plain = AutoModelForCausalLM.from_config(model.original_model.config)
    rows = [
        (name, tuple(parameter.shape), parameter.numel(), trainable.get(name, True))
        for name, parameter in plain.named_parameters()
        if layer is None or f".{layer}." in name
    ]
    return pd.DataFrame(rows, columns=["parameter", "shape", "count", "trainable"])


class ModelSummary(SimpleNamespace):
    """What a model is, in numbers: the fields that `summarize` reads. Counts are of parameters,
    `context` is in tokens; None where the architecture has no such thing."""

    def to_frame(self) -> pd.DataFrame:
        """One column, named as the model."""
        return pd.DataFrame({self.name: {k: v for k, v in vars(self).items() if k != "name"}})


def summarize(model: TransformerBridge) -> ModelSummary:
    """Architecture summary, read from the loaded model and its config."""
    cfg, config, table = model.cfg, model.original_model.config, parameter_table(model)
    count = table["count"]
    embeddings = table["parameter"].str.contains("wte|wpe|embed_tokens|embed_in")
    return ModelSummary(
        name=model_name(model),
        architecture=type(model.original_model).__name__,
        layers=cfg.n_layers,
        d_model=cfg.d_model,
        heads=cfg.n_heads,
        key_value_heads=cfg.n_key_value_heads or cfg.n_heads,
        d_head=cfg.d_head,
        d_mlp=cfg.d_mlp,
        experts=cfg.num_experts,
        experts_per_token=cfg.experts_per_token,
        vocabulary=cfg.d_vocab,
        context=cfg.n_ctx,
        normalization=str(cfg.normalization_type),
        activation=str(cfg.act_fn),
        positions=str(cfg.positional_embedding_type),
        tied_embeddings=bool(config.tie_word_embeddings),
        parameters=int(count.sum()),
        trainable_parameters=int(count[table["trainable"]].sum()),
        embedding_parameters=int(count[embeddings].sum()),
        block_parameters=int(count[table["parameter"].str.contains(r"\.\d+\.")].sum()),
        dtype=str(cfg.dtype).removeprefix("torch."),
    )


def generate(
    model: TransformerBridge,
    prompt: str | list[str],
    *,
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
) -> str | list[str]:
    """Continue a prompt; greedy at temperature 0, else sampled from a generator seeded by `seed`.

    Returns prompt and continuation, one string per prompt. Raises ValueError when the prompt and
    the new tokens do not fit the context, or the prompt is empty; for a model in train mode.
    """
    check_eval(model)
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not all(text.strip() for text in prompts):
        raise ValueError("An empty prompt: give the model at least one word to continue.")
    encoded = model.tokenizer(prompts, add_special_tokens=False).input_ids
    longest, context = 1 + max(map(len, encoded)), model.cfg.n_ctx  # BOS included
    if longest + max_new_tokens > context:
        raise ValueError(f"{longest} tokens and {max_new_tokens} new exceed the context {context}.")
    options = dict(max_new_tokens=max_new_tokens, verbose=False, return_type="str")
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(derive_generator(seed, "generate").initial_seed())
        texts = [
            model.generate(t, do_sample=temperature > 0, temperature=temperature or 1.0, **options)
            for t in prompts
        ]
    return texts[0] if isinstance(prompt, str) else texts
