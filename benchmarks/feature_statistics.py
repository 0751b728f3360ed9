"""Statistics of phase 2: AUROCs under shuffled labels against scipy and scikit-learn, and how long
all of it takes.

Activations with the sizes of phase 2 (420 texts, 2,048 latents, a tenth of them above zero) and its
labels; all contestants compute the AUROC of every latent under shuffled labels, in float64 on the
same matrix.

1. `lenslab`: `auroc_permutations`, 1,000 shuffles: ranks once, then one matrix product.
2. `scipy`: `mannwhitneyu`, all latents at once, 8 shuffles. `scikit-learn`: `roc_auc_score`, 64
   latents, 4 shuffles. Theirs are counted for what they did: nobody would wait for a thousand.
3. Beside our speed: seconds of each statistic of phase 2 with 1,000 shuffles, four controls
   included, and their sum.

    python benchmarks/feature_statistics.py            # a minute: results/feature_statistics.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from compare import Contestant, compare, timed

TEXTS, LATENTS, ACTIVE, SHUFFLES = 420, 2048, 0.1, 1000
CATEGORIES = 7


def activations(seed: int = 0) -> np.ndarray:
    """[text, latent], most of it zero."""
    random = np.random.default_rng(seed)
    return np.where(
        random.random((TEXTS, LATENTS)) < ACTIVE, random.gamma(2.0, 4.0, (TEXTS, LATENTS)), 0.0
    )


def members() -> np.ndarray:
    return np.arange(TEXTS) % CATEGORIES == 0


def ours() -> Callable:
    """lenslab.stats.auroc_permutations; the check times every statistic of phase 2."""
    from lenslab.runtime import derive_generator
    from lenslab.stats import auroc_permutations

    scores, inside = activations(), members()

    def run() -> tuple[int, Callable[[], dict[str, float]]]:
        auroc_permutations(scores, inside, derive_generator(0, "benchmark"), SHUFFLES)
        return LATENTS * SHUFFLES, everything

    return run


def everything() -> dict[str, float]:
    """Seconds of each statistic of phase 2."""
    from lenslab.features.ranking import count_specialists_null, summarize_features
    from lenslab.features.specialists import discriminate, find_specialists
    from lenslab.features.together import coactivation, concept_features
    from lenslab.texts import label_texts, load_probes

    labels = label_texts(load_probes("categories"))
    matrix, controls = activations(), {f"control {i}": activations(i) for i in range(1, 5)}
    about = labels.inside[:, 0]
    jobs = {
        "summary": lambda: summarize_features(matrix, labels.category),
        "discriminate": lambda: discriminate({"sae": matrix}, labels, n=SHUFFLES),
        "specialists": lambda: find_specialists(matrix, labels, controls, name="sae", n=SHUFFLES),
        "count null": lambda: count_specialists_null(matrix, labels.category),
        "co-activation": lambda: coactivation(matrix, list(range(10)), strata=labels.category),
        "concept search": lambda: concept_features(matrix[about], matrix[~about], n=SHUFFLES),
    }
    seconds = {}
    for name, job in jobs.items():
        start = time.perf_counter()
        job()
        seconds[name] = time.perf_counter() - start
    return seconds | {"all": sum(seconds.values())}


def scipy() -> Callable:
    """scipy.stats.mannwhitneyu over all latents, a shuffle at a time."""
    from scipy.stats import mannwhitneyu

    scores, inside, random = activations(), members(), np.random.default_rng(0)

    def run() -> int:
        for _ in range(8):
            shuffled = random.permutation(inside)
            mannwhitneyu(scores[shuffled], scores[~shuffled], axis=0, method="asymptotic")
        return LATENTS * 8

    return run


def scikit_learn() -> Callable:
    """sklearn.metrics.roc_auc_score, a latent and a shuffle at a time."""
    from sklearn.metrics import roc_auc_score

    scores, inside, random = activations(), members(), np.random.default_rng(0)

    def run() -> int:
        for _ in range(4):
            shuffled = random.permutation(inside)
            for column in scores.T[:64]:
                roc_auc_score(shuffled, column)
        return 64 * 4

    return run


CONTESTANTS = {
    "lenslab": Contestant(ours),
    "scipy": Contestant(scipy),
    "scikit-learn": Contestant(scikit_learn),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contestant", choices=sorted(CONTESTANTS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.contestant:
        return timed(CONTESTANTS[given.contestant].prepare)
    compare(
        __file__,
        claim=f"the statistics of phase 2 ({TEXTS} texts, {LATENTS:,} latents, {SHUFFLES:,} "
        "shuffles) take under 10 "
        "seconds, and AUROCs under shuffled labels are faster than scipy's and scikit-learn's",
        unit="AUROCs/s",
        ours="lenslab",
        contestants=CONTESTANTS,
        rounds=given.rounds,
        more=lambda taken: {
            "seconds": {
                name: round(statistics.median(one[name] for one in taken["lenslab"]), 2)
                for name in taken["lenslab"][0]
                if name not in ("units", "seconds")
            }
        },
    )


if __name__ == "__main__":
    main()
