"""Train the SAEs that ship with lenslab: four layers of a model, three sparsities each, from one
pass of the model.

1. Documents come from the corpus (pocket_corpus.py) in the shares that the model was trained on;
   held-out ones are kept for step 3.
2. They are packed into windows; the vectors of real tokens (neither BOS nor EOS) train TopK SAEs,
   all at once.
3. Each is measured as users will have it (weights stored as bf16) on held-out documents, beside
   random directions of the same L0. The middle sparsity ships; the metrics of all stand in its
   card.json.
4. `--twin` trains one on the random-weight twin, the control of phase 2.

    python scripts/train_pocket_saes.py --corpus FOLDER                                  # a quarter
    of an hour python scripts/train_pocket_saes.py --corpus FOLDER --twin --layers 3 --k 16 python
    scripts/train_pocket_saes.py --corpus FOLDER --model FOLDER --smoke           # a toy, one
    minute
"""

from __future__ import annotations

import argparse
import json
import math
import re
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pocket_corpus as corpus
import torch

from lenslab.files import VERSIONED, data_path
from lenslab.hooks import stream_hook
from lenslab.models import load_model, model_key, model_name, random_twin
from lenslab.runtime import machine_summary
from lenslab.sae.controls import evaluate_null
from lenslab.sae.evaluate import evaluate_sae
from lenslab.sae.load import SparseAutoencoder, load_sae
from lenslab.sae.save import save_sae
from lenslab.sae.train import ModelSource, TrainingConfig, build_sae, train
from lenslab.tokens import TokenBatch, pack


def windows(model, documents: dict[str, list[str]], tokens: int, seed: int) -> TokenBatch:
    """About `tokens` tokens of packed windows, documents drawn by category as for the model, then
    shuffled."""
    chosen, random = [], np.random.default_rng([seed, tokens])
    shares = {
        category: corpus.MIX.get(category, 0.1) for category, texts in documents.items() if texts
    }
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
    return (
        1.15 * sum(map(len, sample)) / sum(map(len, ids))
    )  # rather too many documents than too few


def stored(sae: SparseAutoencoder, device: str) -> SparseAutoencoder:
    """The SAE as users get it: weights that went through bf16."""
    with tempfile.TemporaryDirectory() as scratch:
        return load_sae(save_sae(sae, Path(scratch) / "sae", dtype=torch.bfloat16), device=device)


def measure(model, sae: SparseAutoencoder, held_out: TokenBatch, name: str, seed: int) -> dict:
    """Metrics of an SAE and of random directions with its L0."""
    measured = evaluate_sae(model, sae, held_out, name=name)
    null = evaluate_null(model, sae, held_out, measured.l0, seed=seed)
    print(
        f"{name}: L0 {measured.l0:.1f}, variance explained {measured.variance_explained:.3f} "
        f"(random directions {null.variance_explained:.3f}), dead {measured.dead}, dense "
        f"{measured.dense}",
        flush=True,
    )
    return {"sae": measured.to_dict(), "null": null.to_dict()}


def main(arguments: list[str] | None = None) -> list[Path]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--corpus", default="corpus", help="folder CATEGORY/SOURCE.jsonl.gz, or 'hub'"
    )
    parser.add_argument(
        "--model", default="pocket-gpt", help="bundled name, local folder or hub name"
    )
    parser.add_argument(
        "--twin", action="store_true", help="the same architecture with untrained weights"
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 1, 3, 5])
    parser.add_argument("--stream", default="residual", help="residual, attention or mlp")
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument(
        "--k", type=int, nargs="+", default=[16, 8, 32], help="sparsities; the first one ships"
    )
    parser.add_argument(
        "--vectors", type=float, default=1.2e6, help="activations to train on, all distinct"
    )
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument(
        "--validation", type=float, default=2e4, help="held-out tokens to measure on"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=data_path("saes"), help="folder of the SAEs' folders"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/pocket-saes"), help="checkpoints")
    parser.add_argument(
        "--smoke", action="store_true", help="d_sae 128 on 40 thousand vectors, for development"
    )
    given = parser.parse_args(arguments)
    if given.smoke:
        given.d_sae, given.k, given.vectors, given.validation, given.batch = (
            128,
            [8, 4],
            4e4,
            4e3,
            512,
        )

    model = load_model(given.model)
    model = random_twin(model) if given.twin else model
    short = {"residual": "resid", "attention": "attn"}.get(given.stream, given.stream)
    called = re.sub(r"[^\w.-]+", "-", model_name(model)).strip(
        "-"
    )  # "pocket-gpt (random twin)" as a folder's name
    hooks = {layer: stream_hook(model, layer, given.stream) for layer in given.layers}
    train_documents, validation = corpus.load_documents(given.corpus)
    batch = windows(model, train_documents, int(given.vectors), given.seed)
    held_out = windows(model, validation, int(given.validation), given.seed)
    print(
        f"{model_name(model)} ({model_key(model)}): {batch.n_real:,} vectors in {len(batch):,} "
        "windows",
        flush=True,
    )

    options = dict(d_sae=given.d_sae, seed=given.seed)
    saes = {
        f"{layer}-k{k}": build_sae(
            "topk", model.cfg.d_model, k=k, metadata={"hook_name": hook}, **options
        )
        for layer, hook in hooks.items()
        for k in given.k
    }
    vectors = batch.n_real // given.batch * given.batch
    config = TrainingConfig(vectors, given.batch, given.lr, dead_after=100_000, seed=given.seed)
    started = time.perf_counter()
    folder = given.work / f"{called}-{short}"
    trained = train(saes, ModelSource(model, batch, list(hooks.values())), config, folder=folder)
    seconds = time.perf_counter() - started
    about = {
        "windows": len(batch),
        "window": int(batch.tokens.shape[1]),
        "distinct_vectors": batch.n_real,
        "excluded": "BOS, EOS, padding",
        "documents": "training part of the corpus, in the shares of pocket_corpus.MIX",
        "seconds": round(seconds, 1),
        "trained_together": len(saes),
        "config": vars(config),
    }
    written = []
    for layer in given.layers:
        name = f"{called}-{short}-{layer}"
        levels = {}
        for k in given.k:
            sae = stored(trained[f"{layer}-k{k}"].sae, str(model.cfg.device))
            levels[str(k)] = measure(model, sae, held_out, f"{name}, k {k}", given.seed) | {
                "ships": k == given.k[0]
            }
        first = levels[str(given.k[0])]
        card = {
            "trained_on": about,
            "measured_on": "documents held out from the training of model and SAE "
            "(pocket_corpus.is_held_out)",
            "sae": first["sae"],
            "null": first["null"],
            "at_l0": levels,
            "machine": machine_summary(),
            "versions": {package: version(package) for package in VERSIONED},
        }
        sae = trained[f"{layer}-k{given.k[0]}"].sae
        written.append(
            save_sae(sae, given.out / name, dtype=torch.bfloat16, card=json.loads(json.dumps(card)))
        )
    return written


if __name__ == "__main__":
    main()
