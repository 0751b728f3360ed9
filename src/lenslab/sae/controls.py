"""Controls for what an SAE's features tell apart: the same texts, described without a trained
dictionary.

An SAE offers thousands of candidates and the best of thousands is good by luck. Some functions here
give another set of candidates for the same search, as a matrix `[text, candidate]` pooled as the
SAE's features are:
1. `pca_axes`: principal axes of the SAE's own input, both directions of each;
2. raw neurons (`neuron_hook`): those of the MLP after their non-linearity, in the block that wrote
   last into the SAE's input;
3. `ngram_features`: character n-grams of the text, hashed into buckets; no model at all.
A fourth, an SAE on the random-weight twin, is any SAE's features: `encode_features(twin, its_sae,
batch).pool(how)`.

Others are SAEs that learned nothing, to be encoded and evaluated like any: `untrained_sae`. Those
that learn, but on one side only, are trained: `build_sae(..., frozen=...)`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lenslab.capture import harvest
from lenslab.hooks import hook_names
from lenslab.runtime import derive_generator, progress_bar
from lenslab.sae.evaluate import SAEMetrics, evaluate_sae
from lenslab.sae.inputs import SparseAutoencoder, input_transform, sae_hook
from lenslab.tokens import TokenBatch

TEXTS = 32  # texts whose candidates are held per token at a time

# directions of an SAE that learned nothing
KINDS = {"random": "random directions", "PCA": "PCA axes", "coordinates": "raw coordinates"}
NULLS = KINDS | {"data": "data points"}  # floors, and what is a null for matching alone
FIT = 50_000  # tokens that principal axes are fitted on, at most


def control_matrices(
    model: TransformerBridge, sae: SparseAutoencoder, batch: TokenBatch, how: str = "max"
) -> dict[str, Float[np.ndarray, "text candidate"]]:
    """The controls that need no training, by name: axes, neurons (where the model has such a hook)
    and n-grams. `how` is "max" or "mean", as in `FeatureActivations.pool`.

    The definition of a specialist asks for these and for an SAE on the random twin; add that one
    yourself.
    """
    controls = {"PCA axes": pca_axes(model, sae, batch, how)}
    if hook := neuron_hook(model, sae):
        flat = partial(torch.flatten, start_dim=1)
        controls["raw neurons"] = _pooled(model, batch, hook, flat, how)
    return controls | {"character n-grams": ngram_features(batch.texts, sae.cfg.d_sae)}


def mean_activations(
    model: TransformerBridge, sae: SparseAutoencoder, batch: TokenBatch
) -> Float[np.ndarray, "text d_in"]:
    """The SAE's input, averaged over each text's real tokens: what supervised directions are fitted
    on (`lenslab.features.ceiling`)."""
    return _pooled(model, batch, sae_hook(sae), input_transform(sae, model), "mean")


def pca_axes(
    model: TransformerBridge, sae: SparseAutoencoder, batch: TokenBatch, how: str = "max"
) -> Float[np.ndarray, "text candidate"]:
    """Projections on the principal axes of the SAE's input at the real tokens: all axes, then all
    reversed.

    The axes are fitted on the batch (at most 50,000 tokens of it) without looking at any label.
    """
    transform, hook = input_transform(sae, model), sae_hook(sae)
    every = max(1, -(-batch.n_real // FIT))
    sample = [transform(values)[::every] for _, values in _real_values(model, batch, hook)]
    axes, mean = _principal_axes(torch.cat(sample))

    def project(values: Tensor) -> Tensor:
        along = (transform(values) - mean) @ axes.T  # [token, axis]
        return torch.cat([along, -along], dim=1)

    return _pooled(model, batch, hook, project, how)


def _principal_axes(x: Float[Tensor, "token d_in"]) -> tuple[Tensor, Tensor]:
    """(axes `[axis, d_in]`, the widest first; the mean)"""
    from sklearn.decomposition import PCA

    pca = PCA(svd_solver="covariance_eigh").fit(x.cpu().double().numpy())
    return torch.from_numpy(pca.components_).float(), torch.from_numpy(pca.mean_).float()


def neuron_hook(model: TransformerBridge, sae: SparseAutoencoder) -> str | None:
    """The hook of the MLP's neurons in the SAE's block, or in the one before for its input; None
    where there is none (embeddings, mixtures of experts)."""
    block = re.match(r"blocks\.(\d+)\.(.+)", sae_hook(sae))
    if block is None:
        return None
    before = block[2] in ("hook_resid_pre", "hook_in")
    # Not `mlp.hook_post`: in mixtures of experts that name stands for the block's output
    hook = f"blocks.{max(int(block[1]) - before, 0)}.mlp.out.hook_in"
    return hook if hook in hook_names(model) else None


def ngram_features(texts: Sequence[str], n: int) -> Float[np.ndarray, "text candidate"]:
    """Share of a text's character 1- to 4-grams that fall into each of `n` hash buckets
    (scikit-learn's hashing).

    What these tell apart is spelling: no model has read the texts.
    """
    from sklearn.feature_extraction.text import HashingVectorizer

    options = dict(analyzer="char", ngram_range=(1, 4), alternate_sign=False, norm="l1")
    return HashingVectorizer(n_features=n, **options).transform(texts).toarray().astype(np.float32)


def _real_values(
    model: TransformerBridge, batch: TokenBatch, hook: str
) -> Iterator[tuple[TokenBatch, Float[Tensor, "token *width"]]]:
    """A few texts at a time, and the values at their real tokens."""
    for start in progress_bar(range(0, len(batch), TEXTS), desc=hook):
        part = batch[start : start + TEXTS]
        values = harvest(model, part, hook, compute="float32", progress=False)[hook]
        yield part, values[part.real]


def _pooled(
    model: TransformerBridge, batch: TokenBatch, hook: str, describe: Callable, how: str
) -> Float[np.ndarray, "text candidate"]:
    """What `describe` makes of values `[token, *width]`, `[token, candidate]`, pooled per text."""
    reduce = {"max": "amax", "mean": "mean"}[how]
    pooled = []
    for part, values in _real_values(model, batch, hook):
        candidates = describe(values)
        text = part.real.nonzero()[:, :1].expand_as(candidates)
        empty = candidates.new_zeros(len(part), candidates.shape[1])
        pooled.append(empty.scatter_reduce(0, text, candidates, reduce, include_self=False))
    return torch.cat(pooled).numpy()


@dataclass
class UntrainedSAE:
    """An SAE that learned nothing: given directions, the `k` strongest used, one scale fitted. See
    `untrained_sae`."""

    cfg: Any  # of the SAE that it is the null of, with its own d_sae
    directions: Float[Tensor, "d_sae d_in"]
    mean: Float[Tensor, " d_in"]
    k: int
    scale: float = 1.0

    def encode(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_sae"]:
        strength = torch.relu((x - self.mean) @ self.directions.T)
        top = strength.topk(self.k, dim=-1)
        return torch.zeros_like(strength).scatter_(-1, top.indices, top.values * self.scale)

    def decode(self, features: Float[Tensor, "... d_sae"]) -> Float[Tensor, "... d_in"]:
        return features @ self.directions + self.mean


def untrained_sae(
    sae: SparseAutoencoder,
    x: Float[Tensor, "token d_in"],
    k: int,
    seed: int = 0,
    kind: str = "random",
) -> UntrainedSAE:
    """A floor of an SAE at the same hook, with k latents (at most all) active at a time: as many
    `random` directions or points of `x`, seen from their mean (`data`); or both directions of each
    principal axis of `x` (`PCA`) or of each of the hook's own coordinates (`coordinates`).

    What it scores needs no learned dictionary. To be a fair null it is given what costs nothing:
    the mean of `x` as its bias, and the one factor on its activations that fits `x` best.
    """
    if kind not in NULLS:
        raise ValueError(f"kind is one of {', '.join(NULLS)}, not {kind!r}.")
    mean, cfg = x.mean(0), copy(sae.cfg)
    if kind in ("random", "data"):
        generator = derive_generator(seed, f"{kind} SAE")
        directions = torch.randn(cfg.d_sae, cfg.d_in, generator=generator).to(x)
        if kind == "data":
            directions = (x - mean)[torch.randperm(len(x), generator=generator)[: cfg.d_sae]]
        directions = directions / directions.norm(dim=1, keepdim=True)
    else:
        axes = torch.eye(cfg.d_in) if kind == "coordinates" else _principal_axes(x)[0]
        directions = torch.cat([axes, -axes]).to(x)
    cfg.d_sae = len(directions)
    null = UntrainedSAE(cfg=cfg, directions=directions, mean=mean, k=min(k, cfg.d_sae))
    few = x[:: max(1, len(x) // 4096)]  # enough for one factor
    guess = null.decode(null.encode(few)) - mean
    null.scale = float(((few - mean) * guess).sum() / guess.square().sum().clamp_min(1e-30))
    return null


def evaluate_null(
    model: TransformerBridge,
    sae: SparseAutoencoder,
    batch: TokenBatch,
    l0: float,
    seed: int = 0,
    kind: str = "random",
) -> SAEMetrics:
    """`evaluate_sae` of the untrained SAE (`untrained_sae`) with the same rounded L0; its mean,
    axes and scale are those of the first 4,096 positions or so of `batch` itself."""
    transform, hook = input_transform(sae, model), sae_hook(sae)
    first = batch[: max(1, 4096 // batch.tokens.shape[1])]
    values = torch.cat([values for _, values in _real_values(model, first, hook)])
    x = transform(values.to(model.cfg.device))
    null = untrained_sae(sae, x, max(1, round(l0)), seed, kind)
    return evaluate_sae(model, null, batch, name=f"{NULLS[kind]}, same L0")
