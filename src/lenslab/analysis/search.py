"""The search that an SAE and its controls go through alike: the candidate with the best AUROC on texts of one half.

1. Every candidate is ranked over the searched texts once, ties at their mid-rank.
2. The AUROCs of all candidates for all categories are one product: labels times ranks.
3. The best is kept, with how many share its AUROC; of those the one that is strongest inside, then the lowest id.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
import scipy.stats
from jaxtyping import Bool, Float, Int

from lenslab.analysis.features import columns_of
from lenslab.analysis.labels import LabelledTexts
from lenslab.analysis.results import Matrix, blocks


class Ranked:
    """Candidates `[text, candidate]` ranked once on some texts, so that any labels can be searched for cheaply."""

    def __init__(self, matrix: Matrix, rows: Bool[np.ndarray, " text"]):
        self.matrix, self.rows, self.columns = matrix, rows, np.arange(matrix.shape[1])
        exact = np.float32 if rows.sum() < 4000 else np.float64  # sums of half-integers, so that ties are seen
        self.ranks = np.empty((int(rows.sum()), matrix.shape[1]), dtype=exact)
        self.variance = np.empty(matrix.shape[1])
        for part, block in blocks(matrix):
            self.ranks[:, part] = scipy.stats.rankdata(block[rows], axis=0)
            self.variance[part] = block[rows].var(axis=0, dtype=np.float64)

    def restricted(self, n: int) -> Ranked:
        """The `n` candidates of highest variance only (all where there are no more)."""
        few = copy(self)
        chosen = np.sort(np.argsort(-self.variance, kind="stable")[:n])
        few.columns, few.ranks, few.variance = self.columns[chosen], self.ranks[:, chosen], self.variance[chosen]
        return few

    def best(self, inside: Bool[np.ndarray, "text category"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(candidate, its AUROC, how many share it), each `[category]`; ties go to the stronger inside, then the id."""
        member = inside[self.rows]
        k = member.sum(axis=0)[:, None]
        auroc = (member.T.astype(self.ranks.dtype) @ self.ranks - k * (k + 1) / 2) / (k * (len(member) - k))
        best, tied = auroc.argmax(axis=1), []
        for c, place in enumerate(best):
            same = np.flatnonzero(auroc[c] == auroc[c, place])
            tied.append(len(same))
            if len(same) > 1:
                means = columns_of(self.matrix, self.columns[same])[self.rows][member[:, c]].mean(axis=0)
                best[c] = same[means.argmax()]
        return self.columns[best], auroc[np.arange(len(best)), best], np.array(tied)


@dataclass(frozen=True, eq=False)
class Fold:
    """On which texts a category's feature is searched for, and on which it is scored; none is in both."""

    category: str
    language: str | None  # left out of the search; None: halves as they are
    rows: Bool[np.ndarray, " text"]  # searched
    searched: Bool[np.ndarray, " text"]  # of these, inside the category
    inside: Bool[np.ndarray, " text"]  # scored: texts of the category against ...
    outside: Bool[np.ndarray, " text"]  # ... the rest of the held-out half

    def auroc(self, values: Float[np.ndarray, " text"]) -> float:
        """AUROC of one candidate on the scored texts."""
        k, both = int(self.inside.sum()), np.concatenate([values[self.inside], values[self.outside]])
        return float((scipy.stats.rankdata(both)[:k].sum() - k * (k + 1) / 2) / (k * (len(both) - k)))


def halves(labels: LabelledTexts) -> list[Fold]:
    """One fold per category: searched on the discovery half, scored on the other."""
    held = labels.held_out
    members = zip(labels.categories, labels.inside.T, strict=True)
    return [Fold(name, None, ~held, ~held & inside, held & inside, held & ~inside) for name, inside in members]


def language_folds(labels: LabelledTexts) -> list[Fold]:
    """For categories of several languages one fold per language: not searched in any text, scored on all of its texts.

    A language's texts of the discovery half can be scored on as well, since that search has not seen them.
    """
    folds, held = [], labels.held_out
    for name, inside in zip(labels.categories, labels.inside.T, strict=True):
        languages = np.unique(labels.language[inside & ~held]).tolist()
        for language in languages if len(languages) > 1 else []:
            own = inside & (labels.language == language)
            folds.append(Fold(name, language, ~held & ~own, ~held & inside & ~own, own, held & ~inside))
    return folds


def search(matrix: Matrix, folds: Sequence[Fold], numbers: Sequence[int]) -> Int[np.ndarray, "number fold"]:
    """The best candidate of each fold: among the n of highest variance, for every n of `numbers`."""
    found = np.empty((len(numbers), len(folds)), dtype=np.int64)
    for rows in {fold.rows.tobytes(): fold.rows for fold in folds}.values():  # ranked once where the texts are the same
        ranked, same = Ranked(matrix, rows), [i for i, fold in enumerate(folds) if np.array_equal(fold.rows, rows)]
        inside = np.stack([folds[i].searched for i in same], axis=1)
        for k, n in enumerate(numbers):
            found[k, same] = ranked.restricted(n).best(inside)[0]
    return found
