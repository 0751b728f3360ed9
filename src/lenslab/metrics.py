"""Audited metrics of reconstructions, latents, predictions and distributions: small pure functions.

Everything over tokens takes `real` (`TokenBatch.real`) and drops the other tokens before anything
is computed, so that a NaN at a padded position harms nobody. Without `real` every token counts.
Sums are kept in float64.

How variance explained is computed, on data of any size:
1. every batch of real tokens gives a count, a mean and a sum of squared deviations per dimension;
2. two such triples merge exactly (Chan, Golub and LeVeque 1979), so how the data was split changes
   nothing;
3. the squared error of the reconstruction is summed beside them;
4. 1 - squared error / squared deviations from the mean of the whole set, once, at the end.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int, Num
from scipy.stats import rankdata
from torch import Tensor

ROWS = 8192  # tokens turned to float64 at a time: 16 MB at d_model 256


Tokens = Num[Tensor, "*token d"]


Latents = Num[Tensor, "*token latent"]


Mask = Bool[Tensor, "*token"] | None


Logits = Float[Tensor, "text pos vocab"]


def _real_rows(x: Tensor, real: Tensor | None, what: str) -> Tensor:
    """`[..., d]` -> `[token, d]`: the real tokens. ValueError on other shapes, none left, NaN or
    Inf."""
    if x.ndim < 2:
        raise ValueError(
            f"{what} needs a token axis and a dimension axis, got shape {tuple(x.shape)}"
        )
    if real is not None and real.shape != x.shape[:-1]:
        raise ValueError(
            f"{what} has tokens {tuple(x.shape[:-1])}, `real` has {tuple(real.shape)}: pass the batch's"
        )
    rows = x.flatten(0, -2) if real is None else x[real]
    if not len(rows):
        raise ValueError(
            f"{what} has no real token: nothing to measure. Check `real` (BOS and padding are not real)"
        )
    if not torch.isfinite(rows).all():
        raise ValueError(
            f"{what} holds NaN or Inf at a real token: find the layer that made it before measuring"
        )
    return rows


def _seen(tokens: int) -> int:
    """The number of tokens an accumulator has seen; ValueError before the first."""
    if not tokens:
        raise ValueError("no tokens yet: call update first")
    return tokens


class Moments:
    """Count, mean and sum of squared deviations (`M2`) per dimension, in float64, of data seen in
    any pieces."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None  # [d]
        self.M2: Tensor | None = None  # [d]

    def update(self, x: Tokens, real: Mask = None) -> Moments:
        """Take in the real tokens of x; returns itself. ValueError on NaN, Inf, no token, another
        width."""
        for block in _real_rows(x, real, "x").split(ROWS):
            block, part = block.double(), Moments()
            part.count, part.mean = len(block), block.mean(0)
            part.M2 = (block - part.mean).square().sum(0)
            self.merge(part)
        return self

    def merge(self, other: Moments) -> Moments:
        """Take in what another has seen; returns itself. ValueError when the widths differ."""
        if other.mean is None or other.M2 is None:
            return self
        if self.mean is None or self.M2 is None:
            self.count, self.mean, self.M2 = other.count, other.mean.clone(), other.M2.clone()
            return self
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                f"moments of width {len(self.mean)} cannot take in width {len(other.mean)}"
            )
        total = self.count + other.count
        delta = other.mean.to(self.mean) - self.mean
        self.mean = self.mean + delta * (other.count / total)
        self.M2 = (
            self.M2 + other.M2.to(self.M2) + delta.square() * (self.count * other.count / total)
        )
        self.count = total
        return self

    @property
    def variance(self) -> Float[Tensor, " d"]:
        """Mean squared deviation per dimension (divided by count, not by count - 1)."""
        return self.M2 / _seen(self.count)

    @property
    def total_variance(self) -> float:
        """Mean squared distance of a token from the mean: the variances, summed."""
        return float(self.variance.sum())


class ReconstructionError:
    """How far reconstructions lie from what they reconstruct, over data seen in any pieces."""

    def __init__(self) -> None:
        self.moments = Moments()
        self.squared_error = self._cosine = self._ratio = 0.0
        self._with_direction = (
            0  # tokens with x != 0: the others have no direction and no relative length
        )

    def update(self, x: Tokens, x_hat: Tokens, real: Mask = None) -> ReconstructionError:
        """Take in one batch; returns itself. ValueError when shapes differ, on NaN, Inf and no real
        token."""
        if x.shape != x_hat.shape:
            raise ValueError(
                f"x {tuple(x.shape)} and its reconstruction {tuple(x_hat.shape)} differ in shape"
            )
        rows, rows_hat = _real_rows(x, real, "x"), _real_rows(x_hat, real, "the reconstruction")
        self.moments.update(rows)
        for pair in zip(rows.split(ROWS), rows_hat.split(ROWS), strict=True):
            block, block_hat = (half.double() for half in pair)
            self.squared_error += float((block - block_hat).square().sum())
            norm, norm_hat = block.norm(dim=1), block_hat.norm(dim=1)
            has = norm > 0
            self._cosine += float(
                ((block * block_hat).sum(1) / (norm * norm_hat).clamp_min(1e-300))[has].sum()
            )
            self._ratio += float((norm_hat[has] / norm[has]).sum())
            self._with_direction += int(has.sum())
        return self

    @property
    def mse(self) -> float:
        """Mean over tokens of ||x - x_hat||^2: summed, not averaged, over dimensions, as SAELens
        does."""
        return self.squared_error / _seen(self.moments.count)

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained. ValueError when x is constant: there is no variance to
        explain."""
        error, total = self.mse, self.moments.total_variance
        if total <= 1e-24 * float(
            self.moments.mean.square().sum()
        ):  # rounding leaves about 1e-32 of a constant
            raise ValueError(
                "x is the same at every token: it has no variance to explain. Give more tokens"
            )
        return error / total

    @property
    def variance_explained(self) -> float:
        return 1 - self.fvu

    def _per_directed_token(self, total: float) -> float:
        if not self._with_direction:
            raise ValueError(
                "x is zero at every token seen: it has neither direction nor length to compare with"
            )
        return total / self._with_direction

    @property
    def cosine_similarity(self) -> float:
        """Mean over tokens with x != 0; a reconstruction of zero counts as 0."""
        return self._per_directed_token(self._cosine)

    @property
    def l2_ratio(self) -> float:
        """Mean over tokens with x != 0 of ||x_hat|| / ||x||; below 1 is shrinkage."""
        return self._per_directed_token(self._ratio)


def variance_explained(x: Tokens, x_hat: Tokens, real: Mask = None) -> float:
    """1 - sum ||x - x_hat||^2 / sum ||x - mean(x)||^2, mean per dimension over all real tokens
    given.

    1 for a perfect reconstruction, 0 for predicting the mean, negative for worse. For data that
    comes in batches use `ReconstructionError`: an average of this over batches is another number.
    """
    return ReconstructionError().update(x, x_hat, real).variance_explained


def fvu(x: Tokens, x_hat: Tokens, real: Mask = None) -> float:
    """Fraction of variance unexplained: one minus `variance_explained`."""
    return ReconstructionError().update(x, x_hat, real).fvu


def mse(x: Tokens, x_hat: Tokens, real: Mask = None) -> float:
    """Mean over real tokens of the squared distance ||x - x_hat||^2 (summed over dimensions)."""
    return ReconstructionError().update(x, x_hat, real).mse


def cosine_similarity_mean(x: Tokens, x_hat: Tokens, real: Mask = None) -> float:
    """Mean cosine between x and x_hat over real tokens with x != 0."""
    return ReconstructionError().update(x, x_hat, real).cosine_similarity


def l2_ratio(x: Tokens, x_hat: Tokens, real: Mask = None) -> float:
    """Mean of ||x_hat|| / ||x|| over real tokens with x != 0."""
    return ReconstructionError().update(x, x_hat, real).l2_ratio


class FeatureActivity:
    """How often and how strongly latents fire, over data seen in any pieces. Active is `!= 0`, not
    `> 0`."""

    def __init__(self) -> None:
        self.tokens = 0
        self.counts: Tensor | None = None  # [latent] tokens at which each latent was active
        self._absolute = 0.0

    def update(self, features: Latents, real: Mask = None) -> FeatureActivity:
        """Take in one batch; returns itself. ValueError on NaN, Inf, no real token, another
        width."""
        rows = _real_rows(features, real, "the features")
        fired = (rows != 0).sum(0)
        if self.counts is not None and self.counts.shape != fired.shape:
            raise ValueError(f"activity of {len(self.counts)} latents cannot take in {len(fired)}")
        self.counts = fired if self.counts is None else self.counts + fired
        self.tokens += len(rows)
        self._absolute += float(rows.abs().sum(dtype=torch.float64))
        return self

    @property
    def firing_rate(self) -> Float[Tensor, " latent"]:
        """Share of tokens at which each latent is active."""
        tokens = _seen(self.tokens)
        return self.counts.double() / tokens

    @property
    def l0(self) -> float:
        """Mean count of active latents per token: the firing rates, summed."""
        return float(self.firing_rate.sum())

    @property
    def l1(self) -> float:
        """Mean over tokens of the summed absolute activation."""
        return self._absolute / _seen(self.tokens)


def l0(features: Latents, real: Mask = None) -> float:
    """Mean count of non-zero latents per real token."""
    return FeatureActivity().update(features, real).l0


def l1(features: Latents, real: Mask = None) -> float:
    """Mean over real tokens of the sum of absolute activations."""
    return FeatureActivity().update(features, real).l1


def firing_rate(features: Latents, real: Mask = None) -> Float[Tensor, " latent"]:
    """Share of real tokens at which each latent is non-zero."""
    return FeatureActivity().update(features, real).firing_rate


def dead(fired: Num[Tensor, " latent"], tokens: int) -> Bool[Tensor, " latent"]:
    """Latents never active in the `tokens` tokens looked at; `fired` holds their rates or their
    counts.

    Say the number with the result: a latent not seen in n tokens may still fire at a rate of up to
    about 3/n (`stats.clopper_pearson(0, n)`). ValueError on no tokens, NaN, or more firings than
    tokens.
    """
    _check_fired(fired)
    if tokens < 1:
        raise ValueError("no tokens were looked at, so nothing is known to be dead")
    if bool((fired > (1 if fired.is_floating_point() else tokens)).any()):
        raise ValueError(
            "a latent fired more often than there are tokens: floats are rates, integers are counts"
        )
    return fired == 0


def dense(rate: Float[Tensor, " latent"], threshold: float = 0.1) -> Bool[Tensor, " latent"]:
    """Latents active on more than `threshold` of the tokens. ValueError unless the rates lie in [0,
    1]."""
    _check_fired(rate)
    if bool((rate > 1).any()):
        raise ValueError("firing rates lie in [0, 1]: divide counts by the number of tokens")
    return rate > threshold


def _check_fired(fired: Tensor) -> None:
    if not fired.numel() or not bool((fired >= 0).all()):  # a NaN is not >= 0
        raise ValueError("firing rates or counts must be present, not NaN and not negative")


def recovered_fraction(clean: float, spliced: float, ablated: float) -> float:
    """Share of the loss that ablation costs and the splice keeps: (ablated - spliced) / (ablated -
    clean).

    1: as good as the clean run; 0: as bad as the ablation. Report it for zero and for mean
    ablation, beside the difference in nats. ValueError when ablation does not raise the loss: then
    the share means nothing.
    """
    if not all(map(math.isfinite, (clean, spliced, ablated))):
        raise ValueError(
            f"losses must be finite, got clean {clean}, spliced {spliced}, ablated {ablated}"
        )
    if ablated <= clean:
        raise ValueError(
            f"ablation lowers the loss ({clean:.4f} to {ablated:.4f}): report the difference in nats"
        )
    return (ablated - spliced) / (ablated - clean)


def _check_predictions(logits: Tensor, real: Tensor) -> Tensor:
    """The positions `[text, pos-1]` that predict a real token."""
    if real.shape != logits.shape[:2]:
        raise ValueError(
            f"logits for {tuple(logits.shape[:2])} tokens, `real` for {tuple(real.shape)}"
        )
    if not bool(real[:, 1:].any()):
        raise ValueError("no real token follows another token: there is nothing to predict")
    return real[:, 1:]


def next_token_nats(
    logits: Logits, tokens: Int[Tensor, "text pos"], real: Bool[Tensor, "text pos"]
) -> Float[Tensor, " target"]:
    """-log p of every real token given those before it, in nats and in the order of `real[:,
    1:].nonzero()`.

    The *target* must be real: BOS predicts the first token and counts, nothing is scored for
    predicting padding. ValueError when shapes differ, when no target is real and when a loss is not
    finite.
    """
    if tokens.shape != logits.shape[:2]:
        raise ValueError(
            f"logits for {tuple(logits.shape[:2])} tokens, tokens {tuple(tokens.shape)}"
        )
    scored = _check_predictions(logits, real)
    nats = []
    for row, targets, where in zip(
        logits[:, :-1], tokens[:, 1:], scored, strict=True
    ):  # by text: they are large
        nats.append(
            torch.nn.functional.cross_entropy(
                row[where].float(), targets[where].long(), reduction="none"
            )
        )
    result = torch.cat(nats)
    if not torch.isfinite(result).all():
        raise ValueError(
            "a loss is NaN or infinite at a real target: check the logits of that text"
        )
    return result


def cross_entropy(
    logits: Logits, tokens: Int[Tensor, "text pos"], real: Bool[Tensor, "text pos"]
) -> float:
    """Mean of `next_token_nats`: every real target weighs the same, whichever text it is in."""
    return float(next_token_nats(logits, tokens, real).double().mean())


def kl_divergence(
    clean_logits: Logits, other_logits: Logits, real: Bool[Tensor, "text pos"] | None = None
) -> float:
    """Mean KL(clean || other) in nats over the positions that predict a real token, as
    `cross_entropy`.

    ValueError for logits of two shapes, no real token, and a divergence that is NaN or infinite.
    """
    if clean_logits.shape != other_logits.shape:
        raise ValueError(
            f"logits of shape {tuple(clean_logits.shape)} and {tuple(other_logits.shape)} differ"
        )
    if real is None:
        real = torch.ones(clean_logits.shape[:2], dtype=torch.bool, device=clean_logits.device)
    scored, total = _check_predictions(clean_logits, real), 0.0
    for clean, other, where in zip(clean_logits[:, :-1], other_logits[:, :-1], scored, strict=True):
        log_p, log_q = clean[where].float().log_softmax(-1), other[where].float().log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
    if not math.isfinite(total):
        raise ValueError(
            "the divergence is NaN or infinite: check both sets of logits for NaN and -inf"
        )
    return total / int(scored.sum())


def bits_per_byte(total_nats: float, n_bytes: int) -> float:
    """Summed loss in nats over the bytes of the text it covers, in bits: comparable across
    tokenizers.

    ValueError without bytes, and for a loss that is NaN or infinite.
    """
    if n_bytes < 1 or not math.isfinite(total_nats):
        raise ValueError(
            f"needs a finite loss and at least one byte, got {total_nats} nats over {n_bytes} bytes"
        )
    return total_nats / math.log(2) / n_bytes


def gini(x: Num[Tensor, " n"]) -> float:
    """Concentration of non-negative values, times n / (n - 1): 0 when all are equal, 1 when one has
    everything.

    Without the correction five values cannot exceed 0.8 (Deltas 2003). ValueError below two values,
    on a negative value, NaN, or a sum of zero.
    """
    if (
        x.numel() < 2
        or not torch.isfinite(x).all()
        or bool((x < 0).any())
        or not bool((x > 0).any())
    ):
        raise ValueError(
            "the Gini coefficient needs two or more finite, non-negative values, not all zero"
        )
    ascending, n = x.double().sort().values, len(x)
    rank = torch.arange(1, n + 1, dtype=torch.float64, device=x.device)
    return float((2 * (rank * ascending).sum() / ascending.sum() - (n + 1)) / (n - 1))


def auroc(
    scores: Num[Tensor, "sample feature"], labels: Bool[Tensor, " sample"]
) -> Float[Tensor, " feature"]:
    """P(a positive scores above a negative), ties counting half, for every feature (mid-rank
    Mann-Whitney).

    ValueError on NaN, lengths that differ and when one class is absent.
    """
    if labels.shape != scores.shape[:1]:
        raise ValueError(f"{len(scores)} samples but {len(labels)} labels")
    positive, negative = int(labels.sum()), int((~labels).sum())
    if not positive or not negative:
        raise ValueError(
            f"AUROC needs both classes: {positive} positive and {negative} negative samples"
        )
    if bool(scores.isnan().any()):
        raise ValueError("a score is NaN: an AUROC over it would rank it arbitrarily")
    values = scores.detach().cpu()
    values = values.float() if values.dtype == torch.bfloat16 else values  # NumPy has no bfloat16
    ranks = torch.from_numpy(rankdata(values.numpy(), axis=0))
    above = ranks[labels.cpu()].sum(0) - positive * (positive + 1) / 2
    return (above / (positive * negative)).to(scores.device)


def entropy(p: Float[Tensor, "*batch outcome"]) -> Float[Tensor, "*batch"]:
    """-sum p log p over the last axis, in nats, 0 log 0 = 0. ValueError unless p sums to one.

    Of shares of few counts it comes out too small: compare with a permutation null, not with zero.
    """
    p = _distribution(p)
    return -torch.special.xlogy(p, p).sum(-1)


def jensen_shannon(
    p: Float[Tensor, "*batch outcome"], q: Float[Tensor, "*batch outcome"]
) -> Float[Tensor, "*batch"]:
    """Jensen-Shannon *divergence* in nats (0 to log 2; SciPy's `jensenshannon` is its square root).

    Leave p's samples out of q when q is a pool, and compare with a permutation null: shares of few
    counts differ by chance. ValueError unless both sum to one and have one shape.
    """
    if p.shape != q.shape:
        raise ValueError(f"distributions of shape {tuple(p.shape)} and {tuple(q.shape)} differ")
    p, q = _distribution(p), _distribution(q)
    return (entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2).clamp_min(0)


def _distribution(p: Tensor) -> Tensor:
    p = p.double()
    if (
        not p.shape[-1]
        or not bool((p >= 0).all())
        or not torch.allclose(p.sum(-1), p.new_ones(()), atol=1e-4, rtol=0)
    ):
        raise ValueError(
            "not a distribution: values must be non-negative and sum to one (divide counts by their sum)"
        )
    return p / p.sum(-1, keepdim=True)
