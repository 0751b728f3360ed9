"""Texts: the probe texts that ship with the project, and text to train an SAE on.

Sources, each a list of documents for `lenslab.tokens.pack` or `tokenize`: files of one's own
(`load_texts`), a data set of the hub (`hub_texts`), and, for a machine with neither, a million
tokens that pocket-gpt wrote and that ship (`sampled_text`).
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from io import TextIOBase
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int, Num, Shaped

from lenslab.files import data_path
from lenslab.runtime import derive_generator, progress_bar


class TextsNotHere(OSError):
    """Texts that are not on this machine and could not be fetched; the message says what to do."""


def load_probes(name: str = "first_look") -> pd.DataFrame:
    """A set of probes from `data/probes/NAME.jsonl`, one row each; its card (README.md there) names
    the columns.

    All were written for this project. Raises FileNotFoundError with the sets that exist;
    ValueError, naming the file, where it is damaged.
    """
    file = data_path("probes", f"{name}.jsonl")
    if not file.exists():
        sets = sorted(f.stem for f in data_path("probes").glob("*.jsonl"))
        raise FileNotFoundError(f"No probe set {name!r}; there are: {', '.join(sets)}.")
    try:
        with _open(file) as lines:
            return pd.DataFrame([json.loads(line) for line in lines])
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(
            f"{file.name} is damaged ({error}): restore it from the repository."
        ) from error


def load_texts(
    source: str | os.PathLike, *, column: str = "text", limit: int | None = None
) -> list[str]:
    """Documents from files on this machine: one file, or a folder with all below it in order of
    path.

    Read are `.txt` (documents end at a blank line) and `.jsonl` (one object a line), both also as
    `.gz`, and `.parquet`. Empty documents are left out; with `limit` nothing is read beyond what it
    needs.

    Raises FileNotFoundError for nothing there; ValueError, naming file and line, for another kind
    of file, a row without `column` or with something else than text in it, and a file that is cut
    off or not UTF-8.
    """
    path = Path(source)
    files = (
        sorted(f for f in path.rglob("*") if f.is_file() and _kind(f)) if path.is_dir() else [path]
    )
    if not files or not files[0].exists():
        raise FileNotFoundError(f"No {', '.join(READERS)} file at {source}.")
    return list(
        islice((text for file in files for text in _documents(file, column) if text.strip()), limit)
    )


def hub_texts(
    name: str,
    config: str | None = None,
    *,
    split: str = "train",
    column: str = "text",
    limit: int | None = None,
    progress: bool = True,
) -> list[str]:
    """Documents of a data set on the hub, streamed: only what `limit` needs is downloaded.

    Args: name: as on the hub, e.g. `Salesforce/wikitext`; a local folder of data files works too.
        config: which of its configurations, e.g. `wikitext-103-raw-v1` (one paragraph or heading a
        row). limit: number of documents; empty rows are left out and do not count.

    A gated data set takes its token from `HF_TOKEN` or from `hf auth login`. Raises TextsNotHere
    where the hub cannot be reached or refuses; ValueError for a configuration, split or column that
    is not there, naming those that are.
    """
    from datasets import config as settings
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        rows = load_dataset(name, config, split=split, streaming=True)
        found = (text for text in _cells(rows, column, f"{name}, row") if text.strip())
        found = islice(found, limit)
        return list(
            progress_bar(
                found, progress=progress, total=limit, desc=f"texts of {name}", unit="text"
            )
        )
    except (
        OSError,
        DatasetsError,
    ) as error:  # no network, offline, no such data set, gated: all of these
        first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        offline = (
            "HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set: unset it. "
            if settings.HF_HUB_OFFLINE
            else ""
        )
        raise TextsNotHere(
            f"{name} could not be read: {first}. {offline}For a gated data set accept its terms on its page and set "
            "HF_TOKEN. Without the hub: load_texts(file) reads .txt, .jsonl and .parquet files."
        ) from error


def _kind(file: Path) -> str | None:
    """The suffix that says how to read a file, `.gz` left off; None where nobody reads it."""
    suffix = Path(file.name.lower().removesuffix(".gz")).suffix
    return suffix if suffix in READERS else None


def _documents(file: Path, column: str) -> Iterator[str]:
    if (kind := _kind(file)) is None:
        raise ValueError(
            f"{file.name} is none of {', '.join(READERS)}: save its text as one of these."
        )
    try:
        yield from READERS[kind](file, column)
    except (
        EOFError,
        OSError,
        zlib.error,
        ValueError,
    ) as error:  # gzip, UTF-8 and parquet each raise their own
        if str(error).startswith(file.name):  # it says already which row is at fault
            raise
        raise ValueError(
            f"{file.name} is cut off, damaged or not UTF-8 ({error}): copy it again."
        ) from error


def _open(file: Path) -> TextIOBase:
    return (gzip.open if file.suffix.lower() == ".gz" else open)(file, "rt", encoding="utf-8")


def _paragraphs(file: Path, column: str) -> Iterator[str]:
    with _open(file) as lines:
        for blank, group in groupby(lines, key=lambda line: not line.strip()):
            if not blank:
                yield "".join(group).strip()


def _lines(file: Path, column: str) -> Iterator[str]:
    with _open(file) as lines:
        yield from _cells((line.strip() for line in lines), column, f"{file.name}, line", first=1)


def _parquet(file: Path, column: str) -> Iterator[str]:
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=str(file), split="train", streaming=True)
    yield from _cells(rows, column, f"{file.name}, row")


READERS = {".txt": _paragraphs, ".jsonl": _lines, ".parquet": _parquet}


def _cells(rows: Iterable[dict | str], column: str, where: str, first: int = 0) -> Iterator[str]:
    """The text of each row (a line of JSON is parsed), '' where it has none; `where` begins what
    the errors say."""
    for number, row in enumerate(rows, first):
        if isinstance(row, str):
            try:
                row = json.loads(row or "null")
            except json.JSONDecodeError as error:
                raise ValueError(f"{where} {number}: not JSON ({error}).") from error
            if row is None:
                continue
        if not isinstance(row, dict) or column not in row:
            has = ", ".join(map(str, row)) if isinstance(row, dict) else f"a {type(row).__name__}"
            raise ValueError(
                f"{where} {number}: no {column!r} (it has {has}). Name it with column=..."
            )
        if not isinstance(value := row[column], str | None):
            raise ValueError(
                f"{where} {number}: {column!r} holds a {type(value).__name__}, not text."
            )
        yield value or ""


def sampled_text(n_documents: int | None = None) -> list[str]:
    """Documents that pocket-gpt wrote, of nine kinds in turn; default all. See
    `data/corpus/README.md`.

    A stand-in for a corpus where there is none: not by people, and no measure of a model or an SAE
    on real text.
    """
    frame = pd.read_parquet(data_path("corpus", "sampled.parquet"))
    row = (
        frame["id"].str.rsplit("-", n=1).str[-1].astype(int)
    )  # batches are of one opening each: deal them out
    return frame["text"].iloc[row.argsort(kind="stable")].head(n_documents or len(frame)).tolist()


LEAST = 3  # texts of a category in each half


SPLITS = ("discovery", "held_out")


@dataclass(frozen=True)
class Skipped:
    """Something that was left out. `kind` is 'text' (`which`: its row in the table) or 'category'
    (its name)."""

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
        """Bins by other lengths than characters, such as `batch.real.sum(1)`: what pooling depends
        on."""
        lengths = np.asarray(lengths)
        if lengths.shape != (len(self),):
            raise ValueError(f"{len(self)} texts but lengths of shape {lengths.shape}.")
        stratum, strata = _strata(lengths, self.register, self.category, self.bins, unit)
        return replace(self, stratum=stratum, strata=strata)

    def to_frame(self) -> pd.DataFrame:
        """One row per text."""
        return pd.DataFrame(
            {k: v for k, v in vars(self).items() if isinstance(v, np.ndarray)}
        ).assign(text=self.texts)


def label_texts(probes: pd.DataFrame, *, seed: int = 0, bins: int = 5) -> LabelledTexts:
    """Probe texts (`lenslab.texts.load_probes`, or any table with `text` and `category`) made
    ready; see the module.

    Optional columns: `split`, `register`, `language`. `bins`: of equal numbers of texts, by length
    in characters. ValueError for a table without these columns or with another split, and where no
    category is left.
    """
    if missing := {"text", "category"} - set(probes.columns):
        raise ValueError(
            f"The table has no column {', '.join(sorted(missing))}; it has {', '.join(probes.columns)}."
        )
    reasons = _reasons(probes["text"].tolist(), probes["category"].tolist())
    skipped = [Skipped("text", row, reason) for row, reason in sorted(reasons.items())]
    rows = np.array([i for i in range(len(probes)) if i not in reasons], dtype=np.int64)
    if not len(rows):
        raise ValueError(
            f"No text is left; the first was left out because: {skipped[0].reason if skipped else 'none'}"
        )
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
            why = (
                f"{least} texts in one half: {LEAST} are needed in each"
                if least < LEAST
                else "there is no other"
            )
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
            reasons[row] = f"the same text as row {before}" + (
                "" if same else ", under another category"
            )
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
        return np.unique(pairs, axis=1, return_inverse=True)[1].reshape(
            -1
        ), f"register and {in_words}"
    nested = (
        ""
        if len(np.unique(register)) < 2
        else " (registers lie within single categories and cannot be strata)"
    )
    return length_bin, in_words + nested
