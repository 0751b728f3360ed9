"""What a training refuses before it begins: an SAE or held-out data that do not fit, a folder of another run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from lenslab import __version__
from lenslab.sae.sources import VectorSource
from lenslab.sae.trainable import SAEConfig, TrainableSAE

SHARED = 0.01  # share of held-out fingerprints that may occur in the training text. Licences do; of vectors, those of
# first tokens, which have nothing but themselves as context


def prepared(name: str, sae: TrainableSAE, source: VectorSource, vectors: int) -> SAEConfig:
    """The SAE's configuration with everything in its metadata that the saved one should say; refuses one that does not
    fit. The SAE itself is left as it is: the training may yet be refused for another reason."""
    if not isinstance(sae, TrainableSAE):
        raise TypeError(
            f"{name} is a {type(sae).__name__}: only what `build_sae` makes can be trained, not a saved SAE."
        )
    known = dict(sae.config.metadata)
    hooks, transcoder = source.widths, sae.config.architecture == "transcoder"
    hook = known.get("hook_name") or (next(iter(hooks)) if len(hooks) == 1 else None)
    written_to = known.get("hook_name_out") or (None if transcoder else hook)
    if not transcoder and written_to != hook:
        raise ValueError(f"{name}: only a transcoder writes another hook ({written_to!r}) than it reads ({hook!r}).")
    wanted = {"hook_name": (hook, sae.config.d_in), "hook_name_out": (written_to, sae.config.d_out or sae.config.d_in)}
    for key, (asked, width) in wanted.items():
        if asked not in hooks:
            raise ValueError(f"{name}: {key} is {asked!r}; the data hold {', '.join(hooks)}. Set it in metadata.")
        if hooks[asked] != width:
            raise ValueError(f"{name}: vectors at {asked} are {hooks[asked]} wide, the SAE expects {width}.")
    for key in ("model_name", "model_key"):
        if key in known and key in source.metadata and known[key] != source.metadata[key]:
            raise ValueError(f"{name} is meant for {key} {known[key]!r}; the data are of {source.metadata.get(key)!r}.")
    written = {"hook_name": hook, "training_vectors": vectors, "seed": sae.config.seed}
    written |= {"lenslab_version": __version__}
    if wrong := {str(value.dtype) for value in sae.parameters()} - {"torch.float32"}:
        raise ValueError(f"{name} holds {', '.join(sorted(wrong))}: weights are trained in float32, sae.float().")
    return replace(sae.config, metadata={**source.metadata, **known, **written})


def check_held_out(source: VectorSource, held_out: VectorSource, hooks: set[str]) -> None:
    """Raise ValueError where the held-out vectors are of other hooks, widths or weights than those of the training, or
    their text was trained on, whole or in parts, however it was cut into windows."""
    for hook in sorted(hooks):
        if held_out.widths.get(hook) != source.widths[hook]:
            raise ValueError(f"The held-out data hold no vectors of width {source.widths[hook]} at {hook}.")
    for key in ("model_name", "model_key"):
        ours, theirs = source.metadata.get(key), held_out.metadata.get(key)
        if ours and theirs and ours != theirs:
            raise ValueError(f"The training vectors are of {key} {ours!r}, the held-out ones of {theirs!r}.")
    if source.known_by != held_out.known_by:
        raise ValueError(
            f"The training data are known by their {source.known_by}, the held-out data by their {held_out.known_by}: "
            "whether they overlap cannot be told. Give both as tokens (model or store) or both as tensors."
        )
    theirs = held_out.texts()
    shared = int(torch.isin(theirs, source.texts()).sum())
    if shared > SHARED * len(theirs):
        raise ValueError(
            f"{shared} of {len(theirs)} fingerprints of the held-out text occur in the training text: hold out other "
            "documents."
        )


def check_same(asked: dict[str, Any], known: dict[str, Any] | None) -> None:
    """Raise where a checkpoint is of another run, naming what differs."""
    if known is None:
        raise ValueError("The folder holds checkpoints of something else; choose another.")
    wrong = _differences("config", asked["config"], known["config"])
    wrong += ["the data"] if asked["source"] != known["source"] else []
    for name in sorted({*asked["saes"], *known["saes"]}):
        wrong += _differences(name, asked["saes"].get(name, {}), known["saes"].get(name, {}))
    if wrong:
        raise ValueError(f"The folder holds checkpoints of another run; choose another. Different: {'; '.join(wrong)}.")


def _differences(what: str, asked: dict[str, Any], known: dict[str, Any]) -> list[str]:
    if not asked or not known:
        return [f"{what} is only {'here' if asked else 'there'}"]
    keys = [key for key in {**asked, **known} if asked.get(key) != known.get(key)]
    return [f"{what}.{key}: {known.get(key)!r} there, {asked.get(key)!r} here" for key in keys]
