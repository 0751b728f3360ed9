"""A small SAE for a model that has none, by SAELens's own trainer."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lenslab.activations import TokenBatch, harvest
from lenslab.models import check_hooks, model_key, model_name
from lenslab.runtime import derive_generator, has_fast_bf16
from lenslab.sae.pretrained import SparseAutoencoder, finish, inference_form

TRAIN_BATCH = 2048  # vectors per step
POOL = 1 << 16  # real tokens that are harvested and shuffled together


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
    """A TopK SAE for a model that has none, by SAELens's own trainer; minutes on two cores.

    1. Real tokens only: vectors are harvested in pools of 65,536 and shuffled within (bounded memory).
    2. They are scaled to a mean norm of sqrt(d_in), and the decoder's bias starts at their mean.
    3. `steps` steps of 2,048 vectors: 5 % warm-up, the last 20 % decaying; the scale is folded back in.

    `batch` is read as often as the steps need. Raises ValueError when its real tokens do not fill one step or k
    exceeds d_sae; UnknownHook.
    """
    from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.sae import SAEMetadata
    from tqdm.auto import tqdm

    check_hooks(model, [hook])
    if not 0 < k <= d_sae:
        raise ValueError(f"k must lie between 1 and d_sae = {d_sae}, got {k}.")
    if int(batch.real.sum()) < TRAIN_BATCH:
        raise ValueError(f"{int(batch.real.sum())} real tokens do not fill one step of {TRAIN_BATCH}: give more text.")
    pools = _pools(model, hook, batch, seed)
    first = next(pools)
    scale = math.sqrt(first.shape[1]) / float(first.norm(dim=1).mean())
    metadata = SAEMetadata(
        model_name=model_name(model),
        model_key=model_key(model),
        hook_name=hook,
        prepend_bos=True,
        context_size=int(batch.tokens.shape[1]),
        training_vectors=steps * TRAIN_BATCH,
        distinct_training_vectors=int(batch.real.sum()),
        seed=seed,
    )
    device = str(model.cfg.device)
    shape = "hook_z" if hook.endswith("hook_z") else "none"  # so that SAELens joins the heads too
    config = TopKTrainingSAEConfig(
        d_in=first.shape[1], d_sae=d_sae, k=k, device=device, reshape_activations=shape, metadata=metadata
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_generator(seed, "sae initial weights").initial_seed())
        sae = TopKTrainingSAE(config)
    sae.b_dec.data = first.mean(0).to(device) * scale
    schedule = SAETrainerConfig(
        total_training_samples=steps * TRAIN_BATCH,
        train_batch_size_samples=TRAIN_BATCH,
        lr=3e-3,  # at a few hundred steps 1e-3 leaves a third more variance unexplained (tinystories-656k)
        lr_end=3e-4,
        lr_warm_up_steps=steps // 20,
        lr_decay_steps=steps // 5,
        dead_feature_window=max(20, steps // 20),
        device=device,
        autocast=has_fast_bf16(),
    )
    vectors = _steps(first, pools, seed)
    trainer = SAETrainer(cfg=schedule, sae=sae, data_provider=vectors)
    bar = tqdm(range(steps), desc=f"SAE on {hook}", disable=None if progress else True, unit="step")
    for _ in bar:
        output = trainer.step(next(vectors).to(device) * scale)
        trainer.n_training_steps += 1
        if trainer.n_training_steps % 50 == 0:
            bar.set_postfix(loss=f"{output.losses['mse_loss'].item():.1f}", dead=int(trainer.dead_neurons.sum()))
    sae.fold_activation_norm_scaling_factor(scale)
    return finish(inference_form(sae), hook)


def _pools(model: TransformerBridge, hook: str, batch: TokenBatch, seed: int) -> Iterator[Float[Tensor, "token d_in"]]:
    """Endless: the real vectors of a few texts at a time, in an order that the seed decides."""
    generator, size = derive_generator(seed, "sae order of texts"), max(1, POOL // batch.tokens.shape[1])
    starts = range(0, len(batch), size)
    known = None
    while True:
        for i in torch.randperm(len(starts), generator=generator).tolist():
            part = batch[starts[i] : starts[i] + size]
            if known is None or len(starts) > 1:
                known = harvest(model, part, hook, progress=False)[hook][part.real].flatten(1).float()
            yield known


def _steps(first: Tensor, pools: Iterator[Tensor], seed: int) -> Iterator[Float[Tensor, "step d_in"]]:
    """Endless: shuffled batches for one step each; what does not fill a step waits for the next pool."""
    generator, pool = derive_generator(seed, "sae order of vectors"), first
    while True:
        pool = pool[torch.randperm(len(pool), generator=generator).to(pool.device)]
        whole = len(pool) - len(pool) % TRAIN_BATCH
        yield from pool[:whole].split(TRAIN_BATCH)
        pool = torch.cat([pool[whole:], next(pools)])
