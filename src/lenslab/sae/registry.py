"""Which SAEs the hub has and which of their files are on this machine: SAELens's registry, read
offline.

Nothing here loads an SAE. Releases whose weights are pickles are refused by name.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from pathlib import Path
from typing import Any

import pandas as pd

from lenslab.files import HUB, sha256_file

# SAELens's readers of releases whose weights are pickles
PICKLE_READERS = {
    "connor_rob_hook_z",
    "goodfire",
    "deepseek_r1",
    "qwen_scope",
    "dictionary_learning_1",
}


COMMAND = ".venv/bin/python -m lenslab.sae.hub"  # what errors advise: it serves at the shell and beside a notebook


class NotAnSAE(ValueError):
    """What was named cannot be loaded as an SAE; the message says why and what to do."""


class SAENotHere(FileNotFoundError):
    """An SAE that is neither bundled, nor in a folder, nor in the cache, while the hub cannot be
    reached."""


def plain_name(name: str) -> str:
    """gpt2-small, gpt2 and openai-community/gpt2 are one model."""
    return HUB.get(name, name).rstrip("/").split("/")[-1].lower()


def registry() -> dict[str, Any]:
    """SAELens's table of releases by name; read from its package, no network."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    return get_pretrained_saes_directory()


def repository_of(release: str, sae_id: str) -> tuple[str, str]:
    """(hub repository, path in it); NotAnSAE for a name the registry has not and for pickles."""
    known = registry().get(release)
    if known is None and "/" not in release:
        near = difflib.get_close_matches(release, registry(), n=3)
        raise NotAnSAE(
            f"No release {release!r}. Nearest: {', '.join(near) or 'none'}; {COMMAND} list shows all."
        )
    if known is None:
        return release, sae_id
    if sae_id not in known.saes_map:
        near = difflib.get_close_matches(sae_id, known.saes_map, n=3, cutoff=0.3)
        raise NotAnSAE(
            f"{release} has no SAE {sae_id!r}. Nearest: {', '.join(near) or 'none'}. {_some_ids(release)}"
        )
    if known.conversion_func in PICKLE_READERS:
        raise NotAnSAE(
            f"{release} stores its weights as pickles, which can run code when opened and are never loaded here. "
            f"Releases for {known.model} in safe formats: {COMMAND} list --model {known.model}, column `format`."
        )
    return known.repo_id, known.saes_map[sae_id]


def _some_ids(release: str, shown: int = 5) -> str:
    ids = list(registry()[release].saes_map)
    return f"It has {len(ids)}, among them {', '.join(ids[:shown])}."


def refuse_release_alone(name: str) -> None:
    """Raise NotAnSAE, with some ids, where `name` is a whole release: one of its SAEs must be named
    too."""
    if name in registry():
        some = next(iter(registry()[name].saes_map))
        raise NotAnSAE(
            f"{name} is a release of several SAEs: name one of them, as load_sae({name!r}, {some!r}) or on the command "
            f"line after the release. {_some_ids(name)}"
        )


def cached_files(repository: str, path: str) -> list[Path]:
    """Files of a hub repository at or below a path that are in the cache, in any snapshot."""
    from huggingface_hub import constants

    snapshots = Path(
        constants.HF_HUB_CACHE, f"models--{repository.replace('/', '--')}", "snapshots"
    ).glob("*")
    places = [snapshot / path for snapshot in snapshots]
    files = [
        file for place in places for file in ([place] if place.is_file() else place.rglob("*"))
    ]
    return [file for file in files if file.is_file()]


def intact(file: Path) -> bool:
    """Whether a cached file has the hash that the hub's cache keeps as the name of its blob.

    64 digits are the SHA-256 of a large file, 40 the git hash of a small one. Where the cache has
    no links (Windows), the format's own check at loading has to do.
    """
    etag = Path(os.readlink(file)).name if file.is_symlink() else ""
    if len(etag) == 64:
        return sha256_file(file) == etag
    if len(etag) == 40:
        content = file.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == etag
    return True


def is_cached(release: str, sae_id: str) -> bool:
    """Whether the weights of a release's SAE are on this machine; whole or not, loading will
    tell."""
    known = registry()[release]
    files = cached_files(known.repo_id, known.saes_map[sae_id])
    return any(file.suffix in {".safetensors", ".npz"} for file in files)


def list_releases(model: str | None = None) -> pd.DataFrame:
    """SAELens's registry, offline: one row per release; `cached` counts SAEs whose weights are on
    this machine.

    `model` restricts it to one model, under any of its usual names.
    """
    rows = []
    for name, release in registry().items():
        if model is None or plain_name(model) == plain_name(release.model):
            ids = release.saes_map if cached_files(release.repo_id, "") else ()
            here = sum(is_cached(name, sae_id) for sae_id in ids)
            safe = "pickle, refused" if release.conversion_func in PICKLE_READERS else "safe"
            rows.append((name, release.model, len(release.saes_map), release.repo_id, safe, here))
    return pd.DataFrame(
        rows, columns=["release", "model", "saes", "repository", "format", "cached"]
    )
