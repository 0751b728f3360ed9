"""Seven sparse autoencoders, each a way to decide which latents are active and what keeps them few.

All of them compute, from a vector x that `fit` scaled and centred:
1. pre-activations (x - b_dec) @ W_enc + b_enc (a transcoder leaves b_dec out: it reads one stream,
   writes another);
2. a code: which latents are active, with which values;
3. the reconstruction code @ W_dec + b_dec, and its squared distance to x (or to what is to be
   written);
4. where the rule itself does not fix how many are active, a penalty.

`relu` penalises the sum of activations times decoder norms (L1); `topk` keeps the k largest of each
vector, `batchtopk` the k largest a vector on average over the batch; `matryoshka` does the same and
also reconstructs from its first latents alone; `jumprelu` learns a threshold for each latent,
`gated` a gate; `transcoder` is batchtopk from one hook to another. The topk family keeps decoder
rows at norm 1 and works with sparse products (`lenslab.sae.train.sparse`).

Sources: Bricken et al. 2023 (relu), Gao et al. 2024 (topk, AuxK), Bussmann et al. 2024 and 2025
(batchtopk, matryoshka), Rajamanoharan et al. 2024 (gated, jumprelu). Loss terms are sums over
dimensions and means over the
batch, as SAELens has them: losses and gradients equal those of its training classes (tested). On
purpose different: decoder rows of the topk family stay at norm 1, what would lengthen them leaves
the gradient (SAELens rescales by the norm instead); the estimate of BatchTopK's threshold is a mean
over the last tenth of the batches (over the last hundred once there were a thousand), not one that
leaves zero by a hundredth a batch; a transcoder, which SAELens does not train, is batchtopk because
SAELens has no topk transcoder to save it as; jumprelu's thresholds, which a step moves by no more
than the rate, begin where few latents are active, not at .01 where half of them are, its
bandwidth is ten times as wide, and its encoder columns begin at full length. Saving is
`lenslab.sae.train.convert`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lenslab.runtime import compute_dtype
from lenslab.sae.train import sparse
from lenslab.sae.train.base import FROZEN, Losses, SAEConfig, TrainableSAE

START = 8  # jumprelu begins with d_in over this many latents active on average
SHORT = 0.3  # length of jumprelu's decoder rows at first: long ones explain all before they turn
BANDWIDTH = 0.5  # how near its threshold a pre-activation of jumprelu moves it
NESTED = (16, 4, 1)  # matryoshka: d_sae over the latents in each nested dictionary
AT_A_TIME = 512  # vectors whose dead latents are looked at together
SPARSE_ENOUGH = 0.04  # share of active latents below which a ReLU SAE is cheaper without its zeros


class ReLU(TrainableSAE):
    def loss(self, x, target, dead=None, warm=1.0) -> Losses:
        norms = self.decoder.norm(dim=1)
        values = self.fast_pre(x).relu_()  # [batch, d_sae]
        integers = sparse.as_integers(values.detach())
        active = integers.count_nonzero()
        # the lengths are one column more of the decoder: the product sums the penalty too
        if active < SPARSE_ENOUGH * values.numel():
            code = sparse.code_of_places(integers.flatten().nonzero().flatten(), *values.shape)
            values = torch.relu(sparse.Encode.apply(x, self.shift, self.W_enc, self.b_enc, code))
            both = sparse.Decode.apply(values, sparse.widened(self.decoder, norms, x.dtype), code)
        else:
            both = (values @ sparse.widened(self.decoder, norms, values.dtype)).float()
        penalty = warm * self.config.sparsity * both[:, x.shape[1]].sum() / len(x)
        x_hat = both[:, : x.shape[1]] + self.b_dec
        return self._losses(target, x_hat, active / len(x), integers.amax(0) > 0, sparsity=penalty)


class TopK(TrainableSAE):
    topk_family = True

    def activate(self, pre):
        top = pre.topk(self.config.k, dim=-1)
        return torch.zeros_like(pre).scatter(-1, top.indices, torch.relu(top.values))

    def select(self, pre: Float[Tensor, "batch d_sae"]) -> sparse.Code:
        return sparse.code_of_topk(sparse.largest(pre, self.config.k), self.config.d_sae)

    def loss(self, x, target, dead=None, warm=1.0) -> Losses:
        with torch.no_grad():
            pre = self.fast_pre(x)  # [batch, d_sae]
        code = self.select(pre)
        values = torch.relu(sparse.Encode.apply(x, self.shift, self.W_enc, self.b_enc, code))
        self.watch(values.detach())
        x_hat, nested = self.reconstructions(values, code, target)
        auxiliary = self.auxiliary(x, (target - x_hat).detach(), pre, dead)
        positive = values > 0  # of the k largest some may not be
        fired = torch.bincount(code.latents[positive], minlength=self.config.d_sae) > 0
        l0 = positive.sum() / len(x)
        return self._losses(target, x_hat, l0, fired, sparsity=nested, auxiliary=auxiliary)

    def watch(self, values: Float[Tensor, " active"]) -> None:
        """BatchTopK estimates its threshold here."""

    def reconstructions(self, values, code, target) -> tuple[Tensor, Tensor]:
        """(reconstruction, what is added to the loss for partial ones)"""
        return sparse.Decode.apply(values, self.W_dec, code) + self.b_dec, target.new_zeros(())

    def auxiliary(self, x, residual, pre, dead) -> Tensor:
        """AuxK: the dead latents with the largest pre-activations reconstruct what the others left
        (Gao, A.2)."""
        latents = pre.new_zeros(0) if dead is None else dead.nonzero().flatten()
        n_dead = len(latents)
        if not n_dead or not self.config.auxiliary:
            return residual.new_zeros(())
        most = max(1, x.shape[-1] // 2)
        k = min(most, n_dead)
        # some rows at a time: a block of another size at every step, as large as `pre`, would
        # fragment the memory
        chunks = (rows[:, latents] for rows in pre.split(AT_A_TIME))
        chosen = torch.cat([rows.topk(k, sorted=False).indices for rows in chunks])  # [batch, k]
        code = sparse.code_of_topk(latents[chosen], self.config.d_sae)
        values = sparse.Encode.apply(x, self.shift, self.W_enc, self.b_enc, code)
        guess = sparse.Decode.apply(values, self.W_dec, code)
        error = (guess - residual).square().sum(-1).mean()
        return self.config.auxiliary * min(n_dead / most, 1.0) * error


class BatchTopK(TopK):
    def __init__(self, config: SAEConfig):
        super().__init__(config)
        # running mean of the smallest value that was kept, and the batches that it is a mean of
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("guess", torch.zeros(()))  # where to begin looking for the largest

    def select(self, pre):
        n = self.config.k * len(pre)
        candidates = sparse.positive_places(pre, max(0.0, float(self.guess)))
        if len(candidates) < n:  # the guess was too high, or fewer than that are positive
            candidates = sparse.positive_places(pre)
        values = pre.flatten()[candidates]
        if len(candidates) > n:
            top = values.topk(n, sorted=False)
            self.guess.copy_(0.8 * top.values.min())
            candidates = candidates[top.indices].sort().values
        return sparse.code_of_places(candidates, *pre.shape)

    def watch(self, values):
        kept = values[values > 0]
        if len(kept):
            share = (1 / (1 + self.seen / 10)).clamp_min(0.01)  # at first the youngest tenth
            self.threshold.lerp_(kept.min(), share)
            self.seen += 1


class Matryoshka(BatchTopK):
    def reconstructions(self, values, code, target):
        widths = sorted({max(1, self.config.d_sae // n) for n in NESTED})
        partial = self.b_dec.expand_as(target)
        loss = target.new_zeros(())
        for begin, end in zip((0, *widths), widths, strict=False):
            inside = (code.latents >= begin) & (code.latents < end)
            partial = partial + sparse.Decode.apply(values[inside], self.W_dec, code.part(inside))
            if end < widths[-1]:
                loss = loss + (target - partial).square().sum(-1).mean()
        return partial, loss


class _Rectangle(torch.autograd.Function):
    """Jump or step at a threshold. Only pre-activations within half a bandwidth of it move it
    (arXiv 2407.14435)."""

    @staticmethod
    def forward(ctx, pre, threshold, jump):
        ctx.save_for_backward(pre, threshold)
        ctx.jump = jump
        return pre * (pre > threshold) if jump else (pre > threshold).to(pre)

    @staticmethod
    def backward(ctx, grad):
        pre, threshold = ctx.saved_tensors
        near = ((pre - threshold).abs() < BANDWIDTH / 2) * grad / BANDWIDTH
        moved = -(near * threshold if ctx.jump else near).sum(0)
        return (grad * (pre > threshold) if ctx.jump else None), moved, None


class JumpReLU(TrainableSAE):
    def __init__(self, config: SAEConfig):
        super().__init__(config)
        self.threshold = nn.Parameter(torch.zeros(config.d_sae))
        if config.frozen is None:  # floors keep the length that they are drawn with
            self.W_dec.data.mul_(SHORT)

    def begin(self, pre):
        l0 = min(max(1, self.config.d_in // START), self.config.d_sae)
        self.threshold.fill_(pre.flatten().topk(l0 * len(pre)).values[-1].clamp_min(0))

    def activate(self, pre):
        return pre * (pre > self.threshold)

    def loss(self, x, target, dead=None, warm=1.0) -> Losses:
        with _autocast(x):
            pre = ((x - self.b_dec) @ self.W_enc).float() + self.b_enc  # [batch, d_sae]
            values = _Rectangle.apply(pre, self.threshold, True)
            x_hat = (values @ self.W_dec).float() + self.b_dec
        active = _Rectangle.apply(pre, self.threshold, False).sum(-1).mean()
        penalty = warm * self.config.sparsity * active
        return self._losses(target, x_hat, *_usage(values), sparsity=penalty)

    def after_step(self) -> None:
        super().after_step()
        self.threshold.data.clamp_(min=0)  # below zero the gate would let negative values through


class Gated(TrainableSAE):
    def __init__(self, config: SAEConfig):
        super().__init__(config)
        self.b_mag = nn.Parameter(torch.zeros(config.d_sae))
        self.r_mag = nn.Parameter(torch.zeros(config.d_sae))

    def activate(self, pre):  # pre: of the gate, whose bias is b_enc
        return (pre > 0) * torch.relu((pre - self.b_enc) * self.r_mag.exp() + self.b_mag)

    def loss(self, x, target, dead=None, warm=1.0) -> Losses:
        with _autocast(x):
            gate = ((x - self.b_dec) @ self.W_enc).float() + self.b_enc  # [batch, d_sae]
            values = self.activate(gate)
            x_hat = (values @ self.W_dec).float() + self.b_dec
            # what the gate alone would reconstruct; SAELens lets this term train the decoder too
            via_gate = (torch.relu(gate) @ self.W_dec).float() + self.b_dec
        penalty = warm * self.config.sparsity * (torch.relu(gate) @ self.W_dec.norm(dim=1)).mean()
        via_error = (via_gate - target).square().sum(-1).mean()
        return self._losses(target, x_hat, *_usage(values), sparsity=penalty, auxiliary=via_error)


def _autocast(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, torch.bfloat16, enabled=compute_dtype() is torch.bfloat16)


def _usage(values: Float[Tensor, "batch d_sae"]) -> tuple[Tensor, Bool[Tensor, " d_sae"]]:
    """(mean number of active latents, latents that fired for some vector)"""
    positive = values > 0
    return positive.sum() / len(values), positive.any(0)


TOPK_FAMILY = {"topk": TopK, "batchtopk": BatchTopK, "matryoshka": Matryoshka}
TOPK_FAMILY["transcoder"] = BatchTopK
PENALISED = {"relu": ReLU, "jumprelu": JumpReLU, "gated": Gated}
ARCHITECTURES: dict[str, type[TrainableSAE]] = TOPK_FAMILY | PENALISED
# options that only some architectures read
FOR = {"k": TOPK_FAMILY, "auxiliary": TOPK_FAMILY, "sparsity": PENALISED, "tied": ["relu"]}
FOR["d_out"] = ["transcoder"]


def build_sae(architecture: str, d_in: int, d_sae: int, **options: Any) -> TrainableSAE:
    """An untrained SAE; `options` are fields of `SAEConfig`. Raises ValueError for what cannot be
    and for options that this architecture does not read (`FOR`), TypeError for those that none
    reads."""
    if architecture not in ARCHITECTURES:
        raise ValueError(f"No architecture {architecture!r}; there are {', '.join(ARCHITECTURES)}.")
    config = SAEConfig(architecture, d_in, d_sae, **options)
    for name in options:
        if architecture not in FOR.get(name, ARCHITECTURES):
            raise ValueError(f"{name} is for {', '.join(FOR[name])}, not for {architecture}.")
    if not (config.sparsity >= 0 and config.auxiliary >= 0):
        raise ValueError("sparsity and auxiliary are weights from 0 on.")
    if architecture in TOPK_FAMILY and (not 0 < config.k <= d_sae or config.k % 1):
        raise ValueError(f"k must lie between 1 and d_sae = {d_sae}, got {config.k}.")
    if config.frozen not in (None, *FROZEN) or (config.frozen and config.tied):
        raise ValueError(f"frozen is one of {', '.join(FROZEN)}, or None; of a tied SAE None.")
    if config.scale not in ("mean", "unit", "none"):
        raise ValueError(f"scale is 'mean', 'unit' or 'none', not {config.scale!r}.")
    if config.scale == "unit" and (config.centre or architecture == "transcoder"):
        raise ValueError("scale='unit' cannot be undone with centre=True or of a transcoder.")
    return ARCHITECTURES[architecture](config)


# log penalty = intercept + slope * log L0, and the power of d_in that it grows with
STARTING = {"relu": (3.464, -0.644, 0.5), "gated": (3.451, -0.616, 0.5)}
STARTING["jumprelu"] = (4.661, -1.616, 1)


def starting_penalty(architecture: str, d_in: int, l0: float | int) -> float:
    """The `sparsity` with which about `l0` latents of a vector are active after training: a line
    fitted to one site of pocket-gpt (data/results/phase_4_sweep.json).

    A latent that is kept costs the penalty once (jumprelu) or times its activation; what it saves
    is its activation squared, of which a scaled vector has d_in to share out. With a quarter of the
    latents and a sixteenth of the vectors, there and at an attention's output, the L0 of relu and
    gated was within a factor of 1.7 of the one asked for, with penalties up to a tenth smaller; a
    quarter of the steps, or of the rate (.008), left two to three times as many. jumprelu's line is
    of rows that began at full length; since they begin short (`SHORT`), L0 comes out up to two
    fifths lower than asked for with 2,048 latents, about as asked for with 512. Raises ValueError
    for an architecture without a penalty and an l0 of 0.
    """
    if architecture not in PENALISED or not l0 > 0:
        raise ValueError(f"An l0 above 0 and one of {', '.join(PENALISED)}; others are given k.")
    intercept, slope, power = STARTING[architecture]
    return math.exp(intercept + slope * math.log(l0)) * (d_in / 256) ** power
