"""One SAE in training: its optimizer, what a step does, which latents are dead, what is logged.

1. Loss and gradients of a batch, one step of Adam. The rate warms up, stays, then falls along a
   cosine to a floor; a penalty warms up too.
2. A latent is dead when it has not fired in the last `dead_after` vectors. The topk family revives
   dead latents by AuxK at every step; the others are given new directions, those of badly
   reconstructed vectors, once per window.
3. NaN, Inf and a loss that runs away, at once or slowly, stop the run with an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lenslab.runtime import derive_generator
from lenslab.sae.train.base import FROZEN, SAEConfig, TrainableSAE, TrainingFailed

FIRST = 1 << 15  # vectors that scale and centre are taken from
WALK, FASTEST = 2.0, 0.008  # of a row of norm 1 over all steps; the rate, where none is given
WARM = 1e-4  # the rate of an SAE that goes on; that of new weights would undo what it learned
# times the mean square of the data, in one step: their variance where they are centred, and the
# error of the start where they lie far from the origin
DIVERGED = 100.0
LOST = 2.0  # the same, as a mean over logged steps, of a training that was better before
# in a checkpoint, beside weights and optimizer
KEPT = ("silent", "variance", "square", "steps", "history")


@dataclass(frozen=True)
class TrainingConfig:
    """How long and how fast; what an SAE is stands in its own config."""

    vectors: int  # to train on, counted with repetitions
    batch: int = 4096  # vectors per step
    # peak rate of Adam; None: 2 / sqrt(d_in * steps), at most .008, and 1e-4 where an SAE goes on
    # from a saved one. A step moves each entry of a
    # row by the rate; over all steps, as a random walk, rows of norm 1 then move alike at every
    # width and length (`data/results/phase_4_rates.json`: 256 dimensions, 98 and 366 steps)
    lr: float | None = None
    # of Adam. The usual .9 ends with more error after 32 and after 256 steps (`lenslab-momenta` in
    # `benchmarks/results/time_to_quality.json`); what ships was made with it
    momentum: float = 0.8
    warm_up: float = 0.05  # share of the steps in which the rate rises
    # share of `decay` after which it falls. At 0, a cosine from the start, a training of 32 or of
    # 256 steps ends with more error (`benchmarks/results/time_to_quality.json`: lenslab-holds)
    hold: float = 0.8
    floor: float = 0.1  # what the cosine ends at, as a share of the peak
    # share of the steps after which it ends; from there on the rate stays at the floor
    decay: float = 1.0
    sparsity_warm_up: float = 0.1  # share of the steps in which penalties rise
    dead_after: int = 200_000  # vectors without firing after which a latent counts as dead
    # of resampling; the order of the vectors is the source's, first weights the SAE's
    seed: int = 0
    log_every: int | None = None  # steps; None: 50, in short trainings down to 10
    checkpoint_minutes: float = 5.0  # where a folder is given

    def __post_init__(self) -> None:
        names = ("warm_up", "hold", "floor", "decay", "sparsity_warm_up")
        if not all(0 <= getattr(self, name) <= 1 for name in names) or not 0 <= self.momentum < 1:
            raise ValueError(f"{', '.join(names)} are shares: 0 to 1; momentum is below 1.")
        counts = (self.batch, self.dead_after, 1 if self.log_every is None else self.log_every)
        if not all(count >= 1 and count % 1 == 0 for count in counts):
            raise ValueError("batch, dead_after and log_every are whole numbers from 1 on.")
        if not (self.lr is None or 0 < self.lr < math.inf) or not self.checkpoint_minutes >= 0:
            raise ValueError("lr is above 0 (or None), checkpoint_minutes 0 or more; none is NaN.")
        derive_generator(self.seed, "resample")  # TypeError now, not when it is needed

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
        start = max(warm, round(self.hold * self.decay * self.steps))
        progress = (step - start) / max(1, round(self.decay * self.steps) - start)
        progress = min(1.0, max(0.0, progress))
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))

    def warm(self, step: int) -> float:
        """Share of the full penalty at a step."""
        return min(1.0, (step + 1) / max(1, round(self.sparsity_warm_up * self.steps)))


class Member:
    """`described` is the SAE's configuration with all metadata that the saved one will say."""

    def __init__(self, name: str, sae: TrainableSAE, config: TrainingConfig, described: SAEConfig):
        if any(weights.dtype != torch.float32 for weights in sae.parameters()):
            raise ValueError(f"{name}: weights are trained in float32: call its .float() before.")
        self.name, self.sae, self.config, self.described = name, sae.train(), config, described
        self.hook = described.metadata["hook_name"]
        self.hook_out = described.metadata.get("hook_name_out") or self.hook
        walk = math.sqrt(described.d_in * max(1, config.steps))
        self.lr = config.lr or min(WARM if sae.saved else FASTEST, WALK / walk)
        betas = (float(config.momentum), 0.999)
        self.optimizer = torch.optim.Adam(sae.parameters(), self.lr, betas, fused=True)
        device = sae.W_enc.device
        self.silent = torch.zeros(described.d_sae, dtype=torch.long, device=device)  # vectors
        self.variance = self.square = 0.0
        self.steps: list[dict[str, float]] = []  # since the last row of the history
        self.history: list[dict[str, float | int]] = []

    @property
    def dead(self) -> Bool[Tensor, " d_sae"]:
        return self.silent >= self.config.dead_after

    def scaled(self, vectors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(what the SAE reads, what it is to write), as its weights see them."""
        x = self.sae.scaled(vectors[self.hook].to(self.sae.W_enc.device))
        if self.hook_out == self.hook:
            return x, x
        return x, (vectors[self.hook_out].to(x.device) - self.sae.centre_out) * self.sae.scale_out

    def fit(self, vectors: Mapping[str, Float[Tensor, "vector d_in"]]) -> None:
        """Scale and centre from the first vectors."""
        if self.sae.fitted:
            raise ValueError(f"{self.name} was trained before: build a new one or give its folder.")
        first = {hook: value[:FIRST].to(self.sae.W_enc.device) for hook, value in vectors.items()}
        self.sae.fit(first[self.hook], first[self.hook_out] if self.hook_out != self.hook else None)
        target = self.scaled(first)[1]
        self.variance = float((target - target.mean(0)).square().sum(1).mean())
        self.square = float(target.square().sum(1).mean())

    def step(self, step: int, vectors: Mapping[str, Float[Tensor, "batch d_in"]]) -> None:
        # 1. the loss, and whether it is one
        x, target = self.scaled(vectors)
        dead = self.dead if self.sae.topk_family else None
        losses = self.sae.loss(x, target, dead, self.config.warm(step))
        names = ("total", "reconstruction", "sparsity", "auxiliary", "l0")
        scalars = torch.stack([getattr(losses, name).detach().to(x.device) for name in names])
        values = dict(zip(names, scalars.tolist(), strict=True))  # a GPU is waited for once
        self.steps.append(values)
        if self.sae.saved and step == 0:  # how far off it begins is not that it diverged
            self.square = max(self.square, values["reconstruction"])
        self.check(step, values["reconstruction"], DIVERGED)
        # 2. gradients and the step
        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        self.sae.before_step()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * self.config.rate(step)
        self.optimizer.step()
        self.sae.after_step()
        # 3. dead latents
        self.silent += self.config.batch
        self.silent.masked_fill_(losses.fired, 0)
        window = -(-self.config.dead_after // self.config.batch)
        last = self.config.steps - 2 * window  # a latent needs time to grow into its direction
        if not self.sae.topk_family and 0 < step < last and step % window == 0 and self.dead.any():
            self.resample(step, x, losses.error)

    def check(self, step: int, error: float, limit: float) -> None:
        if not error <= limit * self.square:  # NaN is not
            fvu = error / self.variance
            raise TrainingFailed(f"{self.name}: FVU {fvu:.3g} at step {step}: diverged. Lower lr.")

    @torch.no_grad()
    def resample(self, step: int, x: Tensor, error: Tensor) -> None:
        """Dead latents start anew in the directions of inputs that are reconstructed badly (drawn
        by the square of their loss), the encoder at a fifth of the usual length (Bricken), and fire
        for vectors at a cosine above a half: many that fired for every other vector would together
        undo the training. Everything else is zero. Of a floor what is frozen stays, and the other
        side starts in its directions."""
        latents = self.dead.nonzero().flatten()
        weight = error.square().sum(1).double().square().cpu()
        generator = derive_generator(self.config.seed, f"resample {step}")
        drawn = torch.multinomial(weight, len(latents), replacement=True, generator=generator)
        vectors = x[drawn] - self.sae.b_dec  # [dead, d_in]
        direction = torch.nn.functional.normalize(vectors, dim=1)
        frozen = FROZEN.get(self.described.frozen)
        if frozen:
            rows = self.sae.W_dec if frozen == "W_dec" else self.sae.W_enc.T
            direction = torch.nn.functional.normalize(rows[latents], dim=1)
        length = 0.2 * self.sae.W_enc[:, ~self.dead].norm(dim=0).mean().nan_to_num(1.0)
        encoder = self.sae.W_enc.T[latents] if frozen == "W_enc" else length * direction
        half = encoder.norm(dim=1) * vectors.norm(dim=1) / 2
        first = {"W_enc": encoder, "W_dec": direction}
        first |= {"threshold": half} if hasattr(self.sae, "threshold") else {"b_enc": -half}
        for name, parameter in self.sae.named_parameters():
            if name in ("b_dec", frozen):  # all others have a row (W_enc a column) for each latent
                continue
            moments = self.optimizer.state[parameter]
            for tensor in (parameter, moments["exp_avg"], moments["exp_avg_sq"]):
                value = first.get(name, 0.0) if tensor is parameter else 0.0
                (tensor.T if name == "W_enc" else tensor)[latents] = value
        self.silent[latents] = 0

    def log(self, step: int) -> dict[str, float | int]:
        """A row of the history: means over the steps since the one before."""
        n = len(self.steps)
        mean = {key: sum(values[key] for values in self.steps) / n for key in self.steps[0]}
        self.steps = []
        loss, reconstruction = mean.pop("total"), mean.pop("reconstruction")
        fvu = reconstruction / self.variance
        best = min((row["fvu"] for row in self.history), default=math.inf)
        self.check(step, reconstruction, max(LOST, best * self.variance / self.square))
        row = {"step": step, "vectors": step * self.config.batch, "loss": loss, "fvu": fvu}
        row |= {"mse": reconstruction / len(self.sae.b_dec), **mean, "dead": int(self.dead.sum())}
        self.history.append(row | {"lr": self.lr * self.config.rate(step - 1)})
        return self.history[-1]

    def state(self) -> dict[str, Any]:
        """All that a checkpoint holds; TrainingFailed where the last step has spoilt the weights:
        the loss of the next would show it, but the checkpoint would be spoilt by then."""
        if not all(torch.isfinite(value).all() for value in self.sae.parameters()):
            raise TrainingFailed(f"{self.name}: weights are NaN or Inf. Lower lr.")
        state = {"sae": self.sae.state_dict(), "optimizer": self.optimizer.state_dict()}
        return state | {key: getattr(self, key) for key in KEPT}

    def restore(self, state: dict[str, Any]) -> None:
        self.sae.load_state_dict(state["sae"])
        self.sae.fitted = True
        self.optimizer.load_state_dict(state["optimizer"])
        vars(self).update({key: state[key] for key in KEPT})
        self.silent = self.silent.to(self.sae.W_enc.device)
