"""Activation records: what one text did inside one model, kept with the words to read it by, saved
and compared.

| suffix          | values                  | opens in                    | use it for                            |
|-----------------|-------------------------|-----------------------------|---------------------------------------|
| `.safetensors`  | as they are             | Python, Rust, JavaScript    | the default: fast, exact, cannot run code |
| `.npz`          | as they are, compressed | NumPy                       | analysis without PyTorch              |
| `.json`, `.json.gz` | written out in digits, exact | anything, a text editor | reading, small records, the web       |
| `.pt`           | as they are             | PyTorch                     | passing on to PyTorch code            |

Pickles (`.pkl`, `.pickle`, or one that calls itself `.pt`) are refused: opening one can run any
code. All formats hold the same two things: a header (JSON) and a set of named tensors.
"""

from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lenslab import __version__
from lenslab.capture import harvest
from lenslab.files import atomic_write
from lenslab.hooks import by_token
from lenslab.models import model_key, model_name
from lenslab.tokens import tokenize

FORMAT = "lenslab activation records 1"


SUFFIXES = (".safetensors", ".npz", ".json", ".json.gz", ".pt")


DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}


class NotARecord(ValueError):
    """A file that holds no activation record, or one that must not be opened; the message says what
    to do."""


@dataclass(frozen=True, eq=False)
class ActivationRecord:
    """One text and its activations. Position 0 is BOS where the model has one: see `real`."""

    prompt: str
    tokens: tuple[str, ...]  # readable, one per position
    token_ids: tuple[int, ...]
    real: tuple[bool, ...]  # False at BOS
    activations: dict[
        str, Tensor
    ]  # hook -> [pos, d], or as the hook gives it ([head, query, key] of a pattern)
    metadata: dict[str, Any] = field(
        default_factory=dict
    )  # JSON: model, model_key, hooks, compute, versions

    def __eq__(self, other: object) -> bool:
        """Equal to the last bit, dtypes included."""
        if not isinstance(other, ActivationRecord):
            return NotImplemented
        mine, theirs = self.activations, other.activations
        return (
            self._header() == other._header()
            and list(mine) == list(theirs)
            and all(
                mine[h].dtype == theirs[h].dtype and torch.equal(mine[h], theirs[h]) for h in mine
            )
        )

    __hash__ = None

    def _header(self) -> dict[str, Any]:
        """All but the activations, as JSON holds it."""
        fields = {
            name: getattr(self, name)
            for name in ("prompt", "tokens", "token_ids", "real", "metadata")
        }
        return json.loads(json.dumps(fields))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain Python values, the activations as nested lists."""
        return self._header() | {
            "activations": {h: value.tolist() for h, value in self.activations.items()}
        }

    def to_frame(self, hook: str) -> pd.DataFrame:
        """One row per position: token, id, real, and the components of a `[pos, d]` hook."""
        frame = pd.DataFrame(_vectors(self, hook).float().numpy())
        for place, name in enumerate(("token", "id", "real")):
            frame.insert(
                place, name, {"token": self.tokens, "id": self.token_ids, "real": self.real}[name]
            )
        return frame


@dataclass(frozen=True)
class RecordStatistics:
    """Of the components of all real tokens at one hook; BOS apart, because it is often a hundred
    times larger."""

    hook: str
    tokens: tuple[str, ...]  # of all positions
    mean: float
    std: float  # of the components, divided by their number
    min: float
    max: float
    norm: tuple[float, ...]  # Euclidean, of every position
    mean_norm: float  # over real tokens
    bos_norm: float | None  # None where the model has no BOS

    def to_frame(self) -> pd.DataFrame:
        """One row per position: token and norm."""
        return pd.DataFrame({"token": self.tokens, "norm": self.norm})


def extract(
    model: TransformerBridge,
    text: str,
    hooks: str | Sequence[str],
    *,
    dtype: torch.dtype = torch.float32,
    compute: str = "float32",
) -> ActivationRecord:
    """The record of one text at some hooks; `dtype` and `compute` as in `harvest`. Raises as it and
    `tokenize`."""
    return extract_batch(model, [text], hooks, dtype=dtype, compute=compute)[0]


def extract_batch(
    model: TransformerBridge,
    texts: Sequence[str],
    hooks: str | Sequence[str],
    *,
    dtype: torch.dtype = torch.float32,
    compute: str = "float32",
) -> list[ActivationRecord]:
    """One record per text, run together; each is what the text alone would give."""
    hooks = (hooks,) if isinstance(hooks, str) else tuple(hooks)
    batch = tokenize(model, texts)
    values = harvest(model, batch, hooks, dtype=dtype, compute=compute)
    metadata = {
        "model": model_name(model),
        "model_key": model_key(model),
        "hooks": list(hooks),
        "compute": "float32" if compute == "auto" else compute,
        "versions": {"lenslab": __version__}
        | {n: version(n) for n in ("torch", "transformers", "transformer-lens")},
    }
    records = []
    for row, n in enumerate(batch.attention.sum(1).tolist()):
        cut = {  # padding off: along pos, or along query and key
            hook: (value[row, :n] if by_token(model, hook) else value[row, ..., :n, :n]).clone()
            for hook, value in values.items()
        }
        ids, real = batch.tokens[row, :n].tolist(), batch.real[row, :n].tolist()
        tokens = tuple(batch.strings(row)[:n])
        records.append(
            ActivationRecord(batch.texts[row], tokens, tuple(ids), tuple(real), cut, dict(metadata))
        )
    return records


def save_record(records: ActivationRecord | Sequence[ActivationRecord], path: str | Path) -> Path:
    """Write one record or several; the format comes from the suffix. Returns the path.

    Raises NotARecord for a pickle or an unknown suffix, ValueError for NaN or Inf in `.json`, which
    has no such numbers. A file that is there is replaced only once the new one is whole.
    """
    path, suffix = Path(path), _suffix(path)
    one = isinstance(records, ActivationRecord)
    header: dict[str, Any] = {"format": FORMAT, "one": one, "records": []}
    tensors: dict[str, Tensor] = {}
    for i, record in enumerate([records] if one else records):
        values = {
            h: v.detach().cpu().contiguous().clone() for h, v in record.activations.items()
        }  # none shared
        kinds = {hook: str(value.dtype).removeprefix("torch.") for hook, value in values.items()}
        header["records"].append(record._header() | {"dtypes": kinds})
        tensors |= {f"{i}/{hook}": value for hook, value in values.items()}
    with atomic_write(path) as temporary:
        _WRITE[suffix](temporary, header, tensors)
    return path


def load_record(path: str | Path) -> ActivationRecord | list[ActivationRecord]:
    """What `save_record` wrote: one record, or the list of several.

    Raises NotARecord for a pickle (whatever it calls itself), a cut-off or foreign file;
    FileNotFoundError.
    """
    path, suffix = Path(path), _suffix(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path.name}.")
    try:
        header, tensors = _READ[suffix](path)
        if header["format"] != FORMAT:
            raise ValueError(f"its format is {header['format']!r}")
        records = []
        for i, entry in enumerate(header["records"]):
            kinds = entry.pop("dtypes")
            values = {hook: tensors[f"{i}/{hook}"] for hook in kinds}
            entry |= {name: tuple(entry[name]) for name in ("tokens", "token_ids", "real")}
            records.append(ActivationRecord(activations=values, **entry))
    except NotARecord:
        raise
    except Exception as error:  # five libraries, each with its own errors for a broken file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise NotARecord(
            f"{path.name} holds no activation record that can be read ({reason}). If it was cut off, extract and "
            "save it again."
        ) from error
    return records[0] if header["one"] else records


def compare_records(
    a: ActivationRecord, b: ActivationRecord, hook: str, metric: str = "cosine", position: int = -1
) -> float:
    """How alike two records are at one hook and position (default the last token; each record
    counts its own).

    'cosine' is the cosine similarity, 'l2' and 'l1' are distances. Raises KeyError for a hook that
    one lacks, IndexError for a position outside, ValueError for widths that differ or a cosine with
    a zero vector.
    """
    x, y = (_at(record, hook, position) for record in (a, b))
    if x.shape != y.shape:
        raise ValueError(
            f"{hook} has width {len(x)} in one record and {len(y)} in the other: other models?"
        )
    if metric == "l2":
        return float((x - y).norm())
    if metric == "l1":
        return float((x - y).abs().sum())
    if metric != "cosine":
        raise ValueError(f"metric is 'cosine', 'l2' or 'l1', not {metric!r}.")
    if not x.any() or not y.any():
        raise ValueError(
            f"A vector at {hook}, position {position}, is zero, so no angle is defined: use 'l2'."
        )
    return float(torch.dot(x, y) / (x.norm() * y.norm()))


def record_statistics(record: ActivationRecord, hook: str) -> RecordStatistics:
    """Mean, spread, range and norms at one hook, over real tokens; norms of every position beside
    them.

    Raises KeyError for a hook that the record lacks, ValueError for one without a vector per
    position.
    """
    values = _vectors(record, hook).double()
    real = torch.tensor(record.real)
    norms, inside = values.norm(dim=1), values[real]
    return RecordStatistics(
        hook=hook,
        tokens=record.tokens,
        mean=float(inside.mean()),
        std=float(inside.std(correction=0)),
        min=float(inside.min()),
        max=float(inside.max()),
        norm=tuple(norms.tolist()),
        mean_norm=float(norms[real].mean()),
        bos_norm=None if record.real[0] else float(norms[0]),
    )


def _vectors(record: ActivationRecord, hook: str) -> Float[Tensor, "pos d"]:
    if hook not in record.activations:
        raise KeyError(f"The record has no {hook}; it has {', '.join(record.activations)}.")
    value = record.activations[hook]
    if len(value) != len(record.tokens) or value.ndim < 2:
        raise ValueError(
            f"{hook} has shape {tuple(value.shape)}: no vector for each of {len(record.tokens)} tokens."
        )
    return value.flatten(1)  # heads side by side


def _at(record: ActivationRecord, hook: str, position: int) -> Tensor:
    vectors = _vectors(record, hook)
    if not -len(vectors) <= position < len(vectors):
        raise IndexError(f"Position {position} of a record of {len(vectors)} tokens.")
    return vectors[position].double()


def _suffix(path: Path) -> str:
    name = path.name.lower()
    for suffix in SUFFIXES:
        if name.endswith(suffix):
            return suffix
    if name.endswith((".pkl", ".pickle")):
        raise NotARecord(
            f"{path.name} is a pickle, and opening one can run any code, so none is written or read here. Use "
            ".safetensors, which keeps the same values."
        )
    raise NotARecord(f"The suffix of {path.name} is none of {', '.join(SUFFIXES)}.")


def _write_safetensors(path: Path, header: dict, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, path, metadata={"header": json.dumps(header)})


def _read_safetensors(path: Path) -> tuple[dict, dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["header"]), {
            name: file.get_tensor(name) for name in file.keys()
        }


def _write_npz(path: Path, header: dict, tensors: dict[str, Tensor]) -> None:
    arrays = {
        k: (v.view(torch.uint16) if v.dtype == torch.bfloat16 else v).numpy()
        for k, v in tensors.items()
    }
    text = np.frombuffer(
        json.dumps(header).encode(), dtype=np.uint8
    )  # NumPy has no bfloat16: its bits as uint16
    with open(path, "wb") as file:  # an open file: given a path, NumPy may append a suffix
        np.savez_compressed(file, header=text, **arrays)


def _read_npz(path: Path) -> tuple[dict, dict[str, Tensor]]:
    with np.load(path, allow_pickle=False) as file:
        header = json.loads(file["header"].tobytes())
        tensors = {k: torch.from_numpy(file[k]) for k in file.files if k != "header"}
    return header, {
        k: v.view(torch.bfloat16) if v.dtype == torch.uint16 else v for k, v in tensors.items()
    }


def _write_json(path: Path, header: dict, tensors: dict[str, Tensor]) -> None:
    values = {
        k: v.tolist() for k, v in tensors.items()
    }  # Python writes floats so that they come back exactly
    raw = json.dumps(header | {"values": values}, ensure_ascii=False, allow_nan=False).encode()
    path.write_bytes(
        gzip.compress(raw, mtime=0) if path.name.endswith(".gz") else raw
    )  # same bytes at any time


def _read_json(path: Path) -> tuple[dict, dict[str, Tensor]]:
    raw = path.read_bytes()
    header = json.loads(gzip.decompress(raw) if path.name.lower().endswith(".gz") else raw)
    values, tensors = header.pop("values"), {}
    for i, entry in enumerate(header["records"]):
        tensors |= {
            f"{i}/{k}": torch.tensor(values[f"{i}/{k}"], dtype=DTYPES[d])
            for k, d in entry["dtypes"].items()
        }
    return header, tensors


def _write_pt(path: Path, header: dict, tensors: dict[str, Tensor]) -> None:
    torch.save({"header": json.dumps(header), "tensors": tensors}, path)


def _read_pt(path: Path) -> tuple[dict, dict[str, Tensor]]:
    if not zipfile.is_zipfile(
        path
    ):  # torch.save writes a zip file; the older kind is a bare pickle
        raise NotARecord(
            f"{path.name} is not what torch.save writes (a bare pickle, or cut off), so it is not opened: a pickle can "
            "run any code. Save the record as .safetensors."
        )
    data = torch.load(path, weights_only=True, map_location="cpu")
    return json.loads(data["header"]), data["tensors"]


_WRITE = dict(
    zip(
        SUFFIXES, (_write_safetensors, _write_npz, _write_json, _write_json, _write_pt), strict=True
    )
)


_READ = dict(
    zip(SUFFIXES, (_read_safetensors, _read_npz, _read_json, _read_json, _read_pt), strict=True)
)
