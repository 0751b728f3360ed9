"""Controls for what an SAE's features tell apart: the same texts, described without a trained
dictionary.

An SAE offers thousands of candidates and the best of thousands is good by luck. Each function here
gives another set of candidates for the same search, as a matrix `[text, candidate]` pooled as the
SAE's features are:
1. `pca_axes`: principal axes of the SAE's own input, both directions of each;
2. `raw_neurons`: the MLP's neurons after their non-linearity, in the block that wrote last into the
   SAE's input;
3. `random_directions`: random unit vectors in the SAE's input;
4. `ngram_features`: character n-grams of the text, hashed into buckets; no model at all. A fifth,
an SAE on the random-weight twin, is any SAE's features: `encode_features(twin, its_sae,
batch).pool(how)`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lenslab.capture import harvest
from lenslab.hooks import hook_names
from lenslab.models import model_name
from lenslab.runtime import derive_generator, progress_bar
from lenslab.sae.evaluate import SAEMetrics, evaluate_sae
from lenslab.sae.load import SparseAutoencoder, input_transform, sae_hook
from lenslab.tokens import TokenBatch

TEXTS = 32  # texts whose candidates are held per token at a time


FIT = 50_000  # tokens that principal axes are fitted on, at most


def pool_tokens(
    values: Float[Tensor, "token candidate"],
    text: Int[Tensor, " token"],
    n_texts: int,
    how: str = "max",
) -> Float[Tensor, "text candidate"]:
    """Dense values per token -> per text: 'max', 'mean' or 'fraction' (share of tokens above zero).

    Every text needs a token: ValueError otherwise, and for another `how`.
    """
    counts = torch.bincount(text, minlength=n_texts)
    if len(counts) != n_texts or not bool((counts > 0).all()):
        raise ValueError(f"Every one of {n_texts} texts needs a token, and no other may have one.")
    index, result = text[:, None].expand_as(values), values.new_zeros(n_texts, values.shape[1])
    if how == "max":
        return result.scatter_reduce_(0, index, values, "amax", include_self=False)
    if how not in ("mean", "fraction"):
        raise ValueError(f"Pooling is max, mean or fraction, not {how!r}.")
    return (
        result.scatter_add_(0, index, values if how == "mean" else (values > 0).to(values))
        / counts[:, None]
    )


def pca_axes(
    model: TransformerBridge, sae: SparseAutoencoder, batch: TokenBatch, how: str = "max"
) -> Float[np.ndarray, "text candidate"]:
    """Projections on the principal axes of the SAE's input at the real tokens: all axes, then all
    reversed.

    The axes are fitted on the batch (at most 50,000 tokens of it) without looking at any label.
    """
    from sklearn.decomposition import PCA

    transform, hook = input_transform(sae, model), sae_hook(sae)
    every = max(1, -(-batch.n_real // FIT))
    seen = [transform(values)[::every] for values, _, _ in _tokens(model, batch, hook)]
    pca = PCA(svd_solver="covariance_eigh").fit(torch.cat(seen).double().numpy())
    axes, mean = torch.from_numpy(pca.components_).float(), torch.from_numpy(pca.mean_).float()

    def project(x: Tensor) -> Tensor:
        along = (transform(x) - mean) @ axes.T
        return torch.cat([along, -along], dim=1)

    return _pooled(model, batch, hook, project, how)


def raw_neurons(
    model: TransformerBridge, sae: SparseAutoencoder, batch: TokenBatch, how: str = "max"
) -> Float[np.ndarray, "text candidate"]:
    """The MLP's activations after its non-linearity: of the SAE's block, or of the one before for
    its input.

    ValueError where the model has no such hook (mixtures of experts).
    """
    return _pooled(model, batch, neuron_hook(model, sae), lambda x: x.flatten(1), how)


def neuron_hook(model: TransformerBridge, sae: SparseAutoencoder) -> str:
    """The hook whose values `raw_neurons` takes. ValueError where there is none."""
    found = re.match(r"blocks\.(\d+)\.(.+)", sae_hook(sae))
    if not found:
        raise ValueError(f"{sae_hook(sae)} lies in no block, so no MLP stands beside it.")
    before = found[2] in ("hook_resid_pre", "hook_in")
    # Not `mlp.hook_post`: in mixtures of experts that name stands for the block's output
    hook = f"blocks.{max(int(found[1]) - before, 0)}.mlp.out.hook_in"
    if hook not in hook_names(model):
        raise ValueError(
            f"{model_name(model)} has no {hook}: its neurons cannot serve as a control; leave it out."
        )
    return hook


def random_directions(
    model: TransformerBridge,
    sae: SparseAutoencoder,
    batch: TokenBatch,
    n: int | None = None,
    how: str = "max",
    seed: int = 0,
) -> Float[np.ndarray, "text candidate"]:
    """Projections on `n` (default d_sae) random unit vectors of the SAE's input."""
    transform, n = input_transform(sae, model), sae.cfg.d_sae if n is None else n
    directions = torch.randn(n, sae.cfg.d_in, generator=derive_generator(seed, "random directions"))
    directions = directions / directions.norm(dim=1, keepdim=True)
    return _pooled(model, batch, sae_hook(sae), lambda x: transform(x) @ directions.T, how)


def ngram_features(texts: Sequence[str], n: int) -> Float[np.ndarray, "text candidate"]:
    """Share of a text's character 1- to 4-grams that fall into each of `n` hash buckets
    (scikit-learn's hashing).

    What these tell apart is spelling: no model has read the texts.
    """
    from sklearn.feature_extraction.text import HashingVectorizer

    hashing = HashingVectorizer(
        analyzer="char", ngram_range=(1, 4), n_features=n, alternate_sign=False, norm="l1"
    )
    return hashing.transform(texts).toarray().astype(np.float32)


def control_matrices(
    model: TransformerBridge, sae: SparseAutoencoder, batch: TokenBatch, how: str = "max"
) -> dict[str, Float[np.ndarray, "text candidate"]]:
    """The controls that need no training, by name: axes, neurons (where the model has such a hook)
    and n-grams.

    The definition of a specialist asks for these and for an SAE on the random twin; add that one
    yourself.
    """
    controls = {"PCA axes": pca_axes(model, sae, batch, how)}
    try:
        neuron_hook(model, sae)
    except ValueError:
        pass
    else:
        controls["raw neurons"] = raw_neurons(model, sae, batch, how)
    return controls | {"character n-grams": ngram_features(batch.texts, sae.cfg.d_sae)}


def _tokens(model: TransformerBridge, batch: TokenBatch, hook: str):
    """(values `[token, *width]`, text of each token counted from `start`, start) for a few texts at
    a time."""
    for start in progress_bar(range(0, len(batch), TEXTS), desc=hook):
        part = batch[start : start + TEXTS]
        values = harvest(model, part, hook, compute="float32", progress=False)[hook]
        yield values[part.real], part.real.nonzero()[:, 0], start


def _pooled(
    model: TransformerBridge,
    batch: TokenBatch,
    hook: str,
    describe: Callable[[Tensor], Tensor],
    how: str,
) -> Float[np.ndarray, "text candidate"]:
    parts = []
    for values, text, start in _tokens(model, batch, hook):
        parts.append(pool_tokens(describe(values), text, min(TEXTS, len(batch) - start), how))
    return torch.cat(parts).numpy()


class RandomSAE:
    """The null of an SAE: random unit directions, the `k` strongest used, one scale fitted. See
    `random_sae`."""

    def __init__(self, cfg: Any, directions: Tensor, mean: Tensor, k: int):
        self.cfg, self.directions, self.mean, self.k, self.scale = cfg, directions, mean, k, 1.0

    def encode(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_sae"]:
        strength = torch.relu((x - self.mean) @ self.directions.T)
        top = strength.topk(self.k, dim=-1)
        return torch.zeros_like(strength).scatter_(-1, top.indices, top.values * self.scale)

    def decode(self, features: Float[Tensor, "... d_sae"]) -> Float[Tensor, "... d_in"]:
        return features @ self.directions + self.mean


def random_sae(
    sae: SparseAutoencoder, x: Float[Tensor, "token d_in"], k: int, seed: int = 0
) -> RandomSAE:
    """A random SAE of the same shape at the same hook, with k latents active at a time.

    What it scores needs no learning. To be a fair null it is given what costs nothing: the mean of
    `x` as its bias, and the one factor on its activations that fits `x` best. ValueError unless k
    is in 1 .. d_sae.
    """
    if not 1 <= k <= sae.cfg.d_sae:
        raise ValueError(f"k must lie between 1 and d_sae = {sae.cfg.d_sae}, got {k}.")
    directions = torch.randn(
        sae.cfg.d_sae, sae.cfg.d_in, generator=derive_generator(seed, "random SAE")
    ).to(x)
    null = RandomSAE(sae.cfg, directions / directions.norm(dim=1, keepdim=True), x.mean(0), k)
    guess = null.decode(null.encode(x)) - null.mean
    null.scale = float(((x - null.mean) * guess).sum() / guess.square().sum().clamp_min(1e-30))
    return null


def evaluate_null(
    model: TransformerBridge,
    sae: SparseAutoencoder,
    batch: TokenBatch,
    l0: float,
    *,
    seed: int = 0,
    **options: Any,
) -> SAEMetrics:
    """`evaluate_sae` of the random SAE with the same rounded L0, its scale fitted on the first
    texts of `batch`.

    `options` go to `evaluate_sae`.
    """
    transform, rows = input_transform(sae, model), batch[: max(1, 4096 // batch.tokens.shape[1])]
    tokens, mask = rows.tokens.to(model.cfg.device), rows.attention.long().to(model.cfg.device)
    with torch.inference_mode():
        _, cache = model.run_with_cache(tokens, attention_mask=mask, names_filter=[sae_hook(sae)])
        x = transform(cache[sae_hook(sae)])[rows.real.to(model.cfg.device)]
    null = random_sae(sae, x, min(max(1, round(l0)), sae.cfg.d_sae), seed)
    return evaluate_sae(model, null, batch, name="random directions, same L0", **options)
