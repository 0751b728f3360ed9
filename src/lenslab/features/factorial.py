"""Three choices that decide how many "specialists" an older rule counts, crossed with each other.

A text's value of a feature depends on whether BOS is pooled with the rest, whether padding is, and
whether tokens are encoded before they are averaged or after.
1. `pooled_ways`: the eight combinations, `[text, feature]` each.
2. `factorial`: what the older rule (`count_specialists`) says of each, beside shuffled labels, and
   how much of the texts the most frequent feature covers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lenslab.features.activations import Labels
from lenslab.features.ranking import Threshold, count_specialists_null, summarize_features

FACTORS = ("BOS", "padding", "order")
ORDERS = ("encode, then pool", "pool, then encode")
Encode = Callable[[Tensor], Tensor]  # [.., d_in] -> [.., feature]


@torch.inference_mode()
def pooled_ways(
    encode: Encode,
    x: Float[Tensor, "text pos d_in"],
    real: Bool[Tensor, "text pos"],
    attention: Bool[Tensor, "text pos"],
) -> dict[tuple[bool, bool, str], Float[np.ndarray, "text feature"]]:
    """Mean over a text's tokens under (BOS in, padding in, order); `x` are the SAE's inputs at
    every place, `attention` is False at padding, `real` at padding and BOS."""
    counted = {}
    for bos, padding in product((False, True), repeat=2):
        counted[bos, padding] = real | (attention & bos) | (~attention & padding)
    ways = {}
    for (bos, padding), mask in counted.items():
        average = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)  # [text, d_in]
        ways[bos, padding, ORDERS[1]] = encode(average).float().cpu().numpy()
    sums = {key: [] for key in counted}
    for text in range(len(x)):  # all places of all texts at once would not fit
        features = encode(x[text])  # [pos, feature]
        for key, mask in counted.items():
            sums[key].append(features[mask[text]].mean(0).float().cpu().numpy())
    return {(*key, ORDERS[0]): np.stack(rows) for key, rows in sums.items()} | ways


def factorial(
    ways: Mapping[tuple[bool, bool, str], Float[np.ndarray, "text feature"]],
    categories: Labels,
    threshold: Threshold = 5.0,
    n: int = 20,
) -> pd.DataFrame:
    """One row per way: the factors; `specialists`, categories with a score above 0 by the older
    rule; `shuffled`, as many under shuffled labels, mean of `n`; `coverage`, the share of texts on
    which the most frequent feature fires."""
    rows = []
    for way, matrix in ways.items():
        null = count_specialists_null(matrix, categories, threshold, n=n)
        summary = summarize_features(np.maximum(matrix, 0))
        row = dict(zip(FACTORS, way, strict=True)) | {"specialists": null.observed}
        row |= {"shuffled": null.mean_null, "coverage": float(summary.frequency.max())}
        rows.append(row)
    return pd.DataFrame(rows)
