"""Train the SAEs that ship with lenslab: any sites of a model, from one pass of the model.

1. Documents come from the corpus (pocket_corpus.py) in the shares that the model was trained on;
   held-out ones are kept for step 4. Packed into windows they can be kept in a small file, so that
   a training elsewhere needs no corpus.
2. The vectors of real tokens (neither BOS nor EOS) train all SAEs at once.
3. A site is STREAM-LAYER: resid, attn, mlp, router (what a router reads). Of several architectures
   the one with the least unexplained variance, mean over all sites and levels, is kept.
4. Each is measured as users will have it (weights stored as bf16) on held-out documents, at several
   L0 and beside random directions of the same L0: the k of TopK is changed, of BatchTopK and
   Matryoshka the threshold. All that stands in its card.json.
5. `--twin` trains on the random-weight twin, the control of phase 2; `--frozen` trains floors, of
   which one side of the SAE learns nothing or little.

    python scripts/train_pocket_saes.py --corpus FOLDER
    python scripts/train_pocket_saes.py --corpus FOLDER --twin --sites resid-3
    python scripts/train_pocket_saes.py --corpus FOLDER --model smollm2 --twin --sites resid-15 \
        --architecture batchtopk --d-sae 1024 --k 32 --vectors 1.25e6 --window 128
    python scripts/train_pocket_saes.py --corpus FOLDER --sites resid-3 --frozen decoder encoder
    python scripts/train_pocket_saes.py --corpus FOLDER --write-tokens tokens.npz
    python scripts/train_pocket_saes.py --tokens tokens.npz --sites resid-3 --seeds 1 2 3
    python scripts/train_pocket_saes.py --corpus FOLDER --smoke           # a toy, one minute
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import json
import math
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pocket_corpus as corpus
import torch

from lenslab.capture import harvest
from lenslab.files import atomic_write, data_path, versions
from lenslab.hooks import stream_hook
from lenslab.models import load_model, model_key, model_name, random_twin
from lenslab.runtime import default_device, machine_summary
from lenslab.sae.controls import evaluate_null
from lenslab.sae.evaluate import evaluate_sae
from lenslab.sae.inputs import SparseAutoencoder
from lenslab.sae.load import load_sae
from lenslab.sae.save import save_sae
from lenslab.sae.train import ModelSource, TrainingConfig, build_sae, train
from lenslab.sae.train.architectures import TOPK_FAMILY
from lenslab.sae.train.base import FROZEN
from lenslab.sae.train.convert import to_saelens
from lenslab.tokens import TokenBatch, pack

STREAMS = {"resid": "residual", "attn": "attention"}  # as `stream_hook` calls them
PASS = {"cpu": 32, "cuda": 128}  # windows that go through the model at a time
POOL = {"cpu": 1 << 16, "cuda": 1 << 18}  # vectors of each hook in memory
NEAR = 32  # windows that a threshold is chosen on


# Text


def windows(
    model, documents: dict[str, list[str]], tokens: int, seed: int, length: int | None = None
) -> TokenBatch:
    """About `tokens` tokens of packed windows of `length`, documents drawn by category as for the
    model, then shuffled."""
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
    batch = pack(model, [chosen[i] for i in random.permutation(len(chosen))], length=length)
    order = random.permutation(len(batch))[: math.ceil(tokens / batch.tokens.shape[1])]
    return batch[order.tolist()]


def _characters_per_token(model, documents: dict[str, list[str]]) -> float:
    sample = [texts[0][:2000] for texts in documents.values() if texts]
    ids = model.tokenizer(sample, add_special_tokens=False, verbose=False).input_ids
    # rather too many documents than too few
    return 1.15 * sum(map(len, sample)) / sum(map(len, ids))


def write_tokens(file: Path, model, batches: dict[str, TokenBatch]) -> None:
    """Whole windows of each batch, ids in 16 bits, real tokens in one."""
    arrays = {"tokenizer": np.array(_tokenizer_key(model))}
    for name, batch in batches.items():
        whole = batch.attention.all(1)
        arrays[name] = batch.tokens[whole].numpy().astype(np.uint16)
        arrays[f"{name}_real"] = np.packbits(batch.real[whole].numpy(), axis=1)
    with atomic_write(file) as temporary, open(temporary, "wb") as handle:
        np.savez_compressed(handle, **arrays)


def read_tokens(file: Path, model, name: str, vectors: int) -> TokenBatch:
    """The first windows that hold so many real tokens; without their texts, which nothing here
    reads. ValueError for windows of another tokenizer."""
    with np.load(file) as arrays:
        if str(arrays["tokenizer"]) != _tokenizer_key(model):
            raise ValueError(f"{file} was made with another tokenizer than {model_name(model)}'s.")
        ids, packed = arrays[name], arrays[f"{name}_real"]
    real = np.unpackbits(packed, axis=1, count=ids.shape[1]).astype(bool)
    enough = int(np.searchsorted(real.sum(1).cumsum(), vectors)) + 1
    tokens, real = torch.from_numpy(ids[:enough].astype(np.int64)), torch.from_numpy(real[:enough])
    there, nothing = torch.ones_like(real), ("",) * len(tokens)
    return TokenBatch(tokens, real, there, nothing, tokenizer=model.tokenizer)


def _tokenizer_key(model) -> str:
    return hashlib.sha256(model.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16]


def texts(
    given: argparse.Namespace, model, seed: int = 0, window: int | None = None
) -> tuple[TokenBatch, TokenBatch]:
    """(windows to train on, held-out windows), from the corpus or from a file of tokens."""
    amounts = {"train": int(given.vectors), "held_out": int(given.validation)}
    if given.tokens:
        return tuple(read_tokens(given.tokens, model, *amount) for amount in amounts.items())
    parts = corpus.load_documents(given.corpus)
    counts = zip(parts, amounts.values(), strict=True)
    # some more: separators are no vectors
    return tuple(windows(model, texts, int(1.02 * n), seed, window) for texts, n in counts)


# Training and measures


def site_hook(model, site: str) -> str:
    """The hook of a site STREAM-LAYER."""
    stream, _, layer = site.rpartition("-")
    if stream == "router":  # its own hook has no axis of texts; the block reads nothing else
        return f"blocks.{layer}.mlp.hook_in"
    return stream_hook(model, int(layer), STREAMS.get(stream, stream))


def at_l0(trained, x, l0: int) -> SparseAutoencoder:
    """The SAE with about l0 latents active on average over vectors `[vector, d_in]`, not trained
    again: another k, or one threshold for all latents."""
    sae = copy.deepcopy(trained)
    sae.config = replace(sae.config, k=l0)
    if sae.config.architecture != "topk":
        with torch.no_grad():
            pre = sae.pre(sae.scaled(x.to(sae.W_enc.device)))  # [vector, d_sae]
            sae.threshold.fill_(pre.flatten().topk(l0 * len(pre)).values[-1].clamp_min(0))
    return to_saelens(sae)


def stored(sae: SparseAutoencoder, device: str) -> SparseAutoencoder:
    """The SAE as users get it: weights that went through bf16."""
    with tempfile.TemporaryDirectory() as scratch:
        return load_sae(save_sae(sae, Path(scratch) / "sae", dtype=torch.bfloat16), device=device)


def measure(model, sae: SparseAutoencoder, held_out: TokenBatch, name: str) -> dict:
    """Metrics of an SAE on held-out text."""
    sae = stored(sae, str(model.cfg.device))
    measured = evaluate_sae(model, sae, held_out, name=name)
    print(
        f"{name}: L0 {measured.l0:.1f}, FVU {measured.fvu:.4f}, CE {measured.ce_difference:+.4f}, "
        f"dead {measured.dead}, dense {measured.dense}",
        flush=True,
    )
    return measured.to_dict()


def levels(model, trained, batch: TokenBatch, held_out: TokenBatch, name: str, l0s) -> dict:
    """Metrics by L0; at the one it was trained at with its own rule, and that one ships."""
    config = trained.config
    if config.architecture not in TOPK_FAMILY:
        return {"own": {"sae": measure(model, to_saelens(trained), held_out, name), "ships": True}}
    hook = config.metadata["hook_name"]
    few = batch[:NEAR]
    x = harvest(model, few, hook, progress=False)[hook][few.real]
    result = {}
    for l0 in dict.fromkeys([config.k, *l0s]):
        own = l0 == config.k
        sae = to_saelens(trained) if own else at_l0(trained, x, l0)
        metrics = measure(model, sae, held_out, f"{name}, L0 {l0}")
        result[str(l0)] = {"sae": metrics, "ships": own}
    return result


def fvu(measured: Sequence[dict]) -> float:
    """Mean over SAEs and levels."""
    return float(np.mean([level["sae"]["fvu"] for each in measured for level in each.values()]))


def add_nulls(model, sae: SparseAutoencoder, held_out: TokenBatch, measured: dict, seed: int):
    """Random directions of the same L0 beside each level."""
    for level in measured.values():
        null = evaluate_null(model, sae, held_out, level["sae"]["l0"], seed=seed)
        level["null"] = null.to_dict()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--corpus", default="corpus", help="folder CATEGORY/SOURCE.jsonl.gz, or 'hub'")
    add("--tokens", type=Path, help="windows that --write-tokens made, instead of the corpus")
    add("--write-tokens", type=Path, metavar="FILE", help="make such a file, train nothing")
    add("--model", default="pocket-gpt", help="bundled name, local folder or hub name")
    add("--twin", action="store_true", help="the same architecture with untrained weights")
    every = [f"{stream}-{layer}" for stream in ("resid", "attn", "mlp") for layer in (1, 3, 5)]
    add("--sites", nargs="+", default=every, help="STREAM-LAYER: resid, attn, mlp or router")
    add("--architecture", nargs="+", default=["topk"], help="of several the best is kept")
    add("--d-sae", type=int, nargs="+", default=[2048])
    add("--k", type=int, default=16, help="L0 of the training, which ships")
    add("--sparsity", type=float, help="penalty, where the architecture has one instead of k")
    add("--l0", type=int, nargs="+", default=[8, 16, 32], help="levels of the card")
    add("--frozen", nargs="+", choices=FROZEN, default=[None], help="floors instead of SAEs")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--vectors", type=float, default=1e7, help="activations to train on, all distinct")
    # In a deep model without training most of the variance lies between long windows, of which an
    # SAE sees few: it learns them by heart
    add("--window", type=int, help="tokens of a window; default the context, at most 1,024")
    add("--batch", type=int, default=4096)
    add("--lr", type=float, help="default: by width")
    add("--validation", type=float, default=4e4, help="held-out tokens to measure on")
    add("--out", type=Path, default=data_path("saes"), help="folder of the SAEs' folders")
    add("--pool", type=int, default=POOL[default_device()], help="vectors of a hook in memory")
    add("--work", type=Path, default=Path("runs/pocket-saes"), help="checkpoints")
    add("--smoke", action="store_true", help="128 latents on 40 thousand vectors, for development")
    given = parser.parse_args(arguments)
    if given.tokens and given.window:
        parser.error("--window cuts texts; the windows of --tokens are cut already")
    if given.smoke:
        given.d_sae, given.k, given.l0, given.batch = [128], 8, [4], 512
        given.vectors, given.validation = 4e4, 4e3
    return given


def main(arguments: list[str] | None = None) -> list[Path]:
    given = parse(arguments)
    model = load_model(given.model)
    model = random_twin(model) if given.twin else model
    # "pocket-gpt (random twin)" as a folder's name
    called = re.sub(r"[^\w.-]+", "-", model_name(model)).strip("-")
    batch, held_out = both = texts(given, model, given.seeds[0], given.window)
    if given.write_tokens:
        write_tokens(given.write_tokens, model, {"train": batch, "held_out": held_out})
        return [given.write_tokens]
    about = f"{model_name(model)} ({model_key(model)})"
    print(f"{about}: {batch.n_real:,} vectors in {len(batch):,} windows", flush=True)

    # 1. One training of all
    hooks = {site: site_hook(model, site) for site in given.sites}
    saes, names = {}, {}
    for site, hook in hooks.items():
        for d_sae in given.d_sae:
            for seed in given.seeds:
                width = f"-{d_sae}" if d_sae != given.d_sae[0] or len(given.d_sae) > 1 else ""
                named = f"{called}-{site}{width}" + (f"-seed-{seed}" if seed else "")
                for frozen, architecture in itertools.product(given.frozen, given.architecture):
                    name = f"{named}-frozen-{frozen}".replace(" ", "-") if frozen else named
                    level = {"k": given.k} if architecture in TOPK_FAMILY else {}
                    level |= {} if level or given.sparsity is None else {"sparsity": given.sparsity}
                    options = dict(seed=seed, metadata={"hook_name": hook}, frozen=frozen, **level)
                    d_in = model.cfg.d_model
                    sae = build_sae(architecture, d_in, d_sae, **options).to(default_device())
                    saes[f"{name} {architecture}"] = sae
                    names[f"{name} {architecture}"] = name
    options = dict(batch_size=PASS[default_device()], pool=given.pool)
    source, checked = (ModelSource(model, t, list(hooks.values()), **options) for t in both)
    count = min(batch.n_real, int(given.vectors)) // given.batch * given.batch
    as_ships = {"momentum": 0.9, "hold": 0.0}  # what the SAEs that ship were trained with
    config = TrainingConfig(count, given.batch, given.lr, **as_ships)
    started = time.perf_counter()
    key = hashlib.sha256("".join(saes).encode()).hexdigest()[:8]
    folder = given.work / f"{called}-{key}"
    trained = train(saes, source, config, folder=folder, held_out=checked)
    seconds = time.perf_counter() - started
    print(f"trained {len(saes)} in {seconds:.0f} s", flush=True)

    # 2. Measures, and the best architecture
    measured = {
        name: levels(model, result.trained, batch, held_out, name, given.l0)
        for name, result in trained.items()
    }
    scores = {
        architecture: fvu([m for name, m in measured.items() if name.endswith(f" {architecture}")])
        for architecture in given.architecture
    }
    best = min(scores, key=scores.get)
    print(f"mean FVU over sites and levels: {scores}; kept: {best}", flush=True)

    # 3. Cards
    trained_on = {
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
    for full, name in names.items():
        if not full.endswith(f" {best}"):
            continue
        sae = trained[full].sae
        add_nulls(model, sae, held_out, measured[full], given.seeds[0])
        ships = next(level for level in measured[full].values() if level["ships"])
        others = {a: measured[f"{name} {a}"] for a in given.architecture if a != best}
        card = {
            "trained_on": trained_on,
            "measured_on": "documents held out from the training of model and SAE "
            "(pocket_corpus.is_held_out)",
            "sae": ships["sae"],
            "null": ships["null"],
            "at_l0": measured[full],
            "not_kept": others,
            "machine": machine_summary(),
            "versions": versions(),
        }
        card = json.loads(json.dumps(card))
        written.append(save_sae(sae, given.out / name, dtype=torch.bfloat16, card=card))
    return written


if __name__ == "__main__":
    main()
