"""Audited metrics of reconstructions, latents, predictions and rankings: small pure functions.

Everything over tokens takes `real` (`TokenBatch.real`) and drops the other tokens before anything
is computed, so that a NaN at a padded position harms nobody. Without `real` every token counts.
Sums are kept in float64; on Apple's GPUs, which have none, by the CPU.

How variance explained is computed, on data of any size:
1. every batch of real tokens gives a count, a mean and a sum of squared deviations per dimension;
2. two such triples merge exactly (Chan, Golub and LeVeque 1979), so how the data was split changes
   nothing;
3. the squared error of the reconstruction is summed beside them;
4. 1 - squared error / squared deviations from the mean of the whole set, once, at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.stats
import torch
from jaxtyping import Bool, Float, Int, Num, Shaped
from torch import Tensor
from torch.nn import functional

ROWS = 8192  # tokens turned to float64 at a time: 16 MB at d_model 256
LOGITS = 1 << 21  # logits turned to float64 at a time: 16 MB
DENSE = 0.1  # share of tokens above which a latent is called dense

Array = np.ndarray | Tensor  # on the CPU
Tokens = Num[Tensor, "*token d"]
Mask = Shaped[Array, "*token"] | None  # booleans, or 0 and 1
Logits = Float[Tensor, "text pos vocab"]
Ids = Int[Tensor, "text pos"]
Real = Shaped[Array, "text pos"]
Numbers = np.ndarray | np.number


def as_mask(marks: Array | Sequence) -> Bool[Array, "..."]:
    """Marks as booleans, of which 0 and 1 are a kind: as integers they would select rows 0 and 1,
    and None and NaN would count as true. ValueError for anything else."""
    marks = marks if isinstance(marks, Tensor) else np.asarray(marks)
    if not ((marks == 0) | (marks == 1)).all():
        raise ValueError("A mask holds True and False (or 1 and 0) and nothing else.")
    return marks == 1


def in_float64(x: Num[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """x in float64, on the CPU where its device has no such numbers (MPS)."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def _real_rows(x: Tensor, real: Array | None) -> Float[Tensor, "token d"]:
    """The real tokens of `x [..., d]`. ValueError where none is left, on NaN and Inf, and for a
    mask of another shape."""
    rows = x.flatten(0, -2)
    if real is not None:
        if real.shape != x.shape[:-1]:
            raise ValueError(f"A mask {list(real.shape)} of values {list(x.shape)}: one a token.")
        rows = rows[as_mask(real).flatten()]
    if not len(rows):
        raise ValueError("no real token: nothing to measure (BOS and padding are not real)")
    if not torch.isfinite(rows).all():
        raise ValueError("NaN or Inf at a real token: find the layer that made it first")
    return rows


# Reconstructions


class Moments:
    """Count, mean and sum of squared deviations (`M2`) per dimension, in float64, of data seen in
    any pieces."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None  # [d]
        self.M2: Tensor | None = None  # [d]

    def update(self, x: Tokens, real: Mask = None) -> Moments:
        """Take in the real tokens of x; returns itself. ValueError on NaN, Inf, no token."""
        for rows in _real_rows(x, real).split(ROWS):
            rows = in_float64(rows)  # [token, d]
            block = Moments()
            block.count = len(rows)
            block.mean = rows.mean(0)
            block.M2 = (rows - block.mean).square().sum(0)
            self.merge(block)
        return self

    def merge(self, other: Moments) -> Moments:
        """Take in what another has seen; returns itself."""
        if not other.count:
            return self
        if not self.count:
            self.count, self.mean, self.M2 = other.count, other.mean.clone(), other.M2.clone()
            return self
        total = self.count + other.count
        delta = other.mean.to(self.mean) - self.mean
        between = delta.square() * (self.count * other.count / total)
        self.mean = self.mean + delta * (other.count / total)
        self.M2 = self.M2 + other.M2.to(self.M2) + between
        self.count = total
        return self

    @property
    def variance(self) -> Float[Tensor, " d"]:
        """Mean squared deviation per dimension (divided by count, not by count - 1)."""
        return self.M2 / self.count


class ReconstructionError:
    """How far reconstructions lie from what they reconstruct, over data seen in any pieces."""

    def __init__(self) -> None:
        self.moments = Moments()  # of x
        self.squared_error = 0.0
        self._cosines = 0.0
        self._ratios = 0.0
        self._square = 0.0  # of x_hat
        self._product = 0.0  # of x and x_hat
        self._directed = 0  # tokens with x != 0: others have no direction and no relative length

    def update(self, x: Tokens, x_hat: Tokens, real: Mask = None) -> ReconstructionError:
        """Take in one batch; returns itself. ValueError on NaN, Inf and no real token."""
        rows, rows_hat = _real_rows(x, real), _real_rows(x_hat, real)
        self.moments.update(rows)
        for block, block_hat in zip(rows.split(ROWS), rows_hat.split(ROWS), strict=True):
            block, block_hat = in_float64(block), in_float64(block_hat)  # [token, d]
            norm = block.norm(dim=1)
            directed = norm > 0
            self.squared_error += float((block - block_hat).square().sum())
            cosines = functional.cosine_similarity(block, block_hat, dim=1, eps=1e-150)
            self._cosines += float(cosines.sum())
            self._ratios += float((block_hat.norm(dim=1) / norm)[directed].sum())
            self._directed += int(directed.sum())
            self._square += float(block_hat.square().sum())
            self._product += float((block * block_hat).sum())
        return self

    @property
    def mse(self) -> float:
        """Mean over tokens of ||x - x_hat||^2: summed, not averaged, over dimensions, as SAELens
        does."""
        return self.squared_error / self.moments.count

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained: sum ||x - x_hat||^2 / sum ||x - mean(x)||^2, mean per
        dimension over all tokens seen. An average of it over batches is another number. ValueError
        when x is constant: there is no variance to explain."""
        total = float(self.moments.variance.sum())  # mean squared distance from the mean
        if total <= 1e-24 * float(self.moments.mean.square().sum()):  # a constant leaves 1e-32
            raise ValueError("x is the same at every token: there is no variance to explain")
        return self.mse / total

    @property
    def variance_explained(self) -> float:
        """1 for a perfect reconstruction, 0 for predicting the mean, negative for worse."""
        return 1 - self.fvu

    @property
    def cosine_similarity(self) -> float:
        """Mean over tokens with x != 0; a reconstruction of zero counts as 0."""
        return self._cosines / self._directed

    @property
    def l2_ratio(self) -> float:
        """Mean over tokens with x != 0 of ||x_hat|| / ||x||; below 1 is shrinkage."""
        return self._ratios / self._directed

    @property
    def relative_bias(self) -> float | None:
        """The gamma at which x_hat / gamma comes nearest to x, over all tokens seen and about the
        origin: sum ||x_hat||^2 / sum x . x_hat (Rajamanoharan et al. 2024, equation 10). Below
        1 is shrinkage; 1 where no other length would do, although a projection is shorter than x
        (`l2_ratio`). None where x_hat does not point along x at all."""
        return self._square / self._product if self._product > 0 else None


# Latents


class FeatureActivity:
    """How often and how strongly latents fire, over data seen in any pieces. Active is `!= 0`, not
    `> 0`. Before any data there are no rates: AttributeError."""

    def __init__(self) -> None:
        self.tokens = 0
        self.counts: Tensor | None = None  # [latent] tokens at which each latent was active

    def update(self, features: Num[Tensor, "*token latent"], real: Mask = None) -> FeatureActivity:
        """Take in one batch; returns itself. ValueError on NaN, Inf and no real token."""
        rows = _real_rows(features, real)  # [token, latent]
        fired = (rows != 0).sum(0)
        self.counts = fired if self.counts is None else self.counts + fired
        self.tokens += len(rows)
        return self

    @property
    def firing_rate(self) -> Float[Tensor, " latent"]:
        """Share of tokens at which each latent is active."""
        return in_float64(self.counts) / self.tokens

    @property
    def dead(self) -> Bool[Tensor, " latent"]:
        """Latents never active in the `tokens` tokens looked at.

        Say that number with the result: a latent not seen in n tokens may still fire at a rate of
        up to about 3/n (`stats.clopper_pearson(0, n)`).
        """
        return self.firing_rate == 0

    @property
    def dense(self) -> Bool[Tensor, " latent"]:
        """Latents active on more than a tenth of the tokens."""
        return self.firing_rate > DENSE

    @property
    def l0(self) -> float:
        """Mean count of active latents per token: the firing rates, summed."""
        return float(self.firing_rate.sum())


# Predictions


def next_token_nats(logits: Logits, tokens: Ids, real: Real) -> Float[Tensor, " target"]:
    """-log p of every real token given those before it, in nats and in the order of `real[:,
    1:].nonzero()`.

    The *target* must be real: BOS predicts the first token and counts, nothing is scored for
    predicting padding. ValueError when no target is real and when a loss is not finite.
    """
    real = as_mask(real)
    texts = zip(logits[:, :-1], tokens[:, 1:], real[:, 1:], strict=True)  # one by one: large
    losses = []
    for row, target, scored in texts:
        row, target = row[scored].float(), target[scored].long()
        losses.append(functional.cross_entropy(row, target, reduction="none"))
    nats = torch.cat(losses)
    if not len(nats):
        raise ValueError("no real token follows another token: there is nothing to predict")
    if not torch.isfinite(nats).all():
        raise ValueError("a loss is NaN or infinite at a real target: check the logits")
    return nats


def kl_divergence(clean_logits: Logits, other_logits: Logits, real: Real) -> float:
    """Mean KL(clean || other) in nats over the positions that predict a real token, as
    `next_token_nats`; never negative, NaN where a logit is.

    In float64: the differences of two nearly equal float32 distributions are rounding below 1e-3.
    """
    total, real = 0.0, as_mask(real)
    step = max(1, LOGITS // clean_logits.shape[-1])
    texts = zip(clean_logits[:, :-1], other_logits[:, :-1], real[:, 1:], strict=True)
    for clean, other, scored in texts:
        for rows in scored.nonzero()[:, 0].split(step):
            log_p = in_float64(clean[rows]).log_softmax(-1)  # [target, vocab]
            log_q = in_float64(other[rows]).log_softmax(-1)
            total += float((log_p.exp() * (log_p - log_q)).sum())
    return max(total, 0.0) / int(real[:, 1:].sum())  # equal ones round to either side of 0


def recovered_fraction(clean: float, spliced: float, ablated: float) -> float | None:
    """Share of the loss that ablation costs and the splice keeps: (ablated - spliced) / (ablated -
    clean).

    1: as good as the clean run; 0: as bad as the ablation. Report it for zero and for mean
    ablation, beside the difference in nats. None where ablation does not raise the loss: then the
    share means nothing.
    """
    return (ablated - spliced) / (ablated - clean) if ablated > clean else None


# Ranks


def auroc(
    scores: Num[Array, "sample *feature"], labels: Shaped[Array, " sample"]
) -> Float[np.ndarray, "*feature"]:
    """P(a positive scores above a negative), ties counting half, for every feature (mid-rank
    Mann-Whitney). ValueError on NaN, when one class is absent, and as `as_mask`."""
    labels = as_mask(np.asarray(labels))
    rank_sums = mid_ranks(scores)[labels].sum(0)
    return auroc_of_rank_sums(rank_sums, labels.sum(), len(labels))


def mid_ranks(scores: Num[Array, "sample *feature"]) -> Float[np.ndarray, "sample *feature"]:
    """Ranks from 1 within each feature, ties at their mean. ValueError on NaN."""
    return scipy.stats.rankdata(np.asarray(scores), axis=0, nan_policy="raise")


def auroc_of_rank_sums(rank_sums: Numbers, positives: Numbers, samples: int) -> np.ndarray:
    """AUROC of features whose mid-ranks add up to `rank_sums` over the `positives` of all `samples`
    (numbers, or arrays that broadcast). ValueError when one class is absent."""
    pairs = positives * (samples - positives)
    if not np.all(pairs):
        raise ValueError("AUROC needs both classes, a sample inside the category and one outside")
    return np.asarray((rank_sums - positives * (positives + 1) / 2) / pairs)
