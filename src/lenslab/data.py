"""Texts: the probe texts that ship with the project, and text to train an SAE on.

Sources, each a list of documents for `lenslab.activations.pack` or `tokenize`: files of one's own (`load_texts`), a
data set of the hub (`hub_texts`), and, for a machine with neither, a million tokens that pocket-gpt wrote and that ship
(`sampled_text`).
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from io import TextIOBase
from itertools import groupby, islice
from pathlib import Path

import pandas as pd

from lenslab.paths import data_path
from lenslab.runtime import progress_bar


class TextsNotHere(OSError):
    """Texts that are not on this machine and could not be fetched; the message says what to do."""


def load_probes(name: str = "first_look") -> pd.DataFrame:
    """A set of probes from `data/probes/NAME.jsonl`, one row each; its card (README.md there) names the columns.

    All were written for this project. Raises FileNotFoundError with the sets that exist; ValueError, naming the file,
    where it is damaged.
    """
    file = data_path("probes", f"{name}.jsonl")
    if not file.exists():
        sets = sorted(f.stem for f in data_path("probes").glob("*.jsonl"))
        raise FileNotFoundError(f"No probe set {name!r}; there are: {', '.join(sets)}.")
    try:
        with _open(file) as lines:
            return pd.DataFrame([json.loads(line) for line in lines])
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"{file.name} is damaged ({error}): restore it from the repository.") from error


def load_texts(source: str | os.PathLike, *, column: str = "text", limit: int | None = None) -> list[str]:
    """Documents from files on this machine: one file, or a folder with all below it in order of path.

    Read are `.txt` (documents end at a blank line) and `.jsonl` (one object a line), both also as `.gz`, and
    `.parquet`. Empty documents are left out; with `limit` nothing is read beyond what it needs.

    Raises FileNotFoundError for nothing there; ValueError, naming file and line, for another kind of file, a row
    without `column` or with something else than text in it, and a file that is cut off or not UTF-8.
    """
    path = Path(source)
    files = sorted(f for f in path.rglob("*") if f.is_file() and _kind(f)) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise FileNotFoundError(f"No {', '.join(READERS)} file at {source}.")
    return list(islice((text for file in files for text in _documents(file, column) if text.strip()), limit))


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

    Args:
        name: as on the hub, e.g. `Salesforce/wikitext`; a local folder of data files works too.
        config: which of its configurations, e.g. `wikitext-103-raw-v1` (one paragraph or heading a row).
        limit: number of documents; empty rows are left out and do not count.

    A gated data set takes its token from `HF_TOKEN` or from `hf auth login`. Raises TextsNotHere where the hub cannot
    be reached or refuses; ValueError for a configuration, split or column that is not there, naming those that are.
    """
    from datasets import config as settings
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        rows = load_dataset(name, config, split=split, streaming=True)
        found = (text for text in _cells(rows, column, f"{name}, row") if text.strip())
        found = islice(found, limit)
        return list(progress_bar(found, progress=progress, total=limit, desc=f"texts of {name}", unit="text"))
    except (OSError, DatasetsError) as error:  # no network, offline, no such data set, gated: all of these
        first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        offline = "HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set: unset it. " if settings.HF_HUB_OFFLINE else ""
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
        raise ValueError(f"{file.name} is none of {', '.join(READERS)}: save its text as one of these.")
    try:
        yield from READERS[kind](file, column)
    except (EOFError, OSError, zlib.error, ValueError) as error:  # gzip, UTF-8 and parquet each raise their own
        if str(error).startswith(file.name):  # it says already which row is at fault
            raise
        raise ValueError(f"{file.name} is cut off, damaged or not UTF-8 ({error}): copy it again.") from error


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
    """The text of each row (a line of JSON is parsed), '' where it has none; `where` begins what the errors say."""
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
            raise ValueError(f"{where} {number}: no {column!r} (it has {has}). Name it with column=...")
        if not isinstance(value := row[column], str | None):
            raise ValueError(f"{where} {number}: {column!r} holds a {type(value).__name__}, not text.")
        yield value or ""


def sampled_text(n_documents: int | None = None) -> list[str]:
    """Documents that pocket-gpt wrote, of nine kinds in turn; default all. See `data/corpus/README.md`.

    A stand-in for a corpus where there is none: not by people, and no measure of a model or an SAE on real text.
    """
    frame = pd.read_parquet(data_path("corpus", "sampled.parquet"))
    row = frame["id"].str.rsplit("-", n=1).str[-1].astype(int)  # batches are of one opening each: deal them out
    return frame["text"].iloc[row.argsort(kind="stable")].head(n_documents or len(frame)).tolist()
