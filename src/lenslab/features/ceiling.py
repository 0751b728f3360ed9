"""What labels get out of the same activations: the ceiling beside every best single feature.

A feature was chosen by labels, among thousands that were learned without any. Directions may also
be fitted to the labels themselves, on the texts' mean activations, and scored on the same held-out
texts; the distance between the two is the feature's price. `ceiling` compares, per category:
1. the feature, and probes of the k features that labels select (k-sparse; Gurnee et al. 2023);
2. the difference of the two means, and logistic regression;
3. the same two directions on descriptions that hold less (character n-grams, the random twin's
   activations): how much of the ceiling needs no trained model.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from jaxtyping import Float

from lenslab.features.activations import Matrix, check_matrix, columns_of
from lenslab.metrics import as_mask, auroc
from lenslab.runtime import derive_generator
from lenslab.stats import LEVEL, auroc_difference
from lenslab.texts import LabelledTexts

SPARSE = (5, 16)  # features of a k-sparse probe; the best feature alone is the probe of one
RESAMPLES = 5000  # of texts: with seven categories 18 of them lie beyond a corrected bound


def ceiling(
    pooled: Matrix,
    found: pd.DataFrame,
    vectors: Float[np.ndarray, "text d_in"],
    labels: LabelledTexts,
    nulls: Mapping[str, Float[np.ndarray, "text candidate"]],
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """The feature that `discriminate` found for each category (`found`, of the one SAE whose pooled
    matrix is given) beside what is fitted to the labels.

    `vectors` are the texts' `mean_activations` at the SAE's hook, `nulls` other descriptions of the
    same texts. Everything is fitted on the discovery half and scored on the other. One row per
    category and `way`: held-out `auroc`, its `difference` to the feature's, and an interval of that
    from `low` to `high` which holds for all categories together (95 %, Bonferroni). ValueError on
    NaN, for another number of texts, and where `found` is of several SAEs or in another order.
    """
    pooled = check_matrix(pooled, labels.category)
    if tuple(found["category"]) != labels.categories:  # one would stand for another's
        raise ValueError("`found` needs the rows of one SAE, in the order of labels.categories.")
    features = columns_of(pooled, found["feature"].to_numpy())  # [text, category]
    dense = columns_of(pooled, np.arange(pooled.shape[1]))
    ways = {"best feature": features} | {f"{k} features": probe(dense, labels, k) for k in SPARSE}
    ways |= supervised_directions(vectors, labels)
    for name, matrix in nulls.items():
        fitted = supervised_directions(check_matrix(matrix, labels.category), labels)
        ways |= {f"{name}: {direction}": scores for direction, scores in fitted.items()}
    held_out, level = as_mask(labels.held_out), 1 - (1 - LEVEL) / len(labels.categories)
    rows = []
    for way, scores in ways.items():
        for c, category in enumerate(labels.categories):
            member = labels.inside[:, c]
            ours, theirs = scores[:, [c]], features[:, [c]]
            generator = derive_generator(seed, f"{way} {category}")
            classes = (member & held_out)[:, None], ~member & held_out
            interval = auroc_difference(ours, theirs, *classes, generator, RESAMPLES, level)
            row = {"category": category, "way": way}
            row |= {"auroc": float(auroc(scores[held_out, c], member[held_out]))}
            row |= {"difference": interval.estimate, "low": interval.low, "high": interval.high}
            rows.append(row)
    return pd.DataFrame(rows)


def supervised_directions(
    x: Float[np.ndarray, "text dimension"], labels: LabelledTexts
) -> dict[str, Float[np.ndarray, "text category"]]:
    """Every text's score along two directions per category, both fitted on the discovery half:
    difference of means, and logistic regression on standardised dimensions."""
    fitted = ~as_mask(labels.held_out)
    seen, inside = x[fitted], labels.inside[fitted]
    means = [seen[member].mean(0) - seen[~member].mean(0) for member in inside.T]
    return {"difference of means": x @ np.stack(means, 1), "logistic regression": probe(x, labels)}


def probe(
    x: Float[np.ndarray, "text dimension"], labels: LabelledTexts, k: int | None = None
) -> Float[np.ndarray, "text category"]:
    """Every text's score by a logistic regression per category, fitted on the discovery half; with
    `k`, on the k dimensions alone whose means differ most there (F test)."""
    from sklearn.feature_selection import SelectKBest, VarianceThreshold
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    fitted = ~as_mask(labels.held_out)
    select = [] if k is None else [VarianceThreshold(), SelectKBest(k=k)]
    scores = []
    for member in labels.inside[fitted].T:
        regression = make_pipeline(*select, StandardScaler(), LogisticRegression(max_iter=1000))
        scores.append(regression.fit(x[fitted], member).decision_function(x))
    return np.stack(scores, axis=1)
