"""Bundled SAEs beside every floor: what of their scores takes learned directions.

1. Floors that were trained: frozen decoder, soft-frozen decoder, frozen encoder, by
   train_pocket_saes.py `--frozen` on the text and for as long as the bundled SAE. Their metrics,
   the SAE's, those of its other seeds and of the SAE on the random twin stand in their cards.
2. Floors that were not: random directions, PCA axes, the hook's own coordinates.
3. Each at several L0 also tells the probe texts' kinds apart: held-out AUROC of the best feature
   and of probes of 5 and 16 features, chosen and fitted on the discovery half, mean over kinds.
4. What is finished is a line of WORK/rows.jsonl and not repeated. At the end stands
   data/results/phase_4_floors.json, with every metric in which a floor is ahead of the SAE.

    python scripts/train_pocket_saes.py --tokens tokens.npz --sites resid-3 --lr .004 \
        --architecture batchtopk --frozen decoder "soft decoder" encoder --out FOLDER
    python scripts/sae_floors.py --tokens tokens.npz --floors FOLDER
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from train_pocket_saes import NEAR, site_hook, texts

from lenslab.capture import harvest
from lenslab.features.activations import encode_features
from lenslab.features.ceiling import SPARSE, probe
from lenslab.features.specialists import discriminate
from lenslab.files import Result, content_key, data_path, save_result
from lenslab.metrics import auroc
from lenslab.models import load_model, model_key, model_name, random_twin
from lenslab.sae.controls import KINDS, untrained_sae
from lenslab.sae.evaluate import evaluate_sae
from lenslab.sae.inputs import SparseAutoencoder
from lenslab.sae.load import load_sae
from lenslab.sae.registry import CARD, CONFIG
from lenslab.sae.train.base import FROZEN
from lenslab.texts import label_texts, load_probes
from lenslab.tokens import tokenize

LEVELS = (8, 16, 32)  # L0
FIT = 16  # held-out windows that untrained floors take their mean, axes and scale from
METRICS = ("fvu", "l0", "ce_difference", "kl", "l2_ratio", "cosine", "dead", "dense", "d_sae")
# what is better: less or more; of the twin, another model, only the last can be compared
LESS = ("fvu", "ce_difference", "kl", "dead")
MORE = ("best_feature", *(f"probe_{k}" for k in SPARSE))


@dataclass(frozen=True)
class Floors(Result):
    """A row per SAE or floor and L0."""

    ahead: list[str]  # floors that beat the SAE: site, L0, metric, by how much
    rows: pd.DataFrame = field(repr=False)

    def to_frame(self) -> pd.DataFrame:
        return self.rows

    def to_dict(self) -> dict[str, Any]:
        return {"ahead": self.ahead}


class Bench:
    """Models, held-out text and probe texts."""

    def __init__(self, given: argparse.Namespace):
        self.given, self.model = given, load_model(given.model)
        self.twin = random_twin(self.model)
        self.batch, self.held_out = texts(given, self.model)
        labels = label_texts(load_probes("categories"))
        self.probes = tokenize(self.model, list(labels.texts), truncate=True)
        self.labels = labels.with_lengths(self.probes.real.sum(1).numpy())

    def contestants(self, site: str) -> Iterator[tuple[str, Path | str]]:
        """(what it is, its folder, or the kind of an untrained one)."""
        saes, model = self.given.saes, model_name(self.model)
        name = f"{model}-{site}"
        folders = {"SAE": saes / name}
        folders |= {f"SAE, seed {seed}": saes / f"{name}-seed-{seed}" for seed in (1, 2, 3)}
        for frozen in FROZEN:
            folder = f"{name}-frozen-{frozen}".replace(" ", "-")
            folders[f"frozen {frozen}"] = (self.given.floors or saes) / folder
        folders["SAE of the random twin"] = saes / f"{model}-random-twin-{site}"
        yield from ((what, folder) for what, folder in folders.items() if folder.exists())
        yield from ((what, kind) for kind, what in KINDS.items())

    def vectors(self, model, windows, hook: str) -> torch.Tensor:
        return harvest(model, windows, hook, compute="float32", progress=False)[hook][windows.real]

    def of(self, site: str, what: str, where: Path | str, l0: int) -> tuple[str, str, int, str]:
        """What a row is of: of another model, other texts or SAEs it is another row."""
        folder = where
        if not isinstance(where, Path):
            folder = self.given.saes / f"{model_name(self.model)}-{site}"
        files = [(folder / name).read_text(encoding="utf-8") for name in (CONFIG, CARD)]
        texts = [batch.key for batch in (self.batch, self.held_out, self.probes)]
        return site, what, l0, content_key(model_key(self.model), texts, files)

    def measure(self, site: str, what: str, where: Path | str, l0: int) -> dict[str, Any]:
        """Metrics of one at one L0, and how well it tells the kinds of the probe texts apart."""
        model, hook = self.model, site_hook(self.model, site)
        if isinstance(where, Path):
            model = self.twin if "twin" in what else model
            card = json.loads((where / CARD).read_text(encoding="utf-8"))
            level = card["at_l0"][str(l0)]
            sae, metrics = load_sae(where), level["sae"]
            if not level["ships"]:
                sae = at_l0(sae, self.vectors(model, self.batch[:NEAR], hook), l0)
        else:
            bundled = load_sae(self.given.saes / f"{model_name(model)}-{site}")
            x = self.vectors(model, self.held_out[:FIT], hook)
            sae = untrained_sae(bundled, x, l0, kind=where)
            metrics = evaluate_sae(model, sae, self.held_out).to_dict()
        row = {"site": site, "name": what, "asked_l0": l0} | {key: metrics[key] for key in METRICS}
        pooled = encode_features(model, sae, self.probes).pool("max")
        best = discriminate(pooled, self.labels, n=1)["auroc"].mean()
        row |= {"best_feature": float(best)}
        dense = pooled.toarray()  # [text, feature]
        return row | {f"probe_{k}": self.told_apart(dense, k) for k in SPARSE}

    def told_apart(self, x: np.ndarray, k: int) -> float:
        """Held-out AUROC of probes of k features, mean over kinds."""
        scores, held_out = probe(x, self.labels, k)[self.labels.held_out], self.labels.held_out
        inside = self.labels.inside[held_out]
        return float(np.mean([auroc(scores[:, c], inside[:, c]) for c in range(inside.shape[1])]))


def at_l0(sae: SparseAutoencoder, x: torch.Tensor, l0: int) -> SparseAutoencoder:
    """A saved JumpReLU with about l0 latents active on average over x `[vector, d_in]`: one
    threshold for all latents."""
    sae = copy.deepcopy(sae)
    with torch.no_grad():
        sae.threshold.zero_()
        sae.threshold.fill_(sae.encode(x).flatten().topk(l0 * len(x)).values[-1])
    return sae


def written(file: Path) -> list[dict[str, Any]]:
    """Rows that were written whole, and say what they are of."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        with suppress(ValueError):  # of a run that was killed
            rows.append(json.loads(line))
    return [row for row in rows if "of" in row]


def ahead(rows: pd.DataFrame) -> list[str]:
    """Where a floor does better than the SAE."""
    found = []
    for (site, l0), group in rows.groupby(["site", "asked_l0"]):
        named = group.set_index("name")
        ours, floors = named.loc["SAE"], named[~named.index.str.match(r"SAE$|SAE, seed")]
        for name, floor in floors.iterrows():
            for metric in (*(() if "twin" in name else LESS), *MORE):
                lead = (floor[metric] - ours[metric]) * (-1 if metric in LESS else 1)
                if lead > 0:
                    found.append(f"{site}, L0 {l0}, {metric}: {name} by {lead:.3g}")
    return found


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--corpus", default="corpus", help="folder CATEGORY/SOURCE.jsonl.gz, or 'hub'")
    add("--tokens", type=Path, help="windows that train_pocket_saes.py --write-tokens made")
    add("--saes", type=Path, default=data_path("saes"), help="folder of the SAEs' folders")
    add("--floors", type=Path, help="folder of the trained floors, default that of the SAEs")
    add("--model", default="pocket-gpt")
    add("--sites", nargs="+", default=["resid-3"])
    add("--vectors", type=float, default=2e4, help="training tokens for thresholds")
    add("--validation", type=float, default=4e4, help="held-out tokens to measure on")
    add("--work", type=Path, default=Path("runs/sae-floors"), help="finished rows")
    given = parser.parse_args(arguments)
    bench, file = Bench(given), given.work / "rows.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    done = {tuple(row.pop("of")): row for row in written(file)}
    rows = []
    for site in given.sites:
        for (what, where), l0 in itertools.product(bench.contestants(site), LEVELS):
            of = bench.of(site, what, where, l0)
            row = done.get(of)
            if row is None:
                row = bench.measure(site, what, where, l0)
                print(row, flush=True)
                with open(file, "a", encoding="utf-8") as handle:
                    handle.write("\n" + json.dumps(row | {"of": of}))
            rows.append(row)
    table = pd.DataFrame(rows).map(_rounded)
    ships = given.saes == data_path("saes")
    inputs = {"sites": given.sites, "levels": LEVELS, "model_key": model_key(bench.model)}
    return save_result("phase_4_floors", Floors(ahead(table), table), inputs, ships=ships)


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    print(main())
