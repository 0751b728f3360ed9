"""What every trainable SAE is: weights, a scale and a centre, a loss of one batch, and what a step
must keep.

1. `fit` takes scale and centre from a first sample; from then on the weights see z = (x - centre) *
   scale.
2. `loss` is each architecture's own (`lenslab.sae.train.architectures`), in terms of z.
3. `before_step` and `after_step` stand around the optimizer's step: decoder rows of norm 1 stay so.
4. `encode` and `decode` take and give what the model computes, in the units that saving keeps.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lenslab.runtime import compute_dtype, derive_generator
from lenslab.sae.train.sparse import widened


class TrainingFailed(RuntimeError):
    """NaN, Inf or a loss that ran away; a checkpoint is from before it happened."""


class Losses(NamedTuple):
    """What one batch costs: scalars with gradients, and what the trainer watches."""

    total: Tensor
    reconstruction: Tensor  # squared distance, summed over dimensions, mean over the batch
    sparsity: (
        Tensor  # the penalty; of matryoshka, the squared distances of its partial reconstructions
    )
    auxiliary: Tensor
    l0: Tensor  # mean number of active latents
    fired: Bool[Tensor, " d_sae"]
    error: Float[Tensor, "batch d_out"]  # target minus reconstruction, detached


@dataclass(frozen=True)
class SAEConfig:
    """What an SAE is; what it reads and was made for is in `metadata` (hook_name, model_name,
    ...)."""

    architecture: str
    d_in: int
    d_sae: int
    k: int = 32  # topk family: latents active for a vector (on average)
    # relu, gated: weight of the L1 penalty; jumprelu: of the L0 penalty. Nothing else makes them
    # sparse, and what L0 a weight leads to depends on data, width and length of the training: watch
    # `l0`, and raise the weight until it fits
    sparsity: float = 1.0
    auxiliary: float = 1.0  # topk family: weight of AuxK
    tied: bool = False  # relu: the decoder is the encoder transposed
    widths: tuple[
        int, ...
    ] = ()  # matryoshka: latents in each nested dictionary; default d_sae / 16, / 4 and d_sae
    bandwidth: float = 0.05  # jumprelu: how near its threshold a pre-activation moves it
    d_out: int | None = None  # transcoder: width of what is written
    scale: str = "mean"  # 'mean': one factor to norm sqrt(d_in) on average; 'unit': each vector to it; 'none'
    centre: bool = True  # subtract the mean vector
    seed: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)


class TrainableSAE(nn.Module):
    """Weights and a loss. `encode` and `decode` take and give what the model computes, as after
    saving."""

    unit_decoder = False
    fitted = False  # scale and centre are those of some vectors, and weights have perhaps been trained on them

    def __init__(self, config: SAEConfig):
        super().__init__()
        self.config, d_out = config, config.d_out or config.d_in
        self.cfg = SimpleNamespace(
            **asdict(config) | {"metadata": SimpleNamespace(**config.metadata)}
        )
        generator = derive_generator(config.seed, "sae initial weights")
        decoder = F.normalize(torch.randn(config.d_sae, d_out, generator=generator), dim=1)
        encoder = decoder.T.clone()
        if d_out != config.d_in or config.architecture == "transcoder":
            encoder = F.normalize(
                torch.randn(config.d_in, config.d_sae, generator=generator), dim=0
            )
        # the transposed layout of `decoder.T` is kept by clone(): gradients arrive in it
        # (`lenslab.sae.train.sparse`)
        self.W_enc, self.b_enc = nn.Parameter(encoder), nn.Parameter(torch.zeros(config.d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        if not config.tied:
            self.W_dec = nn.Parameter(decoder)
        for name, width in (("centre", config.d_in), ("centre_out", d_out)):
            self.register_buffer(name, torch.zeros(width))
        for name in ("scale", "scale_out"):
            self.register_buffer(name, torch.ones(()))

    def describe(self, config: SAEConfig) -> None:
        """Take a configuration with more in its metadata; the rest is the same."""
        self.config = config
        vars(self.cfg.metadata).update(config.metadata)

    @property
    def decoder(self) -> Float[Tensor, "d_sae d_out"]:
        return self.W_enc.T if self.config.tied else self.W_dec

    @property
    def norms(self) -> Float[Tensor, " d_sae"]:
        """Lengths of the decoder's rows; a row that a penalty has shrunk to nothing still has a
        direction of zeros."""
        return self.decoder.norm(dim=1).clamp_min(1e-12)

    @property
    def shift(self) -> Tensor | None:
        """What is subtracted before encoding."""
        return None if self.config.architecture == "transcoder" else self.b_dec

    @torch.no_grad()
    def fit(self, x: Float[Tensor, "token d_in"], target: Tensor | None = None) -> None:
        """Scale and centre from a first sample, and the encoder's length at which it reconstructs
        that sample best."""
        for name, sample in (("", x), ("_out", x if target is None else target)):
            sample = sample.float()
            centre = sample.mean(0) if self.config.centre else torch.zeros_like(sample[0])
            norm, spread = (
                (sample - centre).norm(dim=1).mean(),
                (sample - sample.mean(0)).norm(dim=1).mean(),
            )
            if not torch.isfinite(norm) or spread <= 1e-6 * sample.norm(dim=1).mean():
                raise ValueError(
                    f"The activations are constant, or NaN or Inf (mean distance {float(spread):.3g})."
                )
            getattr(self, f"centre{name}").copy_(centre)
            if self.config.scale == "mean":
                getattr(self, f"scale{name}").copy_(sample.shape[1] ** 0.5 / norm)
        if target is None:
            z = self.scaled(x[:4096].float())
            guess = self._reconstruct(z)
            length = ((z * guess).sum() / guess.square().sum().clamp_min(1e-9)).clamp(1e-3, 1)
            self.W_enc.mul_(
                length.sqrt() if self.config.tied else length
            )  # tied: it shortens both sides
        self.fitted = True

    def scaled(self, x: Tensor) -> Tensor:
        """x as the weights see it."""
        if self.config.scale == "unit":
            norm = (
                (x - self.centre).norm(dim=-1, keepdim=True).clamp_min(1e-12)
            )  # a vector of zeros stays one
            return (x - self.centre) * (x.shape[-1] ** 0.5 / norm)
        return (x - self.centre) * self.scale

    def scaled_target(self, target: Tensor) -> Tensor:
        return (target - self.centre_out) * self.scale_out

    def pre(self, x: Tensor) -> Float[Tensor, "*batch d_sae"]:
        return (x if self.shift is None else x - self.shift) @ self.W_enc + self.b_enc

    @torch.no_grad()
    def fast_pre(
        self, x: Tensor
    ) -> tuple[Float[Tensor, "batch wider"], Float[Tensor, "batch d_sae"]]:
        """(x as it was multiplied, pre-activations), in bf16 where that is fast."""
        dtype = compute_dtype()
        inputs = widened(x if self.shift is None else x - self.shift, 1.0, dtype)
        return inputs, inputs @ widened(self.W_enc.T, self.b_enc, dtype).T

    def activate(self, pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """The rule at inference."""
        return torch.relu(pre)

    @property
    def unit(self) -> Float[Tensor, " d_sae"]:
        """What one of training's units of activation is in the model's: length of a decoder row
        over the scale."""
        return self.norms / self.scale_out

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        return self.activate(self.pre(self.scaled(x))) * self.unit

    @torch.no_grad()
    def decode(self, features: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_out"]:
        return (
            (features / self.unit) @ self.decoder / self.scale_out
            + self.b_dec / self.scale_out
            + self.centre_out
        )

    @torch.no_grad()
    def reconstruct(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """decode(encode(x)), given back each vector's own norm where scale='unit' took it away."""
        norm = (
            (x - self.centre).norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
            if self.config.scale == "unit"
            else 1
        )
        return self.decode(self.encode(x)) * norm

    def _reconstruct(self, z: Tensor) -> Tensor:
        return self.activate(self.pre(z)) @ self.decoder + self.b_dec

    def loss(
        self,
        x: Float[Tensor, "batch d_in"],
        target: Float[Tensor, "batch d_out"],
        dead: Bool[Tensor, " d_sae"] | None = None,
        warm: float = 1.0,
    ) -> Losses:
        """Losses of a scaled batch. `dead` latents are given AuxK; `warm` in 0 .. 1 multiplies the
        penalty."""
        raise NotImplementedError

    def _losses(self, target, x_hat, seen, sparsity=None, auxiliary=None) -> Losses:
        """`seen` is (which latents fired, how many per vector), from `usage`."""
        error = target - x_hat
        reconstruction, zero = error.square().sum(-1).mean(), error.new_zeros(())
        sparsity, auxiliary = (zero if term is None else term for term in (sparsity, auxiliary))
        total = reconstruction + sparsity + auxiliary
        fired, l0 = seen
        return Losses(total, reconstruction, sparsity, auxiliary, l0, fired, error.detach())

    @torch.no_grad()
    def before_step(self) -> None:
        """Decoder rows of norm 1 are only turned: what lengthens them leaves the gradient, or Adam
        would count it."""
        if self.unit_decoder:
            weight, grad = self.W_dec, self.W_dec.grad
            grad.sub_((grad * weight).sum(1, keepdim=True) * weight)

    @torch.no_grad()
    def after_step(self) -> None:
        if self.unit_decoder:
            self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-8))
