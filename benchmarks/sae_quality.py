"""Quality after the same training: held-out FVU of ours against SAELens, over five shared seeds.

The same vectors in the same order for all, the same number of steps, the same learning rate and
schedule; each library's own initial weights, losses and treatment of dead latents. lenslab
subtracts the mean of the vectors before it trains, SAELens has to learn it, which takes much of a
short training: `saelens centred` is given vectors without it. Per seed and contestant, in a process
of its own:

1. `topk`: FVU at k latents.
2. `batchtopk`: its threshold is set so that k latents are active on average on 8,192 training
   vectors, for all alike; the FVU with the threshold that training left is reported beside it.
3. `relu`: the weight of the penalty is searched until the L0 is near k, and the FVU read off at
   exactly k by interpolation in log FVU over log L0; each seed's search starts from the weight that
   the seed before it ended with.

The rule (`paired_seeds`): no worse means that the upper end of the 95 % interval of
the ratio ours / SAELens lies below 1.01.

    python benchmarks/sae_quality.py             # about half an hour on two cores:
    results/sae_quality.json python benchmarks/sae_quality.py --quick     # toy sizes, nothing
    written to results/
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import compare as harness
import sae_contestants as entries
from compare import Contestant, run_contestant, timed
from sae_contestants import Job, held_out, job_from

TRAINERS = {
    "lenslab": entries.lenslab,
    "saelens": entries.saelens,
    "saelens centred": entries.saelens_centred,
}
SEEDS, PEERS, ARCHITECTURES = 5, ("saelens", "saelens centred"), ("topk", "batchtopk", "relu")
JOB = Job(d_sae=2048, k=32, l1=4.0, batch=1024, steps=512, momentum=0.9, hold=0.0)
# l1: where the first search starts; hold: a cosine, with which the result was made
QUICK = dict(d_sae=512, k=16, batch=256, steps=60)
SEARCH = 6  # trainings at most, to find the weight of the penalty
BEYOND, NEAR = (
    1.1,
    1.5,
)  # how far beyond the target L0 the search aims; ratio of the L0s between which it is read off


def shuffled(vectors: Tensor, seed: int) -> Tensor:
    """The order of a seed, the same for every library."""
    from lenslab.runtime import derive_generator

    return vectors[
        torch.randperm(len(vectors), generator=derive_generator(seed, "benchmark order"))
    ]


def search_l1(
    measure: Callable[[float], dict[str, float]], target: float, first: float
) -> list[dict[str, float]]:
    """Points {l1, l0, fvu} around the target L0, which falls as the penalty rises; stops once it is
    near and enclosed.

    Until the target is enclosed the penalty moves by up to a factor of 4. After that it is put
    where the line through the two nearest points, in logarithms, meets a tenth beyond the target,
    on the side of the farther of the two.
    """
    points: list[dict[str, float]] = []
    l1 = first
    for _ in range(SEARCH):
        points.append({"l1": l1, **measure(l1)})
        pair = enclosing(points, target)
        if pair is None:
            weak = [p["l1"] for p in points if p["l0"] > target]
            strong = [p["l1"] for p in points if p["l0"] <= target]
            if weak and strong:  # the strong one silenced every latent: half way between
                l1 = math.sqrt(max(weak) * min(strong))
            else:
                beyond = target / BEYOND if weak else target * BEYOND
                l1 *= min(4.0, max(0.25, max(points[-1]["l0"], 0.1) / beyond))
            continue
        below, above = (p["l0"] for p in pair)
        if above / below < NEAR:
            break
        aim = target * BEYOND if above / target > target / below else target / BEYOND
        (x0, y0), (x1, y1) = [(math.log(p["l0"]), math.log(p["l1"])) for p in pair]
        l1 = math.exp(y0 + (y1 - y0) * (math.log(aim) - x0) / (x1 - x0))
    return points


def enclosing(points: list[dict[str, float]], target: float) -> list[dict[str, float]] | None:
    """The nearest point on either side of the target L0; None where one side has none (or no latent
    is active)."""
    below = [p for p in points if 0 < p["l0"] <= target]
    above = [p for p in points if p["l0"] > target]
    if not below or not above:
        return None
    return [max(below, key=lambda p: p["l0"]), min(above, key=lambda p: p["l0"])]


def fvu_at(points: list[dict[str, float]], target: float) -> float | None:
    """Log FVU read off over log L0 between the points that enclose the target; None where none
    do."""
    if (pair := enclosing(points, target)) is None:
        return None
    (x0, y0), (x1, y1) = [(math.log(p["l0"]), math.log(p["fvu"])) for p in pair]
    return math.exp(y0 + (y1 - y0) * (math.log(target) - x0) / (x1 - x0))


def one_seed(train: entries.Train, job: Job, file: str) -> tuple[int, Callable[[], dict[str, Any]]]:
    """All architectures of one library on one seed -> {architecture: {fvu, l0, ...}}."""
    vectors, unseen = entries.load_vectors(file)
    vectors = shuffled(vectors, job.seed)
    found: dict[str, dict[str, Any]] = {
        "topk": held_out(train(replace(job, architecture="topk"), vectors), unseen)
    }
    sae = train(replace(job, architecture="batchtopk"), vectors)
    left = held_out(sae, unseen)
    entries.set_mean_l0(sae, vectors, job.k)
    found["batchtopk"] = {**held_out(sae, unseen), "as_trained": left}
    points = search_l1(
        lambda l1: held_out(train(replace(job, architecture="relu", l1=l1), vectors), unseen),
        job.k,
        job.l1,
    )
    found["relu"] = {"fvu": fvu_at(points, job.k), "l0": job.k, "points": points}
    return job.samples * (2 + len(points)), lambda: {"found": found}


def paired_seeds(ours: list[float], peer: list[float]) -> dict[str, float]:
    """Geometric mean of the errors' ratios ours / peer, paired over at least 5 shared seeds, with
    the ends of Student's two-sided 95 % interval.

    ValueError on fewer seeds, lengths that differ, and errors that are not positive.
    """
    errors = np.array([ours, peer])  # [2, seed]
    if errors.shape[1] < 5:
        raise ValueError(f"{errors.shape[1]} shared seeds: the rule needs at least 5")
    if errors.min() <= 0:
        raise ValueError("errors must be positive for their ratio to mean something")
    logs = np.log(errors[0] / errors[1])
    interval = scipy.stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    ends = {"estimate": logs.mean(), "low": interval.low, "high": interval.high}
    return {key: float(np.exp(end)) for key, end in ends.items()}


def judge(seeds: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """{"peer architecture": ratio of the FVUs ours / peer with its interval, and whether ours is no
    worse}."""
    verdict: dict[str, dict[str, Any]] = {}
    for peer, name in product(PEERS, ARCHITECTURES):
        ours, theirs = (
            [one[name]["fvu"] for one in seeds[library]] for library in ("lenslab", peer)
        )
        if None in (*ours, *theirs):
            why = "the search for the penalty did not enclose the L0 in every seed"
            verdict[f"{peer} {name}"] = {"not_compared": why}
            continue
        ratio = paired_seeds(ours, theirs)
        verdict[f"{peer} {name}"] = {
            **{key: round(end, 4) for key, end in ratio.items()},
            "no_worse": ratio["high"] < 1.01,
            "better": ratio["high"] < 1,
        }
    return verdict


def average(values: list[float | None]) -> float | None:
    return None if None in values else round(math.fsum(values) / len(values), 5)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="toy sizes; nothing is written to results/"
    )
    parser.add_argument("--lr", type=float, default=JOB.lr, help="of both libraries")
    for name in ("--contestant", "--job", "--vectors"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    a = parser.parse_args(words)
    if a.contestant:
        return timed(
            lambda: (
                lambda: None,
                lambda: one_seed(TRAINERS[a.contestant], job_from(a.job), a.vectors),
            )
        )
    job = replace(JOB, lr=a.lr, **(QUICK if a.quick else {}))
    from lenslab.files import write_json
    from lenslab.runtime import machine_summary

    file = str(entries.vectors_file(job.samples))
    kept = harness.Kept("sae_quality" + "_quick" * a.quick, asdict(job), file)
    seeds: dict[str, list[dict[str, Any]]] = {library: [] for library in TRAINERS}
    for seed, library in product(range(SEEDS), TRAINERS):
        before = seeds[library][-1]["relu"]["points"][-1]["l1"] if seed else job.l1
        extra = ["--job", json.dumps(asdict(replace(job, seed=seed, l1=before))), "--vectors", file]
        one = kept.get(
            f"{library} {seed}", partial(run_contestant, __file__, library, Contestant(dict), extra)
        )
        seeds[library].append(one["found"])
        shown = "  ".join(
            f"{name} {one['found'][name]['fvu'] or math.nan:.4f}" for name in ARCHITECTURES
        )
        print(
            f"seed {seed}  {library:15s} {one['seconds']:6.0f} s   held-out FVU: {shown}",
            flush=True,
        )
    verdict = judge(seeds)
    mean = {
        library: {name: average([one[name]["fvu"] for one in ones]) for name in ARCHITECTURES}
        for library, ones in seeds.items()
    }
    result = {
        "claim": "after the same training the held-out FVU is no worse than SAELens's "
        "(ratio's upper "
        "bound below 1.01)",
        "ours": mean["lenslab"],
        "peers": {
            f"{peer} {name}": mean[peer][name] for peer, name in product(PEERS, ARCHITECTURES)
        },
        "ratios": {key: one.get("estimate") for key, one in verdict.items()},
        "unit": "FVU on held-out vectors",
        "verdict": verdict,
        "seeds": seeds,
        "job": asdict(job),
        "precision": entries.precision(),
        "machine": {**machine_summary(), "threads": int(harness.THREADS)},
        "versions": harness.versions(TRAINERS),
    }
    folder = Path(tempfile.mkdtemp(prefix="sae-quality-")) if a.quick else harness.RESULTS
    write_json(folder / "sae_quality.json", result)
    kept.forget()
    print(f"\n{'against':26s} {'ours':>8s} {'theirs':>8s}   ratio (95 % interval)")
    for key, one in verdict.items():
        if "not_compared" in one:
            print(f"{key:26s} not compared: {one['not_compared']}")
            continue
        word = (
            "better"
            if one["better"]
            else "no worse"
            if one["no_worse"]
            else "NOT shown to be no worse"
        )
        values = f"{mean['lenslab'][key.split()[-1]]:8.4f} {result['peers'][key]:8.4f}"
        print(
            f"{key:26s} {values}   {one['estimate']:.4f} ({one['low']:.4f} to {one['high']:.4f}) "
            f" {word}"
        )
    print(f"written to {folder.name}/sae_quality.json")
    return None


if __name__ == "__main__":
    main()
