"""Which features fire together, and which mark a concept that a few texts show.

1. `coactivation`: on how many texts two features both fire, against one's firings shuffled between
   texts.
2. `concept_features`: features that separate texts of a concept from background texts, against
   shuffled labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd
import scipy.stats
from jaxtyping import Float, Int

from lenslab.features.activations import Indices, Labels, Matrix, check_matrix, columns_of, dense
from lenslab.files import Result
from lenslab.runtime import derive_generator
from lenslab.stats import auroc_permutations, benjamini_hochberg


@dataclass(frozen=True, eq=False)
class CoActivation(Result):
    """How often features fire on the same texts, against their firings shuffled between texts."""

    features: Int[np.ndarray, " f"]
    fired: Int[np.ndarray, " f"]  # texts
    joint: Int[np.ndarray, "f f"]  # texts on which both fire
    # log P(both) / (P(row) P(column)), nats; NaN for pairs that never fire together
    pmi: Float[np.ndarray, "f f"]
    expected: Float[np.ndarray, "f f"]  # joint, on average under the null
    p: Float[np.ndarray, "f f"]  # chance of as large a joint under the null; NaN on the diagonal
    q: Float[np.ndarray, "f f"]  # Benjamini-Hochberg over pairs

    def to_frame(self) -> pd.DataFrame:
        """One row per pair, smallest p first."""
        i, j = np.triu_indices(len(self.features), 1)
        columns = {
            "feature": self.features[i],
            "other": self.features[j],
            "p_other_given_feature": self.joint[i, j] / self.fired[i],
            "p_feature_given_other": self.joint[i, j] / self.fired[j],
        }
        columns |= {key: getattr(self, key)[i, j] for key in ("joint", "expected", "pmi", "p", "q")}
        order = {"by": ["p", "pmi"], "ascending": [True, False], "ignore_index": True}
        return pd.DataFrame(columns).sort_values(**order)


def coactivation(matrix: Matrix, features: Indices, strata: Labels | None = None) -> CoActivation:
    """Conditional firing and pointwise mutual information of pairs of features, with a permutation
    null.

    The null shuffles one feature's firings between texts. How often it then meets the other is
    hypergeometric, so p comes from the exact distribution and not from a sample of shuffles. With
    `strata` (one label a text, for instance its category) firings move within a stratum only, and
    the counts of the strata are added: what is left is co-activation that the category does not
    explain. Rows should be texts: tokens of one text resemble each other. ValueError on NaN,
    lengths that differ and a feature named twice.
    """
    fires = columns_of(check_matrix(matrix, strata), features) > 0  # [text, f]
    if len(np.unique(features)) < len(features):
        raise ValueError("A feature is named twice: it would be counted as a pair with itself.")
    n, f = fires.shape
    labels = np.zeros(n) if strata is None else np.asarray(strata)
    codes, sizes = np.unique(labels, return_inverse=True, return_counts=True)[1:]
    counts = np.stack([fires[codes == s].sum(axis=0) for s in range(len(sizes))])  # [stratum, f]
    joint = fires.astype(np.int64).T @ fires
    fired = fires.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        pmi = np.where(joint > 0, np.log(joint * n / np.outer(fired, fired)), np.nan)
    p, q = np.full((f, f), np.nan), np.full((f, f), np.nan)
    upper = np.triu_indices(f, 1)
    for i, j in zip(*upper, strict=True):
        null = np.ones(1)  # P(joint = 0, 1, ...), strata added one by one
        for size, a, b in zip(sizes.tolist(), *counts[:, [i, j]].T.tolist(), strict=True):
            null = np.convolve(null, _hypergeometric(size, *sorted((a, b))))
        p[i, j] = min(1.0, null[joint[i, j] :].sum())
    q[upper] = benjamini_hochberg(p[upper])
    p.T[upper], q.T[upper] = p[upper], q[upper]
    return CoActivation(
        features=np.asarray(features),
        fired=fired,
        joint=joint,
        pmi=pmi,
        expected=np.einsum("si,sj->ij", counts / sizes[:, None], counts),
        p=p,
        q=q,
    )


@lru_cache(maxsize=100_000)
def _hypergeometric(size: int, a: int, b: int) -> Float[np.ndarray, " count"]:
    """P(k common members) for k = 0 .. min(a, b) of two random subsets of sizes a and b."""
    return scipy.stats.hypergeom.pmf(np.arange(min(a, b) + 1), size, a, b)


def concept_features(concept: Matrix, background: Matrix, *, n: int = 1000) -> pd.DataFrame:
    """Features that separate given concept texts from given background texts: two pooled `[text,
    feature]` matrices.

    One row per feature, best `auroc` first, then by difference of means: `mean_concept`,
    `mean_background` (over all texts), `fired_concept`, `fired_background` (share of the texts),
    and `family_p`, which allows for the search: features are not scored on new texts, so it
    compares with the best feature of each of `n` shuffles. ValueError on NaN and an empty side.
    """
    inside, outside = dense(check_matrix(concept)), dense(check_matrix(background))
    values = np.concatenate([inside, outside])
    labels = np.arange(len(values)) < len(inside)
    generator = derive_generator(0, "concept search")
    search = auroc_permutations(values, labels, generator, n)
    table = pd.DataFrame({"feature": np.arange(values.shape[1]), "auroc": search.observed})
    table["mean_concept"] = inside.mean(axis=0, dtype=np.float64)
    table["mean_background"] = outside.mean(axis=0, dtype=np.float64)
    table["fired_concept"] = (inside > 0).mean(axis=0)
    table["fired_background"] = (outside > 0).mean(axis=0)
    table["family_p"] = search.family_p
    gain = table["mean_concept"] - table["mean_background"]
    return table.iloc[np.lexsort([-gain, -table["auroc"]])].reset_index(drop=True)
