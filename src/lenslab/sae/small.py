"""A small SAE for a model that has none."""

from __future__ import annotations

from transformer_lens.model_bridge import TransformerBridge

from lenslab.activations import TokenBatch
from lenslab.sae.architectures import build_sae
from lenslab.sae.pretrained import SparseAutoencoder
from lenslab.sae.sources import ModelSource
from lenslab.sae.training import TrainingConfig, train

TRAIN_BATCH = 2048  # vectors per step
LR = 6e-3  # at a few hundred steps 3e-3 leaves a tenth more variance unexplained (tinystories-656k)


def train_small_sae(
    model: TransformerBridge,
    hook: str,
    batch: TokenBatch,
    *,
    d_sae: int = 1024,
    k: int = 16,
    steps: int = 600,
    seed: int = 0,
    progress: bool = True,
) -> SparseAutoencoder:
    """A TopK SAE for a model that has none, by `lenslab.sae.training`.

    300 steps on 100,000 tokens of a model of width 128 took 50 s on one core; wider models take longer.

    1. The real tokens of `batch` go through the model, once if they fit one pool (`lenslab.sae.sources`).
    2. `steps` steps of 2,048 vectors; scale and centre are folded into the weights that come back.

    `batch` is read as often as the steps need. Raises ValueError when its real tokens do not fill one step or k
    exceeds d_sae; UnknownHook.
    """
    source = ModelSource(model, batch, hook, seed=seed)
    if batch.n_real < TRAIN_BATCH:
        raise ValueError(f"{batch.n_real} real tokens do not fill one step of {TRAIN_BATCH}: give more text.")
    sae = build_sae("topk", source.widths[hook], d_sae, k=k, seed=seed, metadata={"hook_name": hook})
    config = TrainingConfig(
        steps * TRAIN_BATCH,
        batch=TRAIN_BATCH,
        lr=LR,
        dead_after=max(20, steps // 20) * TRAIN_BATCH,
        seed=seed,
    )
    return train({"sae": sae.to(model.cfg.device)}, source, config, progress=progress)["sae"].sae
