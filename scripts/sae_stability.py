"""How much of an SAE another training finds again: by sparsity, and by architecture.

1. BatchTopK SAEs at several L0, and every architecture near one L0, each from two seeds, all on the
   same vectors of one site of the model.
2. Two seeds of the same, and the first seed of one architecture with the second of another, are
   matched as in phase 3 (`lenslab.compare`), by decoder and by firing on the probe texts, each
   against data points in the second's place.
3. data/results/phase_3_stability.json has a row per pair and kind of similarity.

The text is what ships, so this runs offline; five minutes on one core.

    python scripts/sae_stability.py
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from lenslab.capture import harvest
from lenslab.compare import compare, describe, null_dictionaries
from lenslab.features.activations import encode_saes
from lenslab.files import Result, save_result
from lenslab.hooks import stream_hook
from lenslab.models import load_model, model_key, model_name
from lenslab.sae.inputs import input_transform
from lenslab.sae.train import ModelSource, TrainingConfig, build_sae, starting_penalty, train
from lenslab.sae.train.architectures import PENALISED
from lenslab.texts import load_probes, sampled_text
from lenslab.tokens import pack, tokenize

LEVELS = (4, 8, 16, 32, 64)  # L0
MIDDLE = 16
ONE, OTHERS = "batchtopk", ("topk", "matryoshka", "jumprelu", "gated", "relu")
KINDS = ("decoder", "firing")
HELD_OUT = 36  # documents


@dataclass(frozen=True)
class Stability(Result):
    """A row per pair of SAEs and kind of similarity."""

    site: str
    rows: pd.DataFrame = field(repr=False)

    def to_frame(self) -> pd.DataFrame:
        return self.rows


def inputs_of(key: str, site: str) -> dict:
    """What identifies the result; the notebook asks by the same."""
    return {"model_key": key, "site": site, "levels": LEVELS, "architectures": (ONE, *OTHERS)}


def new_sae(architecture: str, level: int, d_in: int, d_sae: int, seed: int):
    if architecture in PENALISED:
        sparsity = starting_penalty(architecture, d_in, level)
        return build_sae(architecture, d_in, d_sae, sparsity=sparsity, seed=seed)
    return build_sae(architecture, d_in, d_sae, k=level, seed=seed)


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="pocket-gpt")
    add("--documents", type=int, default=2400, help="of the text that ships")
    add("--vectors", type=float, default=4e5)
    add("--d-sae", type=int, default=1024)
    add("--batch", type=int, default=2048)
    add("--texts", type=int, help="probe texts to compare on (default: all)")
    add("--keep", action="store_true", help="leave the result in the cache, not with the project")
    given = parser.parse_args(arguments)
    model = load_model(given.model)
    hook = stream_hook(model, model.cfg.n_layers // 2)
    written = sampled_text(given.documents + HELD_OUT, model_name(model))
    text, unseen = pack(model, written[:-HELD_OUT]), pack(model, written[-HELD_OUT:])
    source, held_out = ModelSource(model, text, hook), ModelSource(model, unseen, hook)
    cases = [(ONE, level) for level in LEVELS] + [(other, MIDDLE) for other in OTHERS]
    new = {
        f"{architecture} {level}, seed {seed}": new_sae(
            architecture, level, source.widths[hook], given.d_sae, seed
        )
        for (architecture, level), seed in itertools.product(cases, (0, 1))
    }
    silent = int(given.vectors) // 4
    # hold=0: the cosine that the saved result was made with
    config = TrainingConfig(
        int(given.vectors), given.batch, dead_after=silent, momentum=0.9, hold=0.0
    )
    trained = train(new, source, config, held_out=held_out)
    probes = load_probes("categories")["text"].tolist()[: given.texts]
    batch = tokenize(model, probes, truncate=True)
    saes = {name: result.sae for name, result in trained.items()}
    fas = encode_saes(model, saes, batch)
    values = harvest(model, batch, hook, compute="float32")[hook][batch.real]
    told = {name: describe(model, sae, fas[name]) for name, sae in saes.items()}
    at_middle = [case for case in cases if case[1] == MIDDLE]
    pairs = [(case, case) for case in cases] + list(itertools.permutations(at_middle, 2))
    rows, nulls = [], {}
    for one, other in pairs:
        a, b = f"{one[0]} {one[1]}, seed 0", f"{other[0]} {other[1]}, seed 1"
        if b not in nulls:
            x = input_transform(saes[b], model)(values)
            nulls[b] = null_dictionaries(model, saes[b], fas[b], x, kinds=["data"])
            nulls[b].pop("shuffled firings")
        found = compare(told[a], told[b], nulls[b], KINDS).summary
        about = {"architecture": one[0], "other": other[0], "level": one[1]}
        about |= {measure: trained[a].held_out[measure] for measure in ("l0", "fvu")}
        columns = ["kind", "value", "null", "corrected", "shared", "shared_null"]
        rows += [about | row for row in found[columns].to_dict("records")]
        print(rows[-2], flush=True)
    table = pd.DataFrame(rows).map(lambda v: float(f"{v:.4g}") if isinstance(v, float) else v)
    inputs = inputs_of(model_key(model), hook)
    return save_result("phase_3_stability", Stability(hook, table), inputs, ships=not given.keep)


if __name__ == "__main__":
    print(main())
