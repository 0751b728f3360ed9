"""Do SAEs find what was planted? Recovery of known features, ours against SAELens's same
architecture, and absorption of parents by their children.

1. Data are SAELens's synthetic models: random directions in few dimensions, each on with a
   probability of its own. Both libraries read the same vectors in the same order, of norm
   sqrt(d_in) on average, in float32, with as many latents as there are features.
2. L0 is matched to the true one: by k; of batchtopk and matryoshka by one threshold, set on
   training vectors; of penalised ones the penalty is searched until L0 is within 5 %, or every
   measure can be read off over log L0 between two trainings that enclose the target closely.
3. The rate is the best of a few by the MCC on a seed of its own, for each library; further rates
   are tried while the best is at an end.
4. Compared are five more seeds (of features, vectors and weights), paired: no worse where the lower
   95 % bound of the difference is above -.01. Beside both stands a dictionary that learned nothing.
5. Reseeds: the same features and vectors, weights of five other seeds. What they spread is what a
   measure cannot tell (`smallest_difference`).
6. Absorption (`absorption`): ours, on features of which some imply others.

Each training is a line of WORK/runs.jsonl and is not repeated.

    python benchmarks/ground_truth.py recovery                  # results/ground_truth.json
    python benchmarks/ground_truth.py absorption
    python benchmarks/ground_truth.py recovery absorption --only topk relu
    python benchmarks/ground_truth.py recovery absorption collect --smoke       # toy sizes
    python benchmarks/ground_truth.py collect                   # data/results/phase_4_truth.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import compare as harness
import sae_contestants as entries
from sae_quality import enclosing

SEEDS, CHOOSING = (0, 1, 2, 3, 4), 5  # the last chooses rates and first penalties
RATES = (1e-2, 2e-2, 3e-2)
STEP = 3.0  # between rates that are added at an end
MOST_RATES = 4
RESEEDED = ("batchtopk",)  # as the bundled SAEs are
PEERS = {  # ours -> SAELens's name
    "relu": "Standard",
    "topk": "TopK",
    "batchtopk": "BatchTopK",
    "matryoshka": "MatryoshkaBatchTopK",
    "jumprelu": "JumpReLU",
    "gated": "Gated",
}
FIRST_PENALTY = {"relu": 3.5, "jumprelu": 3.0, "gated": 5.0}  # where the search starts
SEARCH = 6  # trainings at most, to find a penalty
NEAR, ENCLOSED = 0.05, 1.3  # an L0 that is the target's; ratio of two between which one reads off
WARM_UP = 10  # penalties of both rise over the first tenth
DEAD_AFTER = 100_000  # vectors, of both
SCORES = ("mcc", "f1", "uniqueness", "precision", "recall", "variance_explained")
JUDGED = ("mcc", "f1")
MARGIN = -0.01
CARRIES = 0.5  # share of a parent's strength that another latent must carry to have absorbed it


@dataclass(frozen=True)
class Sizes:
    """Of the planted data and the trainings."""

    features: int = 256
    d_in: int = 64
    samples: int = 400 << 10
    batch: int = 1024
    evaluated: int = 20_000
    parents: int = 20  # of the hierarchy
    children: int = 3  # of each
    seeds: tuple[int, ...] = SEEDS
    rates: tuple[float, ...] = RATES

    @property
    def steps(self) -> int:
        return self.samples // self.batch


SMOKE = Sizes(32, 16, 1 << 14, 256, 2000, 4, 3, seeds=SEEDS, rates=(3e-3,))


@dataclass(frozen=True)
class Planted:
    """Features that are known, and vectors made of them."""

    model: Any  # SAELens's SyntheticModel
    vectors: Tensor = field(repr=False)  # [vector, d_in], scaled
    scale: float
    true_l0: float
    seed: int
    children: dict[int, list[int]] = field(default_factory=dict)  # feature -> those that imply it

    @property
    def k(self) -> int:
        return max(1, round(self.true_l0))


@lru_cache(1)
def planted(seed: int, hierarchical: bool, sizes: Sizes) -> Planted:
    """The features and vectors of a seed."""
    from sae_lens import synthetic

    frequent = synthetic.ZipfianFiringProbabilityConfig(max_prob=0.3, min_prob=0.02)
    config = synthetic.SyntheticModelConfig(
        sizes.features,
        sizes.d_in,
        firing_probability=frequent,
        std_firing_magnitudes=0.2,
        seed=seed,
    )
    children = {}
    if not hierarchical:
        model = synthetic.SyntheticModel(config)
    else:
        tree = synthetic.HierarchyConfig(sizes.parents, sizes.children, max_depth=1)
        config = replace(config, num_features=sizes.features // 2, hierarchy=tree)
        hierarchy = synthetic.generate_hierarchy(config.num_features, tree, seed)
        # of a parent, of a child where its parent is on, of the others
        on = torch.full((config.num_features,), 0.04)
        for root in hierarchy.roots:
            children[root.feature_index] = [child.feature_index for child in root.children]
            on[root.feature_index] = 0.12
            on[children[root.feature_index]] = 0.25
        generator = synthetic.ActivationGenerator(
            config.num_features, on, 0.2, 1.0, modify_activations=hierarchy.modifier
        )
        model = synthetic.SyntheticModel(
            config, hierarchy=hierarchy, activation_generator=generator
        )
    torch.manual_seed(seed)
    strengths = model.activation_generator.sample(sizes.evaluated)
    true_l0 = float((strengths > 0).sum(1).float().mean())
    vectors = sampled(model, seed, sizes)
    scale = math.sqrt(sizes.d_in) / float(vectors.norm(dim=1).mean())
    return Planted(model, vectors * scale, scale, true_l0, seed, children)


@torch.no_grad()
def sampled(model: Any, seed: int, sizes: Sizes) -> Tensor:
    """The training vectors, made once and kept in the ignored `.cache`."""
    from lenslab.files import atomic_write, content_key

    features = model.feature_dict.feature_vectors.detach().numpy().tobytes()
    key = content_key(features, model.activation_generator.firing_probabilities, sizes.samples)
    file = entries.CACHE / f"planted-{seed}-{key}.npy"
    if not file.exists():
        torch.manual_seed(seed)
        parts = [model.sample(1 << 14) for _ in range(-(-sizes.samples // (1 << 14)))]
        with atomic_write(file) as temporary, open(temporary, "wb") as handle:
            np.save(handle, torch.cat(parts)[: sizes.samples].numpy())
    return torch.from_numpy(np.load(file))


# Trainings


def lenslab(
    architecture: str, level: float, lr: float, seed: int, data: Planted, sizes: Sizes
) -> Any:
    """Ours, as SAELens loads it; `level` is k or the penalty."""
    from lenslab.sae.train import TrainingConfig, build_sae, train
    from lenslab.sae.train.sources import VectorSource

    VectorSource.register(entries.InOrder)
    options = {"sparsity": level} if architecture in FIRST_PENALTY else {"k": int(level)}
    metadata = {"hook_name": entries.HOOK, "model_name": entries.MODEL}
    features = len(data.model.feature_dict.feature_vectors)
    sae = build_sae(architecture, sizes.d_in, features, seed=seed, metadata=metadata, **options)
    options = dict(hold=0.0, dead_after=DEAD_AFTER, seed=seed)  # a cosine, as theirs below
    config = TrainingConfig(sizes.samples, sizes.batch, lr, **options)
    source = entries.InOrder(data.vectors)
    return train({"sae": sae}, source, config, progress=False)["sae"].sae


def saelens(
    architecture: str, level: float, lr: float, seed: int, data: Planted, sizes: Sizes
) -> Any:
    """SAELens's trainer with our schedule, as in the other benchmarks; its own settings else."""
    import sae_lens
    from sae_lens.config import SAETrainerConfig

    from lenslab.sae.train.architectures import NESTED

    d_sae = len(data.model.feature_dict.feature_vectors)
    if architecture in FIRST_PENALTY:
        what = "l0" if architecture == "jumprelu" else "l1"
        warm_up = sizes.steps // WARM_UP
        options = {f"{what}_coefficient": level, f"{what}_warm_up_steps": warm_up}
    else:
        options = {"k": int(level)}
    if architecture == "matryoshka":
        options["matryoshka_widths"] = [max(1, d_sae // n) for n in NESTED]
    name = f"{PEERS[architecture]}TrainingSAE"
    torch.manual_seed(seed)
    settings = getattr(sae_lens, f"{name}Config")(d_in=sizes.d_in, d_sae=d_sae, **options)
    sae = getattr(sae_lens, name)(settings)
    config = SAETrainerConfig(
        total_training_samples=sizes.samples,
        train_batch_size_samples=sizes.batch,
        lr=lr,
        lr_scheduler_name="cosineannealing",
        lr_end=lr / 10,
        lr_warm_up_steps=max(1, sizes.steps // 20),
        lr_decay_steps=0,
        dead_feature_window=DEAD_AFTER // sizes.batch,
        device="cpu",
        autocast=entries.fast_bf16(),
        logger=sae_lens.LoggingConfig(log_to_wandb=False),
    )
    job = entries.Job(batch=sizes.batch)
    sae_lens.SAETrainer(config, sae, entries.batches(data.vectors, job)).fit()
    return entries._saelens_inference(sae)


LIBRARIES = {"lenslab": lenslab, "saelens": saelens}


def untrained(data: Planted, sizes: Sizes, seed: int) -> Any:
    """The floor: random directions, the k strongest of them, one length fitted."""
    from lenslab.sae.train import build_sae
    from lenslab.sae.train.convert import to_saelens

    metadata = {"hook_name": entries.HOOK, "model_name": entries.MODEL}
    d_sae = len(data.model.feature_dict.feature_vectors)
    options = {"k": data.k, "seed": seed + 1000, "metadata": metadata}
    sae = build_sae("topk", sizes.d_in, d_sae, **options)
    sae.fit(data.vectors[: 1 << 14])
    return to_saelens(sae)


# Measures


def recovery(sae: Any, data: Planted, n: int) -> dict[str, float]:
    """SAELens's measures on `n` new vectors, the same ones for every SAE."""
    from sae_lens.synthetic import eval_sae_on_synthetic_data
    from sae_lens.training.activation_scaler import ActivationScaler

    torch.manual_seed(10_000 + data.seed)
    generator, scaler = data.model.activation_generator, ActivationScaler(data.scale)
    found = eval_sae_on_synthetic_data(
        sae, data.model.feature_dict, generator, n, activation_scaler=scaler
    )
    classes = found.classification
    return {
        "l0": found.sae_l0,
        "mcc": found.mcc,
        "uniqueness": found.uniqueness,
        "precision": classes.precision,
        "recall": classes.recall,
        "f1": classes.f1_score,
        "variance_explained": found.explained_variance,
        "dead": found.dead_latents,
    }


@torch.no_grad()
def absorption(sae: Any, data: Planted, n: int) -> dict[str, float]:
    """How often a parent's latent is silent because a child's latent says it too.

    After Chanin et al. 2024 (arXiv 2409.14507), with known features in the place of probes:
    1. a parent's latent is the one whose decoder row has the largest cosine with the parent;
    2. `silent`: of the vectors on which the parent and a child of it are on, the share on which
       that latent is silent;
    3. `absorbed`: the share on which besides another latent carries at least half of the parent's
       strength, by itself: its activation times its decoder row's part along the parent;
    4. `silent_alone`: as 2, where no child is on: what the latent misses without any child.

    Each is the mean over parents. ValueError where no feature has children.
    """
    if not data.children:
        raise ValueError("These features have no hierarchy: planted(.., hierarchical=True, ..).")
    torch.manual_seed(10_000 + data.seed)
    strengths = data.model.activation_generator.sample(n)  # [vector, feature]
    latents = sae.encode(data.model.feature_dict(strengths) * data.scale)  # [vector, d_sae]
    features = torch.nn.functional.normalize(data.model.feature_dict.feature_vectors, dim=1)
    along = sae.W_dec @ features.T  # [d_sae, feature]
    cosines = along / sae.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12)
    lengths = data.model.feature_dict.feature_vectors.norm(dim=1) * data.scale
    rates = []
    for parent, children in data.children.items():
        main = int(cosines[:, parent].argmax())
        on = strengths[:, parent] > 0
        child = (strengths[:, children] > 0).any(1)
        silent = latents[:, main] <= 0
        carried = (latents * along[:, parent]).amax(1)  # the main latent's is 0 where it is silent
        absorbs = carried >= CARRIES * strengths[:, parent] * lengths[parent]
        with_child, alone = on & child, on & ~child
        if with_child.any() and alone.any():
            rates.append(
                {
                    "absorbed": (silent & absorbs)[with_child].float().mean().item(),
                    "silent": silent[with_child].float().mean().item(),
                    "silent_alone": silent[alone].float().mean().item(),
                }
            )
    return {key: sum(rate[key] for rate in rates) / len(rates) for key in rates[0]}


def scored(sae: Any, data: Planted, n: int) -> dict[str, float]:
    return recovery(sae, data, n) | (absorption(sae, data, n) if data.children else {})


def search(
    measure: Callable[[float], dict[str, float]], target: float, first: float
) -> list[dict[str, float]]:
    """Points {l1, l0, ..}: the last is near the target L0, or the nearest two enclose it closely.

    The next penalty lies on the line through the two nearest points in logarithms, on either side
    of the target where there are such; no more than a factor of 3 beyond them.
    """
    points: list[dict[str, float]] = []
    penalty = first
    for _ in range(SEARCH):
        points.append({"l1": penalty, **measure(penalty)})
        last = max(points[-1]["l0"], 0.1)
        pair = enclosing(points, target)
        if abs(last / target - 1) < NEAR or (pair and pair[1]["l0"] / pair[0]["l0"] < ENCLOSED):
            break
        if pair is None:
            pair = sorted(points, key=lambda point: abs(math.log(max(point["l0"], 0.1) / target)))
        slope = -1.0  # of log L0 over log penalty
        if len(pair) > 1 and min(pair[0]["l0"], pair[1]["l0"]) > 0:
            run = math.log(pair[0]["l1"] / pair[1]["l1"])
            slope = min(-0.1, math.log(pair[0]["l0"] / pair[1]["l0"]) / run if run else -1.0)
        change = math.log(target / max(pair[0]["l0"], 0.1)) / slope
        penalty = pair[0]["l1"] * math.exp(min(math.log(3), max(-math.log(3), change)))
        silenced = [point["l1"] for point in points if point["l0"] == 0]
        if silenced and pair[0]["l0"] > 0 and penalty >= min(silenced):
            penalty = math.sqrt(pair[0]["l1"] * min(silenced))
    return points


def read_off(points: Sequence[dict[str, float]], target: float) -> dict[str, float] | None:
    """The last point where its L0 is near the target, else every measure over log L0, linearly
    between the points that enclose the target; None where none do."""
    if abs(points[-1]["l0"] / target - 1) < NEAR:
        return {key: value for key, value in points[-1].items() if key != "l1"}
    if (pair := enclosing(list(points), target)) is None:
        return None
    low, high = pair
    share = math.log(target / low["l0"]) / math.log(high["l0"] / low["l0"])
    measures = {key: low[key] + share * (high[key] - low[key]) for key in low if key != "l1"}
    return measures | {"l0": target}


# Runs


class Bench:
    """The file of finished trainings, and what is asked of them."""

    def __init__(self, work: Path, sizes: Sizes):
        self.file, self.sizes = work / "runs.jsonl", sizes
        self.done: dict[str, dict[str, float]] = {}
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else ()
        for line in lines:
            with suppress(ValueError):  # a line that was cut off
                row = json.loads(line)
                self.done[row.pop("key")] = row

    def kept(self, key: str, make: Callable[[], dict[str, float]]) -> dict[str, float]:
        """What was measured under a key, or is now."""
        key = f"{key} {asdict(self.sizes)}"
        if key not in self.done:
            self.done[key] = make()
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with open(self.file, "a", encoding="utf-8") as handle:
                handle.write(json.dumps({"key": key} | self.done[key]) + "\n")
        return self.done[key]

    def measured(
        self, library: str, architecture: str, lr: float, level: float, about: tuple[int, int, bool]
    ) -> dict[str, float]:
        """One training; `about` is (seed of the data, of the weights, hierarchical)."""
        seed, weights, hierarchical = about

        def make() -> dict[str, float]:
            from lenslab.sae.train.base import TrainingFailed

            data = planted(seed, hierarchical, self.sizes)
            try:
                sae = LIBRARIES[library](architecture, level, lr, weights, data, self.sizes)
            except TrainingFailed as failed:
                print(failed, flush=True)
                return dict.fromkeys(("l0", *SCORES, "dead"), 0.0)
            if architecture in ("batchtopk", "matryoshka"):
                entries.set_mean_l0(sae, data.vectors, int(level))
            found = scored(sae, data, self.sizes.evaluated)
            return found if np.isfinite(list(found.values())).all() else dict.fromkeys(found, 0.0)

        return self.kept(f"{library} {architecture} {lr:g} {level:.6g} {about}", make)

    def target(self, seed: int, hierarchical: bool) -> float:
        """The true L0, of a few vectors."""
        key = f"true L0 {seed} {hierarchical}"
        return self.kept(key, lambda: {"l0": planted(seed, hierarchical, self.sizes).true_l0})["l0"]

    def matched(
        self, library: str, architecture: str, lr: float, about: tuple[int, int, bool], first: float
    ) -> tuple[dict[str, float] | None, float]:
        """(the measures at the true L0; None where no penalty leads to it or all trainings failed;
        the last penalty)"""
        target = max(1, round(self.target(about[0], about[2])))
        measure = partial(self.measured, library, architecture, lr, about=about)
        if architecture not in FIRST_PENALTY:
            found = measure(target)
            return (found if found["l0"] else None), first
        points = search(measure, target, first)
        return read_off(points, target), points[-1]["l1"]

    def best_rate(self, library: str, architecture: str) -> tuple[float, float]:
        """(rate, first penalty) by the MCC on the seed that chooses."""
        tried: dict[float, tuple[float, float]] = {}
        first, rates = FIRST_PENALTY.get(architecture, 0.0), list(self.sizes.rates)
        while rates:
            lr = rates.pop(0)
            about = (CHOOSING, CHOOSING, False)
            found, first = self.matched(library, architecture, lr, about, first)
            tried[lr] = (-1.0 if found is None else found["mcc"], first)
            best = max(tried, key=lambda rate: tried[rate][0])
            if not rates and 1 < len(tried) < MOST_RATES:
                if best == max(tried):
                    rates.append(best * STEP)
                elif best == min(tried):
                    rates.append(best / STEP)
        shown = "  ".join(f"{lr:g}: {score:.4f}" for lr, (score, _) in sorted(tried.items()))
        print(f"{library} {architecture}: MCC by rate {shown}", flush=True)
        return best, tried[best][1]


def run_recovery(bench: Bench, only: Sequence[str]) -> None:
    """Rates, then seeds; on each seed's data all architectures, since the data are made once."""
    pairs = list(product(LIBRARIES, only))
    chosen = {pair: bench.best_rate(*pair) for pair in pairs}
    for seed in bench.sizes.seeds:
        for library, architecture in pairs:
            found, _ = bench.matched(
                library, architecture, *spread(chosen[library, architecture], seed)
            )
            shown = "not enclosed" if found is None else f"{found['mcc']:.4f} F1 {found['f1']:.4f}"
            print(f"seed {seed} {library:8s} {architecture:11s} MCC {shown}", flush=True)
        floor(bench, seed)
        if seed == 0:
            reseed(bench, chosen, only, False)


def reseed(bench: Bench, chosen: dict, only: Sequence[str], hierarchical: bool) -> None:
    """Other weights on the data of seed 0."""
    for name, weights in product(set(RESEEDED) & set(only), bench.sizes.seeds):
        lr, penalty = chosen["lenslab", name]
        bench.matched("lenslab", name, lr, (0, weights, hierarchical), penalty)


def spread(chosen: tuple[float, float], seed: int, hierarchical: bool = False) -> tuple:
    """Arguments of `matched` for the data and weights of one seed."""
    return chosen[0], (seed, seed, hierarchical), chosen[1]


def floor(bench: Bench, seed: int, hierarchical: bool = False) -> dict[str, float]:
    def make() -> dict[str, float]:
        data = planted(seed, hierarchical, bench.sizes)
        return scored(untrained(data, bench.sizes, seed), data, bench.sizes.evaluated)

    return bench.kept(f"untrained {seed} {hierarchical}", make)


def run_absorption(bench: Bench, only: Sequence[str]) -> None:
    chosen = {("lenslab", name): bench.best_rate("lenslab", name) for name in only}
    for seed, name in product(bench.sizes.seeds, only):
        found, _ = bench.matched("lenslab", name, *spread(chosen["lenslab", name], seed, True))
        floor(bench, seed, True)
        rates = ("absorbed", "silent", "silent_alone", "mcc")
        shown = "" if found is None else " ".join(f"{key} {found[key]:.3f}" for key in rates)
        print(f"seed {seed} {name:11s} {shown or 'not enclosed'}", flush=True)
        if seed == 0:
            reseed(bench, chosen, [name], True)


# What the runs say


def paired(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float | bool]:
    """Difference of scores, paired over at least 5 shared seeds, with Student's two-sided 95 %
    interval; ValueError on fewer."""
    difference = np.subtract(ours, theirs)
    if len(difference) < 5:
        raise ValueError(f"{len(difference)} shared seeds: the rule needs at least 5")
    interval = scipy.stats.ttest_1samp(difference, 0).confidence_interval(0.95)
    mean = float(difference.mean())
    low, high = (mean if math.isnan(end) else float(end) for end in interval)  # no spread at all
    return {"difference": mean, "low": low, "high": high, "no_worse": low > MARGIN}


def recovery_table(bench: Bench, only: Sequence[str]) -> tuple[pd.DataFrame, dict[str, Any]]:
    """(long table of what is finished, rates that were chosen)"""
    rows, rates = [], {}
    for library, architecture in product(LIBRARIES, only):
        chosen = bench.best_rate(library, architecture)
        rates[f"{library} {architecture}"] = chosen[0]
        for seed in bench.sizes.seeds:
            found, _ = bench.matched(library, architecture, *spread(chosen, seed))
            rows += long("recovery", f"{library} {architecture}", seed, found)
            if library == "lenslab" and architecture in RESEEDED:
                about = (0, seed, False)
                found, _ = bench.matched(library, architecture, chosen[0], about, chosen[1])
                rows += long("recovery, reseeded", f"{library} {architecture}", seed, found)
    for seed in bench.sizes.seeds:
        rows += long("recovery", "untrained", seed, floor(bench, seed))
    return pd.DataFrame(rows), rates


def absorption_table(bench: Bench, only: Sequence[str]) -> pd.DataFrame:
    rows = []
    for name in only:
        chosen = bench.best_rate("lenslab", name)
        for seed in bench.sizes.seeds:
            found, _ = bench.matched("lenslab", name, *spread(chosen, seed, True))
            rows += long("absorption", f"lenslab {name}", seed, told(found))
            if name in RESEEDED:
                about = (0, seed, True)
                found, _ = bench.matched("lenslab", name, chosen[0], about, chosen[1])
                rows += long("absorption, reseeded", f"lenslab {name}", seed, told(found))
    for seed in bench.sizes.seeds:
        rows += long("absorption", "untrained", seed, told(floor(bench, seed, True)))
    return pd.DataFrame(rows)


def told(found: dict[str, float] | None) -> dict[str, float]:
    """Of the measures on features with a hierarchy those that are shown."""
    shown = ("absorbed", "silent", "silent_alone", "l0", "mcc", "f1")
    return {key: found[key] for key in shown} if found else {}


def long(part: str, of: str, seed: int, found: dict[str, float] | None) -> list[dict[str, Any]]:
    """One row per measure."""
    about = {"part": part, "of": of, "seed": seed}
    return [about | {"measure": key, "value": value} for key, value in (found or {}).items()]


def judge(table: pd.DataFrame, only: Sequence[str]) -> dict[str, Any]:
    """{"architecture score": paired difference ours - SAELens}; where seeds are missing, why."""
    rows = table[table["part"] == "recovery"]
    values = rows.pivot(index="seed", columns=["of", "measure"], values="value")
    verdict = {}
    for architecture, score in product(only, SCORES):
        columns = [(f"{library} {architecture}", score) for library in LIBRARIES]
        if not set(columns) <= set(values.columns) or values[columns].isna().any(axis=None):
            why = "no penalty was found that leads to the L0 in every seed"
            verdict[f"{architecture} {score}"] = {"not_compared": why}
            continue
        found = paired(*(values[column].to_numpy() for column in columns))
        verdict[f"{architecture} {score}"] = rounded(found)
    return verdict


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()}


def write_recovery(bench: Bench, only: Sequence[str], folder: Path) -> dict[str, Any]:
    """ground_truth.json, in the form of the other results."""
    from lenslab.files import write_json
    from lenslab.runtime import machine_summary

    table, rates = recovery_table(bench, only)
    rows = table[table["part"] == "recovery"]
    spreads = rows.groupby(["of", "measure"])["value"].agg(["mean", "std", "count"])
    mean = spreads["mean"].unstack()
    null = float(mean.loc["untrained", "mcc"])
    scores = {
        of: {
            measure: rounded(
                {key: float(spreads.loc[(of, measure), key]) for key in ("mean", "std")}
            )
            for measure in mean.columns
        }
        | {"mcc_above_null": round((mean.loc[of, "mcc"] - null) / (1 - null), 5)}
        for of in mean.index
    }
    verdict = judge(table, only)
    compared = [name for name in only if "difference" in verdict[f"{name} mcc"]]
    mcc = {of: round(float(value), 5) for of, value in mean["mcc"].items()}
    result = {
        "claim": "at equal samples and the true L0 planted features are recovered no worse than by "
        "SAELens's same architecture (MCC and F1: lower bound of the difference above -0.01)",
        "ours": {name: mcc[f"lenslab {name}"] for name in compared},
        "peers": {f"saelens {name}": mcc[f"saelens {name}"] for name in compared},
        "ratios": {
            f"saelens {name}": mcc[f"lenslab {name}"] / mcc[f"saelens {name}"] for name in compared
        },
        "unit": "MCC",
        "more_is_better": True,
        "holds": all(
            verdict[f"{name} {score}"].get("no_worse", False) for name in only for score in JUDGED
        ),
        "verdict": verdict,
        "scores": scores,
        "rates": rates,
        "true_l0": [round(bench.target(seed, False), 3) for seed in bench.sizes.seeds],
        "sizes": asdict(bench.sizes),
        "precision": "float32",
        "machine": {**machine_summary(), "threads": int(harness.THREADS)},
        "versions": harness.versions(LIBRARIES),
    }
    write_json(folder / "ground_truth.json", result)
    for key, one in verdict.items():
        if key.split()[1] in JUDGED:
            print(f"{key:20s} {one}")
    return result


def truth_table(bench: Bench, only: Sequence[str], work: Path) -> pd.DataFrame:
    """All that is finished in long form: `part`, `of`, `kind` and `k` (of probes), `seed`,
    `measure`, `value`; then, as part "smallest difference", what each measure can tell."""
    from sparse_probing import finished

    tables = [recovery_table(bench, only)[0], absorption_table(bench, only)]
    tables.append(finished(work / "probing.jsonl"))
    table = pd.concat([rows for rows in tables if len(rows)]).reindex(columns=COLUMNS)
    table["k"] = table["k"].astype("Int64").astype(object).where(table["k"].notna(), None)
    return pd.concat([table, pd.DataFrame(smallest(table))]).reindex(columns=COLUMNS)


COLUMNS = ["part", "of", "kind", "k", "seed", "measure", "value"]
TOLD = {  # where reseeds differ in the weights alone -> what is looked at there
    "recovery, reseeded": ("mcc", "f1", "uniqueness"),
    "absorption, reseeded": ("absorbed", "silent"),
    "quality": ("fvu", "l0", "dead", "ce_difference"),
    "probing, max": ("auroc",),
    "probing, mean": ("auroc",),
}


def smallest_difference(values: np.ndarray) -> float:
    """What the difference of one measure between two reseeds stays under in 95 % of cases: a
    smaller one says nothing. `values` are of reseeds that differ in nothing else; ValueError for
    fewer than 3 and for NaN."""
    from lenslab import stats

    if len(values) < 3 or not np.isfinite(values).all():
        raise ValueError(f"The spread needs three reseeds or more, none NaN, not {list(values)}.")
    return stats.smallest_difference(values)


def smallest(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The smallest difference of each measure, from reseeds; of probes after the mean over
    kinds."""
    rows = []
    for part, measures in TOLD.items():
        chosen = table[(table["part"] == part) & table["measure"].isin(measures)]
        chosen = chosen[chosen["of"] != "SAE, shuffled labels"]
        keys = ["measure", "of", "k"]
        for (measure, of, k), group in chosen.groupby(keys, dropna=False, sort=False):
            values = group.groupby("seed")["value"].mean().to_numpy()
            if len(values) < 3:  # axes and coordinates have no seed
                continue
            name = f"{of}, {part}".removesuffix(", reseeded")
            row = {"part": "smallest difference", "of": name, "k": None if pd.isna(k) else k}
            rows.append(row | {"measure": measure, "value": smallest_difference(values)})
    return rows


def write_truth(bench: Bench, only: Sequence[str], work: Path, *, ships: bool) -> Path:
    """data/results/phase_4_truth.json, which belongs to the bundled model and SAE."""
    from sparse_probing import SAE

    from lenslab.files import Result, save_result
    from lenslab.models import load_model, model_key
    from lenslab.runtime import machine_summary
    from lenslab.sae.inputs import sae_key
    from lenslab.sae.load import load_sae

    @dataclass(frozen=True)
    class Truth(Result):
        """What the table says beside itself."""

        sizes: dict[str, Any]
        machine: dict[str, Any]
        table: pd.DataFrame = field(repr=False)

        def to_frame(self) -> pd.DataFrame:
            return self.table

        def to_dict(self) -> dict[str, Any]:
            return {"sizes": self.sizes, "machine": self.machine}

    table = truth_table(bench, only, work)
    table["value"] = [float(f"{value:.5g}") for value in table["value"]]
    result = Truth(asdict(bench.sizes), machine_summary(), table)
    inputs = [model_key(load_model("pocket-gpt")), sae_key(load_sae(SAE))]
    return save_result("phase_4_truth", result, inputs, ships=ships)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("do", nargs="+", choices=["recovery", "absorption", "collect"])
    add("--only", nargs="+", choices=list(PEERS), default=list(PEERS))
    add("--work", type=Path, default=Path("runs/ground-truth"), help="finished trainings")
    add("--smoke", action="store_true", help="toy sizes; nothing is written to results")
    given = parser.parse_args(words)
    os.environ.setdefault("LENSLAB_COMPUTE", "float32")  # of both libraries
    os.environ.setdefault("TQDM_DISABLE", "1")
    bench = Bench(given.work, SMOKE if given.smoke else Sizes())
    if "recovery" in given.do:
        run_recovery(bench, given.only)
    if "absorption" in given.do:
        run_absorption(bench, given.only)
    if "collect" in given.do:
        folder = Path(tempfile.mkdtemp(prefix="ground-truth-")) if given.smoke else harness.RESULTS
        write_recovery(bench, given.only, folder)
        print(f"written to {folder.name}/ground_truth.json")
        file = write_truth(bench, given.only, given.work, ships=not given.smoke)
        print(f"written to {file.parent.name}/{file.name}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
