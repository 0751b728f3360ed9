"""What a feature really fires on: classes of tokens, and form against content.

1. `token_classes`: how a feature's activation spreads over digits, brackets, word starts, foreign letters ...,
   beside how common each class is. A "mathematics feature" that fires on digits wherever they stand is a
   digit feature.
2. `form_and_concept`: on texts that say the same thing in several forms, how much of a feature's activation
   follows the form and how much the content (two-way analysis of variance, one text per cell), beside
   what shuffled labels give.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from tqdm.auto import tqdm

from lenslab.analysis.features import FeatureActivations
from lenslab.analysis.results import Matrix, Result, check_matrix
from lenslab.runtime import derive_generator

CLASSES = (
    "digits",
    "bracket or quote",
    "operator or punctuation",
    "line break or indent",
    "word start",
    "word piece",
    "letters beyond ASCII",
    "emoji or other symbol",
    "part of a character",
)
BRACKETS = frozenset("()[]{}<>\"'`“”‘’«»")


def token_class(string: str) -> str:
    """The class of one token, by the first character that is not a space: one of `CLASSES`."""
    text = string.lstrip(" ")
    if not text or text[0] in "\n\t\r":
        return "line break or indent"
    if text.startswith("<0x"):
        return "part of a character"
    first = text[0]
    if first.isdigit():
        return "digits"
    if first.isalpha():
        if not text.isascii():
            return "letters beyond ASCII"
        return "word start" if string != text else "word piece"
    if first in BRACKETS:
        return "bracket or quote"
    if first.isascii() or unicodedata.category(first).startswith("P"):
        return "operator or punctuation"
    return "emoji or other symbol"


def token_classes(fa: FeatureActivations, features: Sequence[int] | np.ndarray) -> pd.DataFrame:
    """Share of each feature's activation that falls on each class of tokens.

    One row per class; column `all tokens` is the control, how common the class is; then one column per feature.
    A last row, `one token`, has the largest share that a single token string holds. NaN for a feature that never fires.
    """
    batch = fa.batch
    strings = [batch.strings(row) for row in range(len(batch))]
    seen = [strings[t][p] for t, p in zip(fa.text.tolist(), fa.position.tolist(), strict=True)]
    kinds = np.array([CLASSES.index(token_class(string)) for string in seen])
    common = np.bincount(kinds, minlength=len(CLASSES)) / len(kinds)
    columns = {"all tokens": [*common, Counter(seen).most_common(1)[0][1] / len(seen)]}
    ids = np.unique(np.array(seen, dtype=object).astype(str), return_inverse=True)[1]
    for feature in features:
        value = np.asarray(fa.matrix[:, [feature]].todense(), dtype=np.float64).ravel()
        total = value.sum() if value.any() else np.nan
        columns[str(feature)] = [
            *(np.bincount(kinds, value, len(CLASSES)) / total),
            np.bincount(ids, value).max() / total,
        ]
    return pd.DataFrame(columns, index=pd.Index([*CLASSES, "one token"], name="class"))


@dataclass(frozen=True)
class FormAndConcept(Result):
    """Share of each feature's variance over texts that follows form, and content; 0 is what chance gives.

    form, concept: epsilon squared, which corrects for the number of levels, `[feature]`.
    form_p, concept_p: share of shuffles (within a concept, within a form) that reach it.
    """

    features: Int[np.ndarray, " feature"]
    form: Float[np.ndarray, " feature"]
    concept: Float[np.ndarray, " feature"]
    form_p: Float[np.ndarray, " feature"]
    concept_p: Float[np.ndarray, " feature"]
    n_forms: int
    n_concepts: int

    def to_frame(self) -> pd.DataFrame:
        names = ("form", "concept", "form_p", "concept_p")
        return pd.DataFrame({"feature": self.features} | {name: getattr(self, name) for name in names})


def form_and_concept(
    matrix: Matrix,
    form: Sequence | np.ndarray,
    concept: Sequence | np.ndarray,
    *,
    features: Sequence | np.ndarray | None = None,
    n: int = 200,
    seed: int = 0,
) -> FormAndConcept:
    """Does a feature follow how a thing is said, or what is said?

    Args:
        matrix: pooled activations `[text, feature]`, dense or sparse; every concept once in every form.
        features: which to look at; default those that fire on at least ten texts.

    Raises ValueError where a concept lacks a form or has one twice: the two shares would not be comparable.
    """
    matrix = check_matrix(matrix, form)
    if len(concept) != matrix.shape[0]:
        raise ValueError(f"{len(concept)} concepts for {matrix.shape[0]} texts: one each is needed.")
    forms, row = np.unique(np.asarray(form), return_inverse=True)
    concepts, column = np.unique(np.asarray(concept), return_inverse=True)
    cells = np.bincount(row * len(concepts) + column, minlength=len(forms) * len(concepts))
    if (cells != 1).any() or min(len(forms), len(concepts)) < 2:
        raise ValueError(
            f"Needs every concept exactly once in every form: {matrix.shape[0]} texts, {len(forms)} forms, "
            f"{len(concepts)} concepts, {int((cells != 1).sum())} cells without exactly one text."
        )
    if features is None:
        fired = np.asarray((matrix > 0).sum(axis=0)).ravel()
        features = np.flatnonzero(fired >= 10)
    features = np.asarray(features, dtype=np.int64)
    chosen = matrix[:, features]
    values = np.asarray(chosen.todense() if hasattr(chosen, "todense") else chosen, dtype=np.float64)
    table = np.empty((len(forms), len(concepts), len(features)))
    table[row, column] = values
    observed = _epsilon_squared(table)
    above, rng = (
        np.zeros((2, len(features))),
        np.random.default_rng(derive_generator(seed, "form and concept").initial_seed()),
    )
    for _ in tqdm(range(n), "shuffles", delay=3, leave=False):
        within_concept = rng.permuted(np.broadcast_to(np.arange(len(forms))[:, None], table.shape[:2]), axis=0)
        within_form = rng.permuted(np.broadcast_to(np.arange(len(concepts)), table.shape[:2]), axis=1)
        above[0] += _epsilon_squared(table[within_concept, np.arange(len(concepts))])[0] >= observed[0] - 1e-12
        above[1] += _epsilon_squared(table[np.arange(len(forms))[:, None], within_form])[1] >= observed[1] - 1e-12
    p = (1 + above) / (1 + n)
    return FormAndConcept(features, *observed, *p, n_forms=len(forms), n_concepts=len(concepts))


def _epsilon_squared(table: Float[np.ndarray, "form concept feature"]) -> Float[np.ndarray, "2 feature"]:
    """(form, concept): sums of squares less what noise alone would give, over the total; NaN for a constant feature."""
    f, c, _ = table.shape
    grand = table.mean(axis=(0, 1))
    by_form, by_concept = table.mean(axis=1), table.mean(axis=0)
    ss_form, ss_concept = c * ((by_form - grand) ** 2).sum(0), f * ((by_concept - grand) ** 2).sum(0)
    ss_total = ((table - grand) ** 2).sum(axis=(0, 1))
    noise = (ss_total - ss_form - ss_concept) / ((f - 1) * (c - 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.stack([(ss_form - (f - 1) * noise), (ss_concept - (c - 1) * noise)]) / ss_total
