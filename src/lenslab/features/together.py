"""Which features fire together, and which mark a concept that a few texts show.

1. `coactivation`: on how many texts two features both fire, against one's firings shuffled between
   texts.
2. `concept_features`: features that separate texts of a concept from background texts, against
   shuffled labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd
import scipy.sparse
import scipy.stats
from jaxtyping import Float, Int

from lenslab.features.activations import Indices, Matrix, check_matrix, columns_of
from lenslab.files import Result
from lenslab.runtime import derive_generator
from lenslab.stats import auroc_permutations, benjamini_hochberg


@dataclass(frozen=True, eq=False)
class CoActivation(Result):
    """How often features fire on the same texts, against their firings shuffled between texts; axes
    `[row, column]`."""

    features: Int[np.ndarray, " f"]
    fired: Int[np.ndarray, " f"]  # texts
    joint: Int[np.ndarray, "f f"]  # texts on which both fire
    conditional: Float[np.ndarray, "f f"]  # P(column fires | row fires)
    pmi: Float[
        np.ndarray, "f f"
    ]  # log P(both) / (P(row) P(column)), nats; NaN for pairs that never fire together
    expected: Float[np.ndarray, "f f"]  # joint, on average under the null
    p: Float[
        np.ndarray, "f f"
    ]  # chance of as large a joint under the null, exact; NaN on the diagonal
    q: Float[np.ndarray, "f f"]  # Benjamini-Hochberg over pairs
    n_texts: int
    stratified: bool

    def to_frame(self) -> pd.DataFrame:
        """One row per pair, smallest p first."""
        i, j = np.triu_indices(len(self.features), 1)
        columns = {"feature": self.features[i], "other": self.features[j], "fired": self.fired[i]}
        columns |= {"other_fired": self.fired[j], "p_other_given_feature": self.conditional[i, j]}
        columns |= {"p_feature_given_other": self.conditional[j, i]}
        columns |= {key: getattr(self, key)[i, j] for key in ("joint", "expected", "pmi", "p", "q")}
        return pd.DataFrame(columns).sort_values(
            ["p", "pmi"], ascending=[True, False], ignore_index=True
        )


def coactivation(
    matrix: Matrix, features: Indices, strata: Sequence | np.ndarray | None = None
) -> CoActivation:
    """Conditional firing and pointwise mutual information of pairs of features, with a permutation
    null.

    The null shuffles one feature's firings between texts. How often it then meets the other is
    hypergeometric, so p comes from the exact distribution and not from a sample of shuffles. With
    `strata` (one label a text, for instance its category) firings move within a stratum only, and
    the counts of the strata are added: what is left is co-activation that the category does not
    explain. Rows should be texts: tokens of one text resemble each other. ValueError on fewer than
    two features, one named twice, NaN, and lengths that differ.
    """
    matrix = check_matrix(matrix, strata)
    if len(features) < 2 or len(set(features)) < len(features):
        raise ValueError(
            f"Co-activation needs two or more different features, got {list(features)[:10]}."
        )
    fires = columns_of(matrix, features) > 0
    n, f = fires.shape
    codes = (
        np.zeros(n, dtype=int)
        if strata is None
        else np.unique(np.asarray(strata), return_inverse=True)[1]
    )
    sizes = np.bincount(codes)
    counts = np.stack([fires[codes == s].sum(0) for s in range(len(sizes))])  # [stratum, feature]
    joint, fired = fires.astype(np.int64).T @ fires, fires.sum(0)
    expected = np.einsum("si,sj->ij", counts / sizes[:, None], counts)
    with np.errstate(divide="ignore", invalid="ignore"):
        conditional = joint / fired[:, None]
        pmi = np.where(joint > 0, np.log(joint * n / np.outer(fired, fired)), np.nan)
    p, q = np.full((f, f), np.nan), np.full((f, f), np.nan)
    upper = np.triu_indices(f, 1)
    for i, j in zip(*upper, strict=True):
        null = np.ones(1)
        for size, a, b in zip(
            sizes.tolist(), counts[:, i].tolist(), counts[:, j].tolist(), strict=True
        ):
            null = np.convolve(null, _hypergeometric(size, *sorted((a, b))))
        p[i, j] = min(1.0, null[joint[i, j] :].sum())
    q[upper] = benjamini_hochberg(p[upper])
    p.T[upper], q.T[upper] = p[upper], q[upper]
    return CoActivation(
        np.asarray(features), fired, joint, conditional, pmi, expected, p, q, n, strata is not None
    )


@lru_cache(maxsize=100_000)
def _hypergeometric(size: int, a: int, b: int) -> Float[np.ndarray, " count"]:
    """P(k common members) for k = 0 .. min(a, b) of two random subsets of sizes a and b."""
    return scipy.stats.hypergeom.pmf(np.arange(min(a, b) + 1), size, a, b)


@dataclass(frozen=True, eq=False)
class ConceptSearch(Result):
    """How well each feature separates the concept's texts from the background; `family_p` allows
    for the search."""

    auroc: Float[np.ndarray, " feature"]
    mean_concept: Float[np.ndarray, " feature"]  # over all texts of the concept, silent ones too
    mean_background: Float[np.ndarray, " feature"]
    fired_concept: Float[np.ndarray, " feature"]  # share of the texts on which it fires
    fired_background: Float[np.ndarray, " feature"]
    family_p: Float[
        np.ndarray, " feature"
    ]  # against the best of all features under shuffled labels
    n_concept: int
    n_background: int
    n_permutations: int

    def to_frame(self, n: int = 10) -> pd.DataFrame:
        """The `n` best by AUROC, then by difference of means."""
        order = np.lexsort(
            [np.arange(len(self.auroc)), self.mean_background - self.mean_concept, -self.auroc]
        )[:n]
        columns = {
            key: value[order] for key, value in vars(self).items() if isinstance(value, np.ndarray)
        }
        return pd.DataFrame({"feature": order} | columns)


def concept_features(
    concept: Matrix, background: Matrix, *, n: int = 1000, seed: int = 0
) -> ConceptSearch:
    """Features that separate given concept texts from given background texts: two pooled `[text,
    feature]` matrices.

    The features are not scored on new texts; `family_p` compares with the best feature of each of
    `n` shuffles instead. ValueError on NaN, other widths, and fewer than two texts on a side.
    """
    concept, background = check_matrix(concept), check_matrix(background)
    if concept.shape[1] != background.shape[1] or min(concept.shape[0], background.shape[0]) < 2:
        raise ValueError(
            f"Two or more texts a side and one width, got {concept.shape} and {background.shape}."
        )
    stacked = scipy.sparse.csc_array(
        scipy.sparse.vstack([scipy.sparse.csr_array(m) for m in (concept, background)])
    )
    inside = np.arange(stacked.shape[0]) < concept.shape[0]
    width = stacked.shape[1]
    auroc, family = np.full(width, 0.5), np.ones(width)
    used = np.flatnonzero(
        np.diff(stacked.indptr)
    )  # silent everywhere: AUROC one half, under every shuffle as well
    if len(used):
        result = auroc_permutations(
            stacked[:, used].toarray(), inside, derive_generator(seed, "concept search"), n
        )
        auroc[used], family[used] = result.observed, result.family_p
    halves = [
        m.toarray() if scipy.sparse.issparse(m) else np.asarray(m) for m in (concept, background)
    ]
    means = [half.mean(0, dtype=np.float64) for half in halves]
    fired = [(half > 0).mean(0) for half in halves]
    return ConceptSearch(auroc, *means, *fired, family, len(halves[0]), len(halves[1]), n)
