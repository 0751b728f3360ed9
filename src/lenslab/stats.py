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

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats
import torch
from jaxtyping import Bool, Float, Num, Shaped
from tqdm.auto import tqdm

FEATURES = 2048  # features per matrix product: with 1,000 shuffles 16 MB


CELLS = 4_000_000  # resamples x documents held at a time: 32 MB


@dataclass(frozen=True)
class Interval:
    """An estimate with its two-sided interval at `level`, over `n` independent units (documents,
    seeds, trials)."""

    estimate: float
    low: float
    high: float
    level: float
    n: int


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
        above = np.array(
            [np.sum(self.null_max >= value - _slack(value)) for value in self.observed.ravel()]
        )
        return ((1 + above) / (1 + len(self.null_max))).reshape(self.observed.shape)


def permutation_test(
    statistic: Callable[[np.ndarray], float | np.ndarray],
    labels: Shaped[np.ndarray, " sample"],
    generator: torch.Generator,
    n: int = 1000,
    strata: Shaped[np.ndarray, " sample"] | None = None,
) -> PermutationResult:
    """One-sided test (large is extreme) of `statistic(labels)` against shuffled labels.

    The statistic gives a number or an array of them. ValueError when it gives NaN, when n < 1, when
    lengths differ and when shuffling changes nothing because every stratum holds a single label.
    """
    labels = np.asarray(labels)
    observed = _finite(statistic(labels), "the statistic of the labels as given")
    above, null_max = np.zeros(observed.shape), np.empty(n)
    for i, order in enumerate(
        tqdm(shuffled_orders(labels, generator, n, strata), "permutations", n, delay=3, leave=False)
    ):
        value = _finite(statistic(labels[order]), "the statistic of shuffled labels")
        above += value >= observed - _slack(observed)
        null_max[i] = value.max()
    return PermutationResult(observed, np.asarray((1 + above) / (1 + n)), null_max)


def auroc_permutations(
    scores: Num[np.ndarray, "text feature"],
    labels: Bool[np.ndarray, " text"],
    generator: torch.Generator,
    n: int = 1000,
    strata: Shaped[np.ndarray, " text"] | None = None,
) -> PermutationResult:
    """`permutation_test` of the AUROC (label against rest, mid-rank ties) of every feature, all at
    once.

    One-sided: for features that are *silent* on the category pass `-scores`. ValueError on NaN,
    lengths that differ and when one class is absent.
    """
    scores, labels = np.asarray(scores), np.asarray(labels, dtype=bool)
    if scores.ndim != 2 or len(scores) != len(labels):
        raise ValueError(
            f"scores must be [text, feature] with one label a text, got {scores.shape} and {labels.shape}"
        )
    if np.isnan(scores).any():
        raise ValueError("a score is NaN: an AUROC over it would rank it arbitrarily")
    inside, outside = int(labels.sum()), int((~labels).sum())
    if not inside or not outside:
        raise ValueError(
            f"AUROC needs both classes: {inside} texts inside the category, {outside} outside"
        )
    shuffled = np.stack(
        [labels[order] for order in shuffled_orders(labels, generator, n, strata)]
    ).astype(np.float64)
    observed, above = np.empty(scores.shape[1]), np.empty(scores.shape[1])
    null_max = np.full(n, -np.inf)
    for start in range(0, scores.shape[1], FEATURES):
        part = slice(start, start + FEATURES)
        ranks = scipy.stats.rankdata(scores[:, part], axis=0)
        u, null = (
            labels @ ranks,
            shuffled @ ranks,
        )  # sums of half-integers: exact, so >= needs no tolerance
        observed[part], above[part] = u, (null >= u).sum(axis=0)
        null_max = np.maximum(null_max, null.max(axis=1))
    smallest, pairs = inside * (inside + 1) / 2, inside * outside
    return PermutationResult(
        (observed - smallest) / pairs, (1 + above) / (1 + n), (null_max - smallest) / pairs
    )


def matched_auroc_permutations(
    scores: Num[np.ndarray, "text test"],
    labels: Bool[np.ndarray, "text test"],
    generator: torch.Generator,
    n: int = 1000,
    strata: Shaped[np.ndarray, " text"] | None = None,
) -> PermutationResult:
    """One AUROC per column: score i against label i, all under the same `n` shuffles of whole label
    rows.

    For tests whose feature was chosen on other texts: each p stands by itself, and only the number
    of tests is left to correct for. Otherwise as `auroc_permutations`.
    """
    scores, labels = np.asarray(scores), np.asarray(labels, dtype=bool)
    if scores.shape != labels.shape or scores.ndim != 2:
        raise ValueError(
            f"one score and one label per text and test, got {scores.shape} and {labels.shape}"
        )
    if np.isnan(scores).any():
        raise ValueError("a score is NaN: an AUROC over it would rank it arbitrarily")
    inside = labels.sum(axis=0)
    if not (inside * (len(labels) - inside)).all():
        raise ValueError(
            "AUROC needs both classes: a test has no text inside its category, or none outside"
        )
    ranks = scipy.stats.rankdata(scores, axis=0)
    observed, above, null_max = (labels * ranks).sum(axis=0), np.zeros(labels.shape[1]), np.empty(n)
    smallest, pairs = inside * (inside + 1) / 2, inside * (len(labels) - inside)
    rows = np.unique(labels, axis=0, return_inverse=True)[1].reshape(-1)
    for i, order in enumerate(shuffled_orders(rows, generator, n, strata)):
        null = np.einsum("tk,tk->k", labels[order], ranks)
        above += null >= observed
        null_max[i] = ((null - smallest) / pairs).max()
    return PermutationResult((observed - smallest) / pairs, (1 + above) / (1 + n), null_max)


def auroc_difference(
    ours: Num[np.ndarray, "text group"],
    theirs: Num[np.ndarray, "text group"],
    inside: Bool[np.ndarray, "text group"],
    outside: Bool[np.ndarray, " text"],
    generator: torch.Generator,
    n: int = 1000,
    level: float = 0.95,
) -> Interval:
    """Percentile interval of AUROC(ours) - AUROC(theirs) on the same texts, drawn with replacement
    in each class.

    With several groups (languages left out in turn) column g is scored on `inside[:, g]` against
    `outside`, and the differences are averaged. Every text must be a document of its own.
    ValueError on NaN, on shapes that differ and when a class is absent.
    """
    ours, theirs = _finite(ours, "our scores"), _finite(theirs, "the control's scores")
    inside, outside = np.asarray(inside, dtype=bool), np.asarray(outside, dtype=bool)
    if (
        not ours.shape == theirs.shape == inside.shape
        or ours.ndim != 2
        or outside.shape != ours.shape[:1]
    ):
        raise ValueError(
            f"scores of shape {ours.shape} and {theirs.shape} for labels of shape {inside.shape}"
        )
    if not outside.any() or not inside.any(axis=0).all() or (inside & outside[:, None]).any():
        raise ValueError("AUROC needs texts inside every group and outside, and none in both")
    rng, k, groups = _numpy_generator(generator), int(outside.sum()), ours.shape[1]
    drawn_outside = rng.multinomial(k, np.full(k, 1 / k), size=_positive(n)) / k
    estimate, resampled = 0.0, np.zeros(n)
    for g in range(groups):
        member = inside[:, g]
        wins = [
            (s[member, g, None] > s[None, outside, g])
            + 0.5 * (s[member, g, None] == s[None, outside, g])
            for s in (ours, theirs)
        ]
        gain, m = wins[0] - wins[1], int(member.sum())  # [inside, outside]
        drawn_inside = rng.multinomial(m, np.full(m, 1 / m), size=n) / m
        estimate += float(gain.mean()) / groups
        resampled += ((drawn_inside @ gain) * drawn_outside).sum(axis=1) / groups
    low, high = np.quantile(resampled, _tails(level))
    return Interval(
        estimate, float(low), float(high), level, int((inside.any(axis=1) | outside).sum())
    )


def bootstrap_by_document(
    values: Num[np.ndarray, "item ..."],
    documents: Shaped[np.ndarray, " item"],
    generator: torch.Generator,
    statistic: Callable[[np.ndarray], float] = np.mean,
    n: int = 1000,
    level: float = 0.95,
) -> Interval:
    """Percentile interval of `statistic(values)`, whole documents drawn with replacement.

    Tokens of one document resemble each other: an interval that draws tokens is far too narrow.
    Below about 20 documents this one is too narrow as well. ValueError on NaN, lengths that differ
    and fewer than 2 documents.
    """
    values = np.asarray(values)
    members = _documents(values, documents)
    estimate = float(_finite(statistic(values), "the statistic"))
    rng, k = _numpy_generator(generator), len(members)
    if (
        statistic is np.mean and values.ndim == 1
    ):  # resampled sums over resampled counts: one product
        sums, counts = (
            np.array([values[m].sum(dtype=np.float64) for m in members]),
            np.array([len(m) for m in members]),
        )
        resampled, block = np.empty(_positive(n)), max(1, CELLS // k)
        for start in range(0, n, block):
            drawn = rng.multinomial(k, np.full(k, 1 / k), size=min(block, n - start))
            resampled[start : start + block] = (drawn @ sums) / (drawn @ counts)
    else:
        resampled = np.empty(_positive(n))
        for i in tqdm(range(n), "bootstrap", delay=3, leave=False):
            rows = np.concatenate([members[j] for j in rng.integers(0, k, size=k)])
            resampled[i] = _finite(statistic(values[rows]), "the statistic of a resample")
    low, high = np.quantile(resampled, _tails(level))
    return Interval(estimate, float(low), float(high), level, k)


def paired_bootstrap(
    ours: Num[np.ndarray, "item ..."],
    theirs: Num[np.ndarray, "item ..."],
    documents: Shaped[np.ndarray, " item"],
    generator: torch.Generator,
    statistic: Callable[[np.ndarray], float] = np.mean,
    n: int = 1000,
    level: float = 0.95,
) -> Interval:
    """Interval of `statistic(ours) - statistic(theirs)`, both on the same drawn documents.

    A statistic that needs labels takes them as a column: rows of (score, label), for instance.
    ValueError for two shapes, and as `bootstrap`.
    """
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    if ours.shape != theirs.shape:
        raise ValueError(
            f"paired values must match item by item, got shapes {ours.shape} and {theirs.shape}"
        )
    if statistic is np.mean and ours.ndim == 1:
        return bootstrap_by_document(
            ours.astype(np.float64) - theirs, documents, generator, np.mean, n, level
        )
    both = np.stack([ours, theirs], axis=1)
    return bootstrap_by_document(
        both,
        documents,
        generator,
        lambda rows: statistic(rows[:, 0]) - statistic(rows[:, 1]),
        n,
        level,
    )


def benjamini_hochberg(p: Float[np.ndarray, "*test"]) -> Float[np.ndarray, "*test"]:
    """q-values: rejecting where q <= level keeps the false discovery rate at `level` (SciPy's, over
    all entries).

    Give every p that was looked at, in one array: categories and SAEs together. ValueError outside
    [0, 1].
    """
    p = _finite(p, "p-values")
    if (p < 0).any() or (p > 1).any():
        raise ValueError("p-values lie in [0, 1]")
    return scipy.stats.false_discovery_control(p, axis=None, method="bh").reshape(p.shape)


def clopper_pearson(k: int, n: int, level: float = 0.95) -> Interval:
    """Exact interval of a proportion, k successes in n *independent* trials (documents, not
    tokens).

    ValueError unless 0 <= k <= n and n >= 1.
    """
    if not 0 <= k <= n or n < 1:
        raise ValueError(f"needs 0 <= k <= n and n >= 1, got k={k}, n={n}")
    _tails(level)
    interval = scipy.stats.binomtest(k, n).proportion_ci(level, method="exact")
    return Interval(k / n, float(interval.low), float(interval.high), level, n)


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


def paired_seeds(
    ours: Sequence[float] | Float[np.ndarray, " seed"],
    peer: Sequence[float] | Float[np.ndarray, " seed"],
    *,
    lower_is_better: bool = False,
) -> PairedSeeds:
    """The rule for "better" and "no worse": paired over at least 5 shared seeds, in the same order.

    ValueError on fewer seeds, lengths that differ, NaN, and errors (`lower_is_better`) that are not
    positive.
    """
    ours, peer = _finite(ours, "our results"), _finite(peer, "the peer's results")
    if ours.shape != peer.shape or ours.ndim != 1:
        raise ValueError(
            f"one result per shared seed on both sides, got shapes {ours.shape} and {peer.shape}"
        )
    if len(ours) < 5:
        raise ValueError(f"{len(ours)} shared seeds: the rule needs at least 5")
    ratio = None
    if lower_is_better:
        if (ours <= 0).any() or (peer <= 0).any():
            raise ValueError("errors must be positive for their ratio to mean something")
        logs = _student(np.log(ours / peer))
        ratio = Interval(
            math.exp(logs.estimate), math.exp(logs.low), math.exp(logs.high), logs.level, logs.n
        )
    return PairedSeeds(_student(ours - peer), ratio)


def _student(differences: np.ndarray, level: float = 0.95) -> Interval:
    n, mean = len(differences), float(differences.mean())
    half = float(
        scipy.stats.t.ppf(_tails(level)[1], n - 1) * differences.std(ddof=1) / math.sqrt(n)
    )
    return Interval(mean, mean - half, mean + half, level, n)


def shuffled_orders(
    labels: np.ndarray, generator: torch.Generator, n: int, strata: np.ndarray | None
) -> Iterator:
    """`n` orders `[sample]` that move labels only within their stratum: `labels[order]` is one
    shuffle.

    ValueError on NaN labels, lengths that differ, and strata that each hold a single label.
    """
    if labels.ndim != 1 or not len(labels):
        raise ValueError(f"labels must be a list with at least one entry, got shape {labels.shape}")
    if strata is None:
        strata = np.zeros(len(labels), dtype=np.int64)
    if np.shape(strata) != labels.shape:
        raise ValueError(f"{len(labels)} labels but strata of shape {np.shape(strata)}")
    if labels.dtype.kind == "f" and np.isnan(labels).any():
        raise ValueError("a label is NaN")
    codes = np.unique(np.asarray(strata), return_inverse=True)[1]
    if (
        len(np.unique(np.stack([codes, np.unique(labels, return_inverse=True)[1]]), axis=1).T)
        == codes.max() + 1
    ):
        raise ValueError(
            "every stratum holds a single label: shuffling changes nothing. Use coarser strata"
        )
    return _orders(codes, _numpy_generator(generator), _positive(n))


def _orders(codes: np.ndarray, rng: np.random.Generator, n: int) -> Iterator[np.ndarray]:
    """Random keys sorted within each stratum: the i-th place of a stratum gets one of its
    members."""
    grouped = np.argsort(codes, kind="stable")
    for start in range(
        0, n, 256
    ):  # many at a time: one call of argsort each would cost more than the sorting
        orders = np.empty((min(256, n - start), len(codes)), dtype=np.int64)
        orders[:, grouped] = np.argsort(codes + rng.random(orders.shape), axis=1)
        yield from orders


def _documents(values: np.ndarray, documents: np.ndarray) -> list[np.ndarray]:
    """The rows of each document."""
    if np.shape(documents) != values.shape[:1]:
        raise ValueError(
            f"values of shape {values.shape} need one document each, got {np.shape(documents)}"
        )
    _finite(values, "values")
    codes = np.unique(np.asarray(documents), return_inverse=True)[1]
    members = np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])
    if len(members) < 2:
        raise ValueError(
            "all values come from one document: their spread over documents cannot be known"
        )
    return members


def _finite(values, what: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if not array.size or not np.isfinite(array).all():
        raise ValueError(
            f"{what} must be present and finite: found {'nothing' if not array.size else 'NaN or Inf'}"
        )
    return array


def _slack(observed):
    """A shuffle that repeats the observed grouping may differ in the last digits; it still
    counts."""
    return 1e-12 * np.maximum(1, np.abs(observed))


def _positive(n: int) -> int:
    if n < 1:
        raise ValueError(f"needs at least one resample, got n={n}")
    return n


def _tails(level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"a level lies between 0 and 1, got {level}")
    return (1 - level) / 2, (1 + level) / 2


def _numpy_generator(generator: torch.Generator) -> np.random.Generator:
    """NumPy's generator, seeded from what `derive_generator` gave."""
    return np.random.default_rng(torch.randint(2**63 - 1, (2,), generator=generator).tolist())
