"""How well k features of an SAE tell kinds of text apart, beside what needs no SAE.

1. Texts are the probes of phase 2, described by one SAE and its reseeds, by the coordinates of the
   same activations and by their principal axes, each as a mean and as a maximum over the text.
2. Labels select k of the candidates on the discovery half (F test) and fit a logistic regression
   there (`lenslab.features.ceiling.probe`); scored is its AUROC on the other half, by kind.
3. Beside stand logistic regression on all coordinates, and the SAE under shuffled labels.
4. Of the same SAEs: FVU, L0, dead latents and the difference in cross-entropy, on text that
   pocket-gpt wrote.

    python benchmarks/sparse_probing.py    # two minutes; `ground_truth.py collect` reads it
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
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
WINDOWS = 60  # of 256 tokens, to evaluate on
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


def probing(
    model: Any, saes: dict[int, Any], batch: TokenBatch, labels: LabelledTexts
) -> Iterator[dict[str, Any]]:
    """A row for each description of the texts, kind and k; `saes` by seed, which differ in nothing
    else."""
    first = next(iter(saes.values()))
    given: list[tuple[str, str, int, np.ndarray, Sequence[int | None]]] = []
    for seed, sae in saes.items():
        features = encode_features(model, sae, batch, progress=False)
        given += [(how, "SAE", seed, dense(features.pool(how)), KS) for how in ("max", "mean")]
    shuffled_matrix = given[0][3]
    coordinates = mean_activations(model, first, batch)
    given.append(("mean", "coordinates", 0, coordinates, KS))
    given.append(("mean", "logistic regression", 0, coordinates, (None,)))
    for how in ("max", "mean"):
        given.append((how, "PCA axes", 0, pca_axes(model, first, batch, how), KS))
    for how, of, seed, matrix, ks in given:
        about = {"part": f"probing, {how}", "of": of, "seed": seed, "measure": "auroc"}
        yield from (about | row for row in held_out_aurocs(matrix, labels, ks))
    cells = labels.stratum * 2 + labels.held_out
    generator = derive_generator(0, "shuffled kinds")
    orders = shuffled_orders(labels.category, generator, SHUFFLES, cells)
    about = {"part": "probing, max", "of": "SAE, shuffled labels", "measure": "auroc"}
    for seed, order in enumerate(orders):
        shuffled = replace(labels, category=labels.category[order])
        rows = held_out_aurocs(shuffled_matrix, shuffled)
        yield from (about | {"seed": seed} | row for row in rows)


def quality(model: Any, saes: dict[int, Any]) -> Iterator[dict[str, Any]]:
    """A row for each SAE and measure."""
    windows = pack(model, sampled_text())[:WINDOWS]
    for seed, sae in saes.items():
        found = evaluate_sae(model, sae, windows)
        about = {"part": "quality", "of": "SAE", "seed": seed}
        for measure in MEASURES:
            yield about | {"measure": measure, "value": float(getattr(found, measure))}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/ground-truth"))
    given = parser.parse_args(words)
    model = load_model("pocket-gpt")
    saes = {seed: load_sae(name) for seed, name in enumerate(RESEEDS)}
    labels = label_texts(load_probes("categories"))
    batch = tokenize(model, list(labels.texts))
    labels = labels.with_lengths(batch.real.sum(1).numpy())
    rows = [*probing(model, saes, batch, labels), *quality(model, saes)]
    table = pd.DataFrame(rows)
    given.work.mkdir(parents=True, exist_ok=True)
    table.to_json(given.work / "probing.json", orient="records", indent=1)
    probes = table[table["measure"] == "auroc"]
    means = probes.groupby(["part", "of", "k"])["value"].agg(["mean", "min", "max"])
    print(means.round(3).to_string())
    print(table[table["part"] == "quality"].pivot(index="seed", columns="measure", values="value"))


if __name__ == "__main__":
    main()
