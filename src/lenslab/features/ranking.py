"""The older definitions, which count strong texts: kept under their own names, to stand beside the
tested ones.

1. A text is strong on a feature above a threshold: 5.0 for every feature of every layer, or,
   scale-free, half of the feature's own largest value (`threshold="half"`).
2. Specialist of a category: of the `top` features with the largest value inside it, the one with
   the best score, texts strong inside minus texts strong outside; "true" where the score is above
   0. The score starts at -1: where none of the features does better, there is none (feature -1).
3. Nothing is held out and nothing is corrected, so categories that mean nothing have specialists as
   well: `count_specialists_null` says how many.

Ties go to the lowest id (among specialists of equal score to the one with the largest value inside,
then to the lowest id), and `tied` says how many features share the place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import scipy.sparse
from jaxtyping import Float, Int

from lenslab.features.activations import Indices, Matrix, blocks, check_matrix, columns_of
from lenslab.files import Result
from lenslab.runtime import derive_generator
from lenslab.stats import shuffled_orders


@dataclass(frozen=True, eq=False)
class FeatureSummary(Result):
    """One number per feature for each notion; the methods rank. A feature fires on a text where it
    is above zero."""

    n_texts: int
    largest: Float[np.ndarray, " feature"]
    largest_text: Int[np.ndarray, " feature"]  # the first text with that value
    fired: Int[np.ndarray, " feature"]  # texts
    mean: Float[np.ndarray, " feature"]  # over all texts
    strong: Int[
        np.ndarray, " feature"
    ]  # texts above half of the feature's own largest value: no fixed threshold
    least_fraction: (
        Float[np.ndarray, " feature"] | None
    )  # share of texts fired on, in the category where it is least

    @property
    def frequency(self) -> Float[np.ndarray, " feature"]:
        """Share of the texts on which the feature fires."""
        return self.fired / self.n_texts

    @property
    def mean_when_active(self) -> Float[np.ndarray, " feature"]:
        """Mean over the texts on which it fires (for features that are never negative); 0 where it
        never does."""
        return self.mean * self.n_texts / np.maximum(self.fired, 1)

    @property
    def composite(self) -> Float[np.ndarray, " feature"]:
        """Frequency times mean over all texts: constant and strong. (With the mean when active it
        were the mean.)"""
        return self.frequency * self.mean

    def strongest(self, n: int = 10) -> pd.DataFrame:
        """By largest value."""
        return self._ranked([-self.largest], n)

    def frequent(self, n: int = 10) -> pd.DataFrame:
        """By number of texts on which they fire."""
        return self._ranked([-self.fired], n)

    def selective(self, n: int = 10) -> pd.DataFrame:
        """Strong on the fewest texts; as many are strong on a single one, see `tied`, ranked by
        strength."""
        return self._ranked(
            [np.where(self.largest > 0, self.strong, self.n_texts + 1)], n, self.largest > 0
        )

    def most_composite(self, n: int = 10) -> pd.DataFrame:
        """By composite score."""
        return self._ranked([-self.composite], n)

    def general(self, n: int = 10) -> pd.DataFrame:
        """Features that fire in every category, by the share of texts in the category where that
        share is least."""
        if self.least_fraction is None:
            raise ValueError(
                "General features need categories: summarize_features(matrix, categories)."
            )
        return self._ranked([-self.least_fraction], n, self.least_fraction > 0)

    def to_frame(self) -> pd.DataFrame:
        """One row per feature."""
        columns = {key: value for key, value in vars(self).items() if isinstance(value, np.ndarray)}
        derived = ("frequency", "mean_when_active", "composite")
        return pd.DataFrame(columns | {key: getattr(self, key) for key in derived}).rename_axis(
            "feature"
        )

    def _ranked(
        self, keys: list[np.ndarray], n: int, allowed: np.ndarray | None = None
    ) -> pd.DataFrame:
        order = np.lexsort([np.arange(len(self.largest)), -self.largest, *reversed(keys)])
        if allowed is not None:
            order = order[allowed[order]]
        chosen = order[:n]
        shared = keys[0] if allowed is None else keys[0][allowed]
        return (
            self.to_frame()
            .loc[chosen]
            .assign(tied=[int((shared == keys[0][i]).sum()) for i in chosen])
        )


def summarize_features(
    matrix: Matrix, categories: Sequence | np.ndarray | None = None
) -> FeatureSummary:
    """The notions of `FeatureSummary` for every feature of a pooled `[text, feature]` matrix.

    `categories`: one label per text; without them general features are not known. ValueError on
    NaN, Inf, no text and lengths that differ.
    """
    matrix = check_matrix(matrix, categories)
    n, width = matrix.shape
    groups = (
        []
        if categories is None
        else [np.asarray(categories) == c for c in np.unique(np.asarray(categories))]
    )
    largest, mean, least = np.zeros(width), np.zeros(width), np.ones(width)
    where, fired, strong = (np.zeros(width, dtype=np.int64) for _ in range(3))
    for part, block in blocks(matrix):
        largest[part], where[part], mean[part] = (
            block.max(0),
            block.argmax(0),
            block.mean(0, dtype=np.float64),
        )
        fired[part] = (block > 0).sum(0)
        strong[part] = ((block > largest[part] / 2) & (block > 0)).sum(0)
        for group in groups:
            least[part] = np.minimum(least[part], (block[group] > 0).mean(0))
    return FeatureSummary(
        n, largest, where, fired, mean, strong, None if categories is None else least
    )


def category_profile(
    matrix: Matrix, categories: Sequence | np.ndarray, features: Indices
) -> pd.DataFrame:
    """Features x categories: `texts`, `fired` of them, their `fraction`, and `mean` and `largest`
    over all of them."""
    matrix = check_matrix(matrix, categories)
    values = columns_of(matrix, features)
    rows = []
    for column, feature in enumerate(features):
        for category in np.unique(np.asarray(categories)):
            inside = values[np.asarray(categories) == category, column]
            fired = int((inside > 0).sum())
            mean, largest = float(inside.mean(dtype=np.float64)), float(inside.max())
            rows.append(
                (int(feature), category, len(inside), fired, fired / len(inside), mean, largest)
            )
    return pd.DataFrame(
        rows, columns=["feature", "category", "texts", "fired", "fraction", "mean", "largest"]
    )


Threshold = float | int | Literal["half"]


@dataclass(frozen=True)
class Counted(Result):
    """A feature chosen by a count or a value, and how many features share that place."""

    feature: int
    value: float
    text: int  # the text on which the feature is largest
    tied: int


def count_strong(matrix: Matrix, threshold: Threshold = 5.0) -> Int[np.ndarray, " feature"]:
    """Texts on which each feature is strong: above the threshold, or above half of its own largest
    value."""
    return _strong(_dense(matrix), threshold).sum(axis=0)


def strongest_feature(matrix: Matrix) -> Counted:
    """The feature with the largest value of all. ValueError where none fires."""
    values = _firing(matrix)
    return _first(values, values.max(axis=0))


def most_frequent_feature(matrix: Matrix) -> Counted:
    """The feature that is above zero on the most texts. ValueError where none is on any."""
    values = _firing(matrix)
    return _first(values, (values > 0).sum(axis=0))


def most_selective_feature(matrix: Matrix, threshold: Threshold = 5.0) -> Counted:
    """Of the features strong on some text, one strong on the fewest; `tied` is usually large, so it
    says little.

    ValueError where no feature is ever strong.
    """
    values = _dense(matrix)
    strong = _strong(values, threshold).sum(axis=0)
    if not strong.any():
        raise ValueError(
            f"No feature is above {threshold} on any text: the threshold does not fit this layer."
        )
    found = _first(values, np.where(strong > 0, -strong, -len(values) - 1))
    return Counted(found.feature, -found.value, found.text, found.tied)


def count_specialists(
    matrix: Matrix, categories: Sequence | np.ndarray, threshold: Threshold = 5.0, top: int = 5
) -> pd.DataFrame:
    """One row per category: `feature`, `score`, `inside` and `outside` (strong texts), their
    totals, `largest`, `tied`.

    `tied` counts those of the `top` features that share the best score. ValueError for fewer than
    two categories.
    """
    values, names, codes = _labelled(matrix, categories)
    strong, rows = _strong(values, threshold), []
    for c, name in enumerate(names):
        member = codes == c
        chosen, score, inside, outside = _candidates(
            values[member].max(axis=0), strong, member, top
        )
        best = int(score.argmax())
        found = score[best] > -1
        rows.append(
            {
                "category": name,
                "feature": int(chosen[best]) if found else -1,
                "score": int(max(score[best], -1)),
                "inside": int(inside[best]) if found else 0,
                "outside": int(outside[best]) if found else 0,
                "n_inside": int(member.sum()),
                "n_outside": int((~member).sum()),
                "largest": float(values[member, chosen[best]].max()) if found else 0.0,
                "tied": int((score == score[best]).sum()) if found else 0,
            }
        )
    return pd.DataFrame(rows)


@dataclass(frozen=True, eq=False)
class CountNull(Result):
    """How many categories have a score above 0: with the labels as they are, and with shuffled
    ones."""

    observed: int
    null: Int[np.ndarray, " shuffle"]
    categories: int
    threshold: float | str

    @property
    def mean_null(self) -> float:
        """Categories with a "specialist" when the labels mean nothing, on average."""
        return float(self.null.mean())

    @property
    def p(self) -> float:
        """Share of shuffles with at least as many."""
        return float((1 + (self.null >= self.observed).sum()) / (1 + len(self.null)))

    def to_frame(self) -> pd.DataFrame:
        """One row."""
        columns = {
            "threshold": self.threshold,
            "observed": self.observed,
            "categories": self.categories,
        }
        columns |= {
            "null_mean": self.mean_null,
            "null_low": self.null.min(),
            "null_high": self.null.max(),
        }
        return pd.DataFrame([columns | {"p": self.p}])


def count_specialists_null(
    matrix: Matrix,
    categories: Sequence | np.ndarray,
    threshold: Threshold = 5.0,
    top: int = 5,
    *,
    n: int = 200,
    seed: int = 0,
    strata: Sequence | np.ndarray | None = None,
) -> CountNull:
    """`count_specialists` on the labels and on `n` shuffles of them (within strata where given)."""
    _, names, codes = _labelled(matrix, categories)
    values = _firing(matrix)
    values = values[:, (values > 0).any(axis=0)]
    strong, k = _strong(values, threshold), len(names)

    def specialists(codes: np.ndarray) -> int:
        order = np.argsort(codes, kind="stable")
        starts = np.searchsorted(codes[order], np.arange(k))
        inside = np.maximum.reduceat(values[order], starts, axis=0)  # [category, feature]
        return sum(
            bool((_candidates(inside[c], strong, codes == c, top)[1] > 0).any()) for c in range(k)
        )

    generator = derive_generator(seed, "count specialists")
    strata = None if strata is None else np.asarray(strata)
    null = [specialists(codes[order]) for order in shuffled_orders(codes, generator, n, strata)]
    return CountNull(specialists(codes), np.array(null), k, threshold)


def features_per_category(
    matrix: Matrix, categories: Sequence | np.ndarray, top: int = 5
) -> pd.DataFrame:
    """Per category the `top` features above zero on most of its texts: `category`, `feature`,
    `texts`, `of`."""
    values, names, codes = _labelled(matrix, categories)
    rows = []
    for c, name in enumerate(names):
        fired = (values[codes == c] > 0).sum(axis=0)
        rows += [
            (name, int(f), int(fired[f]), int((codes == c).sum())) for f in _largest(fired, top)
        ]
    return pd.DataFrame(rows, columns=["category", "feature", "texts", "of"])


def concept_by_count(
    matrix: Matrix,
    threshold: Threshold = 5.0,
    top: int = 5,
    by: Literal["strong", "total"] = "strong",
) -> pd.DataFrame:
    """Features of some concept's texts by number of strong texts, then by sum, or the other way
    round.

    Columns `feature`, `strong`, `total` (sum over the strong texts), `mean` (that by their number).
    No background is looked at, so a feature that is strong on everything comes first:
    `concept_features` asks the other question.
    """
    values = _dense(matrix)
    strong = _strong(values, threshold)
    count, total = strong.sum(axis=0), (values * strong).sum(axis=0, dtype=np.float64)
    first, second = (count, total) if by == "strong" else (total, count)
    order = np.lexsort([np.arange(len(count)), -second, -first])[:top]
    order = order[count[order] > 0]
    columns = {
        "feature": order,
        "strong": count[order],
        "total": total[order],
        "mean": total[order] / count[order],
    }
    return pd.DataFrame(columns)


def _dense(matrix: Matrix) -> Float[np.ndarray, "text feature"]:
    matrix = check_matrix(matrix)
    return (matrix.toarray() if scipy.sparse.issparse(matrix) else matrix).astype(
        np.float64, copy=False
    )


def _firing(matrix: Matrix) -> Float[np.ndarray, "text feature"]:
    values = _dense(matrix)
    if not (values > 0).any():
        raise ValueError("No feature fires on any text: there is nothing to count.")
    return values


def _labelled(
    matrix: Matrix, categories: Sequence | np.ndarray
) -> tuple[np.ndarray, list, np.ndarray]:
    check_matrix(matrix, categories)
    names, codes = np.unique(np.asarray(categories), return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"Two or more categories are needed, got {names.tolist()}.")
    return _dense(matrix), names.tolist(), codes


def _strong(values: np.ndarray, threshold: Threshold) -> np.ndarray:
    return (
        (values > 0) & (values > values.max(axis=0) / 2)
        if threshold == "half"
        else values > float(threshold)
    )


def _largest(values: np.ndarray, n: int) -> np.ndarray:
    """Places of the n largest; of equal ones, those with the lowest id."""
    if n < len(values):
        least = np.partition(values, len(values) - n)[len(values) - n]
        few = np.flatnonzero(values >= least)
        return few[np.argsort(-values[few], kind="stable")][:n]
    return np.argsort(-values, kind="stable")


def _candidates(
    largest: np.ndarray, strong: np.ndarray, member: np.ndarray, top: int
) -> tuple[np.ndarray, ...]:
    """(the `top` features inside, their scores, strong texts inside and outside)."""
    chosen = _largest(largest, top)
    inside = strong[np.ix_(member, chosen)].sum(axis=0)
    outside = strong[:, chosen].sum(axis=0) - inside
    return chosen, inside - outside, inside, outside


def _first(values: np.ndarray, by: np.ndarray) -> Counted:
    feature = int(by.argmax())
    text = int(values[:, feature].argmax())
    return Counted(feature, float(by[feature]), text, int((by == by[feature]).sum()))
