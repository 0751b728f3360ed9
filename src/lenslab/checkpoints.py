"""Training checkpoints that survive a kill, a full disk and a damaged file: written beside, then renamed.

The newest two are kept. Each has the SHA-256 of its bytes in a file beside it; one that does not match is
refused, said so, and the one before it is used.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from lenslab.paths import sha256_file


def save_checkpoint(folder: Path, state: dict, name: str | None = None) -> Path:
    """Write `state`; without a name, also drop all but the newest two. A failed write leaves the old ones."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / (name or f"step-{state['step']:08d}.pt")
    temporary, digest = file.with_suffix(".tmp"), file.with_suffix(".sha256.tmp")
    try:
        torch.save(state, temporary)
        digest.write_text(sha256_file(temporary))
        os.replace(temporary, file)  # only once both are written: a full disk leaves an older pair as it was
        os.replace(digest, file.with_suffix(".sha256"))
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        digest.unlink(missing_ok=True)
        print(f"checkpoint {file.name} not written ({error}); the one before it is kept", flush=True)
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
    return torch.load(file, weights_only=True, map_location="cpu")  # load_state_dict moves it where it goes


def drop_later_checkpoints(folder: Path, step: int) -> None:
    """Forget what was saved after `step`: the run goes on from there, and would else take them for its newest."""
    for file in sorted(folder.glob("step-*.pt")):
        if int(file.stem.split("-")[1]) > step:
            file.unlink()
            file.with_suffix(".sha256").unlink(missing_ok=True)


def latest_checkpoint(folder: Path) -> dict | None:
    """{'file', 'state'} of the newest checkpoint whose hash matches, or None where there is none.

    Raises ValueError when there are checkpoints and all are damaged: starting over would look like resuming.
    """
    files = sorted(folder.glob("step-*.pt"), reverse=True)
    for file in files:
        try:
            return {"file": file, "state": load_checkpoint(file)}
        except ValueError as error:
            print(f"{error}: trying the one before it", flush=True)
    if files:
        raise ValueError(f"All {len(files)} checkpoints in {folder.name} are damaged: move them away to start over.")
    return None
