"""Which SAEs the hub has and which of their files are on this machine; no network, no SAE loaded.

SAELens keeps its table of releases in a file of its package. It is read as a file: importing
SAELens brings TransformerLens along, ten seconds for a table.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils.sha import git_hash

from lenslab.files import HUB, sha256_file

# SAELens's readers of releases whose weights are pickles, which can run code when opened
PICKLED = {"connor_rob_hook_z", "goodfire", "deepseek_r1", "qwen_scope", "dictionary_learning_1"}

# A folder of SAELens's format, and beside it what was measured
WEIGHTS, CONFIG, CARD = "sae_weights.safetensors", "cfg.json", "card.json"

COMMAND = ".venv/bin/python -m lenslab.sae.hub"  # what errors advise


class NotAnSAE(ValueError):
    """What was named cannot be loaded as an SAE; the message says why and what to do."""


class SAENotHere(FileNotFoundError):
    """An SAE that is neither bundled, nor in a folder, nor in the cache, while the hub cannot be
    reached."""


@cache
def releases() -> dict[str, dict[str, Any]]:
    """Releases by name, as SAELens writes them: `model`, `repo_id`, `conversion_func` (what reads
    their files), and `saes`, each with `id` and `path`."""
    package = importlib.util.find_spec("sae_lens").submodule_search_locations[0]
    text = Path(package, "pretrained_saes.yaml").read_text(encoding="utf-8")
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def releases_of(model: str) -> list[str]:
    """Names of the releases for a model, under any of its usual names."""
    wanted = plain_name(model)
    return [name for name in sorted(releases()) if plain_name(releases()[name]["model"]) == wanted]


def paths_of(release: str) -> dict[str, str]:
    """SAE id -> path in the repository."""
    return {sae["id"]: str(sae["path"]) for sae in releases()[release]["saes"]}


def is_safe(release: str) -> bool:
    """Whether its weights are not pickles."""
    return releases()[release].get("conversion_func") not in PICKLED


def nearest(name: str, names: Iterable[str]) -> str:
    """The names most like one that does not exist, in words."""
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.3)
    return f"Nearest: {', '.join(near) or 'none'}."


def plain_name(name: str) -> str:
    """gpt2-small, gpt2 and openai-community/gpt2 are one model."""
    return HUB.get(name, name).rstrip("/").split("/")[-1].lower()


def check_release(release: str) -> None:
    """Raise NotAnSAE for what is no release, with the nearest."""
    if release not in releases():
        near = nearest(release, releases())
        raise NotAnSAE(f"No release {release!r}. {near} {COMMAND} list shows all.")


def repository_of(release: str, sae_id: str) -> tuple[str, str]:
    """(hub repository, path in it). NotAnSAE for what the registry has not, and for pickles."""
    if release not in releases() and "/" in release and not Path(release).expanduser().is_dir():
        return release, sae_id  # any repository of the hub
    check_release(release)
    paths = paths_of(release)
    if sae_id not in paths:
        raise NotAnSAE(f"{release} has no SAE {sae_id!r}. {nearest(sae_id, paths)}")
    if not is_safe(release):
        safe = f"{COMMAND} list --model {releases()[release]['model']}"
        raise NotAnSAE(f"{release} holds pickles, which can run code: refused. Others: {safe}")
    return releases()[release]["repo_id"], paths[sae_id]


def cached_files(repository: str, path: str = "") -> list[Path]:
    """Files of a hub repository at or below a path that are in the cache, in any snapshot."""
    root = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repository, repo_type="model"))
    paths = [*root.glob(f"snapshots/*/{path}"), *root.glob(f"snapshots/*/{path}/**/*")]
    return [file for file in paths if file.is_file()]


def intact(file: Path) -> bool:
    """Whether a cached file has the hash that the hub's cache keeps as the name of its blob.

    64 digits are the SHA-256 of a large file, 40 the git hash of a small one. Where the cache has
    no links (Windows), the format's own check at loading has to do.
    """
    etag = Path(os.readlink(file)).name if file.is_symlink() else ""
    if len(etag) == 64:
        return sha256_file(file) == etag
    return len(etag) != 40 or git_hash(file.read_bytes()) == etag


def damaged_files(release: str, sae_id: str) -> list[Path]:
    """Cached files of an SAE that are cut off or changed. Raises as `repository_of`."""
    return [file for file in cached_files(*repository_of(release, sae_id)) if not intact(file)]


def cached_ids(release: str) -> list[str]:
    """The SAEs of a release whose weights are on this machine in a safe format; whole or not,
    loading will tell."""
    repository = releases()[release]["repo_id"]
    if not is_safe(release) or not cached_files(repository):
        return []
    return [
        sae_id
        for sae_id, path in paths_of(release).items()
        if any(file.suffix in (".safetensors", ".npz") for file in cached_files(repository, path))
    ]


def list_releases(model: str | None = None) -> pd.DataFrame:
    """One row per release (of `model`, under any of its usual names): `release`, `model`, `saes`,
    `repository`, `format`, and `cached`, how many of its SAEs have their weights on this machine.
    """
    names = list(releases()) if model is None else releases_of(model)
    table = pd.DataFrame({"release": names})
    table["model"] = [releases()[name]["model"] for name in names]
    table["saes"] = [len(paths_of(name)) for name in names]
    table["repository"] = [releases()[name]["repo_id"] for name in names]
    table["format"] = ["safe" if is_safe(name) else "pickle, refused" for name in names]
    table["cached"] = [len(cached_ids(name)) for name in names]
    return table
