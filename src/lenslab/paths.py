"""Where bundled data, caches and outputs live, and how files are written: beside, then renamed.

Notebooks run from any working directory, so every path starts from the package, never from `os.getcwd()`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]  # the package is installed editable: src/lenslab/paths.py


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
    temporary = path.with_name(f".{os.getpid()}-{path.name}")  # keeps the suffix: writers append to others
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
    """Write JSON atomically, keys in the order given; raises ValueError on NaN, which JSON has not."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def content_key(*parts: Any) -> str:
    """16 hexadecimal digits that change when any part does: bytes as they are, the rest as canonical JSON."""
    digest = hashlib.sha256()
    for part in parts:
        raw = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True, default=str).encode()
        digest.update(len(raw).to_bytes(8, "big") + raw)  # lengths keep ("ab", "c") and ("a", "bc") apart
    return digest.hexdigest()[:16]
