"""Learning rates, then L0 against reconstruction, of all seven architectures at one site.

1. `rates` trains each architecture at several peak rates, two lengths and, for topk, three widths.
   The best rate is that of the least FVU where k fixes how many latents are active; where a penalty
   decides that, of the least loss: FVU alone would favour rates that leave more of them active.
2. `sweep` trains each at the best of its rates and at several L0 (or penalties), `seeds` the two
   with the least FVU (mean over levels, interpolated at the same L0) from four more seeds.
3. Runs of one rate, length and number are trained together on the same vectors: one pass of the
   model, or none, on a GPU, which keeps them. Each finished run is a line of WORK/runs.jsonl and is
   not repeated; what is interrupted inside a training goes on from its checkpoint.
4. At the end stand data/results/phase_4_rates.json and phase_4_sweep.json, of all that is finished
   and of what stood there: a run that was made again replaces the old one, `--anew` leaves out an
   architecture's old ones. Each row says on which machine it was made. `--only` takes some
   architectures: on a GPU several processes at once, then one `collect`.

    python scripts/sae_sweep.py rates --corpus FOLDER
    python scripts/sae_sweep.py sweep seeds --corpus FOLDER              # two hours on two cores
    python scripts/sae_sweep.py rates sweep seeds --corpus FOLDER --smoke
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from train_pocket_saes import PASS, texts

from lenslab.files import Result, content_key, save_result, saved_result
from lenslab.models import load_model, model_key
from lenslab.runtime import default_device, machine_summary
from lenslab.sae.evaluate import evaluate_sae
from lenslab.sae.train import ModelSource, TrainingConfig, build_sae, train
from lenslab.sae.train.architectures import ARCHITECTURES, PENALISED
from lenslab.sae.train.base import TrainableSAE, TrainingFailed
from lenslab.sae.train.sources import POOL

RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
LENGTHS = (400_000, 1_500_000)  # vectors
LEVELS = (4, 8, 16, 32, 64)  # L0
MIDDLE = 16
# of which L0 between some 4 and 64 come; the fourth is for rates
SUMMED = (0.6, 1.0, 1.6, 2.5, 4.0, 6.3, 10.0, 16.0)
COUNTED = (0.15, 0.3, 0.6, 1.2, 2.5, 5.0, 10.0, 20.0)
DOUBLED = tuple(2 * penalty for penalty in SUMMED)
PENALTIES = {"relu": SUMMED, "gated": DOUBLED, "jumprelu": COUNTED}
SEEDS = (1, 2, 3, 4)  # beside 0
ABOUT = ("architecture", "d_sae", "vectors", "lr", "level", "seed")
NEAR = 1.15  # times an L0 that was reached
DEAD_AFTER = 100_000  # vectors
GROUP = 12  # trained together: their optimizers and codes must fit the memory


@dataclass(frozen=True)
class Runs(Result):
    """Runs as a table, and what they say together."""

    site: str
    findings: dict[str, Any]
    runs: pd.DataFrame = field(repr=False)

    def to_frame(self) -> pd.DataFrame:
        return self.runs

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in super().to_dict().items() if k != "runs"}


def run_of(architecture: str, level: float, lr: float, seed: int = 0, **options) -> dict[str, Any]:
    """What is asked of one run; `level` is k or the penalty."""
    told = (architecture, options["d_sae"], options["vectors"], lr, level, seed)
    return dict(zip(ABOUT, told, strict=True))


def rate_runs(given: argparse.Namespace) -> list[dict[str, Any]]:
    runs = []
    for architecture in given.only:
        few = architecture == "transcoder"
        lengths = sorted({min(length, given.vectors) for length in LENGTHS})[-1 if few else 0 :]
        widths = [1, 0.5, 2] if architecture == "topk" else [1]  # of the usual one
        rates = RATES[1:4] if few else RATES
        level = MIDDLE if architecture not in PENALISED else PENALTIES[architecture][3]
        runs += [
            run_of(architecture, level, lr, d_sae=int(times * given.d_sae), vectors=vectors)
            for times in widths
            for vectors in lengths
            for lr in rates
        ]
    return runs


def sweep_runs(given: argparse.Namespace, done: pd.DataFrame, seeds=(0,)) -> list[dict[str, Any]]:
    options = dict(d_sae=given.d_sae, vectors=given.vectors)
    return [
        run_of(name, level, best_rate(done, name, options), seed, **options)
        for name in given.only
        for level in PENALTIES.get(name, LEVELS)
        for seed in seeds
    ]


def best_rate(done: pd.DataFrame, architecture: str, options: dict[str, int]) -> float:
    """Of the finished rates the best (`best_row`). ValueError where there is none."""
    rows = done[(done["architecture"] == architecture) & (done["asked_by"] == "rates")]
    for key, value in options.items():
        rows = rows[rows[key] == value]
    rows = rows.dropna(subset=["fvu", "loss"])
    if rows.empty:
        raise ValueError(f"No learning rate of {architecture} is known: run `rates` first.")
    return float(best_row(rows)["lr"])


def best_row(rows: pd.DataFrame) -> pd.Series:
    """Of one architecture's rates the one with the least FVU, or loss where there is a penalty."""
    by = "loss" if rows["architecture"].iloc[0] in PENALISED else "fvu"
    return rows.loc[rows[by].astype(float).idxmin()]


class KeptSource(ModelSource):
    """All vectors stay in memory, a GPU's: the model is run once for all trainings."""

    def _vectors(self, units: list[int]) -> dict[str, Tensor]:
        parts = {hook: value.split(self.units) for hook, value in self._whole.items()}
        return {hook: torch.cat([texts[i] for i in units]) for hook, texts in parts.items()}


class Bench:
    """The site, its vectors, and the file of finished runs."""

    def __init__(self, given: argparse.Namespace):
        self.file, self.given = given.work / "runs.jsonl", given
        self.model = load_model(given.model)
        batch, self.held_out = texts(given, self.model)
        self.block = f"blocks.{given.layer}"
        self.hooks = {hook for name in given.only for hook in self.metadata(name).values()}
        device = default_device()
        options = dict(batch_size=PASS[device])
        kind = KeptSource if device == "cuda" else ModelSource
        pool = batch.n_real if kind is KeptSource else POOL
        self.source = kind(self.model, batch, sorted(self.hooks), pool=pool, **options)
        self.checked = ModelSource(self.model, self.held_out, sorted(self.hooks), **options)

    def train(self, runs: list[dict[str, Any]], asked_by: str) -> None:
        """What is not done yet; together what shares rate and length. A run whose rate is too high
        is kept as such, and the others of its group begin anew."""
        known = finished(self.file)
        known = known.loc[known["asked_by"] == asked_by, list(ABOUT)].to_dict("records")
        if not runs:
            raise ValueError(f"No {asked_by} to train: --only leaves out all that would be.")
        groups = defaultdict(list)
        for run in runs:
            if run not in known:
                groups[run["vectors"], run["lr"]].append(run)
        parts = [g[i : i + GROUP] for g in groups.values() for i in range(0, len(g), GROUP)]
        for number, group in enumerate(parts, 1):
            print(f"{asked_by} {number}/{len(parts)}: {len(group)} runs at lr {group[0]['lr']}")
            while group:
                try:
                    self.add(group, asked_by)
                    break
                except TrainingFailed as failed:
                    print(failed, flush=True)
                    name = str(failed).partition(":")[0]
                    bad = [run for run in group if title(run) == name]
                    write(self.file, [run | {"asked_by": asked_by, "failed": 1} for run in bad])
                    group = [run for run in group if run not in bad]

    def add(self, group: list[dict[str, Any]], asked_by: str) -> None:
        saes = {title(run): self.build(run) for run in group}
        length, lr = group[0]["vectors"], group[0]["lr"]
        # the cosine that the runs that ship were made with
        config = TrainingConfig(
            length, self.given.batch, lr, momentum=0.9, hold=0.0, dead_after=DEAD_AFTER
        )
        folder = self.given.work / content_key(group)
        started = time.perf_counter()
        trained = train(saes, self.source, config, folder=folder, held_out=self.checked)
        seconds = (time.perf_counter() - started) / len(group)
        rows = []
        for run in group:
            result = trained[title(run)]
            row = run | {"asked_by": asked_by, "loss": float(result.history["loss"].iloc[-1])}
            row |= {key: result.held_out[key] for key in ("fvu", "l0", "dead")}
            row |= {"seconds": seconds, "together": len(group), "machine": machine()}
            if asked_by == "sweep" and run["architecture"] != "transcoder":
                measured = evaluate_sae(self.model, result.sae, self.held_out)
                row |= {"dense": measured.dense, "ce_difference": measured.ce_difference}
            rows.append(row)
            print(" ".join(f"{key}={value:.4g}" for key, value in row.items() if key in SHOWN))
        write(self.file, rows)
        shutil.rmtree(folder)

    def metadata(self, architecture: str) -> dict[str, str]:
        """Which hooks an architecture reads and writes."""
        if architecture != "transcoder":
            return {"hook_name": f"{self.block}.hook_resid_post"}
        names = {"hook_name": "mlp.hook_in", "hook_name_out": "hook_mlp_out"}
        return {key: f"{self.block}.{name}" for key, name in names.items()}

    def build(self, run: dict[str, Any]) -> TrainableSAE:
        architecture = run["architecture"]
        what = "sparsity" if architecture in PENALISED else "k"
        options = {what: run["level"], "seed": run["seed"], "metadata": self.metadata(architecture)}
        d_in = self.model.cfg.d_model
        return build_sae(architecture, d_in, run["d_sae"], **options).to(default_device())


SHOWN = ("d_sae", "vectors", "lr", "level", "seed", "loss", "fvu", "l0", "dead", "ce_difference")


def title(run: dict[str, Any]) -> str:
    return " ".join(str(run[key]) for key in ABOUT)


def machine() -> str:
    here = machine_summary()
    processor = f"{here['cpu']}, {here['threads']} threads"
    return processor if default_device() == "cpu" else here["gpu"]


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    """Add lines; several processes may. A line that a killed one left half written ends first."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a", encoding="utf-8") as handle:
        handle.write("".join("\n" + json.dumps(row) for row in rows))
    print(end="", flush=True)


def finished(file: Path) -> pd.DataFrame:
    """The runs of a file that were written whole."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    columns = [*ABOUT, "asked_by", "loss", "fvu", "l0", "dead", "dense", "ce_difference"]
    columns += ["seconds", "together", "machine", "failed"]
    return pd.DataFrame(rows).reindex(columns=columns)


def merged(old: pd.DataFrame | None, new: pd.DataFrame, anew: list[str]) -> pd.DataFrame:
    """Runs that ship and new ones, which take the place of equal ones and of all of the
    architectures `anew`, as soon as there is one of them."""
    new = new.map(rounded)
    anew = set(anew) & set(new["architecture"])
    if old is not None:
        new = pd.concat([old[~old["architecture"].isin(anew)], new])
    return new.drop_duplicates(list(ABOUT), keep="last").sort_values(list(ABOUT))


# What the runs say


def at_levels(runs: pd.DataFrame, column: str) -> np.ndarray:
    """A column at LEVELS, interpolated on log L0 between an architecture's runs; NaN at levels that
    they did not come near."""
    rows = runs[runs["l0"] > 0].groupby("l0")[column].mean().sort_index()
    if rows.empty:
        return np.full(len(LEVELS), np.nan)
    levels, l0 = np.array(LEVELS), rows.index.to_numpy()
    near = (levels > l0[0] / NEAR) & (levels < l0[-1] * NEAR)
    return np.where(near, np.interp(np.log(levels), np.log(l0), rows.to_numpy()), np.nan)


def penalty_of_l0(runs: pd.DataFrame) -> dict[str, Any]:
    """log penalty = a + b log L0, and what that suggests; fitted where L0 is between 2 and 128, to
    the first seed, which has every penalty once."""
    rows = runs[(runs["seed"] == 0) & runs["l0"].between(2, 128)]
    if rows["l0"].nunique() < 2:
        return {}
    b, a = np.polyfit(np.log(rows["l0"]), np.log(rows["level"].astype(float)), 1)
    suggested = {level: float(f"{np.exp(a + b * np.log(level)):.3g}") for level in LEVELS}
    return {"intercept": float(a), "slope": float(b), "penalty_at_l0": suggested}


def two_best(sweep: pd.DataFrame) -> list[str]:
    """The architectures with the least FVU, mean over all levels but the ends, which not all
    reach; a transcoder writes something else."""
    first = sweep.query("seed == 0 and architecture != 'transcoder' and fvu == fvu")
    groups = first.groupby("architecture")
    scores = {name: at_levels(runs, "fvu")[1:-1].mean() for name, runs in groups}
    return sorted((name for name in scores if scores[name] < np.inf), key=scores.get)[:2]


def collect(given: argparse.Namespace) -> list[Path]:
    """Both results, from whatever is finished."""
    done, written = finished(given.work / "runs.jsonl"), []
    inputs = {key: vars(given)[key] for key in ("layer", "d_sae", "vectors")}
    if done.empty:
        raise ValueError(f"No run is finished in {given.work}: run `rates`, then `sweep` first.")
    inputs["model_key"] = model_key(load_model(given.model))
    for name in ("rates", "sweep"):
        runs = done[done["asked_by"] == name].drop(columns="asked_by")
        runs = merged(saved_result(f"phase_4_{name}", inputs), runs, given.anew)
        if runs.empty:
            continue
        if name == "rates":
            keys = ["architecture", "d_sae", "vectors"]
            tried = runs.dropna(subset="fvu").reset_index().groupby(keys)
            findings = {"best": [best_row(r)[[*keys, "lr", "fvu"]].to_dict() for _, r in tried]}
        else:
            groups = {n: r for n, r in runs.dropna(subset="fvu").groupby("architecture")}
            findings = {
                "levels": LEVELS,
                "fvu_at_levels": {n: at_levels(r, "fvu") for n, r in groups.items()},
                "penalties": {n: penalty_of_l0(groups[n]) for n in groups if n in PENALISED},
                "best": two_best(runs),
            }
        site = f"{given.model} blocks.{given.layer}.hook_resid_post"
        result = Runs(site, findings, runs)
        written.append(save_result(f"phase_4_{name}", result, inputs, ships=not given.smoke))
    print("\n".join(f"{file.name}: {file.stat().st_size:,} bytes" for file in written), flush=True)
    return written


def rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("do", nargs="+", choices=["rates", "sweep", "seeds", "collect"])
    add("--corpus", default="corpus", help="folder CATEGORY/SOURCE.jsonl.gz, or 'hub'")
    add("--tokens", type=Path, help="windows that train_pocket_saes.py --write-tokens made")
    add("--model", default="pocket-gpt")
    add("--layer", type=int, default=3)
    add("--d-sae", type=int, default=2048)
    add("--vectors", type=int, default=LENGTHS[1])
    add("--batch", type=int, default=4096)
    add("--validation", type=float, default=2e4, help="held-out tokens to measure on")
    add("--only", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    add("--anew", nargs="+", default=[], help="architectures whose shipped runs are left out")
    add("--work", type=Path, default=Path("runs/sae-sweep"), help="finished runs, checkpoints")
    add("--smoke", action="store_true", help="64 latents on 4 thousand vectors, for development")
    given = parser.parse_args(arguments)
    if given.smoke:
        given.d_sae, given.vectors, given.batch, given.validation = 64, 4096, 1024, 200
    return given


def main(arguments: list[str] | None = None) -> list[Path]:
    given = parse(arguments)
    bench = Bench(given) if set(given.do) - {"collect"} else None
    for do in given.do:
        done = finished(given.work / "runs.jsonl")
        if do == "rates":
            bench.train(rate_runs(given), do)
        elif do == "sweep":
            bench.train(sweep_runs(given, done), do)
        elif do == "seeds":
            best = two_best(done[done["asked_by"] == "sweep"])
            given.only = [name for name in best if name in given.only]
            bench.train(sweep_runs(given, done, SEEDS), "sweep")
    return collect(given)


if __name__ == "__main__":
    main()
