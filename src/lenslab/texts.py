"""Texts: the probe texts that ship with the project, text to train an SAE on, texts with labels.

Text comes from files of one's own (`load_texts`), from a data set of the hub (`hub_texts`) or, on a
machine with neither, from what models wrote and what ships (`sampled_text`: a million tokens of
pocket-gpt, a hundred thousand of smollm2); each is a list of documents for `lenslab.tokens.pack` or
`tokenize`.

How probe texts are made ready to be searched for features (`label_texts`):
1. duplicates, broken and unlabelled texts are left out, and `skipped` says why;
2. half of each category is for discovery, the other half is held out;
3. categories with too few texts in a half are not analysed; their texts stay as some of the rest;
4. texts of similar length, and of one register where several categories have it, form a stratum:
   labels may be shuffled within it.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, groupby, islice
from os.path import expanduser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int, Num, Shaped

from lenslab.files import DEFAULT, FETCHED, data_path
from lenslab.runtime import derive_generator, progress_bar

FORMATS = (".txt", ".jsonl", ".parquet")  # the first two also as .gz
BINS = 5  # of length
LEAST = 3  # texts of a category in each half


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
    return pd.DataFrame(list(_rows(file)))


def load_texts(
    source: str | Path, *, column: str = "text", limit: int | None = None, skip_empty: bool = False
) -> list[str]:
    """Documents from files on this machine: one file, or a folder with all below it in order of
    path.

    Read are `.txt` (blank lines separate documents) and `.jsonl` (one object a line), both also as
    `.gz`, and `.parquet`; `.csv`, `.md` and others are not, and in a folder are left alone: of a
    table give `pandas.read_csv(file)["column"].tolist()` wherever texts are asked for. Empty
    documents are left out; with `limit` nothing is read beyond what it
    needs. `skip_empty` also leaves out rows without `column` and those with something else than
    text in it, as long as some row of the file has the column.

    Raises FileNotFoundError for nothing there; ValueError, naming the file, for another kind of
    file, such a row, and a file that is cut off or not UTF-8.
    """
    path = Path(source).expanduser()
    files = [path]
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.is_file() and _format(f) in FORMATS)
    if not files or not files[0].exists():
        raise FileNotFoundError(f"No {', '.join(FORMATS)} file at {source}.")
    parts = (_documents(_rows(file, column), column, file.name, skip_empty) for file in files)
    return list(islice(chain.from_iterable(parts), limit))


def hub_texts(
    name: str,
    config: str | None = None,
    *,
    split: str = "train",
    column: str = "text",
    limit: int | None = None,
    skip_empty: bool = False,
) -> list[str]:
    """Documents of a data set on the hub, streamed: only what `limit` needs is downloaded.

    Args:
        name: as on the hub, e.g. `Salesforce/wikitext`; a local folder of data files works too.
        config: which of its configurations, e.g. `wikitext-103-raw-v1` (one paragraph or heading a
            row).
        limit: number of documents; empty rows are left out and do not count.
        skip_empty: as in `load_texts`.

    A gated data set takes its token from `HF_TOKEN` or from `hf auth login`. Raises TextsNotHere
    where the hub cannot be reached or refuses; ValueError for a configuration, split or column that
    is not there, naming those that are.
    """
    import datasets

    try:
        rows = datasets.load_dataset(expanduser(name), config, split=split, streaming=True)
        texts = islice(_documents(rows, column, name, skip_empty), limit)
        return list(progress_bar(texts, total=limit, desc=f"texts of {name}", unit="text"))
    except (OSError, datasets.exceptions.DatasetsError) as error:  # offline, unknown, gated
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        if datasets.config.HF_HUB_OFFLINE:
            reason += ". HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set: unset it"
        raise TextsNotHere(
            f"{name} could not be read: {reason}. For a gated data set accept its terms on its "
            "page and set HF_TOKEN. Without the hub: load_texts(file) reads .txt, .jsonl, .parquet."
        ) from error


def sampled_text(n_documents: int | None = None, model: str = DEFAULT) -> list[str]:
    """Documents that `model` wrote where such ship, else pocket-gpt, of nine kinds in turn; default
    all. See `data/corpus/README.md`.

    A stand-in for a corpus where there is none: not by people, and no measure of a model or an SAE
    on real text.
    """
    own = data_path("corpus", FETCHED.get(model, model), "sampled.parquet")
    frame = pd.read_parquet(own if own.is_file() else data_path("corpus", "sampled.parquet"))
    # batches are of one opening each: deal them out
    turn = frame["id"].str.rsplit("-", n=1).str[-1].astype(int).argsort(kind="stable")
    return frame["text"].iloc[turn].iloc[:n_documents].tolist()


def _format(file: Path) -> str:
    """The suffix that says how to read a file."""
    return Path(file.name.lower().removesuffix(".gz")).suffix


def _rows(file: Path, column: str = "text") -> Iterator[Any]:
    """The rows of a file; of plain text each document is one, `{column: document}`.

    Not by `datasets`: it takes a name for a pattern or an address, would ask a server before it
    reads a local file, fails where a file is empty, turns dates into objects and reads ten
    megabytes for the first line.
    """
    if (kind := _format(file)) not in FORMATS:
        advice = 'load a column of a table as pandas.read_csv(file)["column"].tolist().'
        raise ValueError(f"{file.name} is none of {', '.join(FORMATS)}: {advice}")
    try:
        if kind == ".parquet":
            from pyarrow.parquet import ParquetFile

            with ParquetFile(file) as table:
                for batch in table.iter_batches(batch_size=1000):
                    yield from batch.to_pylist()
            return
        opener = gzip.open if file.suffix.lower() == ".gz" else open
        with opener(file, "rt", encoding="utf-8-sig") as lines:
            if kind == ".jsonl":
                yield from (json.loads(line) for line in lines if line.strip())
            else:
                paragraphs = groupby(lines, key=str.isspace)
                for document in ("".join(p).strip() for blank, p in paragraphs if not blank):
                    if "\0" in document:  # UTF-16 and binary files may pass for UTF-8
                        raise ValueError("it holds the character NUL")
                    yield {column: document}
    except (EOFError, OSError, zlib.error, ValueError) as error:  # each reader raises its own
        raise ValueError(f"{file.name} is cut off, damaged or not UTF-8 ({error}).") from error


def _documents(rows: Iterable[Any], column: str, name: str, skip_empty: bool) -> Iterator[str]:
    """The text of every row that has one."""
    wrong, named = "", False
    for number, row in enumerate(rows):
        text = row.get(column, 0) if isinstance(row, dict) else 0
        if isinstance(text, str | None):
            named = True
            if (text or "").strip():
                yield text
            continue
        wrong = wrong or f"{name}, row {number}: no text under {column!r}: {str(row)[:80]}"
        if not skip_empty:
            raise ValueError(wrong)
    if wrong and not named:  # no such column: its name may be misspelt
        raise ValueError(wrong)


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
    categories: tuple[str, ...]  # those with enough texts
    skipped: pd.DataFrame  # kind ('text' or 'category'), which (row in the table, or name), reason

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def inside(self) -> Bool[np.ndarray, "text category"]:
        """Whether each text is of each analysed category."""
        return self.category[:, None] == np.array(self.categories)[None]

    def with_lengths(self, lengths: Num[Any, " text"]) -> LabelledTexts:
        """Strata by other lengths than characters, such as `batch.real.sum(1)`: what pooling
        depends on."""
        return replace(self, stratum=_strata(np.asarray(lengths), self.register, self.category))


def label_texts(probes: pd.DataFrame, *, seed: int = 0) -> LabelledTexts:
    """Probe texts (`load_probes`, or any table with `text` and `category`) made ready; see the
    module.

    Optional columns: `split`, `register`, `language`. Strata are by length in characters.
    ValueError for a split of another name, and where no category is left.
    """
    reasons = _reasons(probes["text"].tolist(), probes["category"].tolist())
    skipped = [("text", row, reason) for row, reason in sorted(reasons.items())]
    rows = np.array([row for row in range(len(probes)) if row not in reasons], dtype=np.int64)
    kept = probes.iloc[rows]

    def strings(column: str) -> Shaped[np.ndarray, " text"]:
        values = kept.get(column, pd.Series("", index=kept.index))
        return values.fillna("").astype(str).to_numpy(dtype=str)

    category = strings("category")
    held_out = _held_out(kept, category, seed)
    categories = []
    for name in np.unique(category).tolist():
        least = int(np.bincount(held_out[category == name], minlength=2).min())
        if least >= LEAST:
            categories.append(name)
        else:
            reason = f"{least} texts in one half: {LEAST} are needed in each"
            skipped.append(("category", name, reason))
    if not categories or len(np.unique(category)) < 2:
        raise ValueError(f"No two categories with enough texts; left out: {skipped}")
    register = strings("register")
    return LabelledTexts(
        texts=tuple(kept["text"]),
        row=rows,
        category=category,
        register=register,
        language=strings("language"),
        held_out=held_out,
        stratum=_strata(kept["text"].map(len).to_numpy(), register, category),
        categories=tuple(categories),
        skipped=pd.DataFrame(skipped, columns=["kind", "which", "reason"]),
    )


def _reasons(texts: list, categories: list) -> dict[int, str]:
    """Why rows are left out, by row."""
    reasons: dict[int, str] = {}
    first: dict[str, int] = {}  # row of each text, its spaces made equal
    for row, (text, category) in enumerate(zip(texts, categories, strict=True)):
        if not isinstance(text, str) or not text.strip():
            reasons[row] = "no text"
        elif text.encode(errors="ignore").decode() != text:
            reasons[row] = "not valid Unicode (half a surrogate pair)"
        elif pd.isna(category) or not str(category).strip():
            reasons[row] = "no category"
        elif (before := first.setdefault(" ".join(text.split()), row)) != row:
            reasons[row] = f"the same text as row {before}"
            if str(categories[before]) != str(category):
                reasons[row] += ", under another category"
                reasons[before] = f"the same text as row {row}, under another category"
    return reasons


def _held_out(kept: pd.DataFrame, category: np.ndarray, seed: int) -> np.ndarray:
    """The table's own split, else half of each category, drawn."""
    if "split" in kept:
        if other := set(kept["split"]) - {"discovery", "held_out"}:
            raise ValueError(f"A split is 'discovery' or 'held_out', not {other}.")
        return (kept["split"] == "held_out").to_numpy(dtype=bool)
    held_out = np.zeros(len(kept), dtype=bool)
    for name in np.unique(category).tolist():
        rows = np.flatnonzero(category == name)
        state = derive_generator(seed, f"halves of {name}").initial_seed()
        held_out[np.random.default_rng(state).permutation(rows)[: len(rows) // 2]] = True
    return held_out


def _strata(lengths: np.ndarray, register: np.ndarray, category: np.ndarray) -> np.ndarray:
    """Bins of equal numbers of texts by length; within each of them registers, unless one lies
    within a single category: then labels could not be shuffled."""
    edges = np.quantile(lengths, np.arange(1, BINS) / BINS)
    length_bin = np.searchsorted(edges, lengths, side="right")
    if (pd.Series(category).groupby(register).nunique() < 2).any():
        return length_bin
    return pd.Series(length_bin).groupby([length_bin, register]).ngroup().to_numpy()
