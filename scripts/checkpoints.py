"""Training checkpoints that survive a kill, a full disk and a damaged file: written beside, then renamed.

The newest two are kept. Each has the SHA-256 of its bytes in a file beside it; one that does not match is
refused, said so, and the one before it is used.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch


def digest(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def save_checkpoint(folder: Path, state: dict, name: str | None = None) -> Path:
    """Write `state`; without a name, also drop all but the newest two. A failed write leaves the old ones."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / (name or f"step-{state['step']:08d}.pt")
    temporary = file.with_suffix(".tmp")
    try:
        torch.save(state, temporary)
        file.with_suffix(".sha256").write_text(digest(temporary))
        os.replace(temporary, file)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        print(f"checkpoint {file.name} not written ({error}); the one before it is kept", flush=True)
        return file
    if name is None:
        for old in sorted(folder.glob("step-*.pt"))[:-2]:
            old.unlink()
            old.with_suffix(".sha256").unlink(missing_ok=True)
    return file


def latest_checkpoint(folder: Path) -> dict | None:
    """{'file', 'state'} of the newest checkpoint whose hash matches, or None."""
    for file in sorted(folder.glob("step-*.pt"), reverse=True):
        stored = file.with_suffix(".sha256")
        if stored.exists() and stored.read_text().strip() == digest(file):
            return {"file": file, "state": torch.load(file, weights_only=True)}
        print(f"checkpoint {file.name} is damaged (its hash does not match): using the one before it", flush=True)
    return None
