"""The SAEs at hand for a model, and their cards: what each was trained on, and how good random
directions are.

`card.json` beside the weights holds `trained_on`, `measured_on`, and `at_l0`: for every sparsity
that was trained, the metrics of `evaluate_sae` and those of its null. One of them ships; `sae` and
`null` are its entries.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from lenslab.files import cache_path, content_key, data_path, versions
from lenslab.hooks import UnknownHook, stream_hook
from lenslab.models import model_key, model_name
from lenslab.runtime import compute_dtype
from lenslab.sae.inputs import SAEMismatch, SparseAutoencoder, check_sae
from lenslab.sae.load import bundled_saes, load_sae
from lenslab.sae.registry import CARD, NotAnSAE, SAENotHere, cached_ids, releases_of
from lenslab.sae.save import save_sae
from lenslab.sae.train import ModelSource, TrainingConfig, build_sae, train
from lenslab.sae.train.sources import POOL
from lenslab.texts import sampled_text
from lenslab.tokens import TokenBatch, pack

TRAIN_BATCH = 2048  # vectors per step

LR = 6e-3  # at a few hundred steps 3e-3 leaves a tenth more variance unexplained (tinystories-656k)

SHOWN = ("l0", "variance_explained", "ce_difference", "ce_recovered_zero", "dead", "dense")


class FoundSAE(NamedTuple):
    """An SAE for a model and where it comes from."""

    sae: SparseAutoencoder
    name: str  # short, for tables
    origin: str  # a sentence's worth, for the reader


def find_sae(
    model: TransformerBridge, name: str | None = None, *, documents: int = 700, steps: int = 300
) -> FoundSAE:
    """The bundled SAE or folder called `name`; without a name the first of these that reads the
    middle layer:

    1. a bundled SAE that was trained on these weights;
    2. a published one that is in the cache of the hub (`python -m lenslab.sae.hub download ...`);
    3. one trained now: small, on the residual stream after the middle block, on text that ships
       with lenslab, of which as much as one pool holds: the model is run once. Kept in the cache
       for the next call. Enough to follow a notebook on any model, not to learn much about it.

    Raises as `load_sae`.
    """
    if name is not None:
        return FoundSAE(load_sae(name), os.path.basename(name), "chosen by name")
    middle = model.cfg.n_layers // 2
    # The input of the block after the middle one is the same vector as the output of the middle one
    same = [f"blocks.{middle + 1}.hook_resid_pre", f"blocks.{middle}.hook_resid_pre"]
    hooks = [stream_hook(model, middle), *same]
    for found in _at_hand(model, hooks):
        # Other weights may go by the same name, and then the SAE is not theirs
        with suppress(SAEMismatch, UnknownHook):
            check_sae(found.sae, model)
            if found.sae.cfg.metadata.hook_name in hooks:
                return found
    batch = pack(model, sampled_text(documents, model_name(model)))
    batch = batch[: POOL // batch.tokens.shape[1]]
    sae = small_sae(model, hooks[0], batch, steps)
    trained = f"a small one trained here, {steps} steps on {batch.n_real:,} tokens"
    origin = f"none at hand for the middle of the residual stream: {trained}"
    return FoundSAE(sae, f"small SAE of {model_name(model)}", origin)


def _at_hand(model: TransformerBridge, hooks: list[str]) -> Iterator[FoundSAE]:
    """The bundled SAEs of a model of this name, then the published ones in the cache, opened."""
    for name in bundled_saes(model):
        yield FoundSAE(load_sae(name), name, "bundled")
    for hook in hooks:
        for release in releases_of(model_name(model)):
            if hook in cached_ids(release):
                sae = load_sae(release, hook)
                yield FoundSAE(sae, f"{release} {hook}", "published, from the cache of the hub")


def small_sae(
    model: TransformerBridge, hook: str, batch: TokenBatch, steps: int
) -> SparseAutoencoder:
    """A TopK SAE for a model that has none: 1,024 latents, 16 active at a token. Trained once on
    this machine for the same model, hook, text and settings, then kept in the cache.

    300 steps on 100,000 tokens of a model of width 128 took 50 s on one core; wider models take
    longer.

    1. The real tokens of `batch` go through the model, once if they fit one pool
       (`lenslab.sae.train.sources`).
    2. `steps` steps of 2,048 vectors; scale and centre are folded into the weights that come back.

    `batch` is read as often as the steps need. Raises ValueError when its real tokens do not fill
    one step; UnknownHook.
    """
    dead_after = max(20, steps // 20) * TRAIN_BATCH
    config = TrainingConfig(steps * TRAIN_BATCH, TRAIN_BATCH, LR, dead_after=dead_after)
    settings = [repr(config), str(compute_dtype()), versions()]
    folder = cache_path("saes", content_key(model_key(model), hook, batch.key, settings))
    with suppress(SAENotHere, NotAnSAE):
        return load_sae(folder, device=str(model.cfg.device))
    source = ModelSource(model, batch, hook, progress=True)
    new = build_sae("topk", source.widths[hook], d_sae=1024, k=16).to(model.cfg.device)
    sae = train({"sae": new}, source, config)["sae"].sae
    try:
        save_sae(sae, folder)
    except OSError as error:
        warnings.warn(f"The small SAE is not kept for the next time: {error}", stacklevel=3)
    return sae


def card_table(model: TransformerBridge | None = None) -> pd.DataFrame:
    """One row per bundled SAE (of `model`) and sparsity, on held-out documents; the null's variance
    explained beside.

    Columns `sae`, `ships`, those of `SHOWN`, and `null` (variance that random directions explain at
    the same L0).
    """
    rows = []
    for name in bundled_saes(model):
        card = json.loads(data_path("saes", name, CARD).read_text(encoding="utf-8"))
        for level in card["at_l0"].values():
            row = {"sae": name, "ships": level["ships"]}
            row |= {metric: level["sae"][metric] for metric in SHOWN}
            rows.append(row | {"null": level["null"]["variance_explained"]})
    return pd.DataFrame(rows, columns=["sae", "ships", *SHOWN, "null"])
