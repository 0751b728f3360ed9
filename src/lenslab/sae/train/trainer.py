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
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from lenslab import __version__, files
from lenslab.metrics import FeatureActivity, ReconstructionError
from lenslab.runtime import interrupts_wait, machine_summary, progress_bar
from lenslab.sae.inputs import SparseAutoencoder
from lenslab.sae.registry import plain_name
from lenslab.sae.train.base import SAEConfig, TrainableSAE
from lenslab.sae.train.convert import to_saelens
from lenslab.sae.train.member import Member, TrainingConfig
from lenslab.sae.train.sources import VectorSource, batches

FORMAT = 3  # of checkpoints
SHARED = 0.01  # share of held-out documents that may occur in the training text: licences do
Watch = Callable[[str, dict[str, float | int]], None]
BAR = {"unit": "vec", "unit_scale": True, "desc": "train"}


@dataclass(frozen=True)
class TrainingResult:
    """A trained SAE and how it came about."""

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
    watch: Watch | None = None,
) -> dict[str, TrainingResult]:
    """Train each SAE on the same batches, in the order that the source decides.

    Args:
        saes: by name; which hook each reads is `metadata["hook_name"]`, by default the only one of
            the source.
        folder: for checkpoints; call again with it to go on after an interruption, with the same
            SAEs or new ones of the same configuration.
        held_out: vectors of other texts, measured at the end.
        log_dir: TensorBoard's, a run per SAE: what `history` holds.
        watch: called with an SAE's name and each new row of its history, after the rows that a
            resumed training brings (`lenslab.show.report.live_curves`). Its errors end
            the training, which goes on from its folder.

    Raises ValueError (widths, hooks, data that fill no batch, held-out documents among those of the
    training, a folder of another run, an SAE that was trained before), TrainingFailed, NotWritten
    while another training writes into the folder, or where nobody can, or not into `log_dir`.
    """
    folder = None if folder is None else Path(folder).expanduser()
    total = config.steps * config.batch
    with nullcontext() if folder is None else files.only_writer(folder):
        described = {name: _described(name, sae, source, total) for name, sae in saes.items()}
        members = [Member(name, sae, config, described[name]) for name, sae in saes.items()]
        _check(members, source, held_out)
        for name in saes if log_dir is not None else ():  # before an SAE is fitted
            with files.writing(place := Path(log_dir).expanduser() / name):
                place.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=place).close()
        run = _Run(members, source, folder)
        try:
            _train(run, progress, log_dir, watch)
        except KeyboardInterrupt:
            run.save()
            print(f"stopped at step {run.step:,}: with a folder the same call goes on", flush=True)
            raise
        return {member.name: _finished(member, held_out) for member in members}


def _train(
    run: _Run, progress: bool, log_dir: str | os.PathLike | None, watch: Watch | None
) -> None:
    """The steps that are left, with bar, TensorBoard and whoever watches."""
    batch, writers = run.config.batch, {}
    told = watch or (lambda name, row: None)
    past = [(member.name, row) for member in run.members for row in member.history]
    for name, row in sorted(past, key=lambda told: told[1]["step"]):  # as they came
        told(name, row.copy())
    total, done = run.config.steps * batch, run.step * batch
    with ExitStack() as stack:
        bar = stack.enter_context(progress_bar(total=total, initial=done, progress=progress, **BAR))
        if log_dir is not None:  # what a killed run logged after its checkpoint is struck out
            from torch.utils.tensorboard import SummaryWriter

            for member in run.members:
                folder = str(Path(log_dir).expanduser() / member.name)
                writer = SummaryWriter(folder, purge_step=run.step + 1)
                writers[member.name] = stack.enter_context(writer)
        while run.step < run.config.steps:
            rows = run.advance()
            bar.update(batch)
            for member, row in zip(run.members, rows, strict=False):
                told(member.name, row.copy())
                for key, value in row.items() if writers else ():
                    writers[member.name].add_scalar(key, value, run.step)
            if rows:
                bar.set_postfix({k: f"{rows[0][k]:.3g}" for k in ("loss", "fvu", "l0", "dead")})


# 1. Prepare


def _described(name: str, sae: TrainableSAE, source: VectorSource, vectors: int) -> SAEConfig:
    """The SAE's configuration with everything in its metadata that the saved one should say. The
    SAE itself is left as it is: the training may yet be refused."""
    own, widths = sae.config, source.widths
    metadata = source.metadata | own.metadata
    for key in source.metadata.keys() & {"model_name", "model_key", "prepend_bos"}:
        if plain_name(str(metadata[key])) != plain_name(str(source.metadata[key])):
            raise ValueError(f"{name} is meant for {key} {metadata[key]}, not the data's.")
    processing = metadata.get("model_from_pretrained_kwargs")
    if processing and "model_key" in source.metadata:
        raise ValueError(f"{name} reads a model with {processing}: give a TensorSource made so.")
    hook = metadata.get("hook_name") or (next(iter(widths)) if len(widths) == 1 else None)
    transcoder = own.architecture == "transcoder"
    hook_out = metadata.get("hook_name_out") or (None if transcoder else hook)
    if hook_out != hook and not transcoder:
        raise ValueError(f"{name}: only a transcoder writes another hook than it reads.")
    for key, width in ((hook, own.d_in), (hook_out, own.d_out or own.d_in)):
        if widths.get(key) != width:
            raise ValueError(f"{name}: no hook_name {key} of width {width} in the data: {widths}.")
    metadata |= {"hook_name": hook, "training_vectors": vectors}
    metadata |= {"seed": own.seed, "lenslab_version": __version__}
    return replace(own, metadata=metadata)


def _check(members: list[Member], source: VectorSource, held_out: VectorSource | None) -> None:
    config, largest = members[0].config, max(source.sizes(0))
    if config.steps < 1 or largest < config.batch:
        asked = f"{config.vectors} are asked for, {largest} at hand: give more, or a smaller batch"
        raise ValueError(f"A step needs a batch of {config.batch} vectors; {asked}.")
    if held_out is None:
        return
    keys = {data.metadata.get("model_key") for data in (source, held_out)}
    if held_out.widths != source.widths or len(keys) > 1 or sum(held_out.sizes(0)) < 2:
        raise ValueError("Held-out: two vectors or more, of the training's hooks and model_key.")
    documents = held_out.documents()
    shared = len(documents & source.documents())
    if shared > SHARED * len(documents):
        raise ValueError(f"{shared} of {len(documents)} held-out documents were trained on.")


# 2. Resume, 3. step, 4. log


class _Run:
    """Where a training is: members, step, and its checkpoints."""

    def __init__(self, members: list[Member], source: VectorSource, folder: Path | None):
        self.members, self.config, self.folder = members, members[0].config, folder
        self.identity = _identity(members, source)
        self.made_with = files.versions() | machine_summary()
        self.step = 0
        self.saved = time.monotonic()
        checkpoint = None if folder is None else files.latest_checkpoint(folder)
        if checkpoint is not None:
            self.restore(checkpoint["state"])
        config = self.config
        opening = None if checkpoint else source.pool(0, 0, config.steps * config.batch)
        self.stream = batches(source, config.batch, self.step, config.steps, opening)
        with interrupts_wait():  # an SAE that is fitted is refused without its checkpoint
            for member in members if opening else ():
                member.fit(opening)
            for member in members:  # after all that can refuse one
                member.sae.config = member.described
            if checkpoint is None:
                self.save()  # what is interrupted before the next one begins from here again

    def restore(self, state: dict[str, Any]) -> None:
        saved = {"config.momentum": "0.9"} | state.get("identity", {})  # what it was before
        for key in {**self.identity, **saved}:  # the format first: older ones have no such keys
            # an option that is younger than the checkpoint was None then
            there, here = str(saved.get(key)), str(self.identity.get(key))
            if there != here:
                raise ValueError(f"The folder is of another run: {key} {there} there, {here} here.")
        self.step = state["step"]
        for member in self.members:
            member.restore(state["members"][member.name])
        files.drop_later_checkpoints(self.folder, self.step)  # damaged: they would stay the newest
        print(f"goes on at step {self.step:,} of {self.config.steps:,}", flush=True)
        for key, there in state.get("made_with", {}).items():
            if there != (here := self.made_with.get(key)):
                print(f"perhaps not to the bit: {key} was {there}, is {here}", flush=True)

    def advance(self) -> list[dict[str, float | int]]:
        """One step of all members; their rows of the history where one is due."""
        vectors = next(self.stream)
        with interrupts_wait():  # what a checkpoint would hold belongs together
            for member in self.members:
                member.step(self.step, vectors)
            self.step += 1
            last = self.step == self.config.steps
            due = last or self.step % self.config.row == 0
            rows = [member.log(self.step) for member in self.members if due]
        if last or time.monotonic() - self.saved >= 60 * self.config.checkpoint_minutes:
            self.save()
        return rows

    def save(self) -> None:
        if self.folder is not None:
            members = {member.name: member.state() for member in self.members}
            state = {"step": self.step, "identity": self.identity, "members": members}
            files.save_checkpoint(self.folder, state | {"made_with": self.made_with})
            self.saved = time.monotonic()


def _identity(members: list[Member], source: VectorSource) -> dict[str, Any]:
    """What a checkpoint is of, flat, so that what differs has a name."""
    parts = {"config": asdict(replace(members[0].config, checkpoint_minutes=0.0))}
    for one in members:  # a rate that is not given is of a rule, which has changed once
        parts[one.name] = asdict(one.described) | ({} if one.config.lr else {"lr": one.lr})
        parts[one.name]["metadata"].pop("lenslab_version")  # it may go on after an update
    flat = {f"{name}.{key}": str(part[key]) for name, part in parts.items() for key in part}
    return {"format": FORMAT, "data": source.key, **flat}


# 5. Finish


def _finished(member: Member, held_out: VectorSource | None) -> TrainingResult:
    """With FVU over the whole held-out set, mean L0 and latents that never fired on it."""
    result = TrainingResult(member.sae.eval(), pd.DataFrame(member.history), None)
    if held_out is None:
        return result
    error, activity = ReconstructionError(), FeatureActivity()
    sae = result.sae
    for units in held_out.groups(0):  # not `pool`, which leaves massive vectors out
        vectors = held_out._vectors(units)
        inputs, targets = vectors[member.hook], vectors[member.hook_out]
        for x, target in zip(inputs.split(4096), targets.split(4096), strict=True):
            latents = sae.encode(x.to(member.sae.W_enc.device))
            error.update(target, sae.decode(latents).to(target.device))
            activity.update(latents)
    dead = int((activity.counts == 0).sum())
    scores = {"fvu": error.fvu, "l0": activity.l0, "dead": dead, "vectors": activity.tokens}
    return replace(result, held_out=scores)
