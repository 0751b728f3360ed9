"""Labelled texts, ready to be compared: what is left out and why, halves, and strata for shuffling.

1. A text is left out where it is no text, is not valid Unicode, has no category, or was there before (a copy in the
   other half would be scored on what it was chosen on; under two categories both go).
2. Halves: the table's own (`split`: discovery or held_out), else half of each category at random.
3. A category is analysed where both halves hold enough of its texts; the others still count as "the rest".
4. Strata are bins of length, crossed with the register where registers occur in several categories. A register
   that lies within one category cannot be a stratum: labels could not move in it, and every p would be one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int, Num, Shaped

from lenslab.runtime import derive_generator

LEAST = 3  # texts of a category in each half
SPLITS = ("discovery", "held_out")


@dataclass(frozen=True)
class Skipped:
    """Something that was left out. `kind` is 'text' (`which`: its row in the table) or 'category' (its name)."""

    kind: str
    which: int | str
    reason: str


@dataclass(frozen=True, eq=False)
class LabelledTexts:
    """Texts with labels; row i is row i of a matrix made from `texts`."""

    texts: tuple[str, ...]
    row: Int[np.ndarray, " text"]  # in the table that was given
    category: Shaped[np.ndarray, " text"]
    register: Shaped[np.ndarray, " text"]  # '' where there is none
    language: Shaped[np.ndarray, " text"]
    held_out: Bool[np.ndarray, " text"]
    stratum: Int[np.ndarray, " text"]
    strata: str  # what they are, in words
    categories: tuple[str, ...]  # those with enough texts
    skipped: tuple[Skipped, ...]
    bins: int = 5

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def inside(self) -> Bool[np.ndarray, "text category"]:
        """Whether each text is of each analysed category."""
        return self.category[:, None] == np.array(self.categories)[None]

    def with_lengths(self, lengths: Num[Any, " text"], unit: str = "tokens") -> LabelledTexts:
        """Bins by other lengths than characters, such as `batch.real.sum(1)`: what pooling depends on."""
        lengths = np.asarray(lengths)
        if lengths.shape != (len(self),):
            raise ValueError(f"{len(self)} texts but lengths of shape {lengths.shape}.")
        stratum, strata = _strata(lengths, self.register, self.category, self.bins, unit)
        return replace(self, stratum=stratum, strata=strata)

    def to_frame(self) -> pd.DataFrame:
        """One row per text."""
        return pd.DataFrame({k: v for k, v in vars(self).items() if isinstance(v, np.ndarray)}).assign(text=self.texts)


def label_texts(probes: pd.DataFrame, *, seed: int = 0, bins: int = 5) -> LabelledTexts:
    """Probe texts (`lenslab.data.load_probes`, or any table with `text` and `category`) made ready; see the module.

    Optional columns: `split`, `register`, `language`. `bins`: of equal numbers of texts, by length in characters.
    ValueError for a table without these columns or with another split, and where no category is left.
    """
    if missing := {"text", "category"} - set(probes.columns):
        raise ValueError(f"The table has no column {', '.join(sorted(missing))}; it has {', '.join(probes.columns)}.")
    reasons = _reasons(probes["text"].tolist(), probes["category"].tolist())
    skipped = [Skipped("text", row, reason) for row, reason in sorted(reasons.items())]
    rows = np.array([i for i in range(len(probes)) if i not in reasons], dtype=np.int64)
    if not len(rows):
        raise ValueError(f"No text is left; the first was left out because: {skipped[0].reason if skipped else 'none'}")
    kept = probes.iloc[rows]
    category = kept["category"].astype(str).to_numpy(dtype=str)
    register, language = (
        kept[c].fillna("").astype(str).to_numpy(dtype=str) if c in kept else np.full(len(rows), "")
        for c in ("register", "language")
    )
    held_out = _halves(kept, category, seed)
    categories = []
    for name in np.unique(category).tolist():
        least = min(int((held_out[category == name] == half).sum()) for half in (False, True))
        if least >= LEAST and len(np.unique(category)) > 1:
            categories.append(name)
        else:
            why = f"{least} texts in one half: {LEAST} are needed in each" if least < LEAST else "there is no other"
            skipped.append(Skipped("category", name, why))
    if not categories:
        raise ValueError(f"No category can be analysed. {skipped[-1].which}: {skipped[-1].reason}.")
    texts = tuple(kept["text"])
    lengths = np.array([len(text) for text in texts])
    stratum, strata = _strata(lengths, register, category, bins, "characters")
    arrays = (category, register, language, held_out, stratum)
    return LabelledTexts(texts, rows, *arrays, strata, tuple(categories), tuple(skipped), bins)


def _reasons(texts: list, categories: list) -> dict[int, str]:
    """Why rows are left out, by row."""
    reasons: dict[int, str] = {}
    first: dict[str, int] = {}
    for row, (text, category) in enumerate(zip(texts, categories, strict=True)):
        if not isinstance(text, str) or not text.strip():
            reasons[row] = "no text"
            continue
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            reasons[row] = "not valid Unicode (half a surrogate pair)"
            continue
        if pd.isna(category) or not str(category).strip():
            reasons[row] = "no category"
            continue
        before = first.setdefault(" ".join(text.split()), row)
        if before != row:
            same = str(categories[before]) == str(category)
            reasons[row] = f"the same text as row {before}" + ("" if same else ", under another category")
            if not same:
                reasons[before] = f"the same text as row {row}, under another category"
    return reasons


def _halves(kept: pd.DataFrame, category: np.ndarray, seed: int) -> np.ndarray:
    if "split" in kept:
        if wrong := set(kept["split"]) - set(SPLITS):
            raise ValueError(f"split is {' or '.join(SPLITS)}, not {sorted(map(str, wrong))[0]!r}.")
        return (kept["split"] == "held_out").to_numpy(dtype=bool)
    held_out = np.zeros(len(kept), dtype=bool)
    for name in np.unique(category).tolist():
        rows = np.flatnonzero(category == name)
        state = derive_generator(seed, f"halves of {name}").initial_seed()
        held_out[np.random.default_rng(state).permutation(rows)[: len(rows) // 2]] = True
    return held_out


def _strata(
    lengths: np.ndarray, register: np.ndarray, category: np.ndarray, bins: int, unit: str
) -> tuple[Int[np.ndarray, " text"], str]:
    edges = np.quantile(lengths, np.arange(1, bins) / bins)
    length_bin = np.searchsorted(edges, lengths, side="right")
    in_words = f"{bins} bins of length in {unit}"
    shared = all(len(np.unique(category[register == r])) > 1 for r in np.unique(register))
    if shared and len(np.unique(register)) > 1:
        pairs = np.stack([length_bin, np.unique(register, return_inverse=True)[1]])
        return np.unique(pairs, axis=1, return_inverse=True)[1].reshape(-1), f"register and {in_words}"
    nested = "" if len(np.unique(register)) < 2 else " (registers lie within single categories and cannot be strata)"
    return length_bin, in_words + nested
