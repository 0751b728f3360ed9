"""Which features are strong, frequent, selective; and the same by counting strong texts.

`summarize_features` computes one number per feature for each notion; the methods of its result
rank. Rankings say how many features share a place; ties go to the stronger, then to the lower id.

Counting is an older way, kept to stand beside the tested ones:
1. a text is strong on a feature above a threshold: 5.0 for every feature of every layer, or,
   scale-free, half of the feature's own largest value (`threshold="half"`);
2. `count_leaders`: first place by largest value, by texts it fires on, by fewest strong texts; ties
   go to the lowest id, and `tied` says how many features share the place;
3. `count_specialists`: of the five features with the largest value inside a category, the one with
   the best score, texts strong inside minus texts strong outside. The score starts at -1: where
   none of the features does better, there is none (feature -1);
4. nothing is held out and nothing is corrected, so categories that mean nothing have specialists as
   well: `count_specialists_null` says how many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import scipy.sparse
from jaxtyping import Float, Int, Shaped

from lenslab.features.activations import Indices, Labels, Matrix, check_matrix, columns_of, dense
from lenslab.files import Result
from lenslab.runtime import derive_generator
from lenslab.stats import shuffled_orders

Threshold = float | int | Literal["half"]
TOP = 5  # features of a category whose strong texts are counted


@dataclass(frozen=True, eq=False)
class FeatureSummary(Result):
    """One number per feature for each notion; the methods rank. A feature fires on a text where it
    is above zero."""

    n_texts: int
    largest: Float[np.ndarray, " feature"]
    fired: Int[np.ndarray, " feature"]  # texts
    mean: Float[np.ndarray, " feature"]  # over all texts
    strong: Int[np.ndarray, " feature"]  # texts above the threshold
    # share of texts fired on, in the category where it is least; NaN without categories
    least_fraction: Float[np.ndarray, " feature"]

    @property
    def frequency(self) -> Float[np.ndarray, " feature"]:
        """Share of the texts on which the feature fires."""
        return self.fired / self.n_texts

    @property
    def composite(self) -> Float[np.ndarray, " feature"]:
        """Frequency times mean over all texts: constant and strong. (Frequency times the mean when
        active is the mean.)"""
        return self.frequency * self.mean

    def strongest(self, n: int = 10) -> pd.DataFrame:
        """By largest value."""
        return self._ranked(self.largest, n)

    def frequent(self, n: int = 10) -> pd.DataFrame:
        """By number of texts on which they fire."""
        return self._ranked(self.fired, n)

    def selective(self, n: int = 10) -> pd.DataFrame:
        """Strong on the fewest texts; as many are strong on a single one, see `tied`, ranked by
        strength."""
        return self._ranked(np.where(self.largest > 0, -self.strong, np.nan), n)

    def most_composite(self, n: int = 10) -> pd.DataFrame:
        """By composite score."""
        return self._ranked(self.composite, n)

    def general(self, n: int = 10) -> pd.DataFrame:
        """Features that fire in every category, by the share of texts in the category where that
        share is least. ValueError where the summary was made without categories."""
        if np.isnan(self.least_fraction).any():
            raise ValueError("General features need summarize_features(matrix, categories).")
        return self._ranked(np.where(self.least_fraction > 0, self.least_fraction, np.nan), n)

    def to_frame(self) -> pd.DataFrame:
        """One row per feature."""
        columns = ("largest", "fired", "mean", "strong", "least_fraction")
        values = {name: getattr(self, name) for name in (*columns, "frequency", "composite")}
        return pd.DataFrame(values).rename_axis("feature")

    def _ranked(self, score: Shaped[np.ndarray, " feature"], n: int) -> pd.DataFrame:
        """The `n` largest scores, how many share each (`tied`); NaN takes no part."""
        order = np.lexsort([-self.largest, -score])  # by score; NaN comes last
        order = order[~np.isnan(score[order])][:n]
        tied = [int((score == score[feature]).sum()) for feature in order]
        return self.to_frame().loc[order].assign(tied=tied)


def matched_features(
    values: Float[np.ndarray, "text f"],
    inside: Shaped[np.ndarray, "text kind"],
    chosen: Indices,
    n: int = 2,
) -> Int[np.ndarray, "kind n"]:
    """For the chosen feature of each kind the `n` nearest to it on that kind's texts, by the share
    on which they fire and the logarithm of their mean: the control of what is said of it. None is
    chosen itself, none is taken twice. ValueError where there are not enough, and for a kind
    without texts."""
    each, alike, taken = inside / inside.sum(0), [], list(chosen)
    rates, means = (values > 0).T @ each, values.T.astype(float) @ each  # [f, kind]
    means = np.log(means + 0.001 * values.max())
    for kind, feature in enumerate(chosen):
        far = np.abs(rates[:, kind] - rates[feature, kind])
        far = far + np.abs(means[:, kind] - means[feature, kind])
        far[taken] = np.inf
        if np.isfinite(far).sum() < n:
            raise ValueError(f"{np.isfinite(far).sum()} features are left to match {feature}.")
        alike.append(np.argsort(far, kind="stable")[:n])
        taken += alike[-1].tolist()
    return np.array(alike)


def summarize_features(
    matrix: Matrix, categories: Labels | None = None, *, threshold: Threshold = "half"
) -> FeatureSummary:
    """The notions of `FeatureSummary` for every feature of a pooled `[text, feature]` matrix.

    `categories`: one label per text, for general features. `threshold`: above it a text is strong;
    "half" is half of the feature's own largest value. ValueError on NaN, Inf, negative values, no
    text and lengths that differ.
    """
    columns = scipy.sparse.csc_array(check_matrix(matrix, categories))
    if (columns.data < 0).any():
        raise ValueError("Negative values: firing is above zero, so their means say nothing here.")
    n_texts, width = columns.shape
    largest = columns.max(axis=0).toarray()
    feature = np.repeat(np.arange(width), np.diff(columns.indptr))  # of each entry
    strong = feature[columns.data > _cut(largest, threshold)[feature]]
    least = np.full(width, np.nan)
    if categories is not None:
        texts = pd.Series(range(n_texts)).groupby(np.asarray(categories)).indices
        shares = [(columns[rows] > 0).sum(axis=0) / len(rows) for rows in texts.values()]
        least = np.min(shares, axis=0)
    return FeatureSummary(
        n_texts=n_texts,
        largest=largest.astype(np.float64),
        fired=np.bincount(feature[columns.data > 0], minlength=width),
        mean=np.bincount(feature, columns.data, minlength=width) / n_texts,
        strong=np.bincount(strong, minlength=width),
        least_fraction=least,
    )


def _cut(largest: Shaped[np.ndarray, " feature"], threshold: Threshold) -> np.ndarray:
    """What a value must exceed to be strong."""
    cut = largest / 2 if threshold == "half" else np.full(len(largest), float(threshold))
    return np.maximum(cut, 0)


def features_per_category(matrix: Matrix, categories: Labels, top: int = 5) -> pd.DataFrame:
    """Per category the `top` features above zero on most of its texts: `category`, `feature`,
    `texts`, `of`."""
    columns, best = check_matrix(matrix, categories), []
    texts = pd.Series(range(len(categories))).groupby(np.asarray(categories)).indices
    for category, rows in texts.items():
        fired = (columns[rows] > 0).sum(axis=0)  # [feature] texts
        first = np.argsort(-fired, kind="stable")[:top]
        best += [(category, feature, fired[feature], len(rows)) for feature in first]
    return pd.DataFrame(best, columns=["category", "feature", "texts", "of"])


def category_profile(matrix: Matrix, categories: Labels, features: Indices) -> pd.DataFrame:
    """Features x categories: `texts`, `fired` of them, their `fraction`, and `mean` and `largest`
    over all of them."""
    features = pd.unique(np.asarray(features))  # named twice it would have twice the texts
    values = columns_of(check_matrix(matrix, categories), features).astype(np.float64)
    wide = pd.DataFrame(values, columns=features.tolist()).assign(category=np.asarray(categories))
    long = wide.melt("category", var_name="feature")
    long["fires"] = long["value"] > 0
    groups = long.groupby(["feature", "category"])
    value, fires = groups["value"], groups["fires"]
    table = pd.DataFrame({"texts": value.size(), "fired": fires.sum(), "fraction": fires.mean()})
    return table.assign(mean=value.mean(), largest=value.max()).reset_index()


def count_leaders(matrix: Matrix, threshold: Threshold = 5.0) -> pd.DataFrame:
    """First place by counting: `leader` ("strongest", "most frequent" and "most selective": strong
    on the fewest texts, on one at least), `feature`, `value`, `tied`; -1, 0 and 0 where there is
    none, as no feature is strong on any text."""
    summary = summarize_features(matrix, threshold=threshold)
    fewest = np.where(summary.strong > 0, summary.n_texts + 1 - summary.strong, 0)
    places = {
        "strongest": (summary.largest, summary.largest),
        "most frequent": (summary.fired, summary.fired),
        "most selective": (fewest, summary.strong),
    }
    rows = []
    for leader, (score, value) in places.items():
        first = int(score.argmax())
        row = (first, float(value[first]), int((score == score[first]).sum()))
        rows.append((leader, *(row if score[first] else (-1, 0.0, 0))))
    return pd.DataFrame(rows, columns=["leader", "feature", "value", "tied"])


def count_specialists(
    matrix: Matrix, categories: Labels, threshold: Threshold = 5.0
) -> pd.DataFrame:
    """One row per category: `category`, `feature`, `score`, and `tied`: how many of its five
    features share the best score."""
    values = dense(check_matrix(matrix, categories))
    names, codes = np.unique(np.asarray(categories), return_inverse=True)
    chosen, score = _count_scores(values, _strong(values, threshold), codes)
    best = score.max(axis=1)
    first = chosen[np.arange(len(names)), score.argmax(axis=1)]
    table = pd.DataFrame({"category": names, "feature": np.where(best > -1, first, -1)})
    tied = np.where(best > -1, (score == best[:, None]).sum(axis=1), 0)
    return table.assign(score=np.maximum(best, -1).astype(np.int64), tied=tied)


@dataclass(frozen=True, eq=False)
class CountNull:
    """How many categories have a score above 0: with the labels as they are, and with shuffled
    ones."""

    observed: int
    null: Int[np.ndarray, " shuffle"]
    threshold: Threshold

    @property
    def mean_null(self) -> float:
        """Categories with a "specialist" when the labels mean nothing, on average."""
        return float(self.null.mean())


def count_specialists_null(
    matrix: Matrix, categories: Labels, threshold: Threshold = 5.0, *, n: int = 200, seed: int = 0
) -> CountNull:
    """`count_specialists` on the labels and on `n` shuffles of them."""
    values = dense(check_matrix(matrix, categories))
    strong = _strong(values, threshold)
    codes = np.unique(np.asarray(categories), return_inverse=True)[1]

    orders = shuffled_orders(codes, derive_generator(seed, "count specialists"), n, None)
    shuffled = [codes, *(codes[order] for order in orders)]
    scores = [_count_scores(values, strong, labels)[1] for labels in shuffled]
    observed, *null = [int((score > 0).any(axis=1).sum()) for score in scores]
    return CountNull(observed=observed, null=np.array(null), threshold=threshold)


def _strong(values: np.ndarray, threshold: Threshold) -> Float[np.ndarray, "text feature"]:
    """1 where a text is strong on a feature, else 0."""
    return (values > _cut(values.max(axis=0), threshold)).astype(np.float32)


def _count_scores(
    values: np.ndarray, strong: np.ndarray, codes: np.ndarray
) -> tuple[Int[np.ndarray, "category top"], Float[np.ndarray, "category top"]]:
    """(the `TOP` features with the largest value inside each category, their scores), from values
    and what is strong `[text, feature]`."""
    member = codes == np.arange(codes.max() + 1)[:, None]  # [category, text]
    largest = np.stack([values[texts].max(axis=0) for texts in member])
    chosen = np.argsort(-largest, axis=1, kind="stable")[:, :TOP]
    inside = member.astype(np.float32) @ strong  # [category, feature]
    score = 2 * inside - strong.sum(axis=0)  # inside less outside, which is all less inside
    return chosen, np.take_along_axis(score, chosen, axis=1)
