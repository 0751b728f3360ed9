"""Tests and intervals for findings: permutation, bootstrap by document, false discovery rate.

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

from collections.abc import Callable, Iterator
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
    """`observed` AUROC and `p` of each test; `null_max [shuffle]`: each shuffle's largest AUROC."""

    observed: Float[np.ndarray, " test"]
    p: Float[np.ndarray, " test"]
    null_max: Float[np.ndarray, " shuffle"]

    @property
    def family_p(self) -> Float[np.ndarray, " test"]:
        """p corrected for having searched all features: against the largest AUROC of each shuffle.

        Unlike BH over `p` it needs no more shuffles for more features.
        """
        n = len(self.null_max)
        below = np.searchsorted(np.sort(self.null_max), self.observed)
        return (1 + n - below) / (1 + n)


def auroc_permutations(
    scores: Scores, labels: Mask, generator: Generator, n: int = 1000, strata: Strata = None
) -> PermutationResult:
    """Test of the AUROC (label against rest, mid-rank ties) of every feature, all at once, against
    labels shuffled within `strata`.

    One-sided (large is extreme): for features that are *silent* on the category pass `-scores`.
    ValueError on NaN, when one class is absent, and as `shuffled_orders`.
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


def _rank_test(tests: list[tuple], orders: Iterator[np.ndarray]) -> PermutationResult:
    """Scores `[text, feature]` against labels `[text]`, test by test under the same orders."""
    orders = np.stack(list(orders))  # [shuffle, text]
    results = []
    for scores, labels in tests:
        ranks, labels = mid_ranks(scores), as_mask(labels)
        observed = auroc_of_rank_sums(labels @ ranks, labels.sum(), len(labels))
        shuffles = labels[orders].astype(np.float64) @ ranks  # [shuffle, feature]
        null = auroc_of_rank_sums(shuffles, labels.sum(), len(labels))
        p = (1 + (null >= observed).sum(axis=0)) / (1 + len(null))
        results.append(PermutationResult(observed, p, null.max(axis=1)))
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
        wins = [np.sign(np.subtract.outer(s[member], s[outside])) for s in (our, their)]
        gain = (wins[0] - wins[1]) / 2  # [inside, outside]
        m = int(member.sum())
        drawn_inside = rng.multinomial(m, np.full(m, 1 / m), size=n) / m  # [resample, inside]
        estimate += float(gain.mean()) / groups
        resampled += ((drawn_inside @ gain) * drawn_outside).sum(axis=1) / groups
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    texts = int((inside.any(axis=1) | outside).sum())
    return Interval(estimate, float(low), float(high), level, texts)


def bootstrap_by_document(
    values: Num[np.ndarray, "row ..."],
    documents: Shaped[np.ndarray, " row"],
    generator: Generator,
    statistic: Callable[[np.ndarray], Any] = np.mean,
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

    def redrawn(chosen: np.ndarray) -> Any:
        return statistic(values[np.concatenate([rows[i] for i in chosen])])

    options = dict(confidence_level=LEVEL, vectorized=False, method="percentile")
    options |= dict(n_resamples=n, rng=_numpy_generator(generator))
    drawn = scipy.stats.bootstrap((np.arange(len(rows)),), redrawn, **options).confidence_interval
    return Interval(float(statistic(values)), float(drawn.low), float(drawn.high), LEVEL, len(rows))


def smallest_difference(reseeds: Num[np.ndarray, " seed"], level: float = LEVEL) -> float:
    """How far two single trainings must lie apart before reseeding alone is no explanation: the
    half-width of the prediction interval of the difference of two draws, from values over seeds.

    NaN for fewer than two: one seed tells nothing of its spread.
    """
    values = np.asarray(reseeds, dtype=np.float64)
    if len(values) < 2:
        return float("nan")
    t = scipy.stats.t.ppf((1 + level) / 2, len(values) - 1)  # few seeds know their own sd badly
    return float(t * np.sqrt(2) * values.std(ddof=1))


def clopper_pearson(k: int, n: int, level: float = LEVEL) -> Interval:
    """Exact interval of a proportion, k successes in n *independent* trials (documents, not
    tokens). ValueError unless 0 <= k <= n and n >= 1."""
    interval = scipy.stats.binomtest(k, n).proportion_ci(level, method="exact")
    return Interval(k / n, float(interval.low), float(interval.high), level, n)


def _numpy_generator(generator: Generator) -> np.random.Generator:
    """NumPy's generator, seeded from what `derive_generator` gave."""
    return np.random.default_rng(randint(2**63 - 1, (2,), generator=generator).tolist())
