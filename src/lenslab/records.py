"""Activation records: what one text did inside one model, kept with the words to read it by, saved
and opened again. Two are compared by PyTorch: `torch.cosine_similarity(a.activations[hook][-1],
b.activations[hook][-1], 0)` at their last tokens. `a.activations[hook][torch.tensor(a.real)]` is
without BOS, which is often a hundred times as long as the others.

| suffix              | values                       | opens in                 | use it for       |
|---------------------|------------------------------|--------------------------|------------------|
| `.safetensors`      | as they are                  | Python, Rust, JavaScript | the default      |
| `.npz`              | as they are, compressed      | NumPy                    | without PyTorch  |
| `.json`, `.json.gz` | written out in digits, exact | anything, a text editor  | reading, the web |
| `.pt`               | as they are                  | PyTorch                  | PyTorch code     |

Every format holds the same two things, a header (JSON; in it the key of all that the file holds)
and named tensors. None runs code when it is read here: a `.pt` is a pickle inside, read with
`weights_only=True`, which makes tensors and plain values and refuses everything else; other pickles
(`.pkl`, `.pickle`) are neither written nor read.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lenslab.capture import harvest
from lenslab.files import atomic_write, content_key, versions
from lenslab.hooks import by_pair, by_token
from lenslab.models import model_key, model_name
from lenslab.store import tensors_key
from lenslab.tokens import tokenize

SUFFIXES = (".safetensors", ".npz", ".json", ".json.gz", ".pt")


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
    activations: dict[str, Tensor]  # by hook: [pos, d], or as it gives it (a pattern: [head, q, k])
    metadata: dict[str, Any] = field(default_factory=dict)  # model, model_key, versions

    def __eq__(self, other: object) -> bool:
        """Equal to the last bit, dtypes included."""
        return isinstance(other, ActivationRecord) and _key(True, [self]) == _key(True, [other])

    def _header(self) -> dict[str, Any]:
        """All but the values, as JSON holds it."""
        fields = {name: value for name, value in vars(self).items() if name != "activations"}
        dtypes = {hook: str(v.dtype).removeprefix("torch.") for hook, v in self.activations.items()}
        return json.loads(json.dumps(fields | {"dtypes": dtypes}))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain Python values, the activations as nested lists."""
        activations = {hook: value.tolist() for hook, value in self.activations.items()}
        return self._header() | {"activations": activations}


def extract_batch(
    model: TransformerBridge, texts: Sequence[str], hooks: str | Sequence[str]
) -> list[ActivationRecord]:
    """One record per text, run together in float32; each is what the text alone would give.

    Raises as `harvest` and `tokenize`.
    """
    batch = tokenize(model, texts)
    values = harvest(model, batch, hooks)
    metadata = {"model": model_name(model), "model_key": model_key(model), "versions": versions()}
    records = []
    for row, n in enumerate(batch.attention.sum(1).tolist()):
        activations = {}
        for hook, value in values.items():  # padding off: along pos, or along query and key
            cut = value[row, :n] if by_token(model, hook) else value[row, :, :n]
            activations[hook] = (cut[..., :n] if by_pair(hook) else cut).clone()
        record = ActivationRecord(
            prompt=batch.texts[row],
            tokens=tuple(batch.strings(row)[:n]),
            token_ids=tuple(batch.tokens[row, :n].tolist()),
            real=tuple(batch.real[row, :n].tolist()),
            activations=activations,
            metadata=dict(metadata),
        )
        records.append(record)
    return records


def save_record(records: ActivationRecord | Sequence[ActivationRecord], path: str | Path) -> Path:
    """Write one record or several; the format comes from the suffix. Returns the path, in which `~`
    is the home folder.

    Raises NotARecord for `.pkl`, `.pickle` or an unknown suffix, ValueError for NaN or Inf in
    `.json`, which has no such numbers. A file that is there is replaced only once the new one is
    whole.
    """
    path = Path(path).expanduser()
    suffix = _suffix(path)
    one = isinstance(records, ActivationRecord)
    listed = [records] if one else records
    header = {"one": one, "records": [record._header() for record in listed]}
    header["key"] = _key(one, listed)
    tensors = {}
    for i, record in enumerate(listed):
        for hook, value in record.activations.items():
            tensors[f"{i}/{hook}"] = value.detach().cpu().contiguous().clone()  # none shared
    with atomic_write(path) as temporary:
        if suffix == ".safetensors":
            save_file(tensors, temporary, metadata={"header": json.dumps(header)})
        elif suffix == ".pt":
            torch.save(tensors | {"header": json.dumps(header)}, temporary)
        elif suffix == ".npz":
            arrays = {}
            for name, value in tensors.items():  # NumPy has no bfloat16; float32 holds the values
                arrays[name] = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
            with open(temporary, "wb") as file:  # given a path, NumPy may append a suffix
                np.savez_compressed(file, header=json.dumps(header), **arrays)
        else:  # Python writes floats so that they come back exactly
            lists = {name: value.tolist() for name, value in tensors.items()}
            text = json.dumps({"header": header} | lists, ensure_ascii=False, allow_nan=False)
            raw = text.encode()
            temporary.write_bytes(gzip.compress(raw, mtime=0) if suffix == ".json.gz" else raw)
    return path


def load_record(path: str | Path) -> ActivationRecord | list[ActivationRecord]:
    """What `save_record` wrote: one record, or the list of several.

    Raises NotARecord for a pickle of more than tensors and plain values, a cut-off, changed or
    foreign file; FileNotFoundError.
    """
    path = Path(path).expanduser()
    suffix = _suffix(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path.name}.")
    try:
        values = _read(path, suffix)
        header = values["header"] if "json" in suffix else json.loads(str(values["header"]))
        records = []
        for i, entry in enumerate(header["records"]):
            activations = {}
            for hook, dtype in entry.pop("dtypes").items():
                value = values[f"{i}/{hook}"]
                activations[hook] = torch.as_tensor(value, dtype=getattr(torch, dtype))
            entry |= {name: tuple(entry[name]) for name in ("tokens", "token_ids", "real")}
            records.append(ActivationRecord(activations=activations, **entry))
        if header["key"] != _key(header["one"], records):
            raise ValueError("not what was written")
        return records[0] if header["one"] else records
    except Exception as error:  # four libraries, each with its own errors for a broken file
        message = f"{path.name} holds no activation record, or is cut off or changed."
        raise NotARecord(message) from error


def _key(one: bool, records: Sequence[ActivationRecord]) -> str:
    """Of all that a file holds, to the last bit."""
    parts: list[Any] = [one]
    for record in records:
        parts += [record._header(), tensors_key(record.activations)]
    return content_key(*parts)


def _read(path: Path, suffix: str) -> dict[str, Any]:
    """The header and the values, as tensors, arrays or lists."""
    if suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return file.metadata() | tensors
    if suffix == ".pt":
        return torch.load(path, weights_only=True, map_location="cpu")
    if suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    raw = path.read_bytes()
    return json.loads(gzip.decompress(raw) if suffix == ".json.gz" else raw)


def _suffix(path: Path) -> str:
    name = path.name.lower()
    if name.endswith((".pkl", ".pickle")):
        advice = "none is written or read here. Use .safetensors, which keeps the same values."
        raise NotARecord(f"{path.name} is a pickle, and opening one can run any code, so {advice}")
    for suffix in SUFFIXES:
        if name.endswith(suffix):
            return suffix
    raise NotARecord(f"The suffix of {path.name} is none of {', '.join(SUFFIXES)}.")
