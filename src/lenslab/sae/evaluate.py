"""How good an SAE is, by every measure of the definitions, beside a random SAE of the same size.

1. One clean and one spliced forward pass per batch: the value at the hook, its reconstruction, both
   sets of logits.
2. Reconstruction and sparsity are accumulated over real tokens in float64 (`lenslab.metrics`), so
   that the size of the batches changes nothing; it is chosen by what they make of a text.
3. The value is also replaced by zero and, once it is known, by its mean over the evaluation set.
4. Cross-entropy counts positions whose *target* is a real token; only values at real tokens are
   replaced.

A number alone says little: 2,048 random directions with the same L0 explain variance too.
`lenslab.sae.controls.evaluate_null` is that null.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lenslab import metrics
from lenslab.capture import texts_per_pass
from lenslab.files import Result
from lenslab.hooks import check_unhooked
from lenslab.models import model_name
from lenslab.runtime import progress_bar
from lenslab.sae.inputs import SparseAutoencoder, input_transform, refuse_transcoder, sae_hook
from lenslab.tokens import TokenBatch

TEXTS = 16  # per forward pass; fewer where logits or features would be large
CELLS = 2**26  # logits or features at a time: 256 MB


@dataclass(frozen=True)
class SAEMetrics(Result):
    """One SAE on one set of texts. Losses in nats per token; fractions are None where ablation does
    not hurt."""

    sae: str
    model: str
    hook: str
    d_sae: int
    n_tokens: int  # real tokens: the denominator of everything but the losses (next tokens)
    l0: float  # mean count of non-zero latents per token
    variance_explained: float  # pooled over tokens, mean per dimension over the whole set
    fvu: float  # one minus variance explained
    cosine: float
    l2_ratio: float  # mean ||x_hat|| / ||x||: below 1 is shrinkage
    relative_bias: float | None  # what x_hat is to be divided by to come nearest to x: the same
    dead: int  # latents never active in n_tokens
    dense: int  # latents active on more than 10 % of them
    ce_clean: float
    ce_spliced: float
    ce_zero: float
    ce_mean: float
    ce_difference: float  # spliced - clean
    ce_recovered_zero: float | None  # (zero - spliced) / (zero - clean)
    ce_recovered_mean: float | None
    kl: float  # KL(clean || spliced)
    # share of the tokens at which each latent is active, for `show.feature_plots.firing_density`
    firing_rate: Float[Tensor, " d_sae"] = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Every field but the firing rates: thousands of numbers, in which a card or a table would
        drown."""
        return {key: value for key, value in super().to_dict().items() if key != "firing_rate"}

    def to_frame(self) -> pd.DataFrame:
        """One row; put several SAEs together with `pd.concat`."""
        return pd.DataFrame([self.to_dict()])


@torch.inference_mode()
def evaluate_sae(
    model: TransformerBridge, sae: SparseAutoencoder, batch: TokenBatch, name: str | None = None
) -> SAEMetrics:
    """Every metric of an SAE on texts that it was not trained on. Four forward passes over `batch`,
    a few texts at a time. `name` is what to call it in tables; default its class and hook.

    Raises as `input_transform` and `texts_per_pass`; ValueError when no real token follows another,
    on NaN or Inf, for a transcoder, and for a model that holds hooks.
    """
    transform, hook = input_transform(sae, model, batch), sae_hook(sae)
    refuse_transcoder(sae)
    check_unhooked(model)
    if isinstance(sae, torch.nn.Module):
        check_unhooked(sae)
    few = max(1, CELLS // (batch.tokens.shape[1] * sae.cfg.d_sae))
    step = texts_per_pass(model, batch, limit=min(TEXTS, few))
    n_predicted = int(batch.real[:, 1:].sum())
    if not n_predicted:
        raise ValueError("No real token follows another: there is nothing to predict.")
    error, activity = metrics.ReconstructionError(), metrics.FeatureActivity()
    totals = dict.fromkeys(("ce_clean", "ce_spliced", "ce_zero", "ce_mean", "kl"), 0.0)
    parts = [batch[start : start + step] for start in range(0, len(batch), step)]
    for part in progress_bar(parts, desc="evaluate SAE"):
        # 1. and 4. Clean and spliced
        clean, value = forward(model, hook, part)
        x = transform(value)  # [text, pos, d_in]
        features = sae.encode(x)  # [text, pos, d_sae]
        x_hat = sae.decode(features)
        spliced, _ = forward(model, hook, part, partial(transform.inverse, x_hat))
        totals["ce_clean"] += _nats(clean, part)
        totals["ce_spliced"] += _nats(spliced, part)
        for span in _spans(part, clean.shape[-1]):
            there = part.real[:, span]
            kl = metrics.kl_divergence(clean[:, span], spliced[:, span], there.to(clean.device))
            totals["kl"] += kl * int(there[:, 1:].sum())
        del clean, spliced
        # 2. Reconstruction and sparsity
        real = part.real.to(x.device)
        error.update(x, x_hat, real)
        activity.update(features, real)
        # 3. Ablated
        totals["ce_zero"] += _nats(forward(model, hook, part, torch.zeros_like)[0], part)
    mean = error.moments.mean.float().to(model.cfg.device)  # [d_in]

    def to_mean(value: Tensor) -> Tensor:
        return transform.inverse(mean.expand_as(transform(value)), value)

    for part in progress_bar(parts, desc="mean ablation"):
        totals["ce_mean"] += _nats(forward(model, hook, part, to_mean)[0], part)
    losses = {name: total / n_predicted for name, total in totals.items()}
    recovered = partial(metrics.recovered_fraction, losses["ce_clean"], losses["ce_spliced"])
    return SAEMetrics(
        sae=name or f"{type(sae).__name__} {hook}",
        model=model_name(model),
        hook=hook,
        d_sae=sae.cfg.d_sae,
        n_tokens=activity.tokens,
        l0=activity.l0,
        variance_explained=error.variance_explained,
        fvu=error.fvu,
        cosine=error.cosine_similarity,
        l2_ratio=error.l2_ratio,
        relative_bias=error.relative_bias,
        dead=int(activity.dead.sum()),
        dense=int(activity.dense.sum()),
        ce_difference=losses["ce_spliced"] - losses["ce_clean"],
        ce_recovered_zero=recovered(losses["ce_zero"]),
        ce_recovered_mean=recovered(losses["ce_mean"]),
        firing_rate=activity.firing_rate.cpu(),
        **losses,
    )


def forward(
    model: TransformerBridge, hook: str, batch: TokenBatch, replace: Callable | None = None
) -> tuple[Float[Tensor, "text pos vocabulary"], Float[Tensor, "text pos *width"]]:
    """(logits, the value at the hook before `replace` of it took its place at the real tokens)."""
    device = model.cfg.device
    values = []

    def at_hook(value: Tensor, hook: object) -> Tensor:
        values.append(value)
        real = batch.real.to(device).reshape(*value.shape[:2], *[1] * (value.ndim - 2))
        return value if replace is None else torch.where(real, replace(value), value)

    with model.hooks(fwd_hooks=[(hook, at_hook)]):
        logits = model(batch.tokens.to(device), attention_mask=batch.attention.long().to(device))
    return logits, values[0]


def _spans(batch: TokenBatch, vocabulary: int) -> Iterator[slice]:
    """Positions in pieces that predict a real token, each from the last of the piece before on."""
    step = max(1, CELLS // vocabulary)
    for start in range(0, batch.tokens.shape[1] - 1, step):
        if bool(batch.real[:, start + 1 : start + step + 1].any()):
            yield slice(start, start + step + 1)


def _nats(logits: Tensor, batch: TokenBatch) -> float:
    """Summed loss over the positions that predict a real token."""
    tokens, real = batch.tokens.to(logits.device), batch.real.to(logits.device)
    total = 0.0
    for span in _spans(batch, logits.shape[-1]):
        nats = metrics.next_token_nats(logits[:, span], tokens[:, span], real[:, span])
        total += float(metrics.in_float64(nats).sum())
    return total
