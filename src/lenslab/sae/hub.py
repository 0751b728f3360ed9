"""Download SAEs ahead of a session, and check what is cached.

.venv/bin/python -m lenslab.sae.hub list --model gpt2-small
.venv/bin/python -m lenslab.sae.hub download gpt2-small-res-jb blocks.6.hook_resid_pre [--to FOLDER]
.venv/bin/python -m lenslab.sae.hub check gpt2-small-res-jb blocks.6.hook_resid_pre
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys

from lenslab.sae.load import SparseAutoencoder, load_sae, sae_hook, sae_model, save_sae
from lenslab.sae.registry import (
    COMMAND,
    NotAnSAE,
    SAENotHere,
    cached_files,
    intact,
    list_releases,
    registry,
    repository_of,
)


def download(release: str, sae_id: str, to: str | os.PathLike | None = None) -> SparseAutoencoder:
    """Fetch an SAE into the hub's cache, verify it, load it; with `to`, also save it as a local
    folder.

    What is cached and whole is not fetched again, an interrupted download goes on where it stopped,
    and a file that does not have its hash is dropped and fetched anew. Raises SAENotHere and
    NotAnSAE as `load_sae`.
    """
    repository, path = repository_of(release, sae_id)
    _drop_damaged(repository, path)
    try:
        sae = load_sae(release, sae_id, device="cpu")
    finally:
        dropped = _drop_damaged(repository, path)
    if dropped:
        raise NotAnSAE(
            f"{release} {sae_id}: {', '.join(dropped)} arrived damaged and was dropped: run it again."
        )
    if to is not None:
        save_sae(sae, to)
    return sae


def _drop_damaged(repository: str, path: str) -> list[str]:
    damaged = [file for file in cached_files(repository, path) if not intact(file)]
    for file in damaged:
        file.resolve().unlink()
        file.unlink(missing_ok=True)
    return [file.name for file in damaged]


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0, or 1 with the reason on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m lenslab.sae.hub", description="SAEs: list, download, check."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser(
        "list", help="releases that SAELens knows, and how many of their SAEs are here"
    )
    listing.add_argument("--model", help="only SAEs of this model")
    fetching = commands.add_parser(
        "download", help="fetch one SAE, go on with an interrupted download, verify it"
    )
    fetching.add_argument(
        "--to", metavar="FOLDER", help="save it as a folder for load_sae(FOLDER) as well"
    )
    checking = commands.add_parser("check", help="verify what is on this machine; fetches nothing")
    for command in (fetching, checking):
        command.add_argument(
            "release",
            help="a release" if command is fetching else "a release, bundled name or folder",
        )
        command.add_argument("sae_id", **({} if command is fetching else {"nargs": "?"}))
    given = parser.parse_args(arguments)
    try:
        if given.command == "list":
            table = list_releases(given.model)
            if table.empty:
                models = sorted({release.model for release in registry().values()})
                near = (
                    ", ".join(difflib.get_close_matches(given.model, models, n=3, cutoff=0.4))
                    or "none"
                )
                raise NotAnSAE(
                    f"No release for a model {given.model!r}. Nearest: {near}. {COMMAND} list shows all."
                )
            print(table.to_string(index=False))
            return 0
        if given.command == "download":
            sae, place = (
                download(given.release, given.sae_id, given.to),
                given.to or "the cache of the hub",
            )
        else:
            sae, place = _check(given.release, given.sae_id), "this machine, whole"
    except (NotAnSAE, SAENotHere) as error:
        print(error, file=sys.stderr)
        return 1
    print(
        f"{sae_hook(sae)} of {sae_model(sae)}: {sae.cfg.d_in} -> {sae.cfg.d_sae}, {sae.cfg.architecture()}; in {place}"
    )
    return 0


def _check(release: str, sae_id: str | None) -> SparseAutoencoder:
    """Load from this machine only, after comparing cached files with their hashes."""
    if sae_id is None:
        return load_sae(release, device="cpu")
    from huggingface_hub import constants

    command = f"{COMMAND} download {release} {sae_id}"
    files = cached_files(*repository_of(release, sae_id))
    if not files:
        raise SAENotHere(f"{release} {sae_id} is not in the cache. While online, run: {command}")
    damaged = [file.name for file in files if not intact(file)]
    if damaged:
        raise NotAnSAE(
            f"{release} {sae_id}: {', '.join(damaged)} cut off or damaged. While online, run: {command}"
        )
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        return load_sae(release, sae_id, device="cpu")
    finally:
        constants.HF_HUB_OFFLINE = before


if __name__ == "__main__":
    sys.exit(main())
