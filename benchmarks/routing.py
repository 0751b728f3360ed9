"""Routing: capturing it against a bare Hugging Face forward pass, and its statistics.

1. Capture: the same 64 windows of 256 random tokens, 16 windows a pass, through pocket-moe in
   float32, no gradients. Ours keeps ids, weights and logits of every token and layer; Hugging
   Face's forward pass keeps nothing and, as ours, stops before the logits over the vocabulary. It
   runs with every implementation of attention and of experts that it has for this model.
2. Statistics: of 1 and of 4 million tokens, drawn, through 6 layers of 16 experts, two a token, in
   texts of 250 tokens; each amount in a process of its own, whose largest memory is told.
   `specialisation`, `predict_from_dimensions` and `path_clusters` read some thousands of tokens
   whatever there is; they get as many as in phase 5.

    python benchmarks/routing.py        # writes results/routing.json
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from itertools import product
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from compare import Contestant, compare, run_contestant, run_script, timed

WINDOWS, BATCH = 64, 16
MODEL = Path(__file__).parents[1] / "data" / "models" / "pocket-moe"
MILLIONS = (1, 4)  # tokens
LAYERS, EXPERTS, RANKS, LENGTH, KINDS, D = 6, 16, 2, 250, 7, 192
FEW = 5000  # tokens of what takes time in proportion to tokens, `inputs` included
ATTENTION, SPREAD = ("eager", "sdpa"), ("eager", "batched_mm", "grouped_mm")


def tokens() -> torch.Tensor:
    ids = torch.randint(3, 8192, (WINDOWS, 256), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 0  # BOS
    return ids


def ours():
    """lenslab.moe.routing.capture_routing."""
    from lenslab.models import load_model
    from lenslab.moe.routing import capture_routing
    from lenslab.tokens import TokenBatch

    model, ids = load_model("pocket-moe"), tokens()
    real = torch.ones_like(ids, dtype=torch.bool)
    real[:, 0] = False
    batch = TokenBatch(ids, real, torch.ones_like(real), ("",) * len(ids))

    def run() -> int:
        capture_routing(model, batch)
        return ids.numel()

    return run


def hugging_face(attention: str, experts: str):
    from transformers import AutoModel

    options = dict(attn_implementation=attention, experts_implementation=experts)
    model = AutoModel.from_pretrained(MODEL, dtype=torch.float32, **options).eval()
    ids = tokens()

    @torch.inference_mode()
    def run() -> int:
        for few in ids.split(BATCH):
            model(few, use_cache=False)
        return ids.numel()

    return run


def drawn(n: int):
    """A routing with something in it: tokens go to experts of their own, kinds to some more."""
    from lenslab.moe.routing import Routing

    rng = np.random.default_rng(0)
    token = rng.zipf(1.3, n).clip(max=8192) - 1
    text, kind = np.arange(n) // LENGTH, (np.arange(n) // LENGTH) % KINDS
    own = rng.integers(EXPERTS, size=(8192, LAYERS, RANKS), dtype=np.int16)
    ids = own[token]
    moved = rng.random((n, LAYERS)) < 0.3
    ids[moved, 0] = ((kind[:, None] * 2 + rng.integers(3, size=(n, LAYERS))) % EXPERTS)[moved]
    ids[..., 1] = np.where(ids[..., 1] == ids[..., 0], (ids[..., 0] + 1) % EXPERTS, ids[..., 1])
    weights = np.full(ids.shape, 0.5, np.float32)
    origin = dict(text=text, position=np.arange(n) % LENGTH, token=token)
    return Routing(ids, weights, tuple(range(LAYERS)), EXPERTS, **origin), kind


def all_statistics(millions: int):
    """Every statistic of `lenslab.moe`, once."""
    from dataclasses import replace

    from lenslab.moe import experts, paths
    from lenslab.moe import statistics as moe

    routing, kind = drawn(1_000_000 * millions)
    few = routing[:: len(kind) // FEW]
    inputs = np.random.default_rng(1).standard_normal((len(few.ids), LAYERS, D), np.float32)
    common = len(kind) // 1000  # tokens of a path that counts as one
    few, its = replace(few, inputs=inputs), kind[:: len(kind) // FEW]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def run():
        jobs = [
            lambda: [f(routing) for f in (moe.load, moe.balance, moe.coactivation)],
            lambda: moe.contrast(routing, kind),
            lambda: moe.token_statistics(routing, np.arange(24)),
            lambda: moe.router_geometry(np.random.default_rng(2).standard_normal((LAYERS, 16, D))),
            lambda: [paths.path_coverage(routing), paths.continuity(routing)],
            lambda: moe.contrast(paths.paths_as_experts(routing, (3, 4, 5), common)[0], kind),
            lambda: [paths.path_clusters(routing), paths.predict_experts(routing, kind)],
            lambda: experts.specialisation(few, {"kind": its}),
            lambda: paths.predict_from_dimensions(few, shares=(0.02, 0.1, 1.0)),
        ]
        seconds = []
        for job in jobs:
            started = time.perf_counter()
            job()
            seconds.append(time.perf_counter() - started)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        kilo = 1 if sys.platform == "linux" else 1024
        return (
            1,
            lambda: (
                {"peak_mb": peak / kilo / 1000, "before_mb": before / kilo / 1000}
                | {f"job_{i}": value for i, value in enumerate(seconds)}
            ),
        )

    return (lambda: None), run


CONTESTANTS = {"lenslab": Contestant(ours)}
for one in product(ATTENTION, SPREAD):
    name = f"hugging-face, {one[0]} attention, {one[1].replace('_mm', '')} experts"
    CONTESTANTS[name] = Contestant(lambda one=one: hugging_face(*one))
AMOUNTS = {
    f"statistics of {n} million": Contestant(lambda n=n: all_statistics(n)) for n in MILLIONS
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contestant", choices=[*CONTESTANTS, *AMOUNTS], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.contestant:
        return timed((CONTESTANTS | AMOUNTS)[given.contestant].prepare)
    found = {}
    for amount, contestant in AMOUNTS.items():
        taken = [run_contestant(__file__, amount, contestant) for _ in range(min(given.rounds, 3))]
        middle = {key: statistics.median(one[key] for one in taken) for key in taken[0]}
        found[amount] = {key: round(value, 2) for key, value in middle.items() if key != "units"}
        print(amount, found[amount], flush=True)
    return compare(
        __file__,
        claim="capturing the routing of a mixture of experts is at least 0.8 times as fast as "
        "Hugging Face's bare forward pass with the same, eager, attention",
        unit="tokens/s",
        ours="lenslab",
        contestants=CONTESTANTS,
        rounds=given.rounds,
        more=lambda _: {"statistics": found},
    )


if __name__ == "__main__":
    run_script(main)
