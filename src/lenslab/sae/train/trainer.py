"""Train sparse autoencoders, several at once, from one pass over the vectors; killed at any time,
resumed to the bit.

1. Scale and centre of each SAE come from the first pool of vectors (`TrainableSAE.fit`).
2. Every step takes one batch from the source (`lenslab.sae.train.sources`) and gives it to each
   SAE: loss, gradients, one step of Adam. The rate warms up, then follows a cosine to a floor; a
   penalty warms up too.
3. A latent is dead when it has not fired in the last `dead_after` vectors. The topk family revives
   dead latents by AuxK at every step; the others are given new directions, those of badly
   reconstructed vectors, once per window.
4. Before the first step, every few minutes and when interrupted a checkpoint is written: weights,
   optimizers, counts, position in the data. Calling `train` again with the same folder goes on from
   the newest whole one; another configuration or other data is refused.
5. NaN, Inf and a loss that runs away, at once or slowly, stop the run with an error; checkpoints
   are from before.
6. Held-out vectors, checked to come from other texts, are measured at the end.
"""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lenslab import __version__
from lenslab.files import drop_later_checkpoints, latest_checkpoint, save_checkpoint
from lenslab.metrics import FeatureActivity, ReconstructionError
from lenslab.metrics import dead as never_fired
from lenslab.runtime import derive_generator, interrupts_wait, progress_bar
from lenslab.sae.load import SparseAutoencoder
from lenslab.sae.train.architectures import FIRST_THRESHOLD, TOPK_FAMILY
from lenslab.sae.train.base import SAEConfig, TrainableSAE, TrainingFailed
from lenslab.sae.train.convert import to_saelens
from lenslab.sae.train.sources import VectorSource, batches, pool_of

SHARED = 0.01  # share of held-out fingerprints that may occur in the training text. Licences do; of vectors, those of


def prepared(name: str, sae: TrainableSAE, source: VectorSource, vectors: int) -> SAEConfig:
    """The SAE's configuration with everything in its metadata that the saved one should say;
    refuses one that does not fit. The SAE itself is left as it is: the training may yet be refused
    for another reason."""
    if not isinstance(sae, TrainableSAE):
        raise TypeError(
            f"{name} is a {type(sae).__name__}: only what `build_sae` makes can be trained, not a saved SAE."
        )
    known = dict(sae.config.metadata)
    hooks, transcoder = source.widths, sae.config.architecture == "transcoder"
    hook = known.get("hook_name") or (next(iter(hooks)) if len(hooks) == 1 else None)
    written_to = known.get("hook_name_out") or (None if transcoder else hook)
    if not transcoder and written_to != hook:
        raise ValueError(
            f"{name}: only a transcoder writes another hook ({written_to!r}) than it reads ({hook!r})."
        )
    wanted = {
        "hook_name": (hook, sae.config.d_in),
        "hook_name_out": (written_to, sae.config.d_out or sae.config.d_in),
    }
    for key, (asked, width) in wanted.items():
        if asked not in hooks:
            raise ValueError(
                f"{name}: {key} is {asked!r}; the data hold {', '.join(hooks)}. Set it in metadata."
            )
        if hooks[asked] != width:
            raise ValueError(
                f"{name}: vectors at {asked} are {hooks[asked]} wide, the SAE expects {width}."
            )
    for key in ("model_name", "model_key"):
        if key in known and key in source.metadata and known[key] != source.metadata[key]:
            raise ValueError(
                f"{name} is meant for {key} {known[key]!r}; the data are of {source.metadata.get(key)!r}."
            )
    written = {"hook_name": hook, "training_vectors": vectors, "seed": sae.config.seed}
    written |= {"lenslab_version": __version__}
    if wrong := {str(value.dtype) for value in sae.parameters()} - {"torch.float32"}:
        raise ValueError(
            f"{name} holds {', '.join(sorted(wrong))}: weights are trained in float32, sae.float()."
        )
    return replace(sae.config, metadata={**source.metadata, **known, **written})


def check_held_out(source: VectorSource, held_out: VectorSource, hooks: set[str]) -> None:
    """Raise ValueError where the held-out vectors are of other hooks, widths or weights than those
    of the training, or their text was trained on, whole or in parts, however it was cut into
    windows."""
    for hook in sorted(hooks):
        if held_out.widths.get(hook) != source.widths[hook]:
            raise ValueError(
                f"The held-out data hold no vectors of width {source.widths[hook]} at {hook}."
            )
    for key in ("model_name", "model_key"):
        ours, theirs = source.metadata.get(key), held_out.metadata.get(key)
        if ours and theirs and ours != theirs:
            raise ValueError(
                f"The training vectors are of {key} {ours!r}, the held-out ones of {theirs!r}."
            )
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
        raise ValueError(
            f"The folder holds checkpoints of another run; choose another. Different: {'; '.join(wrong)}."
        )


def _differences(what: str, asked: dict[str, Any], known: dict[str, Any]) -> list[str]:
    if not asked or not known:
        return [f"{what} is only {'here' if asked else 'there'}"]
    keys = [key for key in {**asked, **known} if asked.get(key) != known.get(key)]
    return [f"{what}.{key}: {known.get(key)!r} there, {asked.get(key)!r} here" for key in keys]


FIRST = 1 << 15  # vectors that scale and centre are taken from


DIVERGED = 100.0  # times the variance of the data, in one step


SILENT = 0.01  # active latents of a vector, on average


LOST = 2.0  # the same, as a mean over logged steps, of a training that had been below: worse than silence, which has 1


@dataclass(frozen=True)
class TrainingConfig:
    """How long and how fast; what an SAE is stands in its own config."""

    vectors: int  # to train on, counted with repetitions
    batch: int = 4096  # vectors per step
    lr: float | None = (
        None  # peak rate of Adam; None: 1e-3 at 4,096 latents, and by 1 / sqrt(d_sae) (Gao, appendix A)
    )
    warm_up: float = 0.05  # share of the steps in which the rate rises
    floor: float = 0.1  # what the cosine ends at, as a share of the peak
    decay: float = (
        1.0  # share of the steps after which it ends; from there on the rate stays at the floor
    )
    sparsity_warm_up: float = 0.1  # share of the steps in which penalties rise
    dead_after: int = 200_000  # vectors without firing after which a latent counts as dead
    seed: int = (
        0  # of resampling; the order of the vectors is the source's, first weights the SAE's
    )
    log_every: int | None = None  # steps; None: 50, in short trainings down to 10
    checkpoint_minutes: float = 5.0  # where a folder is given

    def __post_init__(self) -> None:
        wrong = {
            name: getattr(self, name)
            for name in ("vectors", "batch", "log_every", "dead_after")
            if getattr(self, name) is not None and getattr(self, name) < 1
        }
        wrong |= {
            name: v
            for name in ("warm_up", "floor", "sparsity_warm_up", "decay")
            if not 0 <= (v := getattr(self, name)) <= 1
        }
        wrong |= {"lr": self.lr} if self.lr is not None and self.lr <= 0 else {}
        if wrong:
            raise ValueError(f"Counts and lr must be above 0, shares between 0 and 1; got {wrong}.")

    @property
    def steps(self) -> int:
        return int(self.vectors) // self.batch

    @property
    def row(self) -> int:
        """Steps between two rows of the history."""
        return self.log_every or min(50, max(10, self.steps // 20))

    def rate(self, step: int) -> float:
        """Share of the peak rate at a step."""
        warm = max(1, round(self.warm_up * self.steps))
        if step < warm:
            return (step + 1) / warm
        progress = min(1.0, (step - warm) / max(1, round(self.decay * self.steps) - warm))
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))

    def warm(self, step: int) -> float:
        """Share of the full penalty at a step."""
        return min(1.0, (step + 1) / max(1, round(self.sparsity_warm_up * self.steps)))


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


class _Member:
    """One SAE in training: its optimizer, when its latents last fired, what it cost since the last
    log."""

    def __init__(self, name: str, sae: TrainableSAE, config: TrainingConfig, described: SAEConfig):
        self.name, self.sae, self.config, self.described = name, sae.train(), config, described
        self.hook = described.metadata.get("hook_name")
        self.hook_out = described.metadata.get("hook_name_out") or self.hook
        self.lr = config.lr or 1e-3 * math.sqrt(4096 / sae.config.d_sae)
        self.optimizer = torch.optim.Adam(
            sae.parameters(), lr=self.lr, betas=(0.9, 0.999), fused=True
        )
        self.silent: Int[Tensor, " d_sae"] = torch.zeros(sae.config.d_sae, dtype=torch.long)
        self.variance = 0.0
        self.sums = dict.fromkeys(("loss", "fvu", "mse", "sparsity", "auxiliary", "l0"), 0.0)
        self.history: list[dict[str, float | int]] = []

    @property
    def dead(self) -> Tensor:
        return self.silent >= self.config.dead_after

    def fit(self, vectors: Mapping[str, Tensor]) -> None:
        if self.sae.fitted:
            raise ValueError(
                f"{self.name} has been given to a training before. Build a new one, or give the folder with that "
                "training's checkpoints."
            )
        x, target = vectors[self.hook][:FIRST], vectors[self.hook_out][:FIRST]
        try:
            self.sae.fit(x, target if self.hook_out != self.hook else None)
        except ValueError as error:
            raise ValueError(f"{self.name} at {self.hook}: {error}") from None
        goal = self.goal(x, target)[1]
        self.variance = float((goal - goal.mean(0)).square().sum(1).mean())

    def goal(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        z = self.sae.scaled(x)
        return z, z if self.hook_out == self.hook else self.sae.scaled_target(target)

    def step(self, step: int, vectors: Mapping[str, Float[Tensor, "batch d_in"]]) -> None:
        config, sae = self.config, self.sae
        x, target = self.goal(vectors[self.hook], vectors[self.hook_out])
        dead = self.dead.to(x.device) if sae.config.architecture in TOPK_FAMILY else None
        losses = sae.loss(x, target, dead, config.warm(step))
        found, fvu = (
            float(losses.total.detach()),
            float(losses.reconstruction.detach()) / self.variance,
        )
        if not math.isfinite(found) or fvu > DIVERGED:
            raise TrainingFailed(
                f"{self.name}: loss {found:.3g} (FVU {fvu:.3g}) at step {step}: diverged. "
                f"Lower lr (now {self.lr:.2g}); a checkpoint, where a folder was given, is from before."
            )
        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        sae.before_step()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * config.rate(step)
        self.optimizer.step()
        sae.after_step()
        self.silent += config.batch
        self.silent[losses.fired.cpu()] = 0
        window = -(-config.dead_after // config.batch)
        last = config.steps - 2 * window  # a latent needs time to grow into its new direction
        if (
            sae.config.architecture not in TOPK_FAMILY
            and step
            and step % window == 0
            and step < last
        ):
            self.resample(step, x, losses.error)
        mse = float(losses.reconstruction.detach()) / losses.error.shape[1]
        parts = (losses.sparsity.detach(), losses.auxiliary.detach(), losses.l0)
        for key, value in zip(self.sums, (found, fvu, mse, *map(float, parts)), strict=True):
            self.sums[key] += value

    @torch.no_grad()
    def resample(self, step: int, x: Tensor, error: Tensor) -> None:
        """Dead latents start anew in the directions of inputs that are reconstructed badly (drawn
        by the square of their loss), the encoder at a fifth of the usual length, everything else as
        at the beginning (Bricken)."""
        latents = self.dead.nonzero().flatten()
        if not len(latents):
            return
        weight = error.square().sum(1).double().square().cpu()
        drawn = torch.multinomial(
            weight,
            len(latents),
            replacement=True,
            generator=derive_generator(self.config.seed, f"resample {step}"),
        )
        direction = torch.nn.functional.normalize(x[drawn] - self.sae.b_dec, dim=1)
        alive = (~self.dead).to(x.device)
        length = (
            self.sae.W_enc[:, alive].norm(dim=0).mean()
            if alive.any()
            else torch.ones((), device=x.device)
        )
        first = {
            "W_enc": 0.2 * length * direction,
            "W_dec": direction,
            "threshold": FIRST_THRESHOLD,
        }
        for name, parameter in self.sae.named_parameters():
            if name != "b_dec":  # all others have a row (W_enc a column) for each latent
                moments = (
                    self.optimizer.state[parameter][key] for key in ("exp_avg", "exp_avg_sq")
                )
                for i, value in enumerate((parameter.data, *moments)):
                    (value.T if name == "W_enc" else value)[latents] = (
                        0.0 if i else first.get(name, 0.0)
                    )
        self.silent[latents] = 0

    def log(self, step: int, since: int) -> dict[str, float | int]:
        mean = {key: value / since for key, value in self.sums.items()}
        best = min((row["fvu"] for row in self.history), default=math.inf)
        if mean["fvu"] > LOST > best:
            raise TrainingFailed(
                f"{self.name}: FVU {mean['fvu']:.3g} around step {step}, after {best:.3g}: it diverges. "
                f"Lower lr (now {self.lr:.2g})."
            )
        if mean["l0"] < SILENT:
            warnings.warn(
                f"{self.name}: hardly any latent is active. Lower sparsity (or lr).", stacklevel=3
            )
        rate = self.lr * self.config.rate(step - 1)
        row = {
            "step": step,
            "vectors": step * self.config.batch,
            **mean,
            "dead": int(self.dead.sum()),
            "lr": rate,
        }
        self.sums = dict.fromkeys(self.sums, 0.0)
        self.history.append(row)
        return row

    def state(self) -> dict[str, Any]:
        return {
            "sae": self.sae.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "silent": self.silent,
            "variance": self.variance,
            "sums": dict(self.sums),
            "history": list(self.history),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.sae.load_state_dict(state["sae"])
        self.sae.fitted = True
        self.optimizer.load_state_dict(state["optimizer"])
        self.silent, self.variance = state["silent"], state["variance"]
        self.sums, self.history = dict(state["sums"]), list(state["history"])


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
        with the same SAEs or new ones of
            the same configuration.
        held_out: vectors of other texts, measured at the end.
        log_dir: TensorBoard's, a run per SAE: what `history` holds, and the held-out scores with a
            histogram of firing rates.

    Raises ValueError (widths, hooks, data that fill no batch, held-out texts among the training
    texts, a folder of another run, an SAE that was trained before), TypeError (what is no untrained
    SAE), TrainingFailed.
    """
    if not isinstance(saes, Mapping):
        raise TypeError(f"`saes` are SAEs by name, {{'mine': sae}}; got {type(saes).__name__}.")
    planned = config.steps * config.batch
    members = [
        _Member(name, sae, config, prepared(name, sae, source, planned))
        for name, sae in saes.items()
    ]
    if len({id(member.sae) for member in members}) < len(members):
        raise ValueError("One SAE is given under two names: build one for each.")
    if not members or not config.steps:
        raise ValueError(
            f"{len(members)} SAEs to train on {config.vectors:,} vectors, {config.batch:,} at a step: there must be an "
            "SAE, and vectors for a step. Raise `vectors` or make the batch smaller."
        )
    if not any(n // config.batch for n in source.sizes(0)):
        raise ValueError(
            f"{sum(source.sizes(0)):,} vectors in pools of {max(source.sizes(0)):,}: a step needs {config.batch:,} "
            "vectors from one pool. Give more text or a smaller batch."
        )
    if held_out is not None:
        check_held_out(
            source, held_out, {h for member in members for h in (member.hook, member.hook_out)}
        )
    identity = {"config": asdict(replace(config, checkpoint_minutes=0.0)), "source": source.key}
    identity["saes"] = {member.name: asdict(member.described) for member in members}
    for known in identity["saes"].values():
        known["metadata"].pop("lenslab_version")  # a run may go on after an update
    identity = json.loads(
        json.dumps(identity, default=str)
    )  # what a checkpoint can hold, whatever metadata are
    step, place = 0, (0, 0, 0)
    resumed = latest_checkpoint(Path(folder)) if folder is not None else None
    if resumed is not None:
        check_same(identity, resumed["state"].get("identity"))
        step, place = resumed["state"]["step"], tuple(resumed["state"]["place"])
        for member in members:
            member.restore(resumed["state"]["members"][member.name])
        drop_later_checkpoints(Path(folder), step)  # damaged ones, which would stay the newest
        print(f"goes on at step {step:,} of {config.steps:,}", flush=True)
    opening = pool_of(source, 0, 0, planned) if resumed is None else None
    for member in members if opening is not None else ():
        member.fit(
            {hook: value[:FIRST].to(member.sae.W_enc.device) for hook, value in opening.items()}
        )
    for member in members:  # after all that can refuse one
        member.sae.describe(member.described)
    stream = batches(source, config.batch, config.steps - step, place, opening)
    del opening

    def snapshot() -> dict[str, Any]:
        for member in (
            members
        ):  # the loss of the next step would show it, but the checkpoint would be spoilt by then
            if not all(torch.isfinite(value).all() for value in member.sae.parameters()):
                raise TrainingFailed(
                    f"{member.name}: weights are NaN or Inf after step {step}. Lower lr."
                )
        states = {member.name: member.state() for member in members}
        return {"step": step, "place": list(place), "identity": identity, "members": states}

    if (
        folder is not None and resumed is None
    ):  # what is interrupted before the next one begins from here again
        save_checkpoint(Path(folder), snapshot())
    writers = _writers(
        log_dir, members, step + 1
    )  # what a killed run logged after its checkpoint is struck out
    saved = time.monotonic()
    done = {"total": planned, "initial": step * config.batch}
    bar = progress_bar(**done, unit="vec", unit_scale=True, desc="train", progress=progress)
    between = True  # steps: what a checkpoint would hold belongs together
    try:
        while step < config.steps:
            after, vectors = next(stream)
            with interrupts_wait():
                between = False
                for member in members:
                    device = member.sae.W_enc.device
                    member.step(step, {hook: value.to(device) for hook, value in vectors.items()})
                del vectors  # a batch is a view: it would keep its pool while the next one is made
                step, place = step + 1, after
                if step % config.row == 0 or step == config.steps:
                    since = (step - 1) % config.row + 1
                    rows = [member.log(step, since) for member in members]
                    bar.set_postfix({k: f"{rows[0][k]:.3g}" for k in ("loss", "fvu", "l0", "dead")})
                    for writer, row in zip(writers, rows, strict=False):
                        for key, value in row.items():
                            writer.add_scalar(key, value, step)
                between = True
            bar.update(config.batch)
            if folder is not None and (
                step == config.steps or time.monotonic() - saved >= 60 * config.checkpoint_minutes
            ):
                save_checkpoint(Path(folder), snapshot())
                saved = time.monotonic()
        results = {}
        for i, m in enumerate(members):
            try:
                scores, rates = (None, None) if held_out is None else _measured(m, held_out)
            except ValueError as error:  # hours of training are not thrown away for it
                warnings.warn(
                    f"{m.name} could not be measured on the held-out vectors: {error}", stacklevel=2
                )
                scores, rates = None, None
            results[m.name] = TrainingResult(m.name, m.sae.eval(), pd.DataFrame(m.history), scores)
            if writers and scores:
                for key, value in scores.items():
                    writers[i].add_scalar(f"held_out/{key}", value, step)
                if (rates > 0).any():
                    writers[i].add_histogram(
                        "held_out/log10 firing rate", rates[rates > 0].log10(), step
                    )
    except KeyboardInterrupt:
        if folder is not None and between:
            save_checkpoint(Path(folder), snapshot())
            print(
                f"stopped and saved at step {step:,}: the same call goes on from there", flush=True
            )
        raise
    finally:
        bar.close()
        for writer in writers:
            writer.close()
    return results


def _writers(log_dir: str | os.PathLike | None, members: list[_Member], step: int) -> list[Any]:
    if log_dir is None:
        return []
    from torch.utils.tensorboard import SummaryWriter

    return [SummaryWriter(str(Path(log_dir) / member.name), purge_step=step) for member in members]


@torch.no_grad()
def _measured(
    member: _Member, held_out: VectorSource
) -> tuple[dict[str, float | int], Float[Tensor, " d_sae"]]:
    """FVU over the whole held-out set, mean L0 and latents that never fired on it; and how often
    each fired."""
    error, activity = ReconstructionError(), FeatureActivity()
    for number in range(len(held_out.sizes(0))):
        vectors = held_out.pool(0, number)
        for part, target in zip(
            vectors[member.hook].split(4096), vectors[member.hook_out].split(4096), strict=True
        ):
            part, target = part.to(member.sae.W_enc.device), target.to(member.sae.W_enc.device)
            error.update(target, member.sae.reconstruct(part))
            activity.update(member.sae.encode(part))
    dead = int(never_fired(activity.counts, activity.tokens).sum())
    scores = {"fvu": error.fvu, "l0": activity.l0, "dead": dead, "vectors": activity.tokens}
    return scores, activity.firing_rate
