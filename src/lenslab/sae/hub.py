"""SAEs of the hub: list them, download one ahead of a session, check what is on this machine.

.venv/bin/python -m lenslab.sae.hub list [RELEASE] [--model gpt2-small]
.venv/bin/python -m lenslab.sae.hub download gpt2-small-res-jb blocks.6.hook_resid_pre [--to FOLDER]
.venv/bin/python -m lenslab.sae.hub check gpt2-small-res-jb blocks.6.hook_resid_pre
"""

from __future__ import annotations

import argparse
import sys

from huggingface_hub import constants

from lenslab.sae import registry
from lenslab.sae.registry import COMMAND, NotAnSAE, SAENotHere

# The loader, and with it TransformerLens, is imported by the commands that load an SAE


def listing(release: str | None = None, model: str | None = None) -> str:
    """The SAEs of a release, each with whether it is on this machine; without one the table of
    releases. NotAnSAE where there is none of that name or for that model."""
    if release is not None:
        registry.check_release(release)
        cached, ids = registry.cached_ids(release), registry.paths_of(release)
        return "\n".join(f"{sae_id}{'  (cached)' * (sae_id in cached)}" for sae_id in ids)
    table = registry.list_releases(model)
    if table.empty:
        near = registry.nearest(model, {entry["model"] for entry in registry.releases().values()})
        raise NotAnSAE(f"No release for a model {model!r}. {near} {COMMAND} list shows all.")
    return table.to_string(index=False)


def download(release: str, sae_id: str, to: str | None = None) -> str:
    """Fetch an SAE into the hub's cache, verify it, load it; with `to`, also save it as a folder.

    What is cached and whole is not fetched again, an interrupted download goes on where it stopped,
    and a file that does not have its hash is fetched anew. Raises as `load_sae`.
    """
    from lenslab.sae.load import load_sae
    from lenslab.sae.save import save_sae

    for file in registry.damaged_files(release, sae_id):
        file.resolve().unlink()
        file.unlink()
    sae = load_sae(release, sae_id, device="cpu")
    checked = check(release, sae_id)
    if to is not None:
        save_sae(sae, to)
    return checked


def check(release: str, sae_id: str | None = None) -> str:
    """Load from this machine only (a release's SAE, a bundled name or a folder), after comparing
    cached files with their hashes. Raises as `load_sae`."""
    from lenslab.sae.load import load_sae

    damaged = registry.damaged_files(release, sae_id) if sae_id else []
    if damaged:
        raise NotAnSAE(
            f"{damaged[0].name} is cut off or damaged: {COMMAND} download {release} {sae_id}"
        )
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        sae = load_sae(release, sae_id, device="cpu")
    finally:
        constants.HF_HUB_OFFLINE = before
    about, shape = sae.cfg.metadata, f"{sae.cfg.d_in} -> {sae.cfg.d_sae}"
    return f"{about.hook_name} of {about.model_name}: {shape}, {sae.cfg.architecture()}; whole"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0, or 1 with the reason on stderr."""
    parser = argparse.ArgumentParser("python -m lenslab.sae.hub", description="SAEs of the hub.")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("list", help="releases, or the SAEs of one, and which are here")
    command.add_argument("release", nargs="?", help="list the SAEs of this release")
    command.add_argument("--model", help="only SAEs of this model")
    command.set_defaults(run=listing)
    command = commands.add_parser("download", help="fetch one SAE, or go on fetching it; verify it")
    command.add_argument("release")
    command.add_argument("sae_id")
    command.add_argument("--to", metavar="FOLDER", help="save it there, for load_sae(FOLDER)")
    command.set_defaults(run=download)
    command = commands.add_parser("check", help="verify what is on this machine; fetches nothing")
    command.add_argument("release", help="a release, bundled name or folder")
    command.add_argument("sae_id", nargs="?")
    command.set_defaults(run=check)
    options = vars(parser.parse_args(arguments))
    try:
        print(options.pop("run")(**options))
    except (NotAnSAE, SAENotHere) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
