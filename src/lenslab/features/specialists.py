"""Does a feature tell one kind of text from the others, better than what needs no SAE?

1. `lenslab.texts.label_texts` prepares the texts: halves for choosing and for scoring; strata
   within which labels may be shuffled. `label_rows` does it where there is only a matrix.
2. `discriminate`: per category the feature with the best AUROC (pooled activation, category against
   rest, mid-rank ties) on the discovery half is scored on the held-out half, once. Labels of the
   held-out half are shuffled within strata for its p. The held-out half took no part in the choice,
   so p needs no correction for the thousands of features searched; Benjamini-Hochberg corrects for
   categories and SAEs. A p from the best of all features on all texts would also be right, but
   AUROCs chosen and scored on the same texts are too high.
3. `find_specialists`: such a feature is a specialist where the same search among each control's
   candidates finds nothing as good: the 95 % interval of the difference of held-out AUROCs (texts
   drawn with replacement) lies above 0, also with both sides restricted to as many candidates; and
   where held-out precision is at least .5 at the threshold that was best on discovery. In a
   category of several languages the comparison is made on languages that took no part in the
   search, each left out in turn: it cannot be won by the spelling of one of them.

`benchmarks/error_rate_and_power.py` puts the procedure itself to the test, on shuffled labels and
on planted features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from lenslab.features.activations import Labels, Matrix, check_matrix, columns_of, dense
from lenslab.features.ranking import CountNull, Threshold, count_specialists, count_specialists_null
from lenslab.files import Result
from lenslab.metrics import Mask, as_mask, auroc, auroc_of_rank_sums, mid_ranks
from lenslab.runtime import derive_generator
from lenslab.stats import auroc_difference, benjamini_hochberg, matched_auroc_permutations
from lenslab.texts import LabelledTexts, label_texts

PRECISION = 0.5  # held-out precision that a specialist needs
Q = 0.05  # level of the false discovery rate
FEATURES = 2048  # candidates made dense at a time


class Best(NamedTuple):
    """The best candidate of each category."""

    candidate: Int[np.ndarray, " category"]
    auroc: Float[np.ndarray, " category"]  # on the texts that were searched
    tied: Int[np.ndarray, " category"]  # candidates with the same AUROC


class Ranked:
    """Candidates `[text, candidate]` ranked once on some texts, so that any labels can be searched
    for cheaply."""

    def __init__(self, matrix: Matrix, searched: Bool[np.ndarray, " text"]):
        searched = as_mask(searched)
        self.matrix, self.searched = matrix, searched
        # sums of half-integers must be exact, so that ties are seen
        exact = np.float32 if searched.sum() < 4000 else np.float64
        ranks = np.empty((int(searched.sum()), matrix.shape[1]), dtype=exact)
        variance = np.empty(matrix.shape[1])
        for start in range(0, matrix.shape[1], FEATURES):
            part = slice(start, start + FEATURES)
            block = dense(matrix[:, part])[searched]  # [searched text, candidate]
            ranks[:, part] = mid_ranks(block)
            variance[part] = block.var(axis=0, dtype=np.float64)
        self.candidates = np.argsort(-variance, kind="stable")  # the highest variance first
        self.ranks = ranks[:, self.candidates]

    def best(self, inside: Bool[np.ndarray, "text category"], n: int | None = None) -> Best:
        """By AUROC, inside against the rest, among all or the `n` candidates of highest variance.

        Ties go to the stronger inside, then to the lower number.
        """
        member = inside[self.searched]
        n_inside = member.sum(axis=0)[:, None]
        sums = member.T.astype(self.ranks.dtype) @ self.ranks[:, :n]  # [category, candidate]
        aurocs = auroc_of_rank_sums(sums, n_inside, len(member))
        chosen, tied = [], []
        for c, of_category in enumerate(aurocs):
            same = np.sort(self.candidates[:n][of_category == of_category.max()])
            values = columns_of(self.matrix, same)[self.searched]
            chosen.append(same[values[member[:, c]].mean(axis=0).argmax()])
            tied.append(len(same))
        return Best(np.array(chosen), aurocs.max(axis=1), np.array(tied))


@dataclass(frozen=True, eq=False)
class Fold:
    """On which texts a category's feature is searched for, and on which it is scored; none is in
    both."""

    category: str
    language: str | None  # left out of the search; None: halves as they are
    member: Bool[np.ndarray, " text"]  # of the category
    searched: Bool[np.ndarray, " text"]
    scored: Bool[np.ndarray, " text"]

    def auroc(self, values: Float[np.ndarray, " text"]) -> float:
        """AUROC of one candidate on the scored texts."""
        return float(auroc(values[self.scored], self.member[self.scored]))


def halves(labels: LabelledTexts) -> list[Fold]:
    """One fold per category: searched on the discovery half, scored on the other."""
    members = zip(labels.categories, labels.inside.T, strict=True)
    held_out = as_mask(labels.held_out)
    return [Fold(name, None, member, ~held_out, held_out) for name, member in members]


def language_folds(labels: LabelledTexts) -> list[Fold]:
    """For categories of several languages one fold per language: not searched in any text, scored
    on all of its texts.

    A language's texts of the discovery half can be scored on as well, since that search has not
    seen them.
    """
    folds = []
    for half in halves(labels):
        languages = np.unique(labels.language[half.member & half.searched]).tolist()
        for language in languages if len(languages) > 1 else []:
            own = half.member & (labels.language == language)
            searched = half.searched & ~own
            scored = own | (half.scored & ~half.member)
            folds.append(Fold(half.category, language, half.member, searched, scored))
    return folds


def search(
    matrix: Matrix, folds: Sequence[Fold], numbers: Sequence[int]
) -> Int[np.ndarray, "number fold"]:
    """The best candidate of each fold: among the n of highest variance, for every n of
    `numbers`."""
    best = []
    for _, same in groupby(folds, key=lambda fold: fold.searched.tobytes()):
        same = list(same)
        ranked = Ranked(matrix, same[0].searched)  # once where the texts are the same
        members = np.stack([fold.member for fold in same], axis=1)
        best.append([ranked.best(members, n).candidate for n in numbers])
    return np.concatenate(best, axis=1)


def label_rows(
    categories: Labels, *, held_out: Mask = None, strata: Labels | None = None, seed: int = 0
) -> LabelledTexts:
    """One label per row of a matrix made ready for `discriminate`, whatever the rows are of.

    Args:
        held_out: rows that are scored, not searched; default half of each category, drawn.
        strata: labels are shuffled within them, such as bins of length; default one for all.

    Categories with fewer than three rows in a half are not analysed; their rows stay as some of the
    rest. ValueError for a label or stratum that is missing, and where no category is left.
    """
    table = pd.DataFrame({"category": np.asarray(categories, dtype=object)})
    table["text"] = table.index.astype(str)  # the texts are not at hand
    if held_out is not None:
        table["split"] = np.where(as_mask(held_out), "held_out", "discovery")
    labels = label_texts(table, seed=seed)
    strata = np.zeros(len(table)) if strata is None else np.asarray(strata, dtype=object)
    stratum = pd.factorize(strata)[0]
    if len(labels) < len(table) or (stratum < 0).any():
        raise ValueError("A label or stratum is missing: leave such rows out, or name it.")
    return replace(labels, stratum=stratum)


def discriminate(
    matrices: Matrix | Mapping[str, Matrix],
    labels: LabelledTexts | Labels,
    *,
    n: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """The category-discriminating features of one SAE, a pooled matrix `[text, feature]`, or of
    several: `{name: matrix}`. Plain labels, one a row, are taken as by `label_rows`.

    One row per SAE and category: `feature`, `tied` (features with the same AUROC on discovery),
    `auroc_discovery`; from the held-out half `auroc`, `worst_register` (lowest AUROC of one
    register's texts against the rest), `p`, `q` (Benjamini-Hochberg over all rows),
    `discriminating` (`q` at most .05), and `precision` and `recall` at
    `threshold`, which is best on discovery and NaN where the feature is silent inside.

    `n` shuffles of the held-out labels: p cannot fall below 1 / (1 + n). ValueError on NaN and for
    another number of texts.
    """
    matrices = matrices if isinstance(matrices, Mapping) else {"SAE": matrices}
    labels = labels if isinstance(labels, LabelledTexts) else label_rows(labels, seed=seed)
    held_out, inside = as_mask(labels.held_out), labels.inside
    strata = labels.stratum[held_out]
    tables = []
    for name, matrix in matrices.items():
        matrix = check_matrix(matrix, labels.category)
        best = Ranked(matrix, ~held_out).best(inside)
        values = columns_of(matrix, best.candidate)  # [text, category]
        generator = derive_generator(seed, "held-out labels")  # the same shuffles for every SAE
        test = matched_auroc_permutations(values[held_out], inside[held_out], generator, n, strata)
        columns = {
            "sae": name,
            "category": labels.categories,
            "feature": best.candidate,
            "tied": best.tied,
            "auroc_discovery": best.auroc.astype(np.float64),
            "auroc": test.observed,
            "worst_register": _worst_register(values, labels),
            "p": test.p,
        }
        tables.append(pd.DataFrame(columns).join(precision_at_best_f1(values, inside, held_out)))
    table = pd.concat(tables, ignore_index=True)
    table["q"] = benjamini_hochberg(table["p"].to_numpy())
    return table.assign(discriminating=table["q"] <= Q)


def precision_at_best_f1(
    values: Float[np.ndarray, "text category"],
    inside: Bool[np.ndarray, "text category"],
    held_out: Bool[np.ndarray, " text"],
) -> pd.DataFrame:
    """`threshold`, `precision` and `recall` per category; the threshold is the positive value with
    the best F1 on discovery.

    The higher of two thresholds that are equally good. Nothing at or above it on the held-out half:
    precision 0. NaN, 0 and 0 where discovery has no positive value inside.
    """
    rows = []
    for c in range(values.shape[1]):
        seen, member = values[~held_out, c], inside[~held_out, c]
        cuts = np.unique(seen[member & (seen > 0)])[::-1]
        if not len(cuts):
            rows.append((np.nan, 0.0, 0.0))
            continue
        above = seen[None] >= cuts[:, None]  # [cut, text]
        f1 = 2 * (above & member).sum(1) / (above.sum(1) + member.sum())
        cut = cuts[f1.argmax()]
        chosen, member = values[held_out, c] >= cut, inside[held_out, c]
        hits = int((chosen & member).sum())
        rows.append((float(cut), hits / max(int(chosen.sum()), 1), hits / int(member.sum())))
    return pd.DataFrame(rows, columns=["threshold", "precision", "recall"])


def _worst_register(values: np.ndarray, labels: LabelledTexts) -> np.ndarray:
    worst = np.ones(values.shape[1])
    for c, fold in enumerate(halves(labels)):
        for register in np.unique(labels.register[fold.member & fold.scored]):
            scored = fold.scored & (~fold.member | (labels.register == register))
            worst[c] = min(worst[c], replace(fold, scored=scored).auroc(values[:, c]))
    return worst


@dataclass(frozen=True, eq=False)
class Specialists(Result):
    """Which categories have a specialist, and which controls each of the others fails to beat.

    `difference` is the held-out AUROC of the SAE's feature minus that of the control's, with its 95
    % interval from `low` to `high`; `equal_` the same where the side with more candidates is
    restricted to as many, those of highest variance on discovery. In categories of several
    languages (`by_language`) both are means over the languages left out in turn.
    """

    candidates: dict[str, int]  # how many each side searched, the SAE first
    # per category: as `discriminate`, `specialist`, `not_beaten`, `by_language`, and the older
    # score at its thresholds
    table: pd.DataFrame
    # per control and category: `control_feature`, `control_auroc` on the held-out half,
    # `difference`, `equal_difference` and their bounds, `beats` (both lower bounds above 0)
    comparisons: pd.DataFrame
    left_out: pd.DataFrame  # per language left out: texts, feature, AUROC, and that of each control
    count_nulls: tuple[CountNull, ...]
    n: int
    seed: int

    def to_frame(self) -> pd.DataFrame:
        """One row per category."""
        return self.table

    def best_by_count(self, threshold: Threshold = "half") -> str | None:
        """The category with the best count score, the first of equals; None where none is above
        0."""
        scores = self.table.set_index("category")[f"count_score_{threshold}"]
        return scores.idxmax() if scores.max() > 0 else None


def find_specialists(
    matrix: Matrix,
    labels: LabelledTexts,
    controls: Mapping[str, Matrix],
    *,
    name: str = "SAE",
    discrimination: pd.DataFrame | None = None,
    n: int = 1000,
    seed: int = 0,
) -> Specialists:
    """The definition of a specialist, for one SAE's pooled matrix against controls pooled alike
    `{name: matrix}`.

    Args:
        discrimination: of several SAEs at once, this one among them under `name`; default of this
            one alone.
        n: shuffles for p (where not given) and resamples for the intervals.

    The older count score and its null (200 shuffles) stand beside. ValueError without controls, on
    NaN, and for another number of texts.
    """
    if not controls:
        raise ValueError("A specialist is better than controls: give some (control_matrices).")
    matrix = check_matrix(matrix, labels.category)
    controls = {key: check_matrix(value, labels.category) for key, value in controls.items()}
    if discrimination is None:
        discrimination = discriminate({name: matrix}, labels, n=n, seed=seed)
    table = discrimination[discrimination["sae"] == name].reset_index(drop=True)
    if tuple(table["category"]) != labels.categories:
        raise ValueError(f"`discrimination` lacks {name!r}, or is of other categories.")
    # 1. search every side, with all its candidates and with as many as the other side has
    folds = [*halves(labels), *language_folds(labels)]
    candidates = {name: matrix.shape[1]} | {key: m.shape[1] for key, m in controls.items()}
    ours, *ours_as_many = search(matrix, folds, list(candidates.values()))
    scores = {"feature": ours, "auroc": _fold_aurocs(matrix, ours, folds)}
    rows = []
    for (control, other), as_many in zip(controls.items(), ours_as_many, strict=True):
        theirs, theirs_as_many = search(other, folds, [other.shape[1], matrix.shape[1]])
        scores[control] = _fold_aurocs(other, theirs, folds)
        # 2. compare the winners on the languages left out in turn, else on the held-out half
        for c, category in enumerate(labels.categories):
            own = [i for i, fold in enumerate(folds) if fold.category == category]
            own = own[1:] or own  # the first is the half
            row = {"control": control, "category": category}
            row |= {"control_feature": theirs[c], "control_auroc": scores[control][c]}
            pairs = {"": (ours, theirs), "equal_": (as_many, theirs_as_many)}
            inside = np.stack([folds[i].member & folds[i].scored for i in own], axis=1)
            outside = labels.held_out & ~folds[c].member
            for prefix, (mine, against) in pairs.items():
                sides = columns_of(matrix, mine[own]), columns_of(other, against[own])
                generator = derive_generator(seed, f"{control} {category}")
                interval = auroc_difference(*sides, inside, outside, generator, n)
                row[f"{prefix}difference"] = interval.estimate
                row[f"{prefix}low"] = interval.low
                row[f"{prefix}high"] = interval.high
            rows.append(row)
    comparisons = pd.DataFrame(rows)
    comparisons["beats"] = (comparisons["low"] > 0) & (comparisons["equal_low"] > 0)
    # 3. a specialist discriminates, beats every control and is precise
    lost = comparisons[~comparisons["beats"]].groupby("category")["control"].agg(", ".join)
    table["not_beaten"] = table["category"].map(lost).fillna("")
    precise = table["precision"] >= PRECISION
    table["specialist"] = table["discriminating"] & (table["not_beaten"] == "") & precise
    nulls = []
    for threshold in ("half", 5.0):
        counts = count_specialists(matrix, labels.category, threshold).set_index("category")
        table[f"count_score_{threshold}"] = table["category"].map(counts["score"])
        nulls.append(count_specialists_null(matrix, labels.category, threshold, seed=seed))
    sizes = [(f.category, f.language, int((f.member & f.scored).sum())) for f in folds]
    left_out = pd.DataFrame(sizes, columns=["category", "language", "texts"]).assign(**scores)
    left_out = left_out[left_out["language"].notna()].reset_index(drop=True)
    return Specialists(
        candidates=candidates,
        table=table.assign(by_language=table["category"].isin(left_out["category"])),
        comparisons=comparisons,
        left_out=left_out,
        count_nulls=tuple(nulls),
        n=n,
        seed=seed,
    )


def _fold_aurocs(matrix: Matrix, chosen: np.ndarray, folds: Sequence[Fold]) -> np.ndarray:
    values = columns_of(matrix, chosen)
    return np.array([fold.auroc(values[:, i]) for i, fold in enumerate(folds)])
