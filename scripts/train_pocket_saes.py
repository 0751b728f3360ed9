"""Train the SAEs that ship with lenslab, with SAELens's own trainer; today one, on pocket-gpt's middle layer.

1. Documents come from the corpus (pocket_corpus.py) in the shares that the model was trained on; held-out ones
   are kept for step 3.
2. They are packed into windows; the vectors of real tokens (neither BOS nor EOS) train a TopK SAE.
3. The SAE is saved, loaded back as users will have it (weights stored as bf16), and measured on held-out documents
   beside a random SAE of the same L0.
4. Both rows, what it was trained on and the versions go into card.json beside the weights.

    python scripts/train_pocket_saes.py --corpus FOLDER                                  # minutes
    python scripts/train_pocket_saes.py --corpus FOLDER --model FOLDER --smoke           # a toy, one minute
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pocket_corpus as corpus
import torch

from lenslab.activations import TokenBatch, pack
from lenslab.models import load_model, model_key, model_name, stream_hook
from lenslab.paths import data_path
from lenslab.runtime import machine_summary
from lenslab.sae.evaluation import VERSIONED, SAEMetrics, evaluate_null, evaluate_sae
from lenslab.sae.pretrained import load_sae, save_sae
from lenslab.sae.small import TRAIN_BATCH, train_small_sae


def windows(model, documents: dict[str, list[str]], tokens: int, seed: int) -> TokenBatch:
    """About `tokens` tokens of packed windows, documents drawn by category as for the model, then shuffled."""
    chosen, random = [], np.random.default_rng([seed, tokens])
    shares = {category: corpus.MIX.get(category, 0.1) for category, texts in documents.items() if texts}
    per_token = _characters_per_token(model, documents)
    for category, share in sorted(shares.items()):
        characters = tokens * per_token * share / sum(shares.values())
        for i in random.permutation(len(documents[category])):
            if characters <= 0:
                break
            chosen.append(documents[category][i])
            characters -= len(chosen[-1])
    batch = pack(model, [chosen[i] for i in random.permutation(len(chosen))])
    order = random.permutation(len(batch))[: math.ceil(tokens / batch.tokens.shape[1])]
    return batch[order.tolist()]


def _characters_per_token(model, documents: dict[str, list[str]]) -> float:
    sample = [texts[0][:2000] for texts in documents.values() if texts]
    ids = model.tokenizer(sample, add_special_tokens=False, verbose=False).input_ids
    return 1.15 * sum(map(len, sample)) / sum(map(len, ids))  # rather too many documents than too few


def card(measured: SAEMetrics, null: SAEMetrics, trained: TokenBatch, seconds: float, options: dict) -> dict:
    """What a reader needs to trust the SAE: what it was trained on, how good it is, and how good chance is."""
    return {
        "trained_on": {
            "windows": len(trained),
            "window": int(trained.tokens.shape[1]),
            "distinct_vectors": trained.n_real,
            "excluded": "BOS, EOS, padding",
            "documents": "training part of the corpus, in the shares of pocket_corpus.MIX",
            "seconds": round(seconds, 1),
            **options,
        },
        "measured_on": "documents held out from the training of model and SAE (pocket_corpus.is_held_out)",
        "sae": measured.to_dict(),
        "null": null.to_dict(),
        "machine": machine_summary(),
        "versions": {name: version(name) for name in VERSIONED},
    }


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", default="corpus", help="folder CATEGORY/SOURCE.jsonl.gz, or 'hub'")
    parser.add_argument("--model", default="pocket-gpt", help="bundled name, local folder or hub name")
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--stream", default="residual", help="residual, attention or mlp")
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--vectors", type=float, default=2e6, help="activations to train on, all distinct")
    parser.add_argument("--validation", type=float, default=1e5, help="held-out tokens to measure on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default data/saes/MODEL-STREAM-LAYER")
    parser.add_argument("--smoke", action="store_true", help="d_sae 128 on 40 thousand vectors, for development")
    given = parser.parse_args(arguments)
    if given.smoke:
        given.d_sae, given.k, given.vectors, given.validation = 128, 8, 4e4, 4e3

    model = load_model(given.model)
    hook = stream_hook(model, given.layer, given.stream)
    short = {"residual": "resid", "attention": "attn"}.get(given.stream, given.stream)
    out = given.out or data_path("saes", f"{model_name(model)}-{short}-{given.layer}")
    train, validation = corpus.load_documents(given.corpus)
    batch = windows(model, train, int(given.vectors), given.seed)
    held_out = windows(model, validation, int(given.validation), given.seed)
    print(f"{hook} of {model_name(model)} ({model_key(model)}): {batch.n_real:,} vectors in {len(batch):,} windows")

    steps, started = max(1, batch.n_real // TRAIN_BATCH), time.perf_counter()
    options = dict(d_sae=given.d_sae, k=given.k, steps=steps, seed=given.seed)
    sae = train_small_sae(model, hook, batch, **options)
    seconds = time.perf_counter() - started

    with tempfile.TemporaryDirectory() as scratch:  # measure what users get: weights that went through bf16
        stored = load_sae(save_sae(sae, Path(scratch) / out.name, dtype=torch.bfloat16), device=str(model.cfg.device))
    measured = evaluate_sae(model, stored, held_out, name=out.name)
    null = evaluate_null(model, stored, held_out, measured.l0, seed=given.seed)
    save_sae(sae, out, dtype=torch.bfloat16, card=card(measured, null, batch, seconds, options))
    columns = [
        "sae",
        "l0",
        "variance_explained",
        "ce_difference",
        "ce_recovered_zero",
        "ce_recovered_mean",
        "dead",
        "dense",
    ]
    rows = [m.to_frame()[columns] for m in (measured, null)]
    print(f"trained in {seconds:.0f} s; on {measured.n_tokens:,} held-out tokens (saved to {out.name}):")
    print("\n".join(row.round(3).to_string(index=False, header=not i) for i, row in enumerate(rows)))
    return out


if __name__ == "__main__":
    main()
