"""Save an SAE in SAELens's format, whole or not at all.

1. What nobody could use is refused: no hook, no model's name, weights that are NaN in the dtype
   that is asked for.
2. Weights, then the config with the hash of both, go to a folder beside.
3. Two renamings swap the folders. A reader sees the old SAE or the new one; after a kill between
   the two `load_sae` opens the folder that was to become it.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lenslab.files import sha256_file, write_json
from lenslab.sae.fields import config_key
from lenslab.sae.inputs import SparseAutoencoder, sae_hook
from lenslab.sae.load import check_finite, left_over
from lenslab.sae.registry import CARD, CONFIG, WEIGHTS, NotAnSAE


def save_sae(
    sae: SparseAutoencoder,
    folder: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    card: dict | None = None,
) -> Path:
    """Save in SAELens's format (cfg.json, sae_weights.safetensors), the folder replaced as a whole.

    Args:
        dtype: of the weights on disk, e.g. torch.bfloat16 for half the size; loaded back as float32
            all the same.
        card: saved beside as card.json: what was measured, on what.

    Raises NotAnSAE for an SAE without hook or model name: whoever loads it could not know what to
    feed it; for weights that are NaN, or become so in `dtype`. TypeError for what is still in
    training form and for a dtype of integers. OSError on a full disk. After any of these, and after
    a kill at any moment, what was there or what is new loads from `folder`.
    """
    from sae_lens import SAE, TrainingSAE, __version__

    if not isinstance(sae, SAE) or isinstance(sae, TrainingSAE):  # decoder norms not folded yet
        raise TypeError(f"A {type(sae).__name__}: give the `.sae` of what `train` returns.")
    if not (sae_hook(sae) and sae.cfg.metadata.model_name):
        raise NotAnSAE("This SAE does not say which model it reads: set cfg.metadata.model_name.")
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"{dtype} would cut the weights to integers: take torch.bfloat16.")
    weights = dict(sae.state_dict())
    sae.process_state_dict_for_saving(weights)
    for name, value in weights.items():
        weights[name] = value.detach().to("cpu", dtype or value.dtype).contiguous()
    folder = Path(folder).expanduser()
    check_finite(weights, folder.name)
    with _replace_folder(folder) as temporary:
        if card is not None:
            write_json(temporary / CARD, card)
        save_file(weights, temporary / WEIGHTS)
        digest = sha256_file(temporary / WEIGHTS)
        config = sae.cfg.to_dict() | {"device": "cpu"}
        # Without a version of 6 or later SAELens drops the metadata on loading
        config["metadata"] |= {"sae_lens_version": __version__, "weights_sha256": digest}
        config["metadata"]["config_key"] = config_key(config)
        write_json(temporary / CONFIG, config)  # the last: a folder that has it is whole
    return folder


@contextmanager
def _replace_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside; swapped in on success, so that half an SAE is never seen under its
    name."""
    if folder.exists() and any(folder.iterdir()) and not (folder / CONFIG).is_file():
        raise NotAnSAE(f"{folder} holds something that is no SAE: choose another folder.")
    now = time.time_ns()  # numbers of processes come again in containers
    temporary, old = (folder.with_name(f".{folder.name}-{what}-{now}") for what in ("new", "old"))
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if folder.exists():
            os.replace(folder, old)  # killed before the next line: `standing`
        os.replace(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{folder.name} was not saved, what was there stays: {error}") from error
    finally:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        shutil.rmtree(temporary, ignore_errors=True)
    for left in left_over(folder, "new|old"):
        shutil.rmtree(left, ignore_errors=True)
