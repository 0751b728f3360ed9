"""Three choices that decide how many "specialists" an older rule counts, crossed with each other.

A text's value of a feature depends on whether BOS is pooled with the rest, whether padding is, and
whether tokens are encoded before they are averaged or after.
1. `pooled_ways`: the eight combinations, `[text, feature]` each.
2. `factorial`: what the older rule (`count_specialists`) says of each, beside shuffled labels, and
   how much of the texts the most frequent feature covers.
3. `planted_layers`: four layers that hold the same, only stronger from one to the next, with a huge
   vector at BOS. Whatever a rule says of the depth of these layers is its own doing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lenslab.features.activations import Labels
from lenslab.features.ranking import Threshold, count_specialists_null, summarize_features
from lenslab.runtime import derive_generator

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


class PlantedLayer(NamedTuple):
    """One layer of `planted_layers`."""

    x: Float[Tensor, "text pos d_in"]
    encode: Encode


def planted_layers(
    *, bos: float = 3000.0, scales: tuple[float, ...] = (1.0, 1.15, 1.35, 2.0), seed: int = 0
) -> tuple[dict[str, PlantedLayer], Tensor, Tensor, np.ndarray]:
    """(layers by name, real, attention, categories): seventy texts of seven kinds, ten each, of 10
    to 20 tokens after BOS, padded.

    Every kind has a feature that fires on every other token of its texts, some kinds strongly,
    some weakly; so has every single text, whatever its kind, and one feature is everywhere. A
    layer is the same as the one before, times a factor. The SAE knows the features; like a trained
    one it has a bias that a feature must exceed to fire.
    """
    generator = derive_generator(seed, "planted layers")
    kinds, texts, longest, bias = 7, 70, 20, 12.0
    d_in = kinds + texts + 3  # and the common feature, what padding holds, and the sink at BOS
    categories = np.repeat([f"kind {kind}" for kind in range(1, kinds + 1)], texts // kinds)
    lengths = torch.randint(10, longest + 1, (texts, 1), generator=generator)
    attention = torch.arange(longest + 1) < 1 + lengths
    real = attention.clone()
    real[:, 0] = False
    own = torch.zeros(texts, d_in)  # strength of each feature in each text
    own[:, -3] = 12.0
    for text in range(texts):
        own[text, text * kinds // texts] = torch.linspace(16, 28, kinds)[text * kinds // texts]
        own[text, kinds + text] = torch.linspace(8, 22, texts)[text * 29 % texts]
    phase = torch.randint(2, (texts, 1, d_in), generator=generator)
    fires = (torch.arange(longest + 1)[:, None] + phase) % 2 == 0  # [text, pos, feature]
    x = fires * (own[:, None] + bias * (own[:, None] > 0))
    x[~attention] = 20 * torch.eye(d_in)[-2]
    turned = torch.linalg.qr(torch.randn(d_in, d_in, generator=generator))[0]
    sink = 1 + torch.rand(d_in, generator=generator)  # every feature sees it
    layers = {}
    for number, scale in enumerate(scales, 1):
        values = x * scale
        values[:, 0] = bos * sink / sink.norm()
        layers[f"layer {number}"] = PlantedLayer(
            values @ turned, lambda given, scale=scale: torch.relu(given @ turned.T - bias * scale)
        )
    return layers, real, attention, categories
