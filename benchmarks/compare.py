"""Run contestants in separate processes, in turn, and write the ratio of their medians.

1. Every contestant is a function of a benchmark file; it runs in a process of its own, with the
   same allocator settings, threads and precision, after one warm-up. "As shipped" contestants keep
   the system's allocator.
2. Rounds are interleaved (A B C A B C ...), so that drift of the machine falls on all alike.
3. The result holds medians, all rounds, ratios ours / peer by the median of the rounds' own ratios,
   machine, versions.
4. Every measurement is kept as it is taken: a run that was killed goes on where it stopped, unless
   the code changed.

A peer that cannot share our environment gets one of its own, made from `peers/NAME.txt` in the
ignored folder `.cache/peers`; `LENSLAB_PEER_NAME` may point at another Python. A peer that cannot
be installed or fails is left out, and the result says why.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS, PEERS, CACHE = HERE / "results", HERE / "peers", HERE.parent / ".cache"
VERSIONED = ("torch", "transformers", "transformer-lens", "sae-lens", "scipy", "scikit-learn")
THREADS = os.environ.get("OMP_NUM_THREADS") or str(
    len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
)
# the settings that `import lenslab` makes, for every contestant, whether it imports lenslab or not
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TQDM_DISABLE": "1",
    "WANDB_MODE": "disabled",
    "CUDA_VISIBLE_DEVICES": "",  # what is compared here is compared on the processor
}


class PeerFailed(RuntimeError):
    """A contestant that could not be installed or did not finish; the message is what the result
    says of it."""


@dataclass(frozen=True)
class Contestant:
    """`prepare()` gives what is timed, or a pair (warm-up, what is timed); see `timed`."""

    prepare: Callable[[], Any]
    peer: str | None = None  # name of peers/NAME.txt where it needs an environment of its own
    tuned: bool = True  # False: the system's allocator, as the peer's users have it


def run_script(main: Callable[[], object]) -> None:
    """A benchmark from the command line: a peer that failed is told in a line, not by a trace."""
    try:
        main()
    except PeerFailed as error:
        raise SystemExit(f"{error}\n{error.__cause__ or ''}") from None


def timed(prepare: Callable[[], Any]) -> None:
    """In the contestant's process: prepare, warm up once, then print one JSON line {units, seconds,
    ...}.

    What is timed returns its number of units, or (units, check): `check()` is called after the
    clock has stopped and gives what else the measurement should say, such as the error of what was
    trained.
    """
    runs = prepare()
    warm_up, run = runs if isinstance(runs, tuple) else (runs, runs)
    warm_up()
    start = time.perf_counter()
    done = run()
    seconds = time.perf_counter() - start
    units, check = done if isinstance(done, tuple) else (done, dict)
    print(json.dumps({"units": units, "seconds": seconds, **check()}))


def environment(peer: str | None) -> str:
    """The Python that a peer runs in; its environment is made on first use. PeerFailed where that
    cannot be done."""
    if peer is None:
        return sys.executable
    if given := os.environ.get(f"LENSLAB_PEER_{peer.upper().replace('-', '_')}"):
        return given
    folder = CACHE / "peers" / peer
    python, ready = folder / "bin" / "python", folder / ".ready"
    wanted = (PEERS / f"{peer}.txt").read_text(encoding="utf-8")
    if not ready.exists() or ready.read_text(encoding="utf-8") != wanted:
        print(f"making an environment for {peer} (minutes, once)", flush=True)
        pins = [line for line in wanted.splitlines() if line and not line.startswith("#")]
        torch_first = [
            pin for pin in pins if pin.startswith("torch==")
        ]  # else what needs torch brings another
        steps = [[sys.executable, "-m", "venv", "--clear", str(folder)]]
        steps += [
            [str(python), "-m", "pip", "install", "--quiet", *some]
            for some in (torch_first, pins)
            if some
        ]
        removed = re.findall(r"^# remove: (\S+)", wanted, re.MULTILINE)
        steps += (
            [[str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *removed]]
            if removed
            else []
        )
        for step in steps:
            done = subprocess.run(step, capture_output=True, text=True)
            if done.returncode:
                raise PeerFailed(f"could not be installed: {_last_line(done.stderr)}")
        ready.write_text(wanted, encoding="utf-8")
    return str(python)


def run_contestant(
    file: str, name: str, contestant: Contestant, extra: Sequence[str] = ()
) -> dict[str, Any]:
    """One measurement in a process of its own: the JSON line that it prints last. PeerFailed when
    it fails."""
    settings = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("MALLOC_", "LENSLAB_MODEL"))
    }
    settings |= {**OFFLINE, "OMP_NUM_THREADS": THREADS} | (ALLOCATOR if contestant.tuned else {})
    settings["LENSLAB_ALLOCATOR"] = "" if contestant.tuned else "default"
    command = [environment(contestant.peer), file, "--contestant", name, *extra]
    done = subprocess.run(command, env=settings, capture_output=True, text=True)
    if done.returncode:
        raise PeerFailed(f"failed: {_last_line(done.stderr)}") from RuntimeError(
            done.stderr[-3000:]
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


class Kept:
    """What an unfinished run has measured already, in the ignored `.cache`; forgotten when any code
    has changed."""

    def __init__(self, stem: str, *settings: Any):
        from lenslab import files as paths
        from lenslab import runtime

        package = Path(paths.__file__).parent
        sources = [
            file.read_bytes()
            for file in (*sorted(HERE.glob("*.py")), *sorted(package.rglob("*.py")))
        ]
        self.key = paths.content_key(
            stem, list(settings), THREADS, runtime.machine_summary(), *sources
        )
        self.file, self.write = CACHE / "benchmarks" / f"unfinished-{stem}.json", paths.write_json
        known = json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else {}
        self.taken: dict[str, Any] = known["taken"] if known.get("key") == self.key else {}

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self.taken:
            self.taken[name] = make()
            self.write(self.file, {"key": self.key, "taken": self.taken})
        return self.taken[name]

    def forget(self) -> None:
        self.file.unlink(missing_ok=True)


def versions(names: Iterable[str]) -> dict[str, str]:
    """Of what shares our environment, and of contestants that have one of their own, which holds
    what its file pins."""
    found = {name: version(name) for name in VERSIONED}
    for name in names:
        if (file := PEERS / f"{name}.txt").exists():
            found |= dict(
                re.findall(
                    rf"^({re.escape(name)})==(\S+)", file.read_text(encoding="utf-8"), re.MULTILINE
                )
            )
    return found


def measure(
    file: str,
    kept: Kept,
    contestants: dict[str, Contestant],
    ours: str,
    rounds: int,
    unit: str,
    extra: Sequence[str],
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """({contestant: one measurement a round}, {contestant: why it was left out}); our own failure
    is raised."""
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
    left_out: dict[str, str] = {}
    for number in range(rounds):
        for name, contestant in contestants.items():
            if name in left_out:
                continue
            try:
                one = kept.get(
                    f"{name} {number}", partial(run_contestant, file, name, contestant, extra)
                )
            except PeerFailed as error:
                if name == ours:
                    raise
                left_out[name] = str(error)
                print(f"left out: {name}: {error}", flush=True)
                continue
            taken[name].append(one)
            rest = {
                k: v
                for k, v in one.items()
                if k not in ("units", "seconds") and isinstance(v, int | float)
            }
            shown = "  ".join(f"{k} {v:.3f}" for k, v in rest.items())
            speed = one["units"] / one["seconds"]
            print(
                f"round {number + 1}/{rounds}  {name:28s} {speed:12,.0f} {unit}  {shown}",
                flush=True,
            )
    return {name: ones for name, ones in taken.items() if name not in left_out}, left_out


def summarise(
    claim: str,
    unit: str,
    ours: str,
    taken: dict[str, list[dict[str, Any]]],
    left_out: dict[str, str],
) -> dict[str, Any]:
    """The result: medians, ratios ours / peer, all rounds, machine, versions."""
    from lenslab.runtime import machine_summary

    speeds = {
        name: [one["units"] / one["seconds"] for one in rounds] for name, rounds in taken.items()
    }
    peers = [name for name in speeds if name != ours]
    ratio = {
        p: statistics.median(a / b for a, b in zip(speeds[ours], speeds[p], strict=True))
        for p in peers
    }
    return {
        "claim": claim,
        "ours": round(statistics.median(speeds[ours])),
        "peers": {p: round(statistics.median(speeds[p])) for p in peers},
        "ratios": {p: round(r, 3) for p, r in ratio.items()},
        "unit": unit,
        "rounds": {name: [round(v) for v in values] for name, values in speeds.items()},
        "left_out": left_out,
        "machine": {**machine_summary(), "threads": int(THREADS)},
        "versions": versions(taken),
    }


def compare(
    file: str,
    claim: str,
    unit: str,
    ours: str,
    contestants: dict[str, Contestant],
    *,
    stem: str | None = None,
    rounds: int = 5,
    extra: Sequence[str] = (),
    more: Callable[[dict[str, list[dict[str, Any]]]], dict[str, Any]] = lambda taken: {},
) -> dict[str, Any]:
    """Measure all rounds, write results/STEM.json and print the table; `more(taken)` adds to the
    result."""
    from lenslab.files import write_json

    stem = stem or Path(file).stem
    kept = Kept(stem, *extra)
    taken, left_out = measure(file, kept, contestants, ours, rounds, unit, extra)
    result = {**summarise(claim, unit, ours, taken, left_out), **more(taken)}
    write_json(RESULTS / f"{stem}.json", result)
    kept.forget()
    print(f"\n{claim}\n{ours:30s} {result['ours']:12,} {unit}")
    for name, speed in result["peers"].items():
        print(f"{name:30s} {speed:12,} {unit}   ours is {result['ratios'][name]:.2f} times as fast")
    for name, why in left_out.items():
        print(f"{name:30s} {'left out':>12s}   {why}")
    return result


def _last_line(text: str) -> str:
    """What an error says at its end, without paths of this machine."""
    text = text.replace(str(HERE.parent), ".").replace(str(Path.home()), "~")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no message"
