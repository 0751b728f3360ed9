"""Sparse autoencoders from disk and hub, kept with what they need: the one place that touches
SAELens.

`load_sae` opens a bundled SAE, a local folder or a release of the hub, and refuses one without a
hook or with a field that would be ignored (`lenslab.sae.fields`). Whether it belongs to a model and
what it reads there is `lenslab.sae.inputs`. Downloading ahead, on the command line, is
`lenslab.sae.hub`.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lenslab.files import data_path, sha256_file
from lenslab.models import model_name
from lenslab.runtime import default_device
from lenslab.sae import registry
from lenslab.sae.fields import check_scaling, checked_reader, config_key, remember_norms
from lenslab.sae.inputs import SparseAutoencoder, sae_hook
from lenslab.sae.registry import COMMAND, CONFIG, WEIGHTS, NotAnSAE, SAENotHere, plain_name

HASHES = ("weights_sha256", "config_key")  # of a saved folder, in its metadata

# Of metadata that change what an SAE is taken for; each may be missing
METADATA = {"hook_name": str, "model_name": str, "model_key": str, "prepend_bos": bool}
METADATA |= {"context_size": int, "model_from_pretrained_kwargs": dict}


def bundled_saes(model: TransformerBridge | None = None) -> list[str]:
    """Names of the SAEs that ship; with a model, of those that were made for one of its name,
    without floors (`lenslab.sae.train.base`), which nobody is to get unasked."""
    names = []
    for file in sorted(data_path("saes").glob(f"*/{CONFIG}")):
        made = json.loads(file.read_text(encoding="utf-8"))["metadata"]
        of_model = model and plain_name(made["model_name"]) == plain_name(model_name(model))
        if model is None or (of_model and not made.get("frozen")):
            names.append(file.parent.name)
    return names


def load_sae(
    name: str | os.PathLike, sae_id: str | None = None, *, device: str | None = None
) -> SparseAutoencoder:
    """An SAE as SAELens builds it, in float32, in eval mode and without gradients.

    Args:
        name: a bundled name (`bundled_saes()`), a local folder in SAELens's format, or, with
            `sae_id`, a release of the hub (`list_releases()`) or a hub repository `user/name`.
        sae_id: which SAE of the release, usually its hook.

    Warns where the decoder's rows are of several lengths: activations of two features then compare
    only after `sae.fold_W_dec_norm()`, which puts the lengths into the activations.

    Raises SAENotHere where there is nothing of that name here and the hub cannot be reached, with
    the command to run; NotAnSAE for a pickle, a cut-off file, weights that do not fit the config or
    hold NaN, files that are not what was saved (by their hashes), metadata without a hook, and
    fields of the config that would be ignored.
    """
    from sae_lens import SAE

    name = os.fspath(name)
    folder = data_path("saes", name) if name in bundled_saes() else Path(name).expanduser()
    label = folder.name if sae_id is None else f"{name} {sae_id}"
    if sae_id is None:
        folder = standing(folder)
        _check_folder(name, folder)
        read, where, converter = SAE.load_from_disk, [folder], checked_reader(None)
    else:
        registry.repository_of(name, sae_id)  # refuses pickles before they are fetched
        read, where, converter = SAE.from_pretrained, [name, sae_id], checked_reader(name)
    device = default_device(device)
    try:
        with warnings.catch_warnings():  # the processing it warns of is applied by input_transform
            warnings.filterwarnings("ignore", message=r"\s*This SAE has non-empty model_from_pretr")
            sae = read(*where, device=device, dtype="float32", converter=converter)
    except OSError as error:  # as all errors of the hub are
        command = f"HF_HUB_OFFLINE=0 {COMMAND} download {label}"
        raise SAENotHere(f"{label} is not in the cache. Online, run: {command}\n{error}") from error
    except Exception as error:  # whatever each reader makes of weights that are cut off or no SAE's
        why = f"is cut off, or does not fit its {CONFIG} ({type(error).__name__}: {error})"
        raise NotAnSAE(f"{label} {why}") from error
    if sae_id is None:
        _check_hashes(folder)
    norms = sae.W_dec.detach().norm(dim=1)
    if float(norms.max()) > 1.05 * float(norms.min()):
        several = f"Decoder rows of {label} are {norms.min():.2g} to {norms.max():.2g} long"
        warnings.warn(f"{several}: to compare features, sae.fold_W_dec_norm().", stacklevel=2)
    return finish(sae, label)


def _check_hashes(folder: Path) -> None:
    """Raise NotAnSAE unless both hashes are there and right, or neither, as other tools write; of a
    bundled SAE both."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    recorded = [config["metadata"].get(name) for name in HASHES] if "metadata" in config else []
    own = any(recorded) or folder.parent == data_path("saes")
    if own and recorded != [sha256_file(folder / WEIGHTS), config_key(config)]:
        why = f"{WEIGHTS} or {CONFIG} has not its hash"
        raise NotAnSAE(f"{folder.name} was changed after it was saved ({why}): copy it anew.")
    with safe_open(folder / WEIGHTS, "pt") as file:
        if not all("F" in file.get_slice(name).get_dtype() for name in list(file.keys())):
            raise NotAnSAE(f"{folder.name}: {WEIGHTS} holds integers, whose scale it does not say.")


def _check_folder(name: str, folder: Path) -> None:
    if not folder.is_dir() and name in registry.releases():
        some = next(iter(registry.paths_of(name)))
        raise NotAnSAE(f"{name} is a release: name one SAE of it, load_sae({name!r}, {some!r}).")
    if not folder.is_dir():
        near = registry.nearest(name, [*bundled_saes(), *registry.releases()])
        raise SAENotHere(f"No bundled SAE and no folder {name!r}. {near}")
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise NotAnSAE(f"{folder.name} needs {CONFIG} and {WEIGHTS}; a pickle is never loaded.")


def finish(sae: Any, label: str) -> SparseAutoencoder:
    """What every loaded SAE goes through: refused without a hook, with NaN, or as by
    `check_scaling`; eval mode, no gradients."""
    about = sae.cfg.metadata
    for name, kind in METADATA.items():
        if type(about[name]) not in (kind, type(None)):
            raise NotAnSAE(f"{label}: {name} is {about[name]!r}, not a {kind.__name__}.")
    sae_hook(sae)
    for part in ("hook_head_index", "seqpos_slice"):  # of the values at the hook
        if about[part] not in (None, [None], (None,)):
            raise NotAnSAE(f"{label} reads a part of its hook ({part}), which is not done here.")
    if sae.cfg.architecture() == "temporal":
        raise NotAnSAE(f"{label} reads several tokens at a time, which is not done here.")
    check_scaling(sae.cfg)
    check_finite(sae.state_dict(), label)
    for name in HASHES:  # of that file, not of what is made of this
        vars(about).pop(name, None)
    sae.turn_off_forward_pass_hook_z_reshaping()  # input_transform joins the heads
    remember_norms(sae)
    return sae.eval().requires_grad_(False)


def check_finite(weights: dict[str, Tensor], label: str) -> None:
    """Raise NotAnSAE, naming the tensor, for NaN and Inf."""
    for name, value in weights.items():
        if not torch.isfinite(value).all():
            raise NotAnSAE(f"{label}: {name} holds NaN or Inf: damaged, or its training diverged.")


def left_over(folder: Path, what: str) -> list[Path]:
    """Folders beside that saving under this name did not come to rename, `what` of "new|old"."""
    name = re.compile(rf"\.{re.escape(folder.name)}-({what})-\d+")
    return [path for path in folder.parent.glob(".*") if name.fullmatch(path.name)]


def standing(folder: Path) -> Path:
    """The folder, or where saving was killed before its last renaming what was to become it."""
    left = [] if folder.exists() else left_over(folder, "new")
    return max((path for path in left if (path / CONFIG).is_file()), default=folder)
