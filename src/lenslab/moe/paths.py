"""Paths: the expert of largest weight, layer after layer, and what foretells it.

A path, or a cluster of paths, can stand in the place of an expert: `paths_as_experts` and
`path_clusters` give a `Routing` of one layer, of which `load` is the paths' shares, `contrast` what
kinds of text have to do with them, and `token_statistics` what tokens have.

How predictors are scored (`predict_experts`, `predict_from_dimensions`): they are fitted on half of
the texts, and the tokens of the other half are foretold. Chance is the expert that was most
frequent in the first half.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse
from jaxtyping import Bool, Int
from sklearn.cluster import HDBSCAN
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from lenslab.moe import statistics
from lenslab.moe.routing import Codes, Routing
from lenslab.moe.statistics import Array, Labels, Statistics, grid, measured, random, texts_of

SHUFFLES = 20  # of layers against each other
SHARES = (0.02, 0.05, 0.1, 0.25, 0.5, 1.0)  # of dimensions that a probe reads
FIT = 4000  # tokens that a probe is fitted on at most
COVERAGE = ["paths", "cover 80 %", "cover 95 %", "top 10", "top 50", "entropy"]


def _prefixes(experts: Int[Array, "token layer"], n: int) -> Iterator[Codes]:
    """The paths of the tokens up to each layer, numbered from 0."""
    codes = np.zeros(len(experts), np.int64)
    for column in experts.T:
        codes = pd.factorize(codes * (n + 1) + column + 1)[0]
        yield codes


def paths_as_experts(
    routing: Routing, layers: Sequence[int] | None = None, at_least: int = 20
) -> tuple[Routing, Int[Array, "path layer"]]:
    """(a routing whose one layer's experts are the paths through `layers`, default all, that at
    least so many tokens take, the commonest first; their experts). Other tokens have -1. ValueError
    where there is no such path."""
    columns = [routing.layers.index(layer) for layer in layers or routing.layers]
    experts = routing.ids[:, columns, 0]
    *_, codes = _prefixes(experts, routing.n_experts)
    _, first, counts = np.unique(codes, return_index=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")[: (counts >= at_least).sum()]
    if not len(order):
        raise ValueError(f"No path has {at_least} tokens; the commonest has {counts.max()}.")
    number = np.full(len(counts), -1)
    number[order] = np.arange(len(order))
    return _as_experts(routing, number[codes], len(order)), experts[first[order]]


def _as_experts(routing: Routing, codes: Codes, n: int) -> Routing:
    ids = codes[:, None, None]
    one = dict(layers=routing.layers[-1:], n_experts=n, weights=np.ones(ids.shape, np.float32))
    return replace(routing, logits=None, inputs=None, ids=ids, **one)


def path_coverage(routing: Routing, seed: int = 0) -> Statistics:
    """Of the paths from the first layer to `layer`, by `statistic`: how many "paths" there are, and
    how many "cover 80 %" and "cover 95 %" of the tokens; the share of the tokens on the "top 10"
    and "top 50"; "entropy", as a share of the largest possible.

    Chance: each layer's experts shuffled among the tokens, which leaves loads alone, 20 times.
    ValueError for fewer than two layers.
    """
    experts, e = routing.ids[..., 0], routing.n_experts
    if experts.shape[1] < 2:
        raise ValueError("A path goes through two layers or more.")
    blocks, rng = texts_of(routing) % statistics.BLOCKS, random(seed, "shuffled layers")
    weights = statistics.resampled(np.eye(blocks.max() + 1, dtype=np.float32), seed).astype(int)
    value, drawn, null = [], [], []
    for length, codes in enumerate(_prefixes(experts, e), 1):
        counts = scipy.sparse.coo_array((np.ones(len(codes), int), (codes, blocks))).tocsr()
        value.append([_coverage(counts.sum(1), length, e)])
        drawn.append([_coverage(counts @ draw, length, e) for draw in weights])
    for _ in range(SHUFFLES):
        paths = _prefixes(_shuffled(experts, rng), e)
        null.append([_coverage(np.bincount(c), length, e) for length, c in enumerate(paths, 1)])
    values = (
        np.array(value),
        np.swapaxes(np.array(null), 0, 1),
        np.array(drawn),
    )  # [layer, draw, statistic]
    rows = grid(layer=routing.layers[1:], statistic=COVERAGE)
    return measured(rows, *(np.concatenate(each[1:], axis=1) for each in values))


def _shuffled(experts: Array, rng: np.random.Generator) -> Array:
    return np.stack([rng.permutation(column) for column in experts.T], 1)


def _coverage(counts: Codes, length: int, n_experts: int) -> Array:
    """`COVERAGE` of the tokens on each path, through `length` layers."""
    n = np.bincount(counts)  # how many paths have each size: nothing has to be sorted
    size = np.flatnonzero(n[1:])[::-1] + 1  # the largest first
    n, number = n[size], np.r_[0, n[size].cumsum()]
    tokens = np.r_[0, (size * n).cumsum()]
    share = size / tokens[-1]
    cover = [np.ceil(np.interp(q * tokens[-1], tokens, number)) for q in (0.8, 0.95)]
    top = [np.interp(k, number, tokens) / tokens[-1] for k in (10, 50)]
    bits = -(n * share * np.log2(share)).sum()
    return np.array([number[-1], *cover, *top, bits / (length * np.log2(n_experts))])


class Clusters(NamedTuple):
    """Tokens whose paths are alike."""

    routing: Routing  # of the tokens looked at: their cluster as expert, -1 for none
    paths: Int[Array, "cluster layer"]  # the commonest expert of each layer
    share: Statistics  # of the tokens, how many are in a cluster


def path_clusters(
    routing: Routing, tokens: int = 2000, smallest: int = 20, seed: int = 0
) -> Clusters:
    """Clusters (HDBSCAN) of the paths of some tokens, drawn. Two paths are as far apart as the
    share of layers in which they differ: numbers of experts mean nothing. Chance: each layer's
    experts shuffled among the tokens, five times."""
    rng = random(seed, "clustered tokens")
    some = routing[np.sort(rng.permutation(len(routing.ids))[:tokens])]
    experts = some.ids[..., 0]

    def clustered(experts: Array) -> Codes:
        options = dict(cluster_selection_method="leaf")  # else shuffled layers are one cluster
        cluster = HDBSCAN(min_cluster_size=smallest, metric="hamming", copy=True, **options)
        return cluster.fit_predict(experts).astype(int)

    found = clustered(experts)
    null = [[(clustered(_shuffled(experts, rng)) >= 0).mean()] for _ in range(5)]
    share = _means((found >= 0)[:, None], some, grid(tokens=[len(found)]), np.array(null), seed)
    of_cluster = (experts[found == c] for c in range(found.max() + 1))
    paths = [[np.bincount(column + 1).argmax() - 1 for column in own.T] for own in of_cluster]
    paths = np.array(paths, int).reshape(-1, experts.shape[1])
    return Clusters(_as_experts(some, found, max(len(paths), 1)), paths, share)


def _means(
    values: Array, routing: Routing, rows: pd.DataFrame, null: Array, seed: int
) -> Statistics:
    """The table of means of `[token, row]`."""
    each = np.hstack([values, np.ones((len(values), 1))]).astype(np.float32)
    blocks = texts_of(routing) % statistics.BLOCKS
    drawn = statistics.resampled(statistics.sums_of(blocks, each), seed)
    return measured(rows, values.mean(0), null, drawn[:, :-1] / drawn[:, -1:])


def fitted_half(routing: Routing, seed: int) -> Bool[Array, " token"]:
    """The tokens of half of the texts, drawn."""
    texts = texts_of(routing)
    order = random(seed, "halves").permutation(texts.max() + 1)
    return order[texts] < len(order) / 2


def predict_experts(routing: Routing, kinds: Labels | None = None, seed: int = 0) -> Statistics:
    """Share of held-out tokens whose expert of largest weight is foretold, by `layer` and
    `predictor`: "position" in the text, "kind" of the text, "token", and "bigram": the token with
    the one before it (a new pair is left to the token, a new token to the most frequent expert)."""
    fit, e = fitted_half(routing, seed), routing.n_experts + 1
    follows = (np.diff(routing.text) == 0) & (np.diff(routing.position) == 1)
    before = np.r_[0, np.where(follows, routing.token[:-1] + 1, 0)].astype(np.int64)
    keys = {"position": routing.position, "kind": kinds, "token": routing.token}
    keys = {name: pd.factorize(key)[0] for name, key in keys.items() if key is not None}
    keys["bigram"] = pd.factorize(before * (keys["token"].max() + 1) + keys["token"])[0]
    right = []
    for experts in routing.ids[..., 0].T + 1:
        told = {"": np.full(len(fit), np.bincount(experts[fit]).argmax())}
        for name, key in keys.items():
            seen = np.bincount(key[fit] * e + experts[fit], minlength=(key.max() + 1) * e)
            seen, otherwise = seen.reshape(-1, e), told["token" if name == "bigram" else ""]
            told[name] = np.where(seen.any(1)[key], seen.argmax(1)[key], otherwise)
        right.append([told[name][~fit] == experts[~fit] for name in told])
    rows = grid(layer=routing.layers, predictor=list(keys))
    return _accuracies(np.array(right), routing[~fit], rows, seed)


def predict_from_dimensions(
    routing: Routing, shares: Sequence[float] = SHARES, seed: int = 0
) -> Statistics:
    """As `predict_experts`, by logistic regressions on what the router reads: on a `share` of its
    `dimensions`, the "largest" (mean of absolute values) or "random" ones, by `layer`. Fitted on at
    most `FIT` tokens. ValueError without `inputs`."""
    if routing.inputs is None:
        raise ValueError("Capture with inputs=True: the probe reads what the routers read.")
    fit, rng = fitted_half(routing, seed), random(seed, "dimensions")
    some, right = rng.permutation(np.flatnonzero(fit))[:FIT], []
    for x, experts in zip(routing.inputs.swapaxes(0, 1), routing.ids[..., 0].T, strict=True):
        largest, x = (
            np.argsort(-np.abs(x[some]).mean(0)),
            StandardScaler().fit(x[some]).transform(x),
        )
        told = [np.full((~fit).sum(), np.bincount(experts[fit] + 1).argmax() - 1)]
        for order in (largest, rng.permutation(len(largest))):
            for n in (max(1, round(share * len(order))) for share in shares):
                probe = LogisticRegression().fit(x[some][:, order[:n]], experts[some])
                told.append(probe.predict(x[~fit][:, order[:n]]))
        right.append([one == experts[~fit] for one in told])
    rows = grid(layer=routing.layers, dimensions=["largest", "random"], share=shares)
    return _accuracies(np.array(right), routing[~fit], rows, seed)


def _accuracies(
    right: Bool[Array, "layer told token"], held_out: Routing, rows: pd.DataFrame, seed: int
) -> Statistics:
    """The table of what was told rightly; the first of `told` is the most frequent expert. The
    interval is of the gain over it, token by token."""
    gain = right[:, 1:].astype(np.float32) - right[:, :1]
    chance = right[:, :1].mean(2).repeat(gain.shape[1], 1).reshape(1, -1)
    table = _means(gain.reshape(-1, gain.shape[2]).T, held_out, rows, 0 * chance, seed).table
    return Statistics(table.assign(value=table["value"] + chance[0], chance=chance[0]))
