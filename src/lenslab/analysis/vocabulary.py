"""What features write: the tokens whose logits a decoder direction raises and lowers most, by itself.

1. The direction goes through the final norm with its scale left out: centred where the norm centres (LayerNorm), then
   times the norm's weight. The scale is one positive factor per token, so the order of tokens is right and the
   size is up to that factor.
2. Times the unembedding; the mean over the vocabulary is subtracted, which no probability depends on.
3. The same for random directions of the same norm: the largest of thousands of logits is large by luck.
This is the direct path only: what later layers make of the direction is not in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lenslab.activations import token_string
from lenslab.analysis.results import Indices, Result
from lenslab.runtime import derive_generator
from lenslab.sae.pretrained import RESIDUAL, SparseAutoencoder, check_sae, sae_hook


@dataclass(frozen=True, eq=False)
class VocabularyEffects(Result):
    """Logits are per unit of activation, before the final norm's scale; each row is sorted, largest effect first."""

    features: Int[np.ndarray, " feature"]
    promoted: Float[np.ndarray, "feature n"]
    promoted_ids: Int[np.ndarray, "feature n"]
    promoted_tokens: tuple[tuple[str, ...], ...]
    suppressed: Float[np.ndarray, "feature n"]
    suppressed_ids: Int[np.ndarray, "feature n"]
    suppressed_tokens: tuple[tuple[str, ...], ...]
    control: Float[np.ndarray, " feature"]  # largest logit of a random direction of the same norm, median of several

    def to_frame(self) -> pd.DataFrame:
        """One row per feature and token: `feature`, `effect`, `rank`, `token`, `logit`, `times_control`."""
        rows = []
        for effect, sign in (("promoted", 1), ("suppressed", -1)):
            logits, tokens = getattr(self, effect), getattr(self, f"{effect}_tokens")
            for i, feature in enumerate(self.features.tolist()):
                for rank, (token, logit) in enumerate(zip(tokens[i], logits[i].tolist(), strict=True), 1):
                    ratio = sign * logit / max(float(self.control[i]), 1e-30)
                    rows.append((feature, effect, rank, token, logit, ratio))
        frame = pd.DataFrame(rows, columns=["feature", "effect", "rank", "token", "logit", "times_control"])
        return frame.sort_values(["feature", "effect", "rank"], ignore_index=True)


@torch.inference_mode()
def vocabulary_effects(
    model: TransformerBridge,
    sae: SparseAutoencoder,
    features: Indices,
    *,
    n: int = 10,
    controls: int = 20,
    seed: int = 0,
) -> VocabularyEffects:
    """The `n` most promoted and most suppressed tokens of some features, and the scale of chance.

    Raises as `check_sae`; ValueError for features that the SAE has not, and for an SAE that does not write into the
    residual stream (`hook_z`, `mlp.hook_post`): its directions are no sums of token logits.
    """
    check_sae(sae, model)
    hook = getattr(sae.cfg.metadata, "hook_name_out", None) or sae_hook(sae)
    features = [int(feature) for feature in features]
    if not features or min(features) < 0 or max(features) >= sae.cfg.d_sae:
        raise ValueError(f"Features lie in 0 to {sae.cfg.d_sae - 1}, got {features[:10]}.")
    if not RESIDUAL.search(hook):
        raise ValueError(f"{hook} does not write into the residual stream: there is no direct path to the vocabulary.")
    direction = _directions(sae, features).to(model.cfg.device)
    logits = direct_logits(model, direction)
    drawn = torch.randn(controls, direction.shape[1], generator=derive_generator(seed, "random decoder directions"))
    largest = direct_logits(model, (drawn / drawn.norm(dim=1, keepdim=True)).to(direction)).max(1).values.median()
    high, low = logits.topk(n), (-logits).topk(n)

    def strings(ids: Tensor) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(token_string(model.tokenizer, i) for i in row) for row in ids.tolist())

    return VocabularyEffects(
        np.array(features),
        high.values.cpu().numpy(),
        high.indices.cpu().numpy(),
        strings(high.indices),
        -low.values.cpu().numpy(),
        low.indices.cpu().numpy(),
        strings(low.indices),
        (direction.norm(dim=1) * largest).cpu().numpy(),
    )


def direct_logits(model: TransformerBridge, direction: Float[Tensor, "row d_model"]) -> Float[Tensor, "row vocab"]:
    """Directions of the residual stream -> centred logits by the direct path, before the final norm's scale."""
    weight, centred = final_norm(model)
    x = direction.float()
    x = (x - x.mean(-1, keepdim=True) if centred else x) * weight
    logits = x @ model.W_U.float()
    return logits - logits.mean(-1, keepdim=True)


def final_norm(model: TransformerBridge) -> tuple[Float[Tensor, " d_model"], bool]:
    """(the final norm's weight, whether it centres), measured on the norm itself: families store it differently.

    A vector of mean 0 and its negative go through; half their difference is the normalised vector times the weight.
    """
    width, norm = model.cfg.d_model, getattr(model, "ln_final", None)
    probe = torch.ones(width, device=model.cfg.device)
    probe[1::2] = -1
    if width % 2:
        probe[:3] = torch.tensor([2.0, -1.0, -1.0])
        probe[3::2], probe[4::2] = 1, -1
    if norm is None:
        return torch.ones_like(probe), False
    probe = probe * 1000  # large against the norm's epsilon

    def through(x: Tensor) -> Tensor:
        return norm(x[None, None].to(model.cfg.dtype))[0, 0].float()

    weight = (through(probe) - through(-probe)) / 2 * probe.square().mean().sqrt() / probe
    return weight, bool(torch.allclose(through(probe + 500), through(probe), rtol=1e-2, atol=1e-3))


def _directions(sae: SparseAutoencoder, features: list[int]) -> Float[Tensor, "row d_in"]:
    if hasattr(sae, "W_dec"):
        return sae.W_dec[features].float()
    one = torch.zeros(len(features), sae.cfg.d_sae)
    one[torch.arange(len(features)), features] = 1
    return (sae.decode(one) - sae.decode(torch.zeros_like(one))).float()
