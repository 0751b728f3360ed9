"""Time to quality: how long each library trains until its held-out FVU is that of a target, at 32
active latents and at the best of its learning rates.

1. The curves (`--choose`): for each contestant trainings of 16, 32, 64, ... steps until one
   reaches the target, each with the whole of its schedule: its end, where the rate falls, is worth
   many steps, and a curve read along one long run would hide it. At the first length four rates
   and the library's own are tried, then the best of the length before with half and twice of it,
   and further ones while the best is an outermost one. One seed; the time does not matter here.
2. The steps that are needed: where log FVU, over log steps, crosses the target, at the rate that
   crosses it first.
3. The time: everyone trains anew for as many steps as it needs, in a process of its own, in
   interleaved rounds. FVU and L0 are measured after the clock has stopped, by the same code.
4. `jumprelu` and `gated`: the same number of steps for all, with the penalty at which each
   library's L0 comes nearest to the target's (`sae_quality.search_l1`).

The same vectors in the same order, steps of 4,096, bf16 autocast and a tuned allocator for all.
Every training of 1. stands in the result under `curves` and is read from there: only what is
missing is trained. Delete the result to begin anew.

    python benchmarks/time_to_quality.py            # results/time_to_quality.json; about 20 minutes
                                                    # if the curves are there, else two hours
    python benchmarks/time_to_quality.py --quick    # toy sizes, nothing written to results/
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import compare as harness
import sae_contestants as entries
from compare import Contestant, PeerFailed, run_contestant, run_script, timed
from sae_contestants import PENALISED, Job, Train

VECTORS = 1 << 18
JOB = Job(d_sae=2048, lr=4e-3)
QUICK = dict(d_sae=256, k=8, batch=512)
TARGETS = {"topk": 0.2, "batchtopk": 0.2}  # FVU
FIRST, LONGEST = 16, 512  # steps
FIXED = 64  # steps where a penalty, not a rate, was chosen
RATES = (1e-3, 2e-3, 4e-3, 8e-3)  # tried first, beside the library's own
PENALTY = {"jumprelu": 0.5, "gated": 2.0}  # where the search begins
TRAINERS: dict[str, Train] = {
    "lenslab": entries.lenslab,
    "lenslab-default": entries.lenslab,  # which is told no rate
    "saelens": entries.saelens,
    "saelens-centred": entries.saelens_centred,
    "dictionary-learning": entries.dictionary_learning,
    "eai-sparsify": lambda job, vectors: entries.eai_sparsify(job, vectors, job.lr),
}
# how our default schedule and momentum were chosen; not timed
TRAINERS |= dict.fromkeys(("lenslab-holds", "lenslab-momenta"), entries.lenslab)
HOLDS = [{"lr": None, "hold": hold, "steps": n} for n in (32, 256) for hold in (0.0, 0.5, 0.8, 0.9)]
MOMENTA = [{"lr": None, "momentum": m, "steps": n} for n in (32, 256) for m in (0.7, 0.8, 0.9)]
OURS = ("lenslab", "lenslab-default")
APART = ("dictionary-learning", "eai-sparsify")  # in an environment of their own
LIBRARIES = ("lenslab", "saelens", "dictionary-learning")
ENTERED = {
    "topk": tuple(TRAINERS)[:6],
    "batchtopk": tuple(TRAINERS)[:5],
    "jumprelu": LIBRARIES,
    "gated": LIBRARIES,
}

Point = dict[str, Any]  # of a curve: lr, l1, steps; fvu, l0, or why it failed


def contestant(name: str, job: Job, file: str) -> Contestant:
    peer = name if name in APART else None
    return Contestant(entries.prepare(TRAINERS[name], job, file), peer=peer)


def trained(name: str, jobs: list[Job], file: str) -> dict[str, Any]:
    """FVU and L0 after each of the jobs, or why there are none: a rate may be too high. One process
    for all of them: to start one takes longer than many of the trainings."""
    found = []
    for job in jobs:
        _, run = entries.prepare(TRAINERS[name], job, file)()
        try:
            _, check = run()
            found.append(check())
        except Exception as error:  # of whatever library
            found.append({"failed": f"{type(error).__name__}: {error}"[:200]})
    return {"points": found}


def own_rate(name: str, d_sae: int) -> float | None:
    """What a library would train at if it were not told (of the default trainer)."""
    scale = math.sqrt(d_sae / 2**14)
    return {
        "saelens": 3e-4,
        "saelens-centred": 3e-4,
        "dictionary-learning": 2e-4 / scale,
        "eai-sparsify": 5e-3 / scale,
    }.get(name)


# --------------------------------------------------------------------------------------------------
# the curves


def curve(
    measure: Callable[[list[float | None], int], list[Point]],
    target: float,
    rates: tuple[float | None, ...],
    own: float | None = None,
    first: int = FIRST,
    longest: int = LONGEST,
) -> list[Point]:
    """Trainings of twice the steps each time, until the best reaches the target FVU."""
    points: list[Point] = []
    steps, tried = first, list(rates)
    while steps <= longest:
        here = measure(sorted({*tried, own or tried[0]}), steps)
        best = least(here)
        while len(rates) > 1 and best and best["lr"] in (here[0]["lr"], here[-1]["lr"]):
            further = best["lr"] * (2 if best is here[-1] else 0.5)
            here = sorted([*here, *measure([further], steps)], key=lambda point: point["lr"])
            if least(here) is best:
                break
            best = least(here)
        points += here
        if best is None or best["fvu"] <= target:
            return points
        tried = [best["lr"] * factor for factor in (0.5, 1, 2)] if len(rates) > 1 else tried
        own, steps = None, 2 * steps
    return points


def least(points: list[Point]) -> Point | None:
    """The point of the lowest FVU; None where all have failed."""
    return min((p for p in points if "fvu" in p), key=lambda p: p["fvu"], default=None)


def needed(points: list[Point], target: float) -> Point | None:
    """{lr, steps}: the fewest steps that reach the target, over all rates, read off in logarithms
    between two lengths of the same rate; None where no rate crosses it."""
    found = []
    for lr in {p["lr"] for p in points}:
        runs = sorted((p for p in points if p["lr"] == lr and "fvu" in p), key=lambda p: p["steps"])
        for above, below in pairwise(runs):
            if above["fvu"] > target >= below["fvu"]:
                share = math.log(above["fvu"] / target) / math.log(above["fvu"] / below["fvu"])
                ratio = below["steps"] / above["steps"]
                found.append({"lr": lr, "steps": round(above["steps"] * ratio**share)})
                break
    return min(found, key=lambda point: point["steps"], default=None)


class Curves:
    """The trainings that chose rates and penalties, by kind and contestant, kept in the result as
    they are made."""

    def __init__(self, job: Job, targets: dict[str, float], file: str):
        self.job, self.targets, self.vectors = job, targets, file
        self.result = harness.RESULTS / "time_to_quality.json"
        known = json.loads(self.result.read_text()) if self.result.exists() else {}
        self.known = known
        self.points: dict[str, dict[str, list[Point]]] = known.get("curves", {})

    def measure(self, kind: str, name: str, changes: list[dict[str, Any]]) -> list[Point]:
        """A training for each of the changes to the job, or what is known of it."""
        points = self.points.setdefault(kind, {}).setdefault(name, [])
        missing = [change for change in changes if self._known(points, change) is None]
        if missing:
            jobs = [replace(self.job, architecture=kind, **change) for change in missing]
            one = contestant(name, jobs[0], self.vectors)
            try:
                found = run_contestant(__file__, name, one, extra({name: jobs}, self.vectors))
                results = found["points"]
            except PeerFailed as error:
                results = [{"failed": str(error)}] * len(jobs)
            for change, result in zip(missing, results, strict=True):
                rounded = {k: round(v, 5) if k != "failed" else v for k, v in result.items()}
                points.append(change | rounded)
                print(f"{kind} {name}: {points[-1]}", flush=True)
            from lenslab.files import write_json

            write_json(self.result, self.known | {"curves": self.points})
        return [self._known(points, change) for change in changes]

    def _known(self, points: list[Point], change: dict[str, Any]) -> Point | None:
        """The point of a training that was made."""
        same = (p for p in points if all(p.get(key) == value for key, value in change.items()))
        return next(same, None)

    def chosen(self, kind: str, name: str) -> Job | str:
        """The job to time, or why there is none."""
        job = replace(self.job, architecture=kind)
        if kind in PENALISED:
            return self._at_l0(job, name)
        own, target = own_rate(name, job.d_sae), self.targets[kind]
        rates = RATES if name != "lenslab-default" else (None,)

        def measure(rates: list[float | None], steps: int) -> list[Point]:
            return self.measure(kind, name, [{"lr": lr, "steps": steps} for lr in rates])

        points = curve(measure, target, rates, own)
        if found := needed(points, target):
            return replace(job, **found)
        return points[-1].get("failed", f"no FVU of {target} within {LONGEST} steps")

    def _at_l0(self, job: Job, name: str) -> Job | str:
        from sae_quality import search_l1  # which no other environment can import

        kind = job.architecture
        steps = FIXED if job.d_sae == JOB.d_sae else FIRST
        changes = {"lr": self.job.lr, "steps": steps}

        def measure(l1: float) -> Point:
            return {"l0": 0.0, **self.measure(kind, name, [{"l1": l1, **changes}])[0]}

        points = [p for p in search_l1(measure, job.k, PENALTY[kind]) if p["l0"]]
        if not points:
            return "no training of it came near the target's L0"
        nearest = min(points, key=lambda point: abs(math.log(point["l0"] / job.k)))
        return replace(job, l1=nearest["l1"], **changes)


# --------------------------------------------------------------------------------------------------
# the time


def extra(jobs: dict[str, Job | list[Job]], file: str) -> list[str]:
    """How a contestant's process is told what to train: one job, which is timed, or several."""
    described = {
        name: [asdict(job) for job in some] if isinstance(some, list) else asdict(some)
        for name, some in jobs.items()
    }
    return ["--jobs", json.dumps(described), "--vectors", file]


def summary(
    kind: str, jobs: dict[str, Job], taken: dict[str, list[dict[str, Any]]], left_out: dict
) -> dict[str, Any]:
    """Of one kind, in the form of `compare.summarise`: milliseconds of training, and beside them
    what was trained."""
    seconds = {
        name: [{"units": 1000 * one["seconds"], "seconds": 1} for one in rounds]
        for name, rounds in taken.items()
    }
    result = harness.summarise("", "", "lenslab", seconds, left_out)
    result["trained"] = {
        name: {
            "lr": jobs[name].lr or "default",
            "l1": jobs[name].l1 if kind in PENALISED else None,
            "vectors": jobs[name].samples,
            "vectors_per_second": round(
                statistics.median(one["units"] / one["seconds"] for one in rounds)
            ),
            "fvu": round(statistics.median(one["fvu"] for one in rounds), 4),
            "l0": round(statistics.median(one["l0"] for one in rounds), 2),
        }
        for name, rounds in taken.items()
    }
    return result


def joined(kinds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One result of those of all kinds: a peer is called by its name and the kind."""
    result: dict[str, Any] = {"ours": {kind: one["ours"] for kind, one in kinds.items()}}
    for key in ("peers", "ratios", "rounds", "left_out", "trained"):
        result[key] = {
            f"{name} {kind}": value
            for kind, one in kinds.items()
            for name, value in one[key].items()
        }
    result["machine"] = next(iter(kinds.values()))["machine"]
    result["versions"] = {k: v for one in kinds.values() for k, v in one["versions"].items()}
    return result


def main(words: list[str] | None = None) -> dict[str, Any] | None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--rounds", type=int, default=3)
    add("--only", nargs="+", choices=list(ENTERED), default=list(ENTERED), help="some of the kinds")
    add("--contestants", nargs="+", choices=list(TRAINERS), default=list(TRAINERS))
    add("--choose", action="store_true", help="the curves alone, nothing is timed")
    add("--quick", action="store_true", help="toy sizes, one round, nothing written to results/")
    for name in ("--contestant", "--jobs", "--vectors"):  # how a contestant's process is called
        add(name, help=argparse.SUPPRESS)
    a = parser.parse_args(words)
    if a.contestant:
        described = json.loads(a.jobs)[a.contestant]
        if isinstance(described, list):
            jobs = [Job(**job) for job in described]
            return print(json.dumps(trained(a.contestant, jobs, a.vectors)))
        return timed(contestant(a.contestant, Job(**described), a.vectors).prepare)
    job, targets = JOB, TARGETS
    if a.quick:
        harness.RESULTS = Path(tempfile.mkdtemp(prefix="time-to-quality-"))
        job, targets = replace(JOB, **QUICK), dict.fromkeys(TARGETS, 0.5)
    file = str(entries.vectors_file(1 << 14 if a.quick else VECTORS))
    curves = Curves(job, targets, file)
    kinds = {}
    if not a.quick:
        curves.measure("topk", "lenslab-holds", HOLDS)
        curves.measure("topk", "lenslab-momenta", MOMENTA)
    for kind in a.only:
        names = [name for name in ENTERED[kind] if name in a.contestants]
        chosen = {name: curves.chosen(kind, name) for name in names}
        jobs = {name: found for name, found in chosen.items() if isinstance(found, Job)}
        left_out = {name: why for name, why in chosen.items() if name not in jobs}
        if a.choose:
            continue
        arguments = extra(jobs, file)
        kept = harness.Kept(f"time_to_quality_{kind}", *arguments)
        timings, failed = harness.measure(
            __file__,
            kept,
            {name: contestant(name, job, file) for name, job in jobs.items()},
            "lenslab",
            1 if a.quick else a.rounds,
            "vectors/s",
            arguments,
        )
        kinds[kind] = summary(kind, jobs, timings, left_out | failed)
    if a.choose:
        return None
    return report(kinds, curves)


def report(kinds: dict[str, dict[str, Any]], curves: Curves) -> dict[str, Any]:
    """Write the result and print its table."""
    from lenslab.files import write_json

    result = joined(kinds)
    peers = {name: ratio for name, ratio in result["ratios"].items() if name.split()[0] not in OURS}
    targets = {kind: fvu for kind, fvu in curves.targets.items() if kind in kinds}
    reached = ", ".join(f"{fvu} ({kind})" for kind, fvu in targets.items())
    claim = (
        f"training until a held-out FVU of {reached} at {curves.job.k} active latents takes at "
        "most half as long as with any peer, each at its best learning rate"
    )
    if fixed := [kind for kind in kinds if kind in PENALISED]:
        claim += f"; {', '.join(fixed)}: the same number of steps"
    result |= {
        "claim": claim,
        "unit": "ms of training",
        "holds": {name: ratio <= 0.5 for name, ratio in peers.items()},
        "targets": targets,
        "curves": curves.points,
        "job": asdict(curves.job) | {"model": entries.MODEL, "hook": entries.HOOK, "d_in": 256},
        "precision": entries.precision(),
    }
    write_json(curves.result, result)
    print(f"\n{claim}")
    for name, ratio in result["ratios"].items():
        print(f"{name:32s} {result['peers'][name]:8,} ms   ours is {1 / ratio:.2f} times as fast")
    for name, why in result["left_out"].items():
        print(f"{name:32s} left out: {why}")
    return result


if __name__ == "__main__":
    run_script(main)
