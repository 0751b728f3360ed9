"""Training SAEs: ours against SAELens, dictionary-learning and sparsify, vectors per second on the
same vectors.

The same job for all (`sae_contestants.Job`): d_in 256, d_sae 4096, k 32, steps of 4,096 vectors, on
this machine's CPU; bf16 autocast and a tuned allocator for every contestant but "as shipped",
float32 where the CPU has no bf16 instructions. Every contestant trains by its own trainer and must
reach a held-out FVU below 0.9.

1. `topk`, `relu`, `batchtopk`: from a file of vectors; `end_to_end`: from pocket-gpt and its
   tokens. `relu` is short and its penalty light, so that a quarter of the latents stay active;
   `relu_sparse` is longer and heavier, nearer to the L0 that such SAEs are trained for.
2. Beside our speed stands how much of the machine's matrix-product peak it is, measured in the same
   run, and which operations the rest of the time goes into.
3. `--memory`: the peak memory of training on 8 million vectors against that on 1 million.

    python benchmarks/sae_training.py                # all five, 80 minutes:
    results/sae_training_*.json python benchmarks/sae_training.py --memory       # four minutes:
    results/sae_training_memory.json python benchmarks/sae_training.py --quick        # toy sizes,
    nothing written to results/
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent))
import compare as harness
import sae_contestants as entries
from compare import Contestant, run_contestant, run_script, timed
from sae_contestants import Job, fast_bf16, job_from

VECTORS, WINDOWS = 1 << 18, 2048
JOBS = {name: Job(architecture=name) for name in ("topk", "relu", "batchtopk")} | {
    "end_to_end": Job()
}
JOBS["relu_sparse"] = Job(architecture="relu", l1=4.0, steps=400)
QUICK = dict(d_sae=512, batch=512, steps=60)
TRAINERS: dict[str, Callable[..., Any]] = {
    "lenslab": entries.lenslab,
    "saelens": entries.saelens,
    "saelens-as-shipped": entries.saelens_as_shipped,
    "dictionary-learning": entries.dictionary_learning,
    "eai-sparsify": entries.eai_sparsify,
}
FROM_MODEL: dict[str, Callable[..., Any]] = {
    "lenslab": entries.lenslab_from_model,
    "saelens": entries.saelens_from_model,
    "saelens-as-shipped": partial(entries.saelens_from_model, tuned=False),
}
OTHERS = [
    "lenslab",
    "saelens",
    "dictionary-learning",
]  # sparsify has topk alone; as shipped costs minutes a round
PEERS = {"topk": list(TRAINERS), "relu": OTHERS, "batchtopk": OTHERS, "relu_sparse": OTHERS}
PEERS["end_to_end"] = list(FROM_MODEL)[:2]  # as shipped costs two minutes a round
MEMORY_SIZES = (1_000_000, 8_000_000)


def contestants(kind: str, job: Job, file: str) -> dict[str, Contestant]:
    found = {}
    for name in PEERS[kind]:
        own = name if name in ("dictionary-learning", "eai-sparsify") else None
        if kind == "end_to_end":
            prepare = entries.prepare_end_to_end(FROM_MODEL[name], job, file)
        else:
            prepare = entries.prepare(TRAINERS[name], job, file)
        found[name] = Contestant(prepare, peer=own, tuned=name != "saelens-as-shipped")
    return found


# --------------------------------------------------------------------- how much of the machine, and
# where the rest goes


def matrix_peak() -> tuple[int, Callable[[], dict[str, float]]]:
    """The fastest matrix product of this machine, GFLOP/s, over the shapes of the job and a large
    square one."""
    best, start = {}, time.perf_counter()
    for dtype in (torch.bfloat16, torch.float32) if fast_bf16() else (torch.float32,):
        for m, k, n in ((4096, 256, 4096), (4096, 4096, 256), (2048, 2048, 2048)):
            a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
            a @ b
            for _ in range(5):
                begun = time.perf_counter()
                a @ b
                speed = 2 * m * k * n / (time.perf_counter() - begun) / 1e9
                best[str(dtype)[6:]] = max(best.get(str(dtype)[6:], 0.0), speed)
    return 1, lambda: {
        "peak_gflops": max(best.values()),
        "seconds_taken": time.perf_counter() - start,
        **best,
    }


class Products(TorchDispatchMode):
    """Counts the operations of matrix products: dense ones, and sparse ones by the entries they
    hold."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = self.sparse = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        packet = function.overloadpacket
        if packet in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            a, b = args[-2:]
            if a.layout == b.layout == torch.strided:
                self.dense += 2 * a.numel() * b.shape[-1]
            else:
                held, other = (a, b.shape[-1]) if a.layout != torch.strided else (b, a.shape[0])
                self.sparse += 2 * held._nnz() * other
        elif packet == torch.ops.aten.sparse_sampled_addmm:
            self.sparse += 2 * args[0]._nnz() * args[1].shape[-1]
        return result


def profile(job: Job, file: str) -> tuple[int, Callable[[], dict[str, Any]]]:
    """Our own training under torch's profiler: share of the time per operation, and the products'
    operations."""
    from torch.profiler import ProfilerActivity

    vectors, _ = entries.load_vectors(file)
    entries.lenslab(replace(job, steps=4), vectors)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        entries.lenslab(job, vectors)
        seconds = time.perf_counter() - start
    with Products() as products:
        entries.lenslab(job, vectors)
    events = sorted(profiler.key_averages(), key=lambda e: -e.self_cpu_time_total)
    inside = sum(e.self_cpu_time_total for e in events) / 1e6
    top = [
        {
            "operation": e.key,
            "share": round(e.self_cpu_time_total / 1e6 / seconds, 4),
            "calls": e.count,
        }
        for e in events[:12]
    ]
    return job.samples, lambda: {
        "dense_gflop_per_vector": products.dense / job.samples / 1e9,
        "sparse_gflop_per_vector": products.sparse / job.samples / 1e9,
        "where_the_time_goes": {
            "outside_operations": round(max(0.0, 1 - inside / seconds), 4),
            "top": top,
        },
    }


def more(
    kind: str, job: Job, file: str, arguments: list[str]
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def found(taken: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
        checks = {
            name: {
                key: round(statistics.median(one[key] for one in rounds), 4)
                for key in ("fvu", "l0")
            }
            for name, rounds in taken.items()
        }
        result: dict[str, Any] = {
            "job": asdict(job) | {"model": entries.MODEL, "hook": entries.HOOK, "d_in": 256},
            "precision": entries.precision(),
            "as_shipped": "float32, the system's allocator",
            "held_out_after": {"vectors": job.samples, **checks},
        }
        if kind == "end_to_end":
            return result
        peaks = [
            run_contestant(__file__, "matrix-peak", Contestant(matrix_peak), arguments)
            for _ in range(3)
        ]
        seen = run_contestant(__file__, "profile", Contestant(matrix_peak), arguments)
        speed = statistics.median(one["units"] / one["seconds"] for one in taken["lenslab"])
        peak, dense = max(one["peak_gflops"] for one in peaks), 10 * 256 * job.d_sae / 1e9
        executed = {kind: seen[f"{kind}_gflop_per_vector"] for kind in ("dense", "sparse")}
        return result | {
            "matrix_products": {
                "peak_gflops": round(peak),
                "peak_float32_gflops": round(max(one["float32"] for one in peaks)),
                "executed_gflops": {
                    kind: round(flop * speed, 1) for kind, flop in executed.items()
                },
                "share_of_peak": round(sum(executed.values()) * speed / peak, 3),
                "share_of_peak_if_all_were_dense": round(dense * speed / peak, 3),
                "counted": "executed: dense and sparse matrix products as run; if all were dense: "
                "10 d_in "
                "d_sae per "
                "vector, for encoder forward and weight gradient, decoder forward, weight and "
                "activation gradient",
            },
            "where_the_time_goes": seen["where_the_time_goes"],
        }

    return found


# --------------------------------------------------------------------------------------------------
# memory


def peak_memory(job: Job, n: int) -> tuple[int, Callable[[], dict[str, float]]]:
    """Train on `n` synthetic vectors as they come; the largest memory of this process, in MB."""
    import resource

    entries.lenslab_from_stream(replace(job, steps=n // job.batch))
    scale = 1024 if sys.platform == "linux" else 1024**2
    return n, lambda: {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale}


def memory(job: Job, sizes: tuple[int, int], write: bool) -> dict[str, Any]:
    found = {}
    for n in sizes:
        extra = ["--job", json.dumps(asdict(job)), "--count", str(n)]
        found[n] = run_contestant(__file__, "memory", Contestant(matrix_peak), extra)["peak_mb"]
        print(f"{n:10,} vectors: peak {found[n]:8.0f} MB", flush=True)
    from lenslab.files import write_json

    small, large = sizes
    name = f"lenslab, {small:,} vectors"
    result = harness.summarise(
        f"training on {large:,} vectors takes at most 1.1 times the memory of training on "
        f"{small:,}",
        "MB",
        "lenslab",
        {
            "lenslab": [{"units": found[large], "seconds": 1}],
            name: [{"units": found[small], "seconds": 1}],
        },
        {},
    ) | {"holds": found[large] < 1.1 * found[small], "precision": entries.precision()}
    result["job"] = asdict(replace(job, steps=large // job.batch)) | {
        "data": "synthetic vectors, made as they are read"
    }
    if write:
        write_json(harness.RESULTS / "sae_training_memory.json", result)
    return result


# --------------------------------------------------------------------------------------------------
# the run


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--only", nargs="+", choices=list(JOBS), default=list(JOBS), help="some of the jobs"
    )
    parser.add_argument(
        "--quick", action="store_true", help="toy sizes, one round, nothing written to results/"
    )
    parser.add_argument("--memory", action="store_true", help="peak memory instead of speed")
    for name in (
        "--contestant",
        "--kind",
        "--job",
        "--vectors",
        "--count",
    ):  # how a contestant's process is called
        parser.add_argument(name, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def contestant(a: argparse.Namespace) -> None:
    job = job_from(a.job)
    special = {
        "matrix-peak": matrix_peak,
        "profile": lambda: profile(job, a.vectors),
        "memory": lambda: peak_memory(job, int(a.count)),
    }
    if a.contestant in special:
        timed(lambda: (lambda: None, special[a.contestant]))
    else:
        timed(contestants(a.kind, job, a.vectors)[a.contestant].prepare)


def main(words: list[str] | None = None) -> None:
    a = parse(words)
    if a.contestant:
        return contestant(a)
    if a.quick:  # its own folder, so that a toy run never replaces a measurement
        harness.RESULTS = Path(tempfile.mkdtemp(prefix="sae-training-"))
        print(f"toy sizes; results in {harness.RESULTS}")
    if a.memory:
        job = replace(JOBS["topk"], **(QUICK if a.quick else {}))
        sizes = (20_480, 81_920) if a.quick else MEMORY_SIZES
        print(json.dumps(memory(job, sizes, write=True), indent=1))
        return None
    for kind in a.only:
        job = replace(JOBS[kind], **(QUICK if a.quick else {}))
        if kind == "end_to_end":
            file = str(entries.tokens_file(128 if a.quick else WINDOWS))
        else:
            file = str(entries.vectors_file(1 << 14 if a.quick else VECTORS))
        extra = ["--kind", kind, "--job", json.dumps(asdict(job)), "--vectors", file]
        claim = (
            f"training a {kind.replace('relu_sparse', 'sparse relu')} SAE is faster than by "
            "SAELens, tuned alike"
            if kind != "end_to_end"
            else "model to SAE in one process is faster than SAELens's runner, tuned alike"
        )
        harness.compare(
            __file__,
            claim,
            "vectors/s",
            "lenslab",
            contestants(kind, job, file),
            stem=f"sae_training_{kind}",
            rounds=1 if a.quick else a.rounds,
            extra=extra,
            more=more(kind, job, file, extra),
        )
    return None


if __name__ == "__main__":
    run_script(main)
