"""Paths: the expert of largest weight, layer after layer, and what foretells it.

A path, or a cluster of paths, can stand in the place of an expert: `paths_as_experts` and
`path_clusters` give a `Routing` of one layer, of which `load` compares the paths, `contrast` what
kinds of text have to do with them, and `token_statistics` what tokens have.

How predictors are scored (`predict_experts`, `predict_from_dimensions`): they are fitted on half of
the texts, and the tokens of the other half are foretold. Chance is the expert that was most
frequent in the first half.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import scipy.stats
from jaxtyping import Bool, Int
from scipy.sparse import coo_array
from sklearn.cluster import HDBSCAN
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from lenslab.moe import statistics
from lenslab.moe.routing import Codes, Routing
from lenslab.moe.statistics import Array, Labels, Table, blocks_of, counts_of, grid, means, random

SOME = 200_000  # tokens that paths are counted of, and chance of continuity is drawn of, at most
SHARES = (0.02, 0.05, 0.1, 0.25, 0.5, 1.0)  # of dimensions that a probe reads
FIT = 4000  # tokens that a probe is fitted on at most
COVERAGE = ["paths", "cover 80 %", "cover 95 %", "top 10", "top 50", "entropy"]


def _prefixes(experts: Int[Array, "token layer"], n: int) -> Iterator[Codes]:
    """The paths of the tokens up to the second layer, and to each one after it, numbered from 0."""
    codes = pd.factorize(experts[:, 0])[0]
    for column in experts.T[1:]:
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
    paths, codes, counts = np.unique(experts, axis=0, return_inverse=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")[: (counts >= at_least).sum()]
    if not len(order):
        told = f"No path has {at_least} tokens (`at_least`)"
        raise ValueError(f"{told}; the commonest has {counts.max()}.")
    number = np.full(len(counts), -1)
    number[order] = np.arange(len(order))
    return _as_experts(routing, number[codes], len(order)), paths[order]


def _as_experts(routing: Routing, codes: Codes, n: int) -> Routing:
    ids = codes[:, None, None]
    one = dict(layers=routing.layers[-1:], n_experts=n, weights=np.ones(ids.shape, np.float32))
    return replace(routing, logits=None, inputs=None, ids=ids, **one)


def path_coverage(routing: Routing, seed: int = 0) -> Table:
    """Of the paths from the first layer to `layer`, by `statistic`: how many "paths" there are, and
    how many "cover 80 %" and "cover 95 %" of the tokens; the share of the tokens on the "top 10"
    and "top 50"; "entropy", as a share of the largest possible. The number of paths grows with that
    of tokens: of `SOME`, drawn, where there are more.

    Chance: each layer's experts shuffled among the tokens, which leaves loads alone, 20 times.
    ValueError for fewer than two layers.
    """
    if len(routing.layers) < 2:
        raise ValueError("A path goes through two layers or more.")
    rng, e, blocks = random(seed, "shuffled layers"), routing.n_experts, blocks_of(routing)
    some = np.sort(rng.permutation(len(blocks))[:SOME])
    experts, ones = routing.ids[some, :, 0], np.ones(len(some), int)

    def covered(counts: Iterable[Codes]) -> Array:  # of the tokens on each path, layer by layer
        return np.concatenate([_coverage(c, length, e) for length, c in enumerate(counts, 2)])

    shuffled = (rng.permuted(experts, axis=0) for _ in range(20))
    null = [covered(map(np.bincount, _prefixes(columns, e))) for columns in shuffled]
    by_block = [coo_array((ones, (c, blocks[some]))).tocsr() for c in _prefixes(experts, e)]
    weights = statistics.resampled(np.eye(by_block[0].shape[1], dtype=np.float32), seed).astype(int)
    drawn = [covered(counts @ draw for counts in by_block) for draw in weights]
    value = covered(counts.sum(1) for counts in by_block)
    rows = grid(layer=routing.layers[1:], statistic=COVERAGE)
    return statistics.measured(rows, value, np.array(null), np.array(drawn))


def _coverage(counts: Codes, length: int, n_experts: int) -> Array:
    """`COVERAGE` of the tokens on each path, through `length` layers."""
    n = np.bincount(counts)  # how many paths have each size: nothing has to be sorted
    size = np.flatnonzero(n[1:])[::-1] + 1  # the largest first
    n, number = n[size], np.r_[0, n[size].cumsum()]
    tokens = np.r_[0, (size * n).cumsum()]
    cover = [np.ceil(np.interp(q * tokens[-1], tokens, number)) for q in (0.8, 0.95)]
    top = [np.interp(k, number, tokens) / tokens[-1] for k in (10, 50)]
    bits = -(n * size * np.log2(size / tokens[-1])).sum() / tokens[-1]
    return np.array([number[-1], *cover, *top, bits / (length * np.log2(n_experts))])


def path_clusters(
    routing: Routing, tokens: int = 2000, smallest: int = 20, seed: int = 0
) -> tuple[Routing, Int[Array, "cluster layer"], Table]:
    """(a routing of some tokens, drawn, whose one layer's experts are clusters of their paths, -1
    for none; the commonest expert of each layer in them; of the tokens, how many are in one).

    Clusters are those of HDBSCAN. Two paths are as far apart as the share of layers in which they
    differ: numbers of experts mean nothing. Chance: each layer's experts shuffled among the tokens,
    five times.
    """
    rng = random(seed, "clustered tokens")
    some = routing[np.sort(rng.permutation(len(routing.ids))[:tokens])]
    experts = some.ids[..., 0]

    def clustered(experts: Array) -> Codes:
        # "leaf", else shuffled layers are one cluster
        options = dict(metric="hamming", copy=True, cluster_selection_method="leaf")
        return HDBSCAN(smallest, **options).fit_predict(experts).astype(int)

    found = clustered(experts)
    null = np.array([[(clustered(rng.permuted(experts, axis=0)) >= 0).mean()] for _ in range(5)])
    share = means((found >= 0)[:, None], blocks_of(some), grid(tokens=[len(found)]), null, seed)
    paths = [scipy.stats.mode(experts[found == c]).mode for c in range(found.max() + 1)]
    paths = np.array(paths, int).reshape(-1, experts.shape[1])
    return _as_experts(some, found, max(len(paths), 1)), paths, share


def continuity(routing: Routing, span: int = 1, seed: int = 0) -> Table:
    """EC: the share of tokens that keep an expert's number for `span` layers after a `layer`. What
    number an expert has is arbitrary. Chance: the layers of tokens drawn anew for each layer, 20
    times.

    ValueError for a span as long as there are layers.
    """
    if not 1 <= span < len(routing.layers):
        raise ValueError(f"A span is from 1 to {len(routing.layers) - 1} here, not {span}.")
    blocks, rng, e = blocks_of(routing), random(seed, "other tokens"), routing.n_experts
    layers, each = np.split(routing.ids, len(routing.layers), axis=1), np.arange(len(blocks))
    member = [np.packbits(counts_of(ids, each, e)[:, 0] > 0, axis=1) for ids in layers]

    def kept(member: list[Array]) -> Array:  # [token, layer]
        runs = (member[i : i + span + 1] for i in range(len(member) - span))
        return np.stack([np.bitwise_and.reduce(run).any(1) for run in runs], 1).astype(np.float32)

    n, some = len(blocks), min(len(blocks), SOME)
    null = [kept([m[rng.integers(n, size=some)] for m in member]).mean(0) for _ in range(20)]
    return means(kept(member), blocks, grid(layer=routing.layers[:-span]), np.array(null), seed)


def fitted_half(routing: Routing, seed: int) -> Bool[Array, " token"]:
    """The tokens of half of the texts, drawn."""
    texts = statistics.texts_of(routing)
    order = random(seed, "halves").permutation(texts.max() + 1)
    return order[texts] < len(order) / 2


def predict_experts(routing: Routing, kinds: Labels | None = None, seed: int = 0) -> Table:
    """Share of held-out tokens whose expert of largest weight is foretold, by `layer` and
    `predictor`: "position" in the text, "kind" of the text, "token", and "bigram": the token with
    the one before it (a new pair is left to the token, a new token to the most frequent expert)."""
    if kinds is not None:
        statistics.check_labels(routing, kinds)
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
    return _scores(np.array(right), routing[~fit], rows, seed)


def predict_from_dimensions(routing: Routing, shares: Sequence = SHARES, seed: int = 0) -> Table:
    """As `predict_experts`, by logistic regressions on what the router reads: on a `share` of its
    `dimensions`, the "largest" (mean of absolute values) or "random" ones, by `layer`. Fitted on at
    most `FIT` tokens. ValueError without `inputs`."""
    if routing.inputs is None:
        raise ValueError("Capture with inputs=True: the probe reads what the routers read.")
    fit, rng = fitted_half(routing, seed), random(seed, "dimensions")
    some, right = rng.permutation(np.flatnonzero(fit))[:FIT], []
    for x, experts in zip(routing.inputs.swapaxes(0, 1), routing.ids[..., 0].T, strict=True):
        largest = np.argsort(-np.abs(x[some]).mean(0))
        x = StandardScaler().fit(x[some]).transform(x)
        told = [np.full((~fit).sum(), np.bincount(experts[fit] + 1).argmax() - 1)]
        for order in (largest, rng.permutation(len(largest))):
            for n in (max(1, round(share * len(order))) for share in shares):
                probe = LogisticRegression(tol=0.01).fit(x[some][:, order[:n]], experts[some])
                told.append(probe.predict(x[~fit][:, order[:n]]))
        right.append([one == experts[~fit] for one in told])
    rows = grid(layer=routing.layers, dimensions=["largest", "random"], share=shares)
    return _scores(np.array(right), routing[~fit], rows, seed)


def _scores(right: Bool[Array, "layer told token"], rest: Routing, rows: Table, seed: int) -> Table:
    """The table of what was told rightly; the first of `told` is the most frequent expert. The
    interval is of the gain over it, token by token."""
    gain = (right[:, 1:].astype(np.float32) - right[:, :1]).reshape(-1, right.shape[2]).T
    chance = right[:, :1].mean(2).repeat(right.shape[1] - 1, 1).reshape(1, -1)
    table = means(gain, blocks_of(rest), rows, 0 * chance, seed)
    return table.assign(value=table["value"] + chance[0], chance=chance[0])
