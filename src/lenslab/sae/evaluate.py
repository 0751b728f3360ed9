"""How good an SAE is, by every measure of the definitions, beside a random SAE of the same size.

1. One clean and one spliced forward pass per batch: the value at the hook, its reconstruction, both
   sets of logits.
2. Reconstruction and sparsity are accumulated over real tokens in float64 (`lenslab.metrics`), so
   that the size of the batches changes nothing.
3. The value is also replaced by zero and, in a second pass, by its mean over the evaluation set.
4. Cross-entropy counts positions whose *target* is a real token; only values at real tokens are
   replaced.

A number alone says little: 2,048 random directions with the same L0 explain variance too.
`random_sae` is that null.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lenslab.files import write_json
from lenslab.metrics import (
    FeatureActivity,
    ReconstructionError,
    dead,
    dense,
    next_token_nats,
    recovered_fraction,
)
from lenslab.metrics import kl_divergence as mean_kl
from lenslab.models import model_name
from lenslab.runtime import progress_bar
from lenslab.sae.load import SparseAutoencoder, input_transform, refuse_transcoder, sae_hook
from lenslab.tokens import TokenBatch

VERSIONED = ("lenslab", "torch", "transformer-lens", "sae-lens", "transformers")


@dataclass(frozen=True)
class SAEMetrics:
    """One SAE on one set of texts. Losses in nats per token; fractions are None where ablation does
    not hurt."""

    sae: str
    model: str
    hook: str
    d_in: int
    d_sae: int
    n_texts: int
    n_tokens: int  # real tokens: the denominator of everything but the losses
    n_predicted: int  # positions whose target is real: the denominator of the losses
    l0: float  # mean count of non-zero latents per token
    l1: float  # mean of the summed absolute activations per token
    variance_explained: float  # pooled over tokens, mean per dimension over the whole set
    fvu: float  # one minus variance explained
    mse: float  # mean squared distance per token, summed over dimensions
    cosine: float
    l2_ratio: float  # mean ||x_hat|| / ||x||: below 1 is shrinkage
    reconstruction_bias: (
        float  # mean ||x_hat||^2 / mean x.x_hat (arXiv 2404.16014, eq. 10): below 1 is shrinkage
    )
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
    fired: Int[Tensor, " d_sae"] = field(
        repr=False, compare=False
    )  # tokens on which each latent was active

    @property
    def firing_rate(self) -> Float[Tensor, " d_sae"]:
        """Share of the real tokens on which each latent is active."""
        return self.fired.double() / self.n_tokens

    def to_dict(self) -> dict[str, Any]:
        """Every number, without the counts per latent."""
        return {key: value for key, value in asdict(self).items() if key != "fired"}

    def to_frame(self) -> pd.DataFrame:
        """One row; put several SAEs together with `pd.concat`."""
        return pd.DataFrame([self.to_dict()])

    def density(self, bins_per_decade: int = 4) -> pd.DataFrame:
        """Histogram of log10 firing rates of the latents that fired: `low`, `high` (rates) and
        `latents`."""
        rate = self.firing_rate[self.fired > 0].log10()
        lowest = math.floor(-math.log10(self.n_tokens))
        edges = torch.linspace(lowest, 0, -lowest * bins_per_decade + 1, dtype=torch.float64)
        counts = torch.histogram(rate, edges).hist.long()
        return pd.DataFrame(
            {
                "low": 10 ** edges[:-1].numpy(),
                "high": 10 ** edges[1:].numpy(),
                "latents": counts.numpy(),
            }
        )

    def save(self, path: str | os.PathLike, **config: Any) -> None:
        """JSON: values, firing counts, versions, and whatever `config` says about how it was
        made."""
        versions = {name: version(name) for name in VERSIONED}
        write_json(
            path,
            {
                "metrics": self.to_dict(),
                "fired": self.fired.tolist(),
                "config": config,
                "versions": versions,
            },
        )


@torch.inference_mode()
def evaluate_sae(
    model: TransformerBridge,
    sae: SparseAutoencoder,
    batch: TokenBatch,
    *,
    name: str | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> SAEMetrics:
    """Every metric of an SAE on texts that it was not trained on. Four forward passes over `batch`.

    Args:
        name: what to call it in tables; default its class and hook.

    Raises as `check_sae`; ValueError when no real token follows another, on NaN or Inf, and for a
    transcoder.
    """
    transform, hook, device = input_transform(sae, model), sae_hook(sae), model.cfg.device
    refuse_transcoder(sae)
    error, activity, products = ReconstructionError(), FeatureActivity(), [0.0, 0.0]
    totals = dict.fromkeys(("clean", "spliced", "zero", "mean", "kl"), 0.0)
    n_predicted = 0
    parts = [batch[start : start + batch_size] for start in range(0, len(batch), batch_size)]
    bar = progress_bar(total=4 * len(parts), desc="evaluate SAE", unit="pass", progress=progress)

    def run(
        part: TokenBatch, replace: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """(logits, the value at the hook before it was replaced)"""
        seen = []

        def at_hook(value: Tensor, hook: object) -> Tensor | None:
            seen.append(value)
            if replace is None:
                return None
            where = part.real.to(device).reshape(*value.shape[:2], *[1] * (value.ndim - 2))
            return torch.where(where, replace(value), value)

        with model.hooks(fwd_hooks=[(hook, at_hook)]):
            logits = model(part.tokens.to(device), attention_mask=part.attention.long().to(device))
        bar.update()
        return logits, seen[0]

    def nats(part: TokenBatch, logits: Tensor) -> float:
        return float(
            next_token_nats(logits, part.tokens.to(device), part.real.to(device)).double().sum()
        )

    for part in parts:
        real, predicted = part.real.to(device), int(part.real[:, 1:].sum())
        logits, value = run(part)
        x = transform(value)
        features = sae.encode(x)
        x_hat = sae.decode(features)
        error.update(x, x_hat, real)
        activity.update(features, real)
        x, x_hat = x[real].double(), x_hat[real].double()
        products[0] += float(x_hat.square().sum())
        products[1] += float((x * x_hat).sum())
        other, _ = run(
            part, lambda value: transform.inverse(sae.decode(sae.encode(transform(value))), value)
        )
        totals["clean"] += nats(part, logits)
        totals["spliced"] += nats(part, other)
        totals["kl"] += mean_kl(logits, other, real) * predicted
        totals["zero"] += nats(part, run(part, torch.zeros_like)[0])
        n_predicted += predicted
    average = error.moments.mean.float()
    for part in parts:
        ablated, _ = run(
            part, lambda value: transform.inverse(average.expand_as(transform(value)), value)
        )
        totals["mean"] += nats(part, ablated)
    bar.close()

    clean, spliced, zero, mean, kl = (total / n_predicted for total in totals.values())
    return SAEMetrics(
        sae=name or f"{type(sae).__name__} {hook}",
        model=model_name(model),
        hook=hook,
        d_in=sae.cfg.d_in,
        d_sae=sae.cfg.d_sae,
        n_texts=len(batch),
        n_tokens=activity.tokens,
        n_predicted=n_predicted,
        l0=activity.l0,
        l1=activity.l1,
        variance_explained=error.variance_explained,
        fvu=error.fvu,
        mse=error.mse,
        cosine=error.cosine_similarity,
        l2_ratio=error.l2_ratio,
        reconstruction_bias=products[0] / products[1] if products[1] else 0.0,
        dead=int(dead(activity.counts, activity.tokens).sum()),
        dense=int(dense(activity.firing_rate).sum()),
        ce_clean=clean,
        ce_spliced=spliced,
        ce_zero=zero,
        ce_mean=mean,
        ce_difference=spliced - clean,
        ce_recovered_zero=recovered_fraction(clean, spliced, zero) if zero > clean else None,
        ce_recovered_mean=recovered_fraction(clean, spliced, mean) if mean > clean else None,
        kl=kl,
        fired=activity.counts.cpu(),
    )
