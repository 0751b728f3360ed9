"""Change what a model computes, on purpose and for a while: splice an SAE into its stream.

Splicing puts a reconstruction in the place of the value at the SAE's hook:
1. the value becomes the SAE's input (`input_transform`: heads joined, the mean removed where the
   SAE wants that);
2. encode, edit the features where asked, decode;
3. add the error term, what the unedited SAE fails to reconstruct, so that only the edit makes a
   difference;
4. put the result back, mean and shape restored, at the positions of the mask.
With an error term and no edit nothing changes: the baseline of every intervention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lenslab.sae.load import SparseAutoencoder, input_transform, refuse_transcoder, sae_hook

Edit = Callable[[Tensor], Tensor]  # features [text, pos, d_sae] -> the same shape


@contextmanager
def splice(
    model: TransformerBridge,
    sae: SparseAutoencoder,
    *,
    error_term: bool = True,
    edit: Edit | None = None,
    mask: Bool[Tensor, "text pos"] | None = None,
) -> Iterator[TransformerBridge]:
    """Within the context, forward passes and generation run with the SAE in place.

        with splice(model, sae, edit=lambda features: features * 0, mask=batch.real):
            logits = model(batch.tokens, attention_mask=batch.attention)

    Args: error_term: add value - decode(encode(value)). It is a constant to gradients, which flow
        through the SAE. edit: what is done to the features `[text, pos, d_sae]` of the tokens in
        this forward pass. mask: positions whose value is replaced, `[text, pos]` or `[1, pos]`;
        usually `batch.real`, which leaves
            BOS and padding alone (at BOS many models hold values that no SAE has seen). Default:
            every position. Positions after the mask's end are those being generated, and are
            replaced. With a key-value cache a forward pass sees the newest tokens only; their
            places in the text are counted, so masks still hold.

    Raises as `check_sae`; ValueError for a mask of another number of texts, an edit that changes
    the shape, and a result that is NaN or Inf. The model's hooks are removed in any case.
    """
    transform = input_transform(sae, model)
    refuse_transcoder(sae)
    past = 0  # tokens that the key-value cache already holds

    def count_past(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal past
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()

    def replace(value: Tensor, hook: object) -> Tensor:
        new = transform.inverse(
            spliced(sae, transform(value), error_term=error_term, edit=edit), value
        )
        return new if mask is None else torch.where(_chosen(mask, past, value), new, value)

    counter = model.original_model.register_forward_pre_hook(count_past, with_kwargs=True)
    try:
        with model.hooks(fwd_hooks=[(sae_hook(sae), replace)]):
            yield model
    finally:
        counter.remove()


def spliced(
    sae: SparseAutoencoder,
    x: Float[Tensor, "text pos d_in"],
    *,
    error_term: bool = True,
    edit: Edit | None = None,
) -> Float[Tensor, "text pos d_in"]:
    """decode(edit(encode(x))), with the error term of the unedited SAE where asked; x in the SAE's
    own space."""
    dtype = next(iter(sae.parameters())).dtype if isinstance(sae, torch.nn.Module) else x.dtype
    x = x.to(dtype)
    features = sae.encode(x)
    if edit is not None:
        shape = features.shape
        features = edit(features)
        if not isinstance(features, Tensor) or features.shape != shape:
            raise ValueError(f"edit was given features {tuple(shape)} and must return that shape.")
    new = sae.decode(features)
    if error_term:
        with (
            torch.no_grad()
        ):  # encoded again: an edit may work in place, and some SAEs keep a norm between the two
            error = x - (new if edit is None else sae.decode(sae.encode(x)))
        new = new + error
    if not torch.isfinite(new).all():
        raise ValueError(
            "The splice gives NaN or Inf: check the edit, and the model's own activations."
        )
    return new


def _chosen(mask: Tensor, past: int, value: Tensor) -> Bool[Tensor, "text pos *width"]:
    """The mask for the positions `past ..` that this forward pass sees, with axes of one to
    broadcast over `value`."""
    texts, positions = value.shape[:2]
    if mask.shape[0] not in (1, texts):
        raise ValueError(f"The mask is for {mask.shape[0]} texts, the model was given {texts}.")
    chosen = mask.new_ones((mask.shape[0], past + positions))
    within = min(mask.shape[1], past + positions)
    chosen[:, :within] = mask[:, :within]
    return chosen[:, past:].to(value.device).reshape(-1, positions, *[1] * (value.ndim - 2))
