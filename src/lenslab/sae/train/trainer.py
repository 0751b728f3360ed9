"""Train sparse autoencoders, several at once, from one pass over the vectors; killed at any time,
resumed to the bit.

1. Prepare: each SAE's metadata are completed from the source, what does not fit is refused, and
   held-out vectors are checked to come from other documents.
2. Resume: with a folder, from its newest whole checkpoint; another configuration or other data is
   refused. Else scale and centre of each SAE come from the first pool of vectors, and a first
   checkpoint is written.
3. Step: one batch from the source (`lenslab.sae.train.sources`) for every SAE
   (`lenslab.sae.train.member`).
4. Log: rows of the history, the bar, TensorBoard; a checkpoint every few minutes and when
   interrupted: weights, optimizers, counts, position in the data.
5. Finish: held-out vectors are measured.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lenslab import __version__
from lenslab.files import drop_later_checkpoints, latest_checkpoint, save_checkpoint
from lenslab.metrics import FeatureActivity, ReconstructionError
from lenslab.metrics import dead as never_fired
from lenslab.runtime import interrupts_wait, progress_bar
from lenslab.sae.load import SparseAutoencoder
from lenslab.sae.train.base import SAEConfig, TrainableSAE
from lenslab.sae.train.convert import to_saelens
from lenslab.sae.train.member import Member, TrainingConfig
from lenslab.sae.train.sources import VectorSource, batches

FORMAT = 2  # of checkpoints
SHARED = 0.01  # share of held-out documents that may occur in the training text: licences do


@dataclass(frozen=True)
class TrainingResult:
    """A trained SAE and how it came about."""

    name: str
    trained: TrainableSAE = field(repr=False)
    # means over the steps since the row before: step, vectors, loss, fvu, mse (per dimension, of
    # scaled vectors), sparsity, auxiliary, l0, dead, lr
    history: pd.DataFrame = field(repr=False)
    held_out: dict[str, float | int] | None  # fvu, l0, dead, vectors

    @property
    def sae(self) -> SparseAutoencoder:
        """As SAELens loads it: for `save_sae`, `evaluate_sae`, `splice`. Raises as `to_saelens`."""
        return to_saelens(self.trained)


def train(
    saes: Mapping[str, TrainableSAE],
    source: VectorSource,
    config: TrainingConfig,
    *,
    folder: str | os.PathLike | None = None,
    held_out: VectorSource | None = None,
    log_dir: str | os.PathLike | None = None,
    progress: bool = True,
) -> dict[str, TrainingResult]:
    """Train each SAE on the same batches, in the order that the source decides.

    Args: saes: by name; which hook each reads is `metadata["hook_name"]`, by default the only one
        of the source. folder: for checkpoints; call again with it to go on after an interruption,
        with the same SAEs or new ones of the same configuration. held_out: vectors of other texts,
        measured at the end. log_dir: TensorBoard's, a run per SAE: what `history` holds, and the
        held-out scores with a histogram of firing rates.

    Raises ValueError (widths, hooks, data that fill no batch, held-out documents among those of the
    training, a folder of another run, an SAE that was trained before), TrainingFailed.
    """
    described = {name: _described(name, sae, source, config) for name, sae in saes.items()}
    members = [Member(name, sae, config, described[name]) for name, sae in saes.items()]
    _check_enough(members, source, config)
    if held_out is not None:
        _check_held_out(members, source, held_out)
    run = _Run(members, source, config, None if folder is None else Path(folder))
    # what a killed run logged after its checkpoint is struck out
    writers = _writers(log_dir, members, run.step + 1)
    bar = progress_bar(
        total=config.steps * config.batch,
        initial=run.step * config.batch,
        unit="vec",
        unit_scale=True,
        desc="train",
        progress=progress,
    )
    try:
        while run.step < config.steps:
            rows = run.advance()
            bar.update(config.batch)
            if rows:
                bar.set_postfix({k: f"{rows[0][k]:.3g}" for k in ("loss", "fvu", "l0", "dead")})
            for writer, row in zip(writers, rows, strict=False):
                for key, value in row.items():
                    writer.add_scalar(key, value, run.step)
            run.save_if_due()
        return {
            member.name: _finished(member, held_out, writer)
            for member, writer in zip(members, writers or [None] * len(members), strict=True)
        }
    except KeyboardInterrupt:
        if run.folder is not None:
            run.save()
            print(f"stopped and saved at step {run.step:,}: the same call goes on", flush=True)
        raise
    finally:
        bar.close()
        for writer in writers:
            writer.close()


# 1. Prepare


def _described(
    name: str, sae: TrainableSAE, source: VectorSource, config: TrainingConfig
) -> SAEConfig:
    """The SAE's configuration with everything in its metadata that the saved one should say;
    refuses one that does not fit. The SAE itself is left as it is: the training may yet be refused
    for another reason."""
    own, widths = sae.config, source.widths
    metadata = source.metadata | own.metadata
    metadata |= {"training_vectors": config.steps * config.batch, "seed": own.seed}
    metadata["lenslab_version"] = __version__
    if not metadata.get("hook_name") and len(widths) == 1:
        metadata["hook_name"] = next(iter(widths))
    hook, hook_out = metadata.get("hook_name"), metadata.get("hook_name_out")
    if own.architecture != "transcoder":
        if hook_out not in (None, hook):
            raise ValueError(f"{name}: only a transcoder writes another hook than it reads.")
        hook_out = hook
    for key, width in ((hook, own.d_in), (hook_out, own.d_out or own.d_in)):
        if widths.get(key) != width:
            raise ValueError(
                f"{name}: hook_name {hook!r}, hook_name_out {hook_out!r} of width {width}: the data "
                f"hold {widths}. Set both in the metadata."
            )
    for key in ("model_name", "model_key"):
        if metadata.get(key) != source.metadata.get(key, metadata.get(key)):
            raise ValueError(
                f"{name} is meant for {key} {metadata[key]!r}, not {source.metadata[key]!r}."
            )
    return replace(own, metadata=metadata)


def _check_enough(members: list[Member], source: VectorSource, config: TrainingConfig) -> None:
    if len({id(member.sae) for member in members}) < len(members):
        raise ValueError("One SAE is given under two names: build one for each.")
    if not members or config.steps < 1:
        raise ValueError(
            f"{len(members)} SAEs to train on {config.vectors:,} vectors, {config.batch:,} a step."
        )
    if max(source.sizes(0)) < config.batch:
        raise ValueError(
            f"{sum(source.sizes(0)):,} vectors in pools of {max(source.sizes(0)):,}: a step needs "
            f"{config.batch:,} vectors from one pool. Give more text or a smaller batch."
        )


def _check_held_out(members: list[Member], source: VectorSource, held_out: VectorSource) -> None:
    """Raise ValueError where the held-out vectors are of other hooks, widths or weights than those
    of the training, or their documents were trained on."""
    for hook in {hook for member in members for hook in (member.hook, member.hook_out)}:
        if held_out.widths.get(hook) != source.widths[hook]:
            raise ValueError(
                f"The held-out data hold no vectors of the training's width at {hook}."
            )
    if source.metadata.get("model_key") != held_out.metadata.get("model_key"):
        raise ValueError(
            "The held-out vectors are of another model_key, or only one of the two is made of "
            "tokens: whether they overlap cannot be told."
        )
    documents = held_out.documents()
    shared = len(documents & source.documents())
    if shared > SHARED * len(documents):
        raise ValueError(
            f"{shared} of {len(documents)} held-out documents were trained on: hold out others."
        )


# 2. Resume, 3. step, 4. log


class _Run:
    """Where a training is: members, step, position in the data, and its checkpoints."""

    def __init__(
        self,
        members: list[Member],
        source: VectorSource,
        config: TrainingConfig,
        folder: Path | None,
    ):
        self.members, self.config, self.folder = members, config, folder
        self.identity = _identity(members, source, config)
        self.step = 0
        self.place = (0, 0, 0)  # epoch, pool, batch within the pool
        checkpoint = None if folder is None else latest_checkpoint(folder)
        if checkpoint is not None:
            self._restore(checkpoint["state"])
        opening = None
        if checkpoint is None:
            opening = source.pool(0, 0, config.steps * config.batch)
            for member in members:
                member.fit(opening)
        for member in members:  # after all that can refuse one
            member.sae.config = member.described
        self.stream = batches(source, config.batch, config.steps - self.step, self.place, opening)
        self.saved = time.monotonic()
        if folder is not None and checkpoint is None:
            self.save()  # what is interrupted before the next one begins from here again

    def _restore(self, state: dict[str, Any]) -> None:
        saved = state.get("identity", {})
        if saved.get("format") != FORMAT:
            raise ValueError("The folder's checkpoints are of something else or of an old layout.")
        if different := [
            f"{key}: {saved.get(key)} there, {self.identity.get(key)} here"
            for key in sorted({*saved, *self.identity})
            if saved.get(key) != self.identity.get(key)
        ]:
            raise ValueError(
                f"The folder holds checkpoints of another run; different: {'; '.join(different[:5])}"
            )
        self.step, self.place = state["step"], tuple(state["place"])
        for member in self.members:
            member.restore(state["members"][member.name])
        # damaged ones, which would stay the newest
        drop_later_checkpoints(self.folder, self.step)
        print(f"goes on at step {self.step:,} of {self.config.steps:,}", flush=True)

    def advance(self) -> list[dict[str, float | int]]:
        """One step of all members; their rows of the history where one is due."""
        place, vectors = next(self.stream)
        with interrupts_wait():  # what a checkpoint would hold belongs together
            for member in self.members:
                member.step(self.step, vectors)
            self.step, self.place = self.step + 1, place
            if self.step % self.config.row and self.step < self.config.steps:
                return []
            since = (self.step - 1) % self.config.row + 1
            return [member.log(self.step, since) for member in self.members]

    def save_if_due(self) -> None:
        minutes = (time.monotonic() - self.saved) / 60
        due = self.step == self.config.steps or minutes >= self.config.checkpoint_minutes
        if self.folder is not None and due:
            self.save()

    def save(self) -> None:
        members = {member.name: member.state() for member in self.members}
        state = {"step": self.step, "place": list(self.place), "identity": self.identity}
        save_checkpoint(self.folder, state | {"members": members})
        self.saved = time.monotonic()


def _identity(
    members: list[Member], source: VectorSource, config: TrainingConfig
) -> dict[str, Any]:
    """What a checkpoint is of, flat, so that what differs has a name."""
    parts = {"config": asdict(replace(config, checkpoint_minutes=0.0))}
    for member in members:
        parts[member.name] = asdict(member.described)
        parts[member.name]["metadata"].pop("lenslab_version")  # it may go on after an update
    flat = {
        f"{name}.{key}": str(value) for name, part in parts.items() for key, value in part.items()
    }
    return {"format": FORMAT, "data": source.key} | flat


def _writers(log_dir: str | os.PathLike | None, members: list[Member], step: int) -> list[Any]:
    if log_dir is None:
        return []
    from torch.utils.tensorboard import SummaryWriter

    return [SummaryWriter(str(Path(log_dir) / member.name), purge_step=step) for member in members]


# 5. Finish


def _finished(member: Member, held_out: VectorSource | None, writer: Any) -> TrainingResult:
    scores = None
    if held_out is not None:
        try:
            scores, rates = _measured(member, held_out)
        except ValueError as error:  # hours of training are not thrown away for it
            warnings.warn(f"{member.name} could not be measured: {error}", stacklevel=3)
    if writer and scores:
        for key, value in scores.items():
            writer.add_scalar(f"held_out/{key}", value, member.config.steps)
        if (rates > 0).any():
            log_rates = rates[rates > 0].log10()
            writer.add_histogram("held_out/log10 firing rate", log_rates, member.config.steps)
    history = pd.DataFrame(member.history)
    return TrainingResult(member.name, member.sae.eval(), history, scores)


@torch.no_grad()
def _measured(
    member: Member, held_out: VectorSource
) -> tuple[dict[str, float | int], Float[Tensor, " d_sae"]]:
    """FVU over the whole held-out set, mean L0 and latents that never fired on it; and how often
    each fired."""
    error, activity = ReconstructionError(), FeatureActivity()
    for number in range(len(held_out.sizes(0))):
        vectors = held_out.pool(0, number)
        inputs, targets = vectors[member.hook], vectors[member.hook_out]
        for x, target in zip(inputs.split(4096), targets.split(4096), strict=True):
            x = x.to(member.device)
            error.update(target.to(member.device), member.sae.reconstruct(x))
            activity.update(member.sae.encode(x))
    dead = int(never_fired(activity.counts, activity.tokens).sum())
    scores = {"fvu": error.fvu, "l0": activity.l0, "dead": dead, "vectors": activity.tokens}
    return scores, activity.firing_rate
