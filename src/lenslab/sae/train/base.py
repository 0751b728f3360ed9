"""What every trainable SAE is: weights, a scale and a centre, a loss of one batch, and what a step
must keep.

1. `fit` takes scale and centre from a first sample; from then on the weights see z = (x - centre) *
   scale.
2. `loss` is each architecture's own (`lenslab.sae.train.architectures`), in terms of z.
3. `before_step` and `after_step` stand around the optimizer's step: decoder rows of norm 1 stay so,
   and what a floor holds back stays where it is.

Floors are SAEs of which one side learns nothing, or little: a frozen decoder, a soft-frozen one, a
frozen encoder, all else trained as usual (Korznikov et al. 2026). What an SAE scores beyond them is
what its learned directions are good for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lenslab.runtime import compute_dtype, derive_generator
from lenslab.sae.train.sparse import widened

# floors, and what each holds back
FROZEN = {"decoder": "W_dec", "soft decoder": "W_dec", "encoder": "W_enc"}
NEAR = 0.8  # cosine that the rows of a soft-frozen decoder keep with their random start, at least


class TrainingFailed(RuntimeError):
    """NaN, Inf or a loss that ran away; a checkpoint is from before it happened."""


class Losses(NamedTuple):
    """What one batch costs: scalars with gradients, and what the trainer watches."""

    reconstruction: Tensor  # squared distance, summed over dimensions, mean over the batch
    error: Float[Tensor, "batch d_out"]  # target minus reconstruction, detached
    l0: Tensor  # mean number of active latents
    fired: Bool[Tensor, " d_sae"]
    # the penalty; of matryoshka, squared distances of partial reconstructions
    sparsity: Tensor = torch.zeros(())
    auxiliary: Tensor = torch.zeros(())

    @property
    def total(self) -> Tensor:
        return self.reconstruction + self.sparsity + self.auxiliary


@dataclass(frozen=True)
class SAEConfig:
    """What an SAE is; what it reads and was made for is in `metadata` (hook_name, model_name,
    ...)."""

    architecture: str
    d_in: int
    d_sae: int
    k: int = 32  # topk family: latents active for a vector (on average)
    # relu, gated: weight of the L1 penalty; jumprelu: of the L0 penalty. Nothing else makes them
    # sparse, and what L0 a weight leads to depends on data, width and length of the training: begin
    # with `starting_penalty`, watch `l0`
    sparsity: float = 1.0
    auxiliary: float = 1.0  # topk family: weight of AuxK
    tied: bool = False  # relu: the decoder is the encoder transposed
    d_out: int | None = None  # transcoder: width of what is written
    # a floor: "decoder" or "encoder" stays as it was drawn, the rows of a "soft decoder" near it
    frozen: str | None = None
    # 'mean': one factor to norm sqrt(d_in) on average; 'unit': each vector to it; 'none'
    scale: str = "mean"
    centre: bool = True  # subtract the mean vector
    seed: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)


class TrainableSAE(nn.Module):
    """Weights and a loss; `lenslab.sae.train.convert` makes an SAE of it that encodes what the
    model computes.

    `loss(x, target, dead=None, warm=1.0)` of each architecture gives the `Losses` of a scaled
    batch, x `[batch, d_in]` and target `[batch, d_out]`; `dead` latents `[d_sae]` are given AuxK,
    `warm` in 0 .. 1 multiplies the penalty.
    """

    topk_family = False  # decoder rows of norm 1, dead latents revived by AuxK
    fitted = False  # scale and centre were taken from data, and weights perhaps trained on them
    saved = False  # the weights are those of a saved SAE (`lenslab.sae.train.convert`)

    def __init__(self, config: SAEConfig):
        super().__init__()
        self.config = config
        d_out = config.d_out or config.d_in
        generator = derive_generator(config.seed, "sae initial weights")
        decoder = F.normalize(torch.randn(config.d_sae, d_out, generator=generator), dim=1)
        # the transposed layout of `decoder.T` is kept by clone(): gradients arrive in it
        # (`lenslab.sae.train.sparse`)
        encoder = decoder.T.clone()
        if config.architecture == "transcoder":
            drawn = torch.randn(config.d_in, config.d_sae, generator=generator)
            encoder = F.normalize(drawn, dim=0)
        self.W_enc = nn.Parameter(encoder)
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        if not config.tied:
            self.W_dec = nn.Parameter(decoder)
        if config.frozen == "soft decoder":
            self.register_buffer("start", decoder.clone())  # [d_sae, d_out], rows of norm 1
        self.register_buffer("centre", torch.zeros(config.d_in))
        self.register_buffer("centre_out", torch.zeros(d_out))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("scale_out", torch.ones(()))

    @property
    def decoder(self) -> Float[Tensor, "d_sae d_out"]:
        return self.W_enc.T if self.config.tied else self.W_dec

    @property
    def shift(self) -> Tensor | None:
        """What is subtracted before encoding."""
        return None if self.config.architecture == "transcoder" else self.b_dec

    @torch.no_grad()
    def fit(self, x: Float[Tensor, "token d_in"], target: Tensor | None = None) -> None:
        """Scale and centre from a first sample, and the encoder's length at which it reconstructs
        that sample best; a saved SAE's weights compute the same as before. ValueError where the
        sample is constant, or NaN or Inf."""
        self._fit_side(x.float(), self.centre, self.scale)
        self._fit_side((x if target is None else target).float(), self.centre_out, self.scale_out)
        if self.saved:
            state = self.state_dict()
            self.b_dec.sub_(self.centre)
            for name in {"b_dec", "b_enc", "b_mag", "threshold"} & state.keys():
                state[name].mul_(self.scale)
        elif target is None:
            z = self.scaled(x[:4096].float())
            self.begin(pre := self.pre(z))
            guess = self.activate(pre) @ self.decoder + self.b_dec
            length = ((z * guess).sum() / guess.square().sum().clamp_min(1e-9)).clamp(1e-3, 1)
            # tied: it shortens both sides
            self.W_enc.mul_(length.sqrt() if self.config.tied else length)
            self.begin(self.pre(z))
        self.fitted = True

    def begin(self, pre: Float[Tensor, "batch d_sae"]) -> None:
        """What else a rule takes from the first sample; jumprelu takes its thresholds."""

    def _fit_side(self, sample: Float[Tensor, "token d"], centre: Tensor, scale: Tensor) -> None:
        mean = sample.mean(0)
        spread = (sample - mean).norm(dim=1).mean()
        length = sample.norm(dim=1).mean()
        if not torch.isfinite(length) or spread <= 1e-6 * length:
            raise ValueError(f"The vectors are constant, or NaN or Inf (spread {spread:.3g}).")
        if self.config.centre:
            centre.copy_(mean)
        if self.config.scale == "mean":
            scale.copy_(sample.shape[1] ** 0.5 / (spread if self.config.centre else length))

    def scaled(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """x as the weights see it."""
        z = x - self.centre
        if self.config.scale == "unit":
            norm = z.norm(dim=-1, keepdim=True).clamp_min(1e-12)  # a vector of zeros stays one
            return z * (x.shape[-1] ** 0.5 / norm)
        return z * self.scale

    def pre(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        return (x if self.shift is None else x - self.shift) @ self.W_enc + self.b_enc

    def fast_pre(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        """Pre-activations in bf16 where that is fast, the bias as one more column of the product.

        x is data: the gradient of what it is shifted by goes through the bias, which saves a
        product as large as this one.
        """
        bias = self.b_enc
        if self.shift is not None:
            x = x - self.shift.detach()
            bias = bias - (self.shift - self.shift.detach()) @ self.W_enc  # the same value
        dtype = compute_dtype()
        return widened(x, 1.0, dtype) @ widened(self.W_enc.T, bias, dtype).T

    def activate(self, pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """The rule, of one vector at a time."""
        return torch.relu(pre)

    def _losses(self, target, x_hat, l0, fired, **terms: Tensor) -> Losses:
        error = target - x_hat  # [batch, d_out]
        return Losses(error.square().sum(-1).mean(), error.detach(), l0, fired, **terms)

    @torch.no_grad()
    def before_step(self) -> None:
        """Decoder rows of norm 1 are only turned: what lengthens them leaves the gradient, or Adam
        would count it."""
        if self.topk_family:
            along = (self.W_dec.grad * self.W_dec).sum(1, keepdim=True)
            self.W_dec.grad.sub_(along * self.W_dec)
        if self.config.frozen in ("decoder", "encoder"):
            getattr(self, FROZEN[self.config.frozen]).grad.zero_()  # Adam then moves nothing

    @torch.no_grad()
    def after_step(self) -> None:
        if self.topk_family and self.config.frozen != "decoder":  # its norms would move by a bit
            self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-8))
        if self.config.frozen == "soft decoder":
            norm = self.W_dec.norm(dim=1, keepdim=True)
            rows = F.normalize(self.W_dec, dim=1)
            cosine = (rows * self.start).sum(1, keepdim=True)  # [d_sae, 1]
            across = F.normalize(rows - cosine * self.start, dim=1)
            nearest = norm * (NEAR * self.start + (1 - NEAR**2) ** 0.5 * across)
            self.W_dec.copy_(torch.where(cosine < NEAR, nearest, self.W_dec))
