"""Where bundled data, caches and outputs live, and how files are written: beside, then renamed.

Notebooks run from any working directory, so every path starts from the package, never from
`os.getcwd()`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

REPOSITORY = (
    Path(__file__).resolve().parents[2]
)  # the package is installed editable: src/lenslab/paths.py


def data_path(*parts: str) -> Path:
    """A path below the bundled `data/`."""
    return REPOSITORY.joinpath("data", *parts)


def cache_path(*parts: str) -> Path:
    """A path below the user's cache: `$LENSLAB_CACHE`, else `~/.cache/lenslab`."""
    root = os.environ.get("LENSLAB_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "lenslab").joinpath(*parts)


def outputs_path(*parts: str) -> Path:
    """A path below `$LENSLAB_OUTPUTS`, else the repository's `outputs/`."""
    root = os.environ.get("LENSLAB_OUTPUTS")
    return (Path(root) if root else REPOSITORY / "outputs").joinpath(*parts)


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it over `path` on success, remove it on error.

    A reader therefore sees the old file or the new one, never half of one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(
        f".{os.getpid()}-{path.name}"
    )  # keeps the suffix: writers append to others
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256_file(path: str | os.PathLike) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write JSON atomically, keys in the order given; raises ValueError on NaN, which JSON has
    not."""
    with atomic_write(path) as temporary:
        temporary.write_text(
            json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
            encoding="utf-8",
        )


def content_key(*parts: Any) -> str:
    """16 hexadecimal digits that change when any part does: bytes as they are, the rest as
    canonical JSON."""
    digest = hashlib.sha256()
    for part in parts:
        raw = (
            part
            if isinstance(part, bytes)
            else json.dumps(part, sort_keys=True, default=str).encode()
        )
        digest.update(
            len(raw).to_bytes(8, "big") + raw
        )  # lengths keep ("ab", "c") and ("a", "bc") apart
    return digest.hexdigest()[:16]


BUNDLED = {  # name -> what it is; the weights are in data/models/NAME
    "pocket-gpt": "GPT-2 architecture, 6 layers, d_model 256, trained by this project on mixed text",
    "pocket-moe": "OLMoE architecture, 6 layers, d_model 192, 16 experts, two per token, same text and tokenizer",
    "pocket-switch": "as pocket-moe, with 8 experts, one per token (Switch routing)",
}


DEFAULT = "pocket-gpt"


HUB = {  # short names for models people ask for; any other hub name works as it is
    "gpt2": "openai-community/gpt2",
    "gpt2-small": "openai-community/gpt2",
    "gemma-3-1b": "google/gemma-3-1b-pt",
    "gemma-3-1b-it": "google/gemma-3-1b-it",
    "olmoe": "allenai/OLMoE-1B-7B-0924",
}


def save_checkpoint(folder: Path, state: dict, name: str | None = None) -> Path:
    """Write `state`; without a name, also drop all but the newest two. A failed write leaves the
    old ones."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / (name or f"step-{state['step']:08d}.pt")
    temporary, digest = file.with_suffix(".tmp"), file.with_suffix(".sha256.tmp")
    try:
        torch.save(state, temporary)
        digest.write_text(sha256_file(temporary))
        os.replace(
            temporary, file
        )  # only once both are written: a full disk leaves an older pair as it was
        os.replace(digest, file.with_suffix(".sha256"))
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        digest.unlink(missing_ok=True)
        print(
            f"checkpoint {file.name} not written ({error}); the one before it is kept", flush=True
        )
        return file
    if name is None:
        for old in sorted(folder.glob("step-*.pt"))[:-2]:
            old.unlink()
            old.with_suffix(".sha256").unlink(missing_ok=True)
    return file


def load_checkpoint(file: Path) -> dict:
    """A checkpoint whose hash matches. Raises ValueError where the file is missing or damaged."""
    stored = file.with_suffix(".sha256")
    if not file.exists() or not stored.exists() or stored.read_text().strip() != sha256_file(file):
        raise ValueError(f"checkpoint {file.name} is missing or damaged (its hash does not match)")
    return torch.load(
        file, weights_only=True, map_location="cpu"
    )  # load_state_dict moves it where it goes


def drop_later_checkpoints(folder: Path, step: int) -> None:
    """Forget what was saved after `step`: the run goes on from there, and would else take them for
    its newest."""
    for file in sorted(folder.glob("step-*.pt")):
        if int(file.stem.split("-")[1]) > step:
            file.unlink()
            file.with_suffix(".sha256").unlink(missing_ok=True)


def latest_checkpoint(folder: Path) -> dict | None:
    """{'file', 'state'} of the newest checkpoint whose hash matches, or None where there is none.

    Raises ValueError when there are checkpoints and all are damaged: starting over would look like
    resuming.
    """
    files = sorted(folder.glob("step-*.pt"), reverse=True)
    for file in files:
        try:
            return {"file": file, "state": load_checkpoint(file)}
        except ValueError as error:
            print(f"{error}: trying the one before it", flush=True)
    if files:
        raise ValueError(
            f"All {len(files)} checkpoints in {folder.name} are damaged: move them away to start over."
        )
    return None


VERSIONED = (
    "lenslab",
    "torch",
    "transformer-lens",
    "sae-lens",
    "transformers",
    "scipy",
    "scikit-learn",
)


class Result:
    """Base of the frozen dataclasses that analyses return: every field can be saved as JSON."""

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain numbers, strings, lists and dictionaries; NaN and infinities become
        None."""
        return _plain(self)

    def save(self, path: str | os.PathLike, **config: Any) -> None:
        """JSON: the values, versions, and whatever `config` says about how it was made (model,
        texts, seed)."""
        versions = {name: version(name) for name in VERSIONED}
        kind = type(self).__name__
        write_json(
            path,
            {
                "result": kind,
                "values": self.to_dict(),
                "config": _plain(config),
                "versions": versions,
            },
        )


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, pd.DataFrame):
        return [_plain(row) for row in value.to_dict("records")]
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def saved_result(name: str, compute: Callable[[], Result], *, inputs: Any) -> pd.DataFrame:
    """The table (`to_frame`) of a result: the saved one where it was made from the same `inputs`,
    else computed now.

    `inputs` identify what went in, for instance content keys of model, SAE and texts, and settings.
    Where the table comes from is in its `attrs["origin"]`.
    """
    key = content_key(inputs)
    shipped, cached = (
        data_path("results", f"{name}.json"),
        cache_path("results", f"{name}-{key}.json"),
    )
    full = os.environ.get("LENSLAB_FULL") == "1"
    kept = {"saved result that ships": shipped, "saved result of this machine": cached}
    for origin, file in () if full else kept.items():
        if (frame := _read(file, key)) is not None:
            return _said(frame, origin)
    result = compute()
    theirs = (
        os.environ.get("LENSLAB_MODEL", "") not in ("", DEFAULT)
        or os.environ.get("LENSLAB_MODEL_TWIN") == "1"
    )
    result.save(shipped if full and not theirs else cached, key=key, table=result.to_frame())
    return _said(result.to_frame(), "computed now")


def _said(frame: pd.DataFrame, origin: str) -> pd.DataFrame:
    frame.attrs["origin"] = origin
    return frame


def _read(file: Path, key: str) -> pd.DataFrame | None:
    """The table in a file, or None where there is none, it was made from something else, or it is
    damaged."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))["config"]
        return pd.DataFrame(config["table"]) if config["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
