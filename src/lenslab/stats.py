"""Tests and intervals for findings: permutation, bootstrap by document, false discovery rate,
shared seeds.

How a feature's discrimination is tested (`auroc_permutations`):
1. rank every feature over the texts once, ties at their mid-rank;
2. shuffle the labels n times, within strata (register, length bin) where given;
3. all AUROCs of all shuffles are one product, shuffled labels [shuffle, text] times ranks [text,
   feature];
4. p = (1 + shuffles at least as large as the observed) / (1 + n), per feature and, by each
   shuffle's largest value, for the best of all features at once (`family_p`).

Where the feature was chosen on other texts, `matched_auroc_permutations` tests one per category,
and `auroc_difference` compares it with another on the same texts.

p cannot fall below 1 / (1 + n): for a lone discovery among m tests, Benjamini-Hochberg at level q
needs n of at least m / q shuffles. Intervals are two-sided, so a "95 % lower bound" here leaves 2.5
% below it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats
from jaxtyping import Float, Num, Shaped
from torch import Generator, randint

from lenslab.metrics import as_mask, auroc_of_rank_sums, mid_ranks

FEATURES = 2048  # features per matrix product: with 1,000 shuffles 16 MB
LEVEL = 0.95  # of intervals

Scores = Num[np.ndarray, "text feature"]
# booleans, or 0 and 1: [text], or [text, feature], one a column of scores
Mask = Shaped[np.ndarray, "text ..."]
Codes = Shaped[np.ndarray, " text"]
Strata = Codes | None
Values = Num[np.ndarray, "text ..."]
Statistic = Callable[[np.ndarray], Any]
Results = Sequence[float] | Float[np.ndarray, " seed"]


@dataclass(frozen=True)
class Interval:
    """An estimate with its two-sided interval at `level`, over `n` independent units (documents,
    seeds, trials)."""

    estimate: float
    low: float
    high: float
    level: float
    n: int


# Permutation


@dataclass(frozen=True, eq=False)
class PermutationResult:
    """`observed` and `p` per statistic (0-d for a single one); `null_max [shuffle]`: each shuffle's
    largest."""

    observed: Float[np.ndarray, "*statistic"]
    p: Float[np.ndarray, "*statistic"]
    null_max: Float[np.ndarray, " shuffle"]

    @property
    def family_p(self) -> Float[np.ndarray, "*statistic"]:
        """p corrected for having searched all the statistics: against the largest of each shuffle.

        Statistics must share one scale (AUROCs do). Unlike BH over `p` it needs no more shuffles
        for more features.
        """
        n = len(self.null_max)
        below = np.searchsorted(np.sort(self.null_max), _least(self.observed))
        return np.asarray((1 + n - below) / (1 + n))


def _least(observed: np.ndarray) -> np.ndarray | np.floating:
    """What counts as large as the observed: the same grouping may differ in its last digits."""
    return observed - 1e-12 * np.maximum(1, np.abs(observed))


def _against(observed: np.ndarray, null: np.ndarray) -> PermutationResult:
    """A statistic `[*statistic]` against those of the shuffles `[shuffle, *statistic]`."""
    p = (1 + (null >= _least(observed)).sum(axis=0)) / (1 + len(null))
    return PermutationResult(observed, np.asarray(p), null.reshape(len(null), -1).max(axis=1))


def permutation_test(
    statistic: Statistic, labels: Codes, generator: Generator, n: int = 1000, strata: Strata = None
) -> PermutationResult:
    """One-sided test (large is extreme) of `statistic(labels)`, a number or an array of them,
    against shuffled labels. ValueError as `shuffled_orders`, and when the statistic gives NaN."""
    observed = np.asarray(statistic(labels), dtype=np.float64)
    orders = shuffled_orders(labels, generator, n, strata)
    null = np.stack([np.asarray(statistic(labels[order]), dtype=np.float64) for order in orders])
    if np.isnan(observed).any() or np.isnan(null).any():
        raise ValueError("the statistic is NaN for the labels or for a shuffle of them")
    return _against(observed, null)


def auroc_permutations(
    scores: Scores, labels: Mask, generator: Generator, n: int = 1000, strata: Strata = None
) -> PermutationResult:
    """`permutation_test` of the AUROC (label against rest, mid-rank ties) of every feature, all at
    once.

    One-sided: for features that are *silent* on the category pass `-scores`. ValueError on NaN,
    when one class is absent, and as `shuffled_orders`.
    """
    starts = range(0, scores.shape[1], FEATURES)
    blocks = [(scores[:, start : start + FEATURES], labels) for start in starts]
    return _rank_test(blocks, shuffled_orders(labels, generator, n, strata))


def matched_auroc_permutations(
    scores: Scores, labels: Mask, generator: Generator, n: int = 1000, strata: Strata = None
) -> PermutationResult:
    """One AUROC per column: score i against label i, all under the same `n` shuffles of whole label
    rows.

    For tests whose feature was chosen on other texts: each p stands by itself, and only the number
    of tests is left to correct for. Otherwise as `auroc_permutations`.
    """
    rows = np.unique(labels, axis=0, return_inverse=True)[1].reshape(-1)
    columns = list(zip(scores.T[:, :, None], labels.T, strict=True))
    return _rank_test(columns, shuffled_orders(rows, generator, n, strata))


def _rank_test(
    tests: list[tuple[np.ndarray, np.ndarray]], orders: Iterator[np.ndarray]
) -> PermutationResult:
    """Scores `[text, feature]` against labels `[text]`, test by test under the same orders."""
    orders = np.stack(list(orders))  # [shuffle, text]
    results = []
    for scores, labels in tests:
        ranks, labels = mid_ranks(scores), as_mask(labels)
        observed = auroc_of_rank_sums(labels @ ranks, labels.sum(), len(labels))
        shuffles = labels[orders].astype(np.float64) @ ranks  # [shuffle, feature]
        null = auroc_of_rank_sums(shuffles, labels.sum(), len(labels))
        results.append(_against(observed, null))
    return PermutationResult(
        observed=np.concatenate([result.observed for result in results]),
        p=np.concatenate([result.p for result in results]),
        null_max=np.max([result.null_max for result in results], axis=0),
    )


def shuffled_orders(
    labels: Codes, generator: Generator, n: int, strata: Strata
) -> Iterator[np.ndarray]:
    """`n` orders `[text]` that move labels only within their stratum: `labels[order]` is one
    shuffle.

    ValueError on lengths that differ, a stratum that is None or NaN, and where each stratum holds a
    single label.
    """
    strata = np.zeros(len(labels)) if strata is None else np.asarray(strata)
    if pd.isna(strata).any():
        raise ValueError("A stratum is None or NaN: leave such texts out, or name it.")
    codes = np.unique(strata, return_inverse=True)[1]
    if len(set(zip(codes.tolist(), labels.tolist(), strict=True))) == len(set(codes.tolist())):
        raise ValueError("every stratum holds a single label: shuffling them changes nothing")
    rng = _numpy_generator(generator)
    grouped = np.argsort(codes, kind="stable")
    for start in range(0, n, 256):  # many at a time: a call of argsort costs more than its sorting
        orders = np.empty((min(256, n - start), len(codes)), dtype=np.int64)
        # random keys sorted within each stratum: its i-th place gets one of its members
        orders[:, grouped] = np.argsort(codes + rng.random(orders.shape), axis=1)
        yield from orders


def benjamini_hochberg(p: Float[np.ndarray, "*test"]) -> Float[np.ndarray, "*test"]:
    """q-values: rejecting where q <= level keeps the false discovery rate at `level`.

    Give every p that was looked at, in one array: categories and SAEs together. ValueError outside
    [0, 1].
    """
    p = np.asarray(p, dtype=np.float64)
    return scipy.stats.false_discovery_control(p, axis=None, method="bh").reshape(p.shape)


# Intervals


def auroc_difference(
    ours: Scores,
    theirs: Scores,
    inside: Mask,
    outside: Mask,
    generator: Generator,
    n: int = 1000,
    level: float = LEVEL,
) -> Interval:
    """Percentile interval of AUROC(ours) - AUROC(theirs) on the same texts `[text, group]`, drawn
    with replacement in each class.

    With several groups (languages left out in turn) column g is scored on `inside[:, g]` against
    `outside`, and the differences are averaged. Every text must be a document of its own.
    NaN makes the interval NaN; ZeroDivisionError where a class is absent.
    """
    ours, theirs = np.float64(ours), np.float64(theirs)  # unsigned integers have no difference
    inside, outside = as_mask(inside), as_mask(outside)
    rng, groups = _numpy_generator(generator), ours.shape[1]
    k = int(outside.sum())
    drawn_outside = rng.multinomial(k, np.full(k, 1 / k), size=n) / k  # [resample, outside]
    estimate, resampled = 0.0, np.zeros(n)
    for member, our, their in zip(inside.T, ours.T, theirs.T, strict=True):
        wins, their_wins = (
            np.sign(np.subtract.outer(scores[member], scores[outside])) for scores in (our, their)
        )
        gain = (wins - their_wins) / 2  # [inside, outside]
        m = int(member.sum())
        drawn_inside = rng.multinomial(m, np.full(m, 1 / m), size=n) / m  # [resample, inside]
        estimate += float(gain.mean()) / groups
        resampled += ((drawn_inside @ gain) * drawn_outside).sum(axis=1) / groups
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    texts = int((inside.any(axis=1) | outside).sum())
    return Interval(estimate, float(low), float(high), level, texts)


def bootstrap_by_document(
    values: Values,
    documents: Codes,
    generator: Generator,
    statistic: Statistic = np.mean,
    n: int = 1000,
) -> Interval:
    """95 % percentile interval of `statistic(values)`, whole documents drawn with replacement.

    Tokens of one document resemble each other: an interval that draws tokens is far too narrow.
    Below about 20 documents this one is too narrow as well. To compare two methods, pair them: rows
    of (ours, theirs), and a statistic that is the difference. ValueError on lengths that differ,
    fewer than 2 documents and one that is None or NaN.
    """
    values, documents = np.asarray(values), np.asarray(documents)  # a Series goes by its index
    if pd.isna(documents).any():
        raise ValueError("A document is None or NaN: its rows would be in no resample.")
    rows = list(pd.Series(range(len(values))).groupby(documents).indices.values())
    drawn = scipy.stats.bootstrap(
        (np.arange(len(rows)),),
        lambda chosen: statistic(values[np.concatenate([rows[i] for i in chosen])]),
        n_resamples=n,
        confidence_level=LEVEL,
        vectorized=False,
        method="percentile",
        rng=_numpy_generator(generator),
    ).confidence_interval
    return Interval(float(statistic(values)), float(drawn.low), float(drawn.high), LEVEL, len(rows))


def clopper_pearson(k: int, n: int, level: float = LEVEL) -> Interval:
    """Exact interval of a proportion, k successes in n *independent* trials (documents, not
    tokens). ValueError unless 0 <= k <= n and n >= 1."""
    interval = scipy.stats.binomtest(k, n).proportion_ci(level, method="exact")
    return Interval(k / n, float(interval.low), float(interval.high), level, n)


# Shared seeds


@dataclass(frozen=True)
class PairedSeeds:
    """Ours against a peer over shared seeds.

    difference: mean of ours - peer, for scores where higher is better;
    ratio: geometric mean of ours / peer, for errors such as FVU where lower is better; None when
    not asked for. Bounds are the ends of Student's two-sided 95 % interval over the seeds.
    """

    difference: Interval
    ratio: Interval | None

    @property
    def better(self) -> bool:
        """The whole interval on our side."""
        return self.ratio.high < 1 if self.ratio else self.difference.low > 0

    @property
    def no_worse(self) -> bool:
        """Scores: lower bound above -0.01. Errors: upper bound of the ratio below 1.01."""
        return self.ratio.high < 1.01 if self.ratio else self.difference.low > -0.01


def paired_seeds(ours: Results, peer: Results, *, lower_is_better: bool = False) -> PairedSeeds:
    """The rule for "better" and "no worse": paired over at least 5 shared seeds, in the same order.

    ValueError on fewer seeds, lengths that differ, and errors (`lower_is_better`) that are not
    positive.
    """
    ours, peer = np.array([ours, peer], dtype=np.float64)
    if len(ours) < 5:
        raise ValueError(f"{len(ours)} shared seeds: the rule needs at least 5")
    if not lower_is_better:
        return PairedSeeds(_student(ours - peer), None)
    if min(ours.min(), peer.min()) <= 0:
        raise ValueError("errors must be positive for their ratio to mean something")
    return PairedSeeds(_student(ours - peer), _student(np.log(ours / peer), np.exp))


def _student(samples: np.ndarray, scale: Callable[[float], float] = float) -> Interval:
    """Student's interval of the mean, its ends taken to another `scale`."""
    n, mean = len(samples), float(samples.mean())
    half = scipy.stats.t.ppf((1 + LEVEL) / 2, n - 1) * scipy.stats.sem(samples)
    estimate, low, high = (float(scale(end)) for end in (mean, mean - half, mean + half))
    return Interval(estimate, low, high, LEVEL, n)


def _numpy_generator(generator: Generator) -> np.random.Generator:
    """NumPy's generator, seeded from what `derive_generator` gave."""
    return np.random.default_rng(randint(2**63 - 1, (2,), generator=generator).tolist())
