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
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from transformer_lens.model_bridge import TransformerBridge

from lenslab.files import BUNDLED, DEFAULT, HUB, data_path, sha256_file
from lenslab.runtime import default_device, derive_generator


class NotAModel(ValueError):
    """What was named cannot be loaded as a language model; the message says why and what can."""


def resolve(name: str) -> tuple[str, str]:
    """(what transformers should open, the name to show): never a path of this machine in what is
    shown."""
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
    except (
        Exception
    ) as error:  # transformers raises a dozen kinds: bad JSON, cut-off weights, no network
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        near = difflib.get_close_matches(label, [*BUNDLED, *HUB], n=1)
        meant = f"Did you mean {near[0]!r}? " if near and near[0] != label else ""
        if _refused(error):
            raise NotAModel(
                f"{label}: the hub gives it to no one it does not know. {meant}It is gated, private or misspelt. "
                f"Accept its licence on https://huggingface.co/{source} while signed in, make an access token in your "
                "settings there, and set it as HF_TOKEN"
                + (" (the one that is set has no access)." if token else ".")
            ) from error
        offline = " and unset HF_HUB_OFFLINE" if os.environ.get("HF_HUB_OFFLINE") else ""
        advice = (
            "Check that the folder is complete: a cut-off download leaves short files."
            if folder.is_dir()
            else f"If it is a hub name, download it while online (`.venv/bin/hf download {source}`; set HF_TOKEN for "
            f"gated models){offline}. Bundled, always here: {', '.join(BUNDLED)}."
        )
        raise NotAModel(f"{label} could not be loaded. {meant}{first} {advice}") from (
            None if meant else error
        )


def _check_bundled(folder: Path, label: str) -> None:
    """Refuse bundled weights that are not those of their card: what ships beside them was measured
    on the card's."""
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
    """GPT-2's GELU in one kernel instead of eight: the same function, and a sixth of a forward pass
    on CPU."""
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


def load_model(
    name: str | os.PathLike | None = None,
    *,
    device: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> TransformerBridge:
    """A model in eval mode with eager attention, so that attention patterns can be read.

    Args: name: a bundled name (`pocket-gpt`), a local Hugging Face folder, or a name on the hub.
        Default:
            `$LENSLAB_MODEL`, else `pocket-gpt`.
        device: default a GPU where there is one.
        dtype: of the weights in memory. Two loaders agree to 1e-4 in the logits only in float32.

    Raises: NotAModel: a folder without config, weights or tokenizer; weights as a pickle only; a
        hub name that is
            neither cached nor reachable; an architecture that TransformerLens does not know.

    With `LENSLAB_MODEL_TWIN=1` the random-weight twin is returned instead: the control for whole
    notebooks.
    """
    name = os.fspath(name or os.environ.get("LENSLAB_MODEL") or DEFAULT)
    source, label = resolve(name)
    model = _boot(open_weights(source, label, dtype), open_tokenizer(source, label), label, device)
    return random_twin(model, label=label) if os.environ.get("LENSLAB_MODEL_TWIN") == "1" else model


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
    from transformers import AutoModelForCausalLM

    config, generator = model.original_model.config, derive_generator(seed, "random twin")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed() % 2**63)
        twin = AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", dtype=model.cfg.dtype
        )
    with torch.no_grad():
        for parameter in twin.parameters():
            spread = float(parameter.float().std()) if parameter.numel() > 1 else 0.0
            if spread > 0:  # biases and the weights of norms begin as constants
                parameter.copy_(_exact_normal(parameter.shape, generator) * float(f"{spread:.2g}"))
    label = label or f"{model_name(model)} (random twin)"
    return _boot(fused_gelu(twin), model.tokenizer, label, str(model.cfg.device))


def _exact_normal(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Numbers of mean 0 and spread 1: each the sum of four integers, which no processor computes
    otherwise."""
    total = sum(
        torch.randint(1 << 16, shape, generator=generator, dtype=torch.int32) for _ in range(4)
    )
    return (total - (2 << 16)).float() / ((1 << 16) / 3**0.5)  # the variance of one is 2^32 / 12


def _boot(hf_model, tokenizer, label: str, device: str | None) -> TransformerBridge:
    try:
        model = TransformerBridge.boot_transformers(
            label, hf_model=hf_model, tokenizer=tokenizer, device=device or default_device()
        )
    except ValueError as error:
        kind = hf_model.config.architectures or [type(hf_model).__name__]
        raise NotAModel(
            f"{label}: TransformerLens has no adapter for {kind[0]} ({error})."
        ) from error
    model.cfg.model_name = label
    return model.eval()


def model_name(model: TransformerBridge) -> str:
    """The name a model was loaded by; for a folder, the folder's own name."""
    return str(model.cfg.model_name)


_KEYS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def model_key(model: TransformerBridge) -> str:
    """16 hexadecimal digits of the SHA-256 of all weights: what caches of activations are keyed by.

    Computed once per state of the weights (0.02 s for pocket-gpt, seconds for a billion
    parameters).
    """
    weights = sorted(model.original_model.named_parameters())
    versions = tuple(p._version for _, p in weights)
    known = _KEYS.get(model)
    if known is None or known[0] != versions:
        digest = hashlib.sha256()
        for name, parameter in weights:
            digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
            digest.update(
                parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            )
        known = _KEYS[model] = (versions, digest.hexdigest()[:16])
    return known[1]


def check_eval(model: TransformerBridge) -> None:
    """Raise ValueError for a model in train mode: dropout would change what it computes, a little
    and at random."""
    if model.training:
        raise ValueError(
            f"{model_name(model)} is in train mode, where dropout changes activations: model.eval()."
        )


def parameter_table(model: TransformerBridge, layer: int | None = None) -> pd.DataFrame:
    """Parameters (name, shape, count, trainable) of the model or of one block; tied weights appear
    once.

    Read from the architecture: the bridge holds fused query-key-value matrices twice, whole and
    split.
    """
    from transformers import AutoModelForCausalLM

    loaded = {
        n.replace("._original_component", ""): p for n, p in model.original_model.named_parameters()
    }
    with torch.device("meta"):  # shapes without weights
        plain = AutoModelForCausalLM.from_config(model.original_model.config)
    rows = []
    for name, parameter in plain.named_parameters():
        if layer is None or f".{layer}." in name:
            trainable = loaded[name].requires_grad if name in loaded else True
            rows.append((name, tuple(parameter.shape), parameter.numel(), trainable))
    return pd.DataFrame(rows, columns=["parameter", "shape", "count", "trainable"])


@dataclass(frozen=True)
class ModelSummary:
    """What a model is, in numbers. Counts are of parameters; `context` is in tokens."""

    name: str
    architecture: str
    layers: int
    d_model: int
    heads: int
    key_value_heads: int
    d_head: int
    d_mlp: int | None
    experts: int | None
    experts_per_token: int | None
    vocabulary: int
    context: int
    normalization: str
    activation: str
    positions: str
    tied_embeddings: bool
    parameters: int
    trainable_parameters: int
    embedding_parameters: int
    block_parameters: int
    dtype: str

    def to_frame(self) -> pd.DataFrame:
        return pd.DataFrame({self.name: {k: v for k, v in asdict(self).items() if k != "name"}})


def summarize(model: TransformerBridge) -> ModelSummary:
    """Architecture summary, read from the loaded model and its config."""
    cfg, table = model.cfg, parameter_table(model)
    config = json.loads(model.original_model.config.to_json_string(use_diff=False))
    embedding = table["parameter"].str.contains(r"wte|wpe|embed_tokens|embed_in", regex=True)
    blocks = table["parameter"].str.contains(r"\.\d+\.", regex=True)
    return ModelSummary(
        name=model_name(model),
        architecture=type(model.original_model).__name__,
        layers=cfg.n_layers,
        d_model=cfg.d_model,
        heads=cfg.n_heads,
        key_value_heads=cfg.n_key_value_heads or cfg.n_heads,
        d_head=cfg.d_head,
        d_mlp=cfg.d_mlp,
        experts=config.get("num_experts") or config.get("num_local_experts"),
        experts_per_token=config.get("num_experts_per_tok"),
        vocabulary=cfg.d_vocab,
        context=cfg.n_ctx,
        normalization=str(cfg.normalization_type),
        activation=str(cfg.act_fn),
        positions=str(cfg.positional_embedding_type),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        parameters=int(table["count"].sum()),
        trainable_parameters=int(table["count"][table["trainable"]].sum()),
        embedding_parameters=int(table["count"][embedding].sum()),
        block_parameters=int(table["count"][blocks].sum()),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
    )


def generate(
    model: TransformerBridge,
    prompt: str | list[str],
    *,
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> str | list[str]:
    """Continue a prompt; greedy at temperature 0, else sampled from a generator seeded by `seed`.

    Returns prompt and continuation, one string per prompt. Raises ValueError when the prompt and
    the new tokens do not fit the context, or the prompt is empty; for a model in train mode.
    """
    check_eval(model)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts or not all(text.strip() for text in prompts):
        raise ValueError("An empty prompt: give the model at least one word to continue.")
    longest = (
        max(len(model.tokenizer(text, add_special_tokens=False).input_ids) for text in prompts) + 1
    )
    if longest + max_new_tokens > model.cfg.n_ctx:
        raise ValueError(
            f"A prompt of {longest} tokens and {max_new_tokens} new ones exceed the context of {model.cfg.n_ctx}."
        )
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(derive_generator(seed, "generate").initial_seed() % 2**63)
        texts = [
            model.generate(
                text,
                max_new_tokens=max_new_tokens,
                do_sample=temperature > 0,
                temperature=temperature or 1.0,
                top_k=top_k,
                top_p=top_p,
                verbose=False,
                return_type="str",
            )
            for text in prompts
        ]
    return texts[0] if isinstance(prompt, str) else texts
