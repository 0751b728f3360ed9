"""What an SAE reads: whether it belongs to a model, and what it is given of that model's values.

An SAE says where it reads (`hook_name`), which model it was made for (`model_name`) and how that
model was processed (`model_from_pretrained_kwargs`). Encoding the activations of another hook gives
numbers that look like features and mean nothing, so nothing here guesses:
1. `check_sae` compares hook, width and model with the model at hand, and names both sides of a
   mismatch;
2. `input_transform` gives what the SAE was trained on from what the unprocessed model computes, and
   back.

The model itself is never processed. Writing weights centred over d_model, as for
`gpt2-small-res-jb`, equal subtracting the mean over d_model from the captured stream of a LayerNorm
model.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lenslab.files import as_bytes, content_key
from lenslab.hooks import check_hooks, check_unhooked, hook_names
from lenslab.models import check_eval, model_name, weights_key
from lenslab.sae.fields import check_scaling
from lenslab.sae.registry import NotAnSAE, plain_name
from lenslab.tokens import TokenBatch

# The stream and what is written to it, under TransformerLens's older and newer names
RESIDUAL = r"hook_(resid_(pre|mid|post)|attn_out|mlp_out|(pos_)?embed)$"
RESIDUAL = re.compile(RESIDUAL + r"|blocks\.\d+\.(hook_in|((attn|mlp)\.)?hook_out)$")

# Processing that changes no value at the hooks of SAEs (weights of norms, a constant in the logits)
# and arguments that only say how to load
UNCHANGED = {"fold_ln", "center_unembed"}
LOADING = {"dtype", "torch_dtype", "device", "device_map", "n_devices", "move_to_device", "n_ctx"}
LOADING |= {"cache_dir", "local_files_only", "token", "trust_remote_code", "attn_implementation"}
LOADING |= {"low_cpu_mem_usage", "use_safetensors", "default_padding_side"}

# Processing that changes q, k, v and z, not what is written to the residual stream
VALUE_BIASES = {"fold_value_biases", "refactor_factored_attn_matrices"}


class SAEMismatch(ValueError):
    """An SAE and a model that do not belong together; the message names both sides."""


@runtime_checkable
class SparseAutoencoder(Protocol):
    """What lenslab needs of an SAE; every SAELens SAE has it. `cfg.metadata` holds `hook_name` and
    `model_name`."""

    cfg: Any  # d_in, d_sae, metadata

    def encode(self, x: Tensor) -> Tensor: ...  # [.., d_in] -> [.., d_sae]

    def decode(self, features: Tensor) -> Tensor: ...  # [.., d_sae] -> [.., d_in]


def sae_hook(sae: SparseAutoencoder) -> str:
    """The hook that the SAE reads, e.g. `blocks.6.hook_resid_pre`. NotAnSAE where it does not
    say."""
    if not sae.cfg.metadata.hook_name:
        raise NotAnSAE("This SAE names no hook: set metadata.hook_name (beside sae_lens_version).")
    return sae.cfg.metadata.hook_name


def recorded_key(sae: SparseAutoencoder) -> str | None:
    """The key of the model that the SAE was made for, where it says one. None for the twin that
    stands in for whole notebooks: the model's SAE must read it, being what it is the control of."""
    return None if os.environ.get("LENSLAB_MODEL_TWIN") == "1" else sae.cfg.metadata.model_key


def refuse_transcoder(sae: SparseAutoencoder) -> None:
    """Raise ValueError for an SAE whose output has no place at the hook that it reads."""
    written = getattr(sae.cfg.metadata, "hook_name_out", None)
    if written not in (None, sae_hook(sae)) or hasattr(sae.cfg, "d_out"):
        raise ValueError(f"A transcoder ({sae_hook(sae)} -> {written}) has no place to splice.")


def neuronpedia_link(sae: SparseAutoencoder, index: int) -> str | None:
    """The page of one latent, or None where the SAE has none. ValueError for a latent that it has
    not."""
    if index not in range(sae.cfg.d_sae):
        raise ValueError(f"Latent {index} is not one of 0 to {sae.cfg.d_sae - 1}.")
    page = sae.cfg.metadata.neuronpedia_id
    return f"https://www.neuronpedia.org/{page}/{int(index)}" if page else None


def check_sae(sae: SparseAutoencoder, model: TransformerBridge) -> None:
    """Raise unless the SAE belongs at its hook in this model.

    SAEMismatch for another model (by name, or by weights where the SAE recorded them), another
    width, and processing that cannot be expressed; UnknownHook for a hook the model has not;
    ValueError for a model in train mode and as `check_scaling`. The message for another model says
    how to use the SAE on it all the same, as on a fine-tune of its own. Warns where the model is in
    another dtype than the one that the SAE was trained on: the weights are the same where they have
    the recorded key when cast to that dtype; of rounded weights that cannot be known. TypeError for
    what is no SAE.
    """
    if not isinstance(sae, SparseAutoencoder):
        order = "check_sae and input_transform take (sae, model), evaluate_sae (model, sae, batch)"
        raise TypeError(f"A {type(sae).__name__} is no SAE: {order}.")
    hook, given = sae_hook(sae), model_name(model)
    check_scaling(sae.cfg)
    about = sae.cfg.metadata
    if (made := about.model_name) and plain_name(made) != plain_name(given):
        tuned = f"for its fine-tune, sae.cfg.metadata.model_name = {given!r}, .model_key = None"
        raise SAEMismatch(f"The SAE was made for {made}, the model is {given}: {tuned}.")
    check_hooks(model, [hook])
    shape = hook_names(model)[hook]  # of one text of two tokens
    if shape[:2] != (1, 2) or math.prod(shape[2:]) != sae.cfg.d_in:
        raise SAEMismatch(f"The SAE has width {sae.cfg.d_in}, {hook} of {given} gives {shape[2:]}.")
    recorded = recorded_key(sae)
    if recorded and recorded.split("-")[0] != weights_key(model):
        own, others = model.cfg.dtype, (torch.float32, torch.bfloat16, torch.float16)
        same = any(recorded.split("-")[0] == weights_key(model, dtype) for dtype in others)
        trained = f"The SAE was trained on weights {recorded}, this {given} has others"
        if not same and own == torch.float32:
            meant = "load the model that was meant; for its fine-tune, sae.cfg.metadata.model_key"
            raise SAEMismatch(f"{trained}, or processed ones: {meant} = None.")
        word = f"{trained} in {own}: not compared."
        if same:
            word = f"The SAE was trained on these weights in another dtype than {own}."
        warnings.warn(word, stacklevel=3)
    check_eval(model)
    _centred(sae, model)


def _centred(sae: SparseAutoencoder, model: TransformerBridge) -> bool:
    """Whether the SAE's input has its mean over d_model removed; SAEMismatch for processing that
    cannot be had from the unprocessed model."""
    hook, processing = sae_hook(sae), sae.cfg.metadata.model_from_pretrained_kwargs or {}
    processing = {name: value for name, value in processing.items() if name not in LOADING}
    if words := [name for name, value in processing.items() if isinstance(value, str)]:
        raise SAEMismatch(f'{words[0]} is {processing[words[0]]!r}: "false" would count as true.')
    applied = {name for name, value in processing.items() if value} - UNCHANGED
    writes = bool(RESIDUAL.search(hook))
    if writes or ".mlp." in hook:
        applied -= VALUE_BIASES
    if other := applied - {"center_writing_weights"}:
        names = ", ".join(sorted(other))
        raise SAEMismatch(f"No unprocessed model gives at {hook} what one with {names} does.")
    # RMSNorm reads the mean too, so TransformerLens leaves such models uncentred
    layer_norm = str(model.cfg.normalization_type) in {"LN", "LNPre"}
    return bool(applied) and writes and layer_norm


@dataclass(frozen=True)
class InputTransform:
    """From the value at a hook to the SAE's input and back; exact, and the identity for most SAEs.

    `centred`: subtract the mean over d_model. `width`: the axes after position that make up d_in
    (two for hook_z).
    """

    centred: bool
    width: tuple[int, ...]

    def __call__(self, value: Float[Tensor, "*axes"]) -> Float[Tensor, "... d_in"]:
        """`[.., *width]` -> `[.., d_in]`. SAEMismatch for other axes, ValueError for integers."""
        if value.shape[-len(self.width) :] != self.width:
            raise SAEMismatch(f"{tuple(value.shape)} does not end in {self.width}, as at the hook.")
        if not value.is_floating_point():
            raise ValueError(f"An SAE reads activations, not {value.dtype}: tokens, or a mask?")
        x = value.flatten(-len(self.width))
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def inverse(
        self, x: Float[Tensor, "... d_in"], value: Float[Tensor, "*axes"]
    ) -> Float[Tensor, "*axes"]:
        """Put `x` in the place of `value`: its shape, its dtype, and the mean that was taken
        away."""
        if self.centred:
            x = x + value.flatten(-len(self.width)).mean(-1, keepdim=True)
        return x.reshape(value.shape).to(value.dtype)


def input_transform(
    sae: SparseAutoencoder, model: TransformerBridge, batch: TokenBatch | None = None
) -> InputTransform:
    """What the SAE was trained on from what this model computes. Raises as `check_sae`; SAEMismatch
    for an SAE that was trained without BOS, where the texts of `batch` begin with one. Warns of
    texts that are longer than the windows that the SAE was trained on."""
    check_sae(sae, model)
    window = sae.cfg.metadata.context_size
    if batch is not None and window and int(longest := batch.attention.sum(1).max()) > window:
        told = f"on windows of {window} tokens, these have up to {longest}: what it reads beyond"
        warnings.warn(f"The SAE was trained {told} is new to it (pack, length=).", stacklevel=3)
    if batch is not None and sae.cfg.metadata.prepend_bos is False:
        first = batch.attention.int().argmax(1, keepdim=True)  # of each text
        if not bool(batch.real.gather(1, first).any()):
            raise SAEMismatch("The SAE was trained without BOS: tokenize(model, texts, bos=False).")
    return InputTransform(centred=_centred(sae, model), width=hook_names(model)[sae_hook(sae)][2:])


def sae_key(sae: SparseAutoencoder) -> str:
    """Content key of what an SAE computes: every tensor that it holds, every field of its config,
    the processing of its input, and an activation function that was put in. Where it reads is the
    hook's name, a key of its own. ValueError for an SAE that holds hooks."""
    held, settings = vars(sae), {**vars(sae.cfg), "device": None}
    if isinstance(sae, torch.nn.Module):
        check_unhooked(sae)
        held = sae.state_dict()
        functions = (sae.activation_fn, sae.get_activation_fn())
        own, usual = (f"{function} {_scalars(vars(function))}" for function in functions)
        if own != usual:
            settings["activation_fn"] = own
    settings = _scalars({**settings, **held})
    if processing := sae.cfg.metadata.model_from_pretrained_kwargs:
        settings["processing"] = processing
    tensors = []
    for name, value in sorted(held.items()):
        if isinstance(value, Tensor):
            tensors += [name, list(value.shape), bytes(as_bytes(value))]
    return content_key(type(sae).__name__, settings, *tensors)


def _scalars(values: dict[str, Any]) -> dict[str, Any]:
    numbers = {k: v for k, v in values.items() if isinstance(v, int | float | str | bool)}
    return {k: v for k, v in numbers.items() if k not in ("name", "training")}  # of modules


@torch.inference_mode()
def encode(sae: SparseAutoencoder, x: Float[Tensor, "token d_in"]) -> Float[Tensor, "token d_sae"]:
    """`sae.encode` on the SAE's device and dtype, back on the CPU in float32. ValueError on NaN and
    Inf."""
    own = next(iter(sae.parameters()), None) if isinstance(sae, torch.nn.Module) else None
    features = sae.encode(x if own is None else x.to(own.device, own.dtype)).float().cpu()
    if not bool(features.isfinite().all()):
        raise ValueError("The SAE gives NaN or Inf: check its weights and the model's activations.")
    return features
