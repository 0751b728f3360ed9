"""Change what a model computes, on purpose and for a while: splice an SAE into its stream.

Splicing puts a reconstruction in the place of the value at the SAE's hook:
1. the value becomes the SAE's input (`input_transform`: heads joined, the mean removed where the
   SAE wants that);
2. encode, edit the features where asked, decode;
3. add the error term, what the unedited SAE fails to reconstruct, so that only the edit makes a
   difference;
4. put the result back, mean and shape restored, at the positions of the mask.
With an error term and no edit nothing changes: the baseline of every intervention.

`ablate_features` sets one feature after another to zero and says what that does to the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lenslab.features.activations import FeatureActivations, Indices
from lenslab.metrics import next_token_nats
from lenslab.runtime import progress_bar
from lenslab.sae.inputs import SparseAutoencoder, input_transform, refuse_transcoder, sae_hook
from lenslab.tokens import TokenBatch

TEXTS = 16  # per forward pass
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

    Args:
        error_term: add value - decode(encode(value)). It is a constant to gradients, which flow
            through the SAE.
        edit: what is done to the features `[text, pos, d_sae]` of the tokens in this forward pass.
        mask: positions whose value is replaced, `[text, pos]` or `[1, pos]`; usually `batch.real`,
            which leaves BOS and padding alone (at BOS many models hold values that no SAE has
            seen). Default: every position. Positions after the mask's end are those being
            generated, and are replaced. With a key-value cache a forward pass sees the newest
            tokens only; their places in the text are counted, so masks still hold.

    Raises as `check_sae`; ValueError for a result that is NaN or Inf. The model's hooks are removed
    in any case.
    """
    transform = input_transform(sae, model)
    refuse_transcoder(sae)
    past = 0  # tokens that the key-value cache already holds

    def count_past(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal past
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()

    def replace(value: Tensor, hook: object) -> Tensor:
        x = transform(value)  # [text, pos, d_in]
        if isinstance(sae, torch.nn.Module):
            x = x.to(next(iter(sae.parameters())).dtype)
        error = torch.zeros_like(x)
        if error_term:  # first, and encoded twice: an edit may work in place, an SAE keep a norm
            with torch.no_grad():
                error = x - sae.decode(sae.encode(x))
        features = sae.encode(x)  # [text, pos, d_sae]
        spliced = sae.decode(features if edit is None else edit(features)) + error
        if not torch.isfinite(spliced).all():
            raise ValueError(
                "The splice gives NaN or Inf: check the edit and what the model gives."
            )
        new = transform.inverse(spliced, value)
        if mask is None:
            return new
        texts, positions = value.shape[:2]
        beyond = max(0, past + positions - mask.shape[1])
        whole = torch.nn.functional.pad(mask, (0, beyond), value=True)
        chosen = whole[:, past : past + positions].expand(texts, positions).to(value.device)
        return torch.where(chosen[(..., *[None] * (value.ndim - 2))], new, value)

    counter = model.original_model.register_forward_pre_hook(count_past, with_kwargs=True)
    try:
        with model.hooks(fwd_hooks=[(sae_hook(sae), replace)]):
            yield model
    finally:
        counter.remove()


@torch.inference_mode()
def ablate_features(
    model: TransformerBridge, sae: SparseAutoencoder, fa: FeatureActivations, features: Indices
) -> Float[np.ndarray, "feature text"]:
    """How much the loss of each text rises, in nats per token, where a feature is set to zero at
    its real tokens (zero ablation), the SAE's error kept.

    The model reads only the texts in which a feature fires: elsewhere the rise is 0. Raises as
    `splice`; ValueError for a text of a single token.
    """
    effect = np.zeros((len(features), len(fa.batch)))
    clean = text_losses(model, fa.batch)
    for row, feature in enumerate(progress_bar(features, desc="ablate")):
        texts = (fa.of(feature) > 0).any(1).nonzero()[:, 0].tolist()

        def zero(latents: Tensor, feature: int = int(feature)) -> Tensor:
            return latents.index_fill(-1, torch.tensor(feature, device=latents.device), 0)

        for start in range(0, len(texts), TEXTS):
            some = texts[start : start + TEXTS]
            few = fa.batch[some]
            with splice(model, sae, edit=zero, mask=few.real):
                effect[row, some] = text_losses(model, few) - clean[some]
    return effect


@torch.inference_mode()
def text_losses(model: TransformerBridge, batch: TokenBatch) -> Float[np.ndarray, " text"]:
    """Mean loss of each text in nats per real token that follows another, as the model stands."""
    losses = []
    for start in range(0, len(batch), TEXTS):
        few, device = batch[start : start + TEXTS], model.cfg.device
        logits = model(few.tokens.to(device), attention_mask=few.attention.long().to(device))
        nats = next_token_nats(logits.cpu(), few.tokens, few.real).double()
        text = few.real[:, 1:].nonzero()[:, 0]
        count = torch.bincount(text, minlength=len(few))
        if not bool(count.all()):
            raise ValueError("A text has a single token: nothing in it is predicted.")
        losses.append(torch.zeros(len(few)).double().index_add(0, text, nats) / count)
    return torch.cat(losses).numpy()
