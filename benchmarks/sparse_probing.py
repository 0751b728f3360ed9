"""How well k features of an SAE tell kinds of text apart, beside what needs no SAE.

1. Texts are the probes of phase 2, described by one SAE and its reseeds, by the coordinates of the
   same activations and by their principal axes, each as a mean and as a maximum over the text.
2. Labels select k of the candidates on the discovery half (F test) and fit a logistic regression
   there (`lenslab.features.ceiling.probe`); scored is its AUROC on the other half, by kind.
3. Beside stand logistic regression on all coordinates, and the SAE under labels shuffled among
   texts of like length: what length alone tells stays.
4. Of the same SAEs: FVU, L0, dead latents and the difference in cross-entropy, on text that
   pocket-gpt wrote.

Each description is measured once, and kept in WORK/probing.jsonl.

    python benchmarks/sparse_probing.py    # minutes; `ground_truth.py collect` reads what it keeps
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import chain, groupby, product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from lenslab.features.activations import dense, encode_features
from lenslab.features.ceiling import probe
from lenslab.metrics import auroc
from lenslab.models import load_model
from lenslab.runtime import derive_generator
from lenslab.sae.controls import mean_activations, pca_axes
from lenslab.sae.evaluate import evaluate_sae
from lenslab.sae.load import load_sae
from lenslab.stats import shuffled_orders
from lenslab.texts import LabelledTexts, label_texts, load_probes, sampled_text
from lenslab.tokens import TokenBatch, pack, tokenize

SAE = "pocket-gpt-resid-3"
RESEEDS = (SAE, *(f"{SAE}-seed-{seed}" for seed in (1, 2, 3)))  # as many as ship
KS = (1, 2, 5, 16)
SHUFFLES = 5
WINDOWS = 32  # of 256 tokens, to evaluate on
POOLINGS = ("max", "mean")
MEASURES = ("fvu", "l0", "dead", "ce_difference")


def held_out_aurocs(
    x: Float[np.ndarray, "text candidate"], labels: LabelledTexts, ks: Sequence[int | None] = KS
) -> list[dict[str, Any]]:
    """Held-out AUROC by kind of the probe of k candidates; None is all of them."""
    rows, held_out = [], labels.held_out
    for k in ks:
        scores = probe(x, labels, k)  # [text, kind]
        for c, kind in enumerate(labels.categories):
            value = auroc(scores[held_out, c], labels.inside[held_out, c])
            rows.append({"kind": kind, "k": k or x.shape[1], "value": float(value)})
    return rows


Described = tuple[str, str, int, Callable[[], np.ndarray], Sequence[int | None], LabelledTexts]


def descriptions(
    model: Any, saes: dict[int, Any], batch: TokenBatch, labels: LabelledTexts
) -> Iterator[Described]:
    """(pooling, what of, seed, how the matrix is made, numbers of candidates, labels); `saes` by
    seed, which differ in nothing else."""
    first = next(iter(saes.values()))

    @cache
    def pooled(seed: int, how: str) -> np.ndarray:
        features = encode_features(model, saes[seed], batch, progress=False)
        return dense(features.pool(how))

    for seed, how in product(saes, POOLINGS):
        yield how, "SAE", seed, partial(pooled, seed, how), KS, labels
    coordinates = cache(partial(mean_activations, model, first, batch))
    yield "mean", "coordinates", 0, coordinates, KS, labels
    yield "mean", "logistic regression", 0, coordinates, (None,), labels
    for how in POOLINGS:
        yield how, "PCA axes", 0, partial(pca_axes, model, first, batch, how), KS, labels
    cells = labels.stratum * 2 + labels.held_out
    generator = derive_generator(0, "shuffled kinds")
    orders = shuffled_orders(labels.category, generator, SHUFFLES, cells)
    for seed, order in enumerate(orders):
        shuffled = replace(labels, category=labels.category[order])
        yield "max", "SAE, shuffled labels", seed, partial(pooled, 0, "max"), KS, shuffled


def probing(*given: Any, done: Container[tuple] = ()) -> Iterator[dict[str, Any]]:
    """A row for each of the `descriptions`, kind and k, but for those (part, of, seed) that are
    done."""
    for how, of, seed, make, ks, labels in descriptions(*given):
        about = {"part": f"probing, {how}", "of": of, "seed": seed}
        if tuple(about.values()) not in done:
            rows = held_out_aurocs(make(), labels, ks)
            yield from (about | {"measure": "auroc"} | row for row in rows)


def quality(
    model: Any, saes: dict[int, Any], done: Container[tuple] = ()
) -> Iterator[dict[str, Any]]:
    """A row for each SAE and measure."""
    windows = pack(model, sampled_text(40))[:WINDOWS]
    for seed, sae in saes.items():
        about = {"part": "quality", "of": "SAE", "seed": seed}
        if tuple(about.values()) not in done:
            found = evaluate_sae(model, sae, windows)
            for measure in MEASURES:
                yield about | {"measure": measure, "value": float(getattr(found, measure))}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/ground-truth"))
    given = parser.parse_args(words)
    file = given.work / "probing.jsonl"
    table = finished(file)
    done = set(table[["part", "of", "seed"]].itertuples(index=False, name=None))
    model = load_model("pocket-gpt")
    saes = {seed: load_sae(name) for seed, name in enumerate(RESEEDS)}
    labels = label_texts(load_probes("categories"))
    batch = tokenize(model, list(labels.texts))
    labels = labels.with_lengths(batch.real.sum(1).numpy())
    given.work.mkdir(parents=True, exist_ok=True)
    rows = chain(probing(model, saes, batch, labels, done=done), quality(model, saes, done))
    for _, piece in groupby(rows, key=lambda row: (row["part"], row["of"], row["seed"])):
        with open(file, "a", encoding="utf-8") as handle:  # a piece at once, or not at all
            handle.write("".join(json.dumps(row) + "\n" for row in piece))
    table = finished(file)
    probes = table[table["measure"] == "auroc"]
    means = probes.groupby(["part", "of", "k"])["value"].agg(["mean", "min", "max"])
    print(means.round(3).to_string())
    print(table[table["part"] == "quality"].pivot(index="seed", columns="measure", values="value"))


def finished(file: Path) -> pd.DataFrame:
    """The rows of what is done."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else ()
    columns = ["part", "of", "kind", "k", "seed", "measure", "value"]
    return pd.DataFrame([json.loads(line) for line in lines], columns=columns)


if __name__ == "__main__":
    main()
