"""Run contestants in separate processes, in turn, and write the ratio of their medians.

1. Every contestant is a function `name(job) -> units done` of a benchmark file; it runs in a process of its own,
   with the same allocator settings, threads and precision, after one warm-up.
2. Rounds are interleaved (A B C A B C ...), so that drift of the machine falls on all alike.
3. The result holds medians, all rounds, ratios ours / peer by the median of the rounds' own ratios, machine, versions.

A peer that cannot share our environment lists what it needs in `peers/NAME.txt`; point `LENSLAB_PEER_NAME` at the
Python of an environment made from that file, or it is left out and said so.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
VERSIONED = ("torch", "transformers", "transformer-lens", "sae-lens")
# the settings that `import lenslab` makes, for every contestant, whether it imports lenslab or not
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TQDM_DISABLE": "1", "WANDB_MODE": "disabled"}


def timed(prepare: Callable[[], Callable[[], int]]) -> None:
    """In the contestant's process: prepare, warm up once, then print one JSON line {units, seconds}."""
    run = prepare()
    run()
    start = time.perf_counter()
    units = run()
    print(json.dumps({"units": units, "seconds": time.perf_counter() - start}))


def _one(file: str, contestant: str, extra: list[str]) -> float:
    python = os.environ.get(f"LENSLAB_PEER_{contestant.upper().replace('-', '_')}", sys.executable)
    command = [python, file, "--contestant", contestant, *extra]
    done = subprocess.run(command, env={**os.environ, **ALLOCATOR, **OFFLINE}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{contestant} failed:\n{done.stderr[-2000:]}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    return result["units"] / result["seconds"]


def main(file: str, claim: str, unit: str, ours: str, contestants: dict[str, Callable[[], Callable[[], int]]]) -> None:
    """Entry point of a benchmark file: as parent, run all rounds; with --contestant, run that one."""
    parser = argparse.ArgumentParser(description=claim)
    parser.add_argument("--contestant", choices=sorted(contestants))
    parser.add_argument("--rounds", type=int, default=5)
    arguments, extra = parser.parse_known_args()
    if arguments.contestant:
        timed(contestants[arguments.contestant])
        return
    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(arguments.rounds):
        for name in contestants:
            speeds[name].append(_one(file, name, extra))
            print(f"round {number + 1}/{arguments.rounds}  {name:24s} {speeds[name][-1]:12,.0f} {unit}", flush=True)
    from lenslab.paths import write_json
    from lenslab.runtime import machine_summary

    peers = [name for name in contestants if name != ours]
    ratio = {p: statistics.median(a / b for a, b in zip(speeds[ours], speeds[p], strict=True)) for p in peers}
    result = {
        "claim": claim,
        "ours": round(statistics.median(speeds[ours])),
        "peers": {p: round(statistics.median(speeds[p])) for p in peers},
        "ratios": {p: round(r, 3) for p, r in ratio.items()},
        "unit": unit,
        "rounds": {name: [round(v) for v in values] for name, values in speeds.items()},
        "machine": machine_summary(),
        "versions": {name: version(name) for name in VERSIONED},
    }
    write_json(RESULTS / f"{Path(file).stem}.json", result)
    print(json.dumps({k: result[k] for k in ("ours", "peers", "ratios")}, indent=1))
