"""Does a feature tell one kind of text from the others, better than what needs no SAE?

1. `label_texts` prepares the texts: duplicates, broken and unlabelled ones are left out, and it
   says so; halves for choosing and for scoring; strata within which labels may be shuffled.
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

`lenslab.features.planted` puts the procedure itself to the test, on shuffled labels and on planted
features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import scipy.stats
from jaxtyping import Bool, Float, Int

from lenslab.features.activations import Matrix, blocks, check_matrix, columns_of
from lenslab.features.ranking import CountNull, count_specialists, count_specialists_null
from lenslab.files import Result
from lenslab.runtime import derive_generator
from lenslab.stats import Interval, auroc_difference, benjamini_hochberg, matched_auroc_permutations
from lenslab.texts import LabelledTexts, Skipped


class Ranked:
    """Candidates `[text, candidate]` ranked once on some texts, so that any labels can be searched
    for cheaply."""

    def __init__(self, matrix: Matrix, rows: Bool[np.ndarray, " text"]):
        self.matrix, self.rows, self.columns = matrix, rows, np.arange(matrix.shape[1])
        exact = (
            np.float32 if rows.sum() < 4000 else np.float64
        )  # sums of half-integers, so that ties are seen
        self.ranks = np.empty((int(rows.sum()), matrix.shape[1]), dtype=exact)
        self.variance = np.empty(matrix.shape[1])
        for part, block in blocks(matrix):
            self.ranks[:, part] = scipy.stats.rankdata(block[rows], axis=0)
            self.variance[part] = block[rows].var(axis=0, dtype=np.float64)

    def restricted(self, n: int) -> Ranked:
        """The `n` candidates of highest variance only (all where there are no more)."""
        few = copy(self)
        chosen = np.sort(np.argsort(-self.variance, kind="stable")[:n])
        few.columns, few.ranks, few.variance = (
            self.columns[chosen],
            self.ranks[:, chosen],
            self.variance[chosen],
        )
        return few

    def best(
        self, inside: Bool[np.ndarray, "text category"]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(candidate, its AUROC, how many share it), each `[category]`; ties go to the stronger
        inside, then the id."""
        member = inside[self.rows]
        k = member.sum(axis=0)[:, None]
        auroc = (member.T.astype(self.ranks.dtype) @ self.ranks - k * (k + 1) / 2) / (
            k * (len(member) - k)
        )
        best, tied = auroc.argmax(axis=1), []
        for c, place in enumerate(best):
            same = np.flatnonzero(auroc[c] == auroc[c, place])
            tied.append(len(same))
            if len(same) > 1:
                means = columns_of(self.matrix, self.columns[same])[self.rows][member[:, c]].mean(
                    axis=0
                )
                best[c] = same[means.argmax()]
        return self.columns[best], auroc[np.arange(len(best)), best], np.array(tied)


@dataclass(frozen=True, eq=False)
class Fold:
    """On which texts a category's feature is searched for, and on which it is scored; none is in
    both."""

    category: str
    language: str | None  # left out of the search; None: halves as they are
    rows: Bool[np.ndarray, " text"]  # searched
    searched: Bool[np.ndarray, " text"]  # of these, inside the category
    inside: Bool[np.ndarray, " text"]  # scored: texts of the category against ...
    outside: Bool[np.ndarray, " text"]  # ... the rest of the held-out half

    def auroc(self, values: Float[np.ndarray, " text"]) -> float:
        """AUROC of one candidate on the scored texts."""
        k, both = (
            int(self.inside.sum()),
            np.concatenate([values[self.inside], values[self.outside]]),
        )
        return float(
            (scipy.stats.rankdata(both)[:k].sum() - k * (k + 1) / 2) / (k * (len(both) - k))
        )


def halves(labels: LabelledTexts) -> list[Fold]:
    """One fold per category: searched on the discovery half, scored on the other."""
    held = labels.held_out
    members = zip(labels.categories, labels.inside.T, strict=True)
    return [
        Fold(name, None, ~held, ~held & inside, held & inside, held & ~inside)
        for name, inside in members
    ]


def language_folds(labels: LabelledTexts) -> list[Fold]:
    """For categories of several languages one fold per language: not searched in any text, scored
    on all of its texts.

    A language's texts of the discovery half can be scored on as well, since that search has not
    seen them.
    """
    folds, held = [], labels.held_out
    for name, inside in zip(labels.categories, labels.inside.T, strict=True):
        languages = np.unique(labels.language[inside & ~held]).tolist()
        for language in languages if len(languages) > 1 else []:
            own = inside & (labels.language == language)
            folds.append(
                Fold(name, language, ~held & ~own, ~held & inside & ~own, own, held & ~inside)
            )
    return folds


def search(
    matrix: Matrix, folds: Sequence[Fold], numbers: Sequence[int]
) -> Int[np.ndarray, "number fold"]:
    """The best candidate of each fold: among the n of highest variance, for every n of
    `numbers`."""
    found = np.empty((len(numbers), len(folds)), dtype=np.int64)
    for rows in {
        fold.rows.tobytes(): fold.rows for fold in folds
    }.values():  # ranked once where the texts are the same
        ranked, same = (
            Ranked(matrix, rows),
            [i for i, fold in enumerate(folds) if np.array_equal(fold.rows, rows)],
        )
        inside = np.stack([folds[i].searched for i in same], axis=1)
        for k, n in enumerate(numbers):
            found[k, same] = ranked.restricted(n).best(inside)[0]
    return found


PRECISION = 0.5  # held-out precision that a specialist needs


@dataclass(frozen=True, eq=False)
class Discrimination(Result):
    """The best feature of each SAE for each category: chosen on discovery, everything else from the
    held-out half."""

    names: tuple[str, ...]  # of the SAEs
    categories: tuple[str, ...]
    feature: Int[np.ndarray, "sae category"]
    tied: Int[np.ndarray, "sae category"]  # features with the same AUROC on discovery
    auroc_discovery: Float[np.ndarray, "sae category"]
    auroc: Float[np.ndarray, "sae category"]
    worst_register: Float[
        np.ndarray, "sae category"
    ]  # lowest AUROC of one register's texts against the rest
    p: Float[np.ndarray, "sae category"]
    q: Float[np.ndarray, "sae category"]  # Benjamini-Hochberg over categories and SAEs
    threshold: Float[
        np.ndarray, "sae category"
    ]  # best F1 on discovery; NaN where the feature is silent inside
    precision: Float[
        np.ndarray, "sae category"
    ]  # of texts at or above the threshold, the share inside
    recall: Float[np.ndarray, "sae category"]
    level: float
    n_permutations: int
    seed: int
    strata: str
    skipped: tuple[Skipped, ...]

    @property
    def discriminating(self) -> Bool[np.ndarray, "sae category"]:
        """Where q is at most the level."""
        return self.q <= self.level

    def to_frame(self) -> pd.DataFrame:
        """One row per SAE and category."""
        rows = [(name, category) for name in self.names for category in self.categories]
        frame = pd.DataFrame(rows, columns=["sae", "category"])
        shape = (len(self.names), len(self.categories))
        arrays = {
            k: v for k, v in vars(self).items() if isinstance(v, np.ndarray) and v.shape == shape
        }
        return frame.assign(
            **{k: v.ravel() for k, v in arrays.items()}, discriminating=self.discriminating.ravel()
        )


def discriminate(
    matrices: Mapping[str, Matrix],
    labels: LabelledTexts,
    *,
    n: int = 1000,
    seed: int = 0,
    q: float = 0.05,
) -> Discrimination:
    """The definition of a category-discriminating feature, for one or several SAEs: `{name: [text,
    feature]}`.

    `n` shuffles of the held-out labels: p cannot fall below 1 / (1 + n). ValueError on NaN, another
    number of texts, and where no category has enough texts.
    """
    if not matrices:
        raise ValueError("No matrix given: discriminate({'my SAE': matrix}, labels).")
    held, inside = labels.held_out, labels.inside
    columns: dict[str, list] = {
        key: [] for key in ("feature", "tied", "auroc_discovery", "auroc", "worst_register")
    }
    columns |= {key: [] for key in ("p", "threshold", "precision", "recall")}
    for matrix in matrices.values():
        matrix = check_matrix(matrix, labels.category)
        feature, discovery, tied = Ranked(matrix, ~held).best(inside)
        values = columns_of(matrix, feature)  # [text, category]
        generator = derive_generator(seed, "held-out labels")  # the same shuffles for every SAE
        test = matched_auroc_permutations(
            values[held], inside[held], generator, n, labels.stratum[held]
        )
        cut, precision, recall = precision_at_best_f1(values, inside, held)
        found = (
            feature,
            tied,
            discovery,
            test.observed,
            _worst_register(values, labels),
            test.p,
            cut,
            precision,
        )
        for key, value in zip(columns, (*found, recall), strict=True):
            columns[key].append(value)
    arrays = {key: np.stack(value) for key, value in columns.items()}
    arrays = {key: a if a.dtype.kind == "i" else a.astype(np.float64) for key, a in arrays.items()}
    corrected = benjamini_hochberg(arrays["p"])
    return Discrimination(
        tuple(matrices),
        labels.categories,
        **arrays,
        q=corrected,
        level=q,
        n_permutations=n,
        seed=seed,
        strata=labels.strata,
        skipped=labels.skipped,
    )


def precision_at_best_f1(
    values: np.ndarray, inside: np.ndarray, held: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(threshold, precision, recall) per category; the threshold is the positive value with the
    best F1 on discovery.

    The higher of two thresholds that are equally good. Nothing at or above it on the held-out half:
    precision 0.
    """
    result = np.zeros((3, values.shape[1]))
    for c in range(values.shape[1]):
        seen, member = values[~held, c], inside[~held, c]
        cuts = np.unique(seen[member & (seen > 0)])[::-1]
        if not len(cuts):
            result[:, c] = np.nan, 0, 0
            continue
        above = seen[None] >= cuts[:, None]  # [cut, text]
        f1 = 2 * (above & member).sum(1) / (above.sum(1) + member.sum())
        cut = cuts[f1.argmax()]
        chosen = values[held, c] >= cut
        hits = int((chosen & inside[held, c]).sum())
        result[:, c] = cut, hits / max(int(chosen.sum()), 1), hits / int(inside[held, c].sum())
    return result[0], result[1], result[2]


def _worst_register(values: np.ndarray, labels: LabelledTexts) -> np.ndarray:
    worst = np.ones(values.shape[1])
    for c, fold in enumerate(halves(labels)):
        for register in np.unique(labels.register[fold.inside]):
            those = replace(fold, inside=fold.inside & (labels.register == register))
            worst[c] = min(worst[c], those.auroc(values[:, c]))
    return worst


@dataclass(frozen=True, eq=False)
class Specialists(Result):
    """Which categories have a specialist, and which controls each of the others fails to beat.

    `difference` is the held-out AUROC of the SAE's feature minus that of the control's, with its 95
    % interval; `equal_` the same where the side with more candidates is restricted to as many,
    those of highest variance on discovery. In categories of several languages (`by_language`) both
    are means over the languages left out in turn.
    """

    name: str
    categories: tuple[str, ...]
    controls: tuple[str, ...]
    discrimination: Discrimination  # of all SAEs that were tested together
    candidates: dict[str, int]  # how many each side searched
    by_language: Bool[np.ndarray, " category"]
    control_feature: Int[np.ndarray, "control category"]
    control_auroc: Float[np.ndarray, "control category"]  # on the held-out half
    difference: Float[np.ndarray, "control category"]
    low: Float[np.ndarray, "control category"]
    high: Float[np.ndarray, "control category"]
    equal_difference: Float[np.ndarray, "control category"]
    equal_low: Float[np.ndarray, "control category"]
    equal_high: Float[np.ndarray, "control category"]
    left_out: (
        pd.DataFrame
    )  # category, language, texts, feature, auroc, and the AUROC of each control
    counts: pd.DataFrame  # the older scores, with both thresholds
    count_nulls: tuple[CountNull, ...]

    @property
    def row(self) -> int:
        """Which row of `discrimination` is this SAE's."""
        return self.discrimination.names.index(self.name)

    @property
    def beats(self) -> Bool[np.ndarray, "control category"]:
        """Lower bounds above 0, against all candidates of the control and at equal numbers."""
        return (self.low > 0) & (self.equal_low > 0)

    @property
    def specialist(self) -> Bool[np.ndarray, " category"]:
        """Discriminating, better than every control, precise enough."""
        found = self.discrimination
        return (
            found.discriminating[self.row]
            & self.beats.all(axis=0)
            & (found.precision[self.row] >= PRECISION)
        )

    def to_frame(self) -> pd.DataFrame:
        """One row per category, the older scores beside."""
        frame = self.discrimination.to_frame()
        frame = frame[frame["sae"] == self.name].reset_index(drop=True)
        lost = [
            [c for c, b in zip(self.controls, column, strict=True) if not b]
            for column in self.beats.T
        ]
        frame = frame.assign(
            specialist=self.specialist, not_beaten=[", ".join(names) for names in lost]
        )
        scores = self.counts.pivot(index="category", columns="threshold", values="score")
        scores.columns = [f"count_score_{name}" for name in scores.columns]
        return frame.merge(scores, left_on="category", right_index=True, how="left")

    def comparisons(self) -> pd.DataFrame:
        """One row per control and category."""
        rows = [(control, category) for control in self.controls for category in self.categories]
        frame = pd.DataFrame(rows, columns=["control", "category"])
        shape = (len(self.controls), len(self.categories))
        arrays = {
            k: v for k, v in vars(self).items() if isinstance(v, np.ndarray) and v.shape == shape
        }
        return frame.assign(
            **{key: value.ravel() for key, value in arrays.items()}, beats=self.beats.ravel()
        )


def find_specialists(
    matrix: Matrix,
    labels: LabelledTexts,
    controls: Mapping[str, Matrix],
    *,
    name: str = "SAE",
    discrimination: Discrimination | None = None,
    n: int = 1000,
    seed: int = 0,
) -> Specialists:
    """The definition of a specialist, for one SAE's pooled matrix against controls pooled alike
    `{name: matrix}`.

    Args: discrimination: of several SAEs at once, this one among them under `name`; default of this
        one alone. n: shuffles for p (where not given) and resamples for the intervals.

    The older count score and its null (200 shuffles) stand beside. ValueError without controls, on
    NaN, and for another number of texts.
    """
    if not controls:
        raise ValueError(
            "A specialist is better than controls: give some (lenslab.sae.controls.control_matrices)."
        )
    matrix = check_matrix(matrix, labels.category)
    controls = {key: check_matrix(value, labels.category) for key, value in controls.items()}
    discrimination = discrimination or discriminate({name: matrix}, labels, n=n, seed=seed)
    if name not in discrimination.names or discrimination.categories != labels.categories:
        raise ValueError(
            f"`discrimination` is of {discrimination.names} and other texts, or lacks {name!r}."
        )
    folds = [*halves(labels), *language_folds(labels)]
    used = [_scored(folds, category) for category in labels.categories]
    width = matrix.shape[1]
    ours = search(
        matrix, folds, [width, *(c.shape[1] for c in controls.values())]
    )  # [0]: all, [1 + i]: as control i
    left_out = {"auroc": _fold_aurocs(matrix, ours[0], folds)}
    rows: dict[str, list] = {
        key: [] for key in ("control_feature", "control_auroc", "all", "equal")
    }
    for i, (control, candidates) in enumerate(controls.items()):
        theirs = search(candidates, folds, [candidates.shape[1], width])
        left_out[control] = _fold_aurocs(candidates, theirs[0], folds)
        rows["control_feature"].append(theirs[0][: len(labels.categories)])
        rows["control_auroc"].append(left_out[control][: len(labels.categories)])
        for key, mine, other in (("all", ours[0], theirs[0]), ("equal", ours[1 + i], theirs[1])):
            pair = columns_of(matrix, mine), columns_of(candidates, other)
            rows[key].append(
                [_difference(*pair, folds, places, n, seed, control) for places in used]
            )
    table = pd.DataFrame([(f.category, f.language, int(f.inside.sum())) for f in folds])
    table.columns = ["category", "language", "texts"]
    table = table.assign(feature=ours[0], **left_out)[len(labels.categories) :].reset_index(
        drop=True
    )
    thresholds = ("half", 5.0)
    counts = [count_specialists(matrix, labels.category, t).assign(threshold=t) for t in thresholds]
    bounds = {"difference": "estimate", "low": "low", "high": "high"}
    return Specialists(
        name=name,
        categories=labels.categories,
        controls=tuple(controls),
        discrimination=discrimination,
        candidates={name: width} | {key: value.shape[1] for key, value in controls.items()},
        by_language=np.array([folds[places[0]].language is not None for places in used]),
        control_feature=np.stack(rows["control_feature"]),
        control_auroc=np.stack(rows["control_auroc"]),
        **{key: _bound(rows["all"], attribute) for key, attribute in bounds.items()},
        **{f"equal_{key}": _bound(rows["equal"], attribute) for key, attribute in bounds.items()},
        left_out=table,
        counts=pd.concat(counts, ignore_index=True),
        count_nulls=tuple(
            count_specialists_null(matrix, labels.category, t, seed=seed) for t in thresholds
        ),
    )


def _scored(folds: Sequence[Fold], category: str) -> list[int]:
    """The folds that a category's comparison is made on: its languages where it has several, else
    the halves."""
    own = [i for i, fold in enumerate(folds) if fold.category == category]
    return [i for i in own if folds[i].language is not None] or own


def _difference(
    ours: np.ndarray,
    theirs: np.ndarray,
    folds: Sequence[Fold],
    places: list[int],
    n: int,
    seed: int,
    control: str,
) -> Interval:
    inside, outside = np.stack([folds[i].inside for i in places], axis=1), folds[places[0]].outside
    generator = derive_generator(seed, f"{control} {folds[places[0]].category}")
    return auroc_difference(ours[:, places], theirs[:, places], inside, outside, generator, n)


def _fold_aurocs(
    matrix: Matrix, found: np.ndarray, folds: Sequence[Fold]
) -> Float[np.ndarray, " fold"]:
    values = columns_of(matrix, found)
    return np.array([fold.auroc(values[:, i]) for i, fold in enumerate(folds)])


def _bound(
    intervals: list[list[Interval]], attribute: str
) -> Float[np.ndarray, "control category"]:
    return np.array([[getattr(interval, attribute) for interval in row] for row in intervals])
