"""Statistics of routing, each with its chance level, the excess over it, and an interval.

Every function returns `Statistics`: a table whose rows are what was measured, with
- `value` as it is, and `chance`: the mean of the same number where the null holds. Few tokens make
  every divergence and share too large; draws of a null, of as many tokens, have the same bias;
- `excess`, value less chance, and its 95 % interval, `low` to `high`: texts are drawn with
  replacement, or `BLOCKS` groups of texts where there are more. NaN where there is only one;
- `p`, where a null is drawn: the share of draws whose largest excess anywhere in the table, in
  standard deviations of its row, is as large (Westfall and Young 1993). It is corrected for the
  whole table, and cannot fall below 1 / (1 + draws).

The nulls: of `load` even loads; of `coactivation` experts drawn with the same loads, as many a
token; of `contrast` labels shuffled among texts, whose loads are the same; of `token_statistics`
other tokens of the same texts; of `continuity` layers of different tokens; of
`specialisation` random linear routers on the same inputs, with biases tuned to the same loads.

A text counts as one document. Of packed windows give `replace(routing, text=documents)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.sparse
import scipy.stats
import torch
from jaxtyping import Bool, Float, Int, Num, Shaped

from lenslab.files import Result
from lenslab.metrics import Numbers
from lenslab.moe.routing import Codes, Ranks, Routing, slot_counts
from lenslab.runtime import derive_generator
from lenslab.stats import benjamini_hochberg, shuffled_orders

BLOCKS = 100  # groups of texts at most
DRAWS = 200  # of a null, and of texts
SOME = 100_000  # tokens, of which chance is drawn at most
TINY = 1e-30

Array = np.ndarray
Labels = Shaped[Array, " token"]
Counts = Float[Array, "..."]


@dataclass(frozen=True, eq=False)
class Statistics(Result):
    """A table of measured numbers; its columns are explained at the head of this module."""

    table: pd.DataFrame

    def to_frame(self) -> pd.DataFrame:
        """One row per number."""
        return self.table


def measured(rows: pd.DataFrame, value: Array, null: Array, drawn: Array) -> Statistics:
    """The table of values `[row]`, given draws of their null `[draw, row]`, or one line of what is
    known of it, and values of drawn texts `[draw, row]`. These are centred: drawing adds a bias."""
    value = value.ravel()
    table = rows.assign(value=value, chance=null.mean(0))
    table["excess"] = table["value"] - table["chance"]
    for name, level in (("low", 0.025), ("high", 0.975)):
        table[name] = table["excess"] + np.quantile(drawn - drawn.mean(0), level, axis=0)
    if len(null) > 1:
        both = np.vstack([value, null])
        z = (both - both.mean(0)) / np.maximum(both.std(0), 1e-12)
        table["p"] = (z.max(1)[:, None] >= z[0] - 1e-9).mean(0)
    return Statistics(table)


def grid(**axes) -> pd.DataFrame:
    """One row per combination, the last axis fastest."""
    return pd.MultiIndex.from_product(axes.values(), names=axes).to_frame(index=False)


def divergence(counts: Num[Array, "... e"], others: Num[Array, "... e"]) -> Numbers:
    """Jensen-Shannon divergence in bits, the square of the distance, of two distributions given as
    counts; 0 where one has none."""
    p, q = (x / np.maximum(x.sum(-1, keepdims=True), TINY) for x in (counts, others))
    m = np.maximum(p + q, TINY) / 2
    bits = sum((x * np.log2(np.maximum(x, TINY) / m)).sum(-1) for x in (p, q)) / 2
    return bits * (counts.sum(-1) > 0) * (others.sum(-1) > 0)


def random(seed: int, what: str) -> np.random.Generator:
    """NumPy's generator for a seed and what it is for."""
    return np.random.default_rng(derive_generator(seed, what).initial_seed())


def texts_of(routing: Routing) -> Codes:
    """The texts of the tokens, numbered from 0. ValueError for a single one."""
    codes = np.unique(routing.text, return_inverse=True)[1]
    if codes.max() < 1:
        raise ValueError("All tokens are of one text: nothing can be said of other texts.")
    return codes


def counts_of(ids: Int[Array, "token layer rank"], codes: Codes, n_experts: int) -> Counts:
    """Slots of the tokens of each code, `[code, layer, expert]`."""
    layers, n = np.moveaxis(ids, 1, 0), int(codes.max()) + 1
    return np.stack([slot_counts(i, codes, n, n_experts) for i in layers], 1, dtype=np.float32)


def resampled(counts: Float[Array, "block ..."], seed: int) -> Float[Array, "draw ..."]:
    """Sums of the blocks' counts over `DRAWS` samples of the blocks, with replacement."""
    n = len(counts)
    weights = random(seed, "texts").multinomial(n, np.full(n, 1 / n), DRAWS) / (n > 1 or np.nan)
    sums = weights.astype(np.float32) @ counts.reshape(n, -1)
    return sums.reshape(DRAWS, *counts.shape[1:])


def sums_of(codes: Codes, values: Float[Array, "token ..."]) -> Float[Array, "code ..."]:
    """Sums of the values of each code."""
    ones = np.ones(len(codes), np.float32)
    chosen = scipy.sparse.csr_array((ones, (codes, np.arange(len(codes)))))
    return (chosen @ values.reshape(len(values), -1)).reshape(-1, *values.shape[1:])


def load(routing: Routing, seed: int = 0) -> Statistics:
    """Load of each `layer` and `expert`, as a multiple of its fair share."""
    counts = counts_of(routing.ids, texts_of(routing) % BLOCKS, routing.n_experts)
    rows, drawn = (
        grid(layer=routing.layers, expert=range(routing.n_experts)),
        resampled(counts, seed),
    )
    drawn = _loads(drawn).reshape(DRAWS, -1)
    return measured(rows, _loads(counts.sum(0)), np.ones((1, len(rows))), drawn)


def balance(routing: Routing, seed: int = 0) -> Statistics:
    """How even the load of each `layer` is, by `statistic`: "entropy", as a share of the largest
    possible, "divergence" from even loads in bits (Kullback-Leibler), and "in use", the share of
    experts with at least a tenth of the fair load. Chance: as many slots drawn evenly, so `p` is
    of loads less even only for "divergence"."""
    counts = counts_of(routing.ids, texts_of(routing) % BLOCKS, routing.n_experts)
    slots, e = counts.sum((0, 2)).astype(int), routing.n_experts
    even = random(seed, "even loads").multinomial(slots, np.full(e, 1 / e), (DRAWS, len(slots)))
    values = []
    for loads in map(_loads, (counts.sum(0, keepdims=True), even, resampled(counts, seed))):
        bits = (loads / e * np.log2(np.maximum(loads, TINY))).sum(-1)  # [draw, layer]
        each = np.stack([1 - bits / np.log2(e), bits, (loads >= 0.1).mean(-1)], -1)
        values.append(each.reshape(len(loads), -1))
    rows = grid(layer=routing.layers, statistic=["entropy", "divergence", "in use"])
    return measured(rows, *values)


def _loads(counts: Array) -> Array:
    return counts * counts.shape[-1] / counts.sum(-1, keepdims=True)


def coactivation(routing: Routing, seed: int = 0) -> Statistics:
    """How often two experts of a layer fire together: the smaller of P(other | expert) and
    P(expert | other), which is 1 for a pair that is never apart, whatever its ranks. Rows: `layer`,
    `expert`, `other`.

    `p` is of excess over chance from block to block of texts (t), `q` Benjamini and Hochberg's over
    all pairs. ValueError where a token has one expert.
    """
    k, e = routing.ids.shape[2], routing.n_experts
    if k < 2:
        raise ValueError("A token has one expert: none fires together with another.")
    blocks, tables = texts_of(routing) % BLOCKS, []
    order, size, pairs = (
        np.argsort(blocks, kind="stable"),
        np.bincount(blocks),
        np.triu_indices(e, 1),
    )
    for index, layer in enumerate(routing.layers):
        member = np.split(members(routing, index)[order].astype(np.float32), size.cumsum()[:-1])
        joint = np.stack([m.T @ m for m in member])  # [block, expert, other]
        rates = np.diag(joint.sum(0)) / size.sum()
        by_chance = pairs_by_chance(rates, k)
        chance = (by_chance / np.maximum(np.maximum.outer(rates, rates), TINY))[None, *pairs]
        value, drawn = (
            _together(j)[:, *pairs] for j in (joint.sum(0)[None], resampled(joint, seed))
        )
        rows = pd.DataFrame({"layer": layer, "expert": pairs[0], "other": pairs[1]})
        beyond = joint[:, *pairs] - by_chance[pairs] * size[:, None]
        t = beyond.mean(0) / np.maximum(beyond.std(0, ddof=1) / len(size) ** 0.5, 1e-9)
        table = measured(rows, value, chance, drawn).table
        tables.append(table.assign(p=scipy.stats.t.sf(t, len(size) - 1)))
    table = pd.concat(tables, ignore_index=True)
    return Statistics(table.assign(q=benjamini_hochberg(table["p"].to_numpy())))


def _together(joint: Array) -> Array:
    fired = np.diagonal(joint, axis1=1, axis2=2)
    return joint / np.maximum(np.maximum(fired[:, None], fired[:, :, None]), 1)


def members(routing: Routing, index: int) -> Bool[Array, "token expert"]:
    """Which experts each token has at the layer with this index."""
    member = np.zeros((len(routing.ids), routing.n_experts + 1), bool)
    np.put_along_axis(member, routing.ids[:, index].astype(np.intp) + 1, True, 1)
    return member[:, 1:]


def pairs_by_chance(rates: Float[Array, " e"], k: int) -> Float[Array, "e e"]:
    """P(both) of two experts where each token gets k of them, as independently as the experts'
    `rates`, which sum to k, allow: a set of k is as probable as the product of its odds
    (conditional Bernoulli, the largest entropy), with the odds that give those rates."""
    rates = odds = np.maximum(rates.astype(np.float64), 1e-9)
    others = 1 - np.eye(len(rates))
    for _ in range(200):  # proportional fitting
        odds = odds / odds.sum()
        odds = rates * _sets(odds, k) / _sets(odds * others, k - 1)
    both = _sets(odds * others[:, None] * others, k - 2)
    return np.outer(odds, odds) * both / _sets(odds, k)


def _sets(odds: Array, k: int) -> Numbers:
    """Sum over all sets of k of the product of their odds `[..., e]`."""
    sums = np.zeros((k + 1, *odds.shape[:-1]))
    sums[0] = 1
    for one in np.moveaxis(odds, -1, 0):
        sums[1:] = sums[1:] + one * sums[:-1]
    return sums[k]


def contrast(
    routing: Routing,
    labels: Labels,
    strata: Labels | None = None,
    average: bool = False,
    seed: int = 0,
) -> Statistics:
    """How far the texts of a label are from the other texts of their stratum: the `divergence`
    between the experts of both. Rows: `stratum`, `label`, `layer`; with `average` the mean over a
    stratum's labels.

    Kinds of text as labels: their routing signatures, beyond loads, which all kinds share. Meanings
    as labels, words as strata, averaged, on the rows of those words: ICS.

    ValueError where a text has several labels or strata, and as `shuffled_orders`.
    """
    texts, layers = texts_of(routing), len(routing.layers)
    facts = pd.DataFrame({"stratum": 0 if strata is None else strata, "label": labels})
    by_text = facts.groupby(texts)
    if (by_text.nunique() > 1).any(axis=None):
        raise ValueError("A text has several labels or strata: labels are of texts here.")
    grouped = by_text.first().groupby(["stratum", "label"])
    group, names = grouped.ngroup().to_numpy(), grouped.size().index.to_frame(index=False)
    above = pd.factorize(names["stratum"])[0]  # [group]
    counts = counts_of(routing.ids, texts, routing.n_experts)  # [text, layer, expert]

    def apart(group: Array, texts: Array | slice = slice(None)) -> Array:
        own = sums_of(group, counts[texts])
        value = divergence(own, sums_of(above, own)[above] - own)  # [group, layer]
        return (sums_of(above, value) / np.bincount(above)[:, None] if average else value).ravel()

    orders = shuffled_orders(group, derive_generator(seed, "labels"), DRAWS, above[group])
    null = np.stack([apart(group[order]) for order in orders])
    rng, order, size = random(seed, "texts"), np.argsort(group, kind="stable"), np.bincount(group)
    first, n = (size.cumsum() - size)[group], size[group]
    draws = (order[first + (rng.random(len(n)) * n).astype(int)] for _ in range(DRAWS))
    drawn = np.stack([apart(group, draw) for draw in draws])  # as many of each label
    rows = names[["stratum"]].drop_duplicates() if average else names
    rows = rows.loc[rows.index.repeat(layers)].reset_index(drop=True)
    rows["layer"] = np.tile(routing.layers, len(rows) // layers)
    return measured(rows, apart(group), null, drawn)


def token_statistics(
    routing: Routing, tokens: Codes | None = None, most: int = 100, per: int = 300, seed: int = 0
) -> Statistics:
    """Of tokens given by id, or the `most` frequent, by `token`, `layer` and `statistic`: "TIS",
    the `divergence` between a token's experts and those of all other tokens; "coverage 1" and
    "coverage 4", the share of its slots at its one and its four most used experts. Of at most `per`
    occurrences each, drawn.

    ValueError for a token that never occurs.
    """
    rng, texts, e = random(seed, "occurrences"), texts_of(routing), routing.n_experts
    kinds, n = np.unique(routing.token, return_counts=True)
    tokens = kinds[np.argsort(-n, kind="stable")[:most]] if tokens is None else tokens
    order, size, zeros = np.argsort(texts, kind="stable"), np.bincount(texts), np.zeros_like(texts)
    total, results = counts_of(routing.ids, zeros, e), []
    for token in tokens:
        rows = np.flatnonzero(routing.token == token)
        if not len(rows):
            raise ValueError(f"Token {token} never occurs in these texts.")
        others = total - counts_of(routing.ids[rows], zeros[rows], e)
        rows = rng.permutation(rows)[:per]
        where = texts[rows]
        place = (size.cumsum() - size)[where] + (
            rng.random((DRAWS, len(rows))) * size[where]
        ).astype(int)
        null = counts_of(routing.ids[order[place].ravel()], np.arange(DRAWS).repeat(len(rows)), e)
        own = counts_of(routing.ids[rows], np.unique(where, return_inverse=True)[1], e)
        for counts in (own.sum(0, keepdims=True), null, resampled(own, seed)):
            shares = -np.sort(-counts / np.maximum(counts.sum(-1, keepdims=True), 1), -1)
            each = [divergence(counts, others), shares[..., 0], shares[..., :4].sum(-1)]
            results.append(np.stack(each, -1).reshape(len(counts), -1))
    rows = grid(token=tokens, layer=routing.layers, statistic=["TIS", "coverage 1", "coverage 4"])
    return measured(rows, *(np.concatenate(results[i::3], 1) for i in range(3)))


def continuity(routing: Routing, span: int = 1, seed: int = 0) -> Statistics:
    """EC: the share of tokens that keep an expert's number for `span` layers after a `layer`. What
    number an expert has is arbitrary. Chance: the layers of tokens drawn anew for each layer, 20
    times.

    ValueError for a span as long as there are layers.
    """
    if not 1 <= span < len(routing.layers):
        raise ValueError(f"A span is from 1 to {len(routing.layers) - 1} here, not {span}.")
    blocks, rng = texts_of(routing) % BLOCKS, random(seed, "other tokens")
    member = [np.packbits(members(routing, i), axis=1) for i in range(len(routing.layers))]

    def kept(member: list[Array]) -> Array:  # [token, layer]
        runs = (member[i : i + span + 1] for i in range(len(member) - span))
        return np.stack([np.bitwise_and.reduce(run).any(1) for run in runs], 1).astype(np.float32)

    n, some = len(blocks), min(len(blocks), SOME)
    null = [kept([m[rng.integers(n, size=some)] for m in member]).mean(0) for _ in range(20)]
    own = kept(member)
    drawn = resampled(sums_of(blocks, np.hstack([own, np.ones((n, 1), np.float32)])), seed)
    rows = grid(layer=routing.layers[:-span])
    return measured(rows, own.mean(0), np.array(null), drawn[:, :-1] / drawn[:, -1:])


def router_geometry(weights: Float[Array, "layer e d"], seed: int = 0) -> Statistics:
    """How far the rows of each router are from right angles, ||cosines - I|| / E * sqrt(D), by
    `router`. Chance: rows of normal numbers. The interval draws dimensions."""
    rng, (n, _, d) = random(seed, "routers"), weights.shape
    random_rows = (rng.standard_normal(weights.shape) for _ in range(DRAWS))
    dimensions = (weights[..., rng.integers(d, size=d)] for _ in range(DRAWS))
    values = (np.stack([*map(_skew, w)]) for w in ([weights], random_rows, dimensions))
    return measured(grid(router=range(n)), *values)


def _skew(weights: Array) -> Array:
    rows = weights / np.maximum(np.linalg.norm(weights, axis=2, keepdims=True), TINY)
    cosines = rows @ rows.swapaxes(1, 2) - np.eye(rows.shape[1])
    return np.linalg.norm(cosines, axis=(1, 2)) / rows.shape[1] * rows.shape[2] ** 0.5


def random_routers(
    inputs: Float[Array, "token d"], loads: Int[Array, " e"], k: int, rng: np.random.Generator
) -> Iterator[Ranks]:
    """The ids of `DRAWS` random linear routers on the same inputs: normal weights, logits of spread
    1, and biases tuned until each expert has the slots of `loads`, but for about .1 %."""
    x, target = torch.as_tensor(inputs - inputs.mean(0)), torch.as_tensor(loads).float() + 1
    for _ in range(DRAWS):
        logits = x @ torch.as_tensor(rng.standard_normal((x.shape[1], len(loads)), np.float32))
        logits /= logits.std(0)
        bias = torch.zeros(len(loads))
        for step in range(14):  # the first ones on a quarter of the tokens: nearly as good, faster
            some = logits[::4] if step < 8 else logits
            ids = (some + bias).topk(k).indices
            slots = torch.bincount(ids.flatten(), minlength=len(loads)) + 1
            ratio = target * (len(some) / len(logits)) / slots
            bias += (0.6 if step < 10 else 0.3) * ratio.log()
        yield ids.numpy()


def specialisation(routing: Routing, labels: Mapping[str, Labels], seed: int = 0) -> Statistics:
    """What an expert's slots say of a label (kind of text, token), in bits: the divergence
    (Kullback-Leibler) of their labels from all labels. Rows: `labels` (which), `layer`, `expert`;
    expert -1 is the layer's mean over slots, the mutual information.

    Chance: `random_routers` on what the routers read, on the same tokens: whatever few tokens add,
    they have too. Takes time in proportion to tokens: some thousands do. ValueError without
    `inputs`.
    """
    if routing.inputs is None:
        raise ValueError("Capture with inputs=True: random routers read what the routers read.")
    blocks, e, k = texts_of(routing) % BLOCKS, routing.n_experts, routing.ids.shape[2]
    codes = [np.unique(label, return_inverse=True)[1] for label in labels.values()]
    results: list[Array] = []
    for index in range(len(routing.layers)):
        ids, rng = routing.ids[:, index], random(seed, f"random routers {index}")
        loads = slot_counts(ids, np.zeros_like(blocks), 1, e)[0]
        draws = list(random_routers(routing.inputs[:, index], loads, k, rng))
        for code in codes:
            n = int(code.max()) + 1
            own = slot_counts(ids, blocks * n + code, (int(blocks.max()) + 1) * n, e)
            own = own.reshape(-1, n, e).astype(np.float32)
            null = (slot_counts(ids, code, n, e) for ids in draws)
            counts = (own.sum(0, keepdims=True), null, resampled(own, seed))
            results += [np.stack([*map(_told, some)]) for some in counts]
    rows = grid(layer=routing.layers, labels=list(labels), expert=[*range(e), -1])
    return measured(rows, *(np.concatenate(results[i::3], 1) for i in range(3)))


def _told(counts: Array) -> Array:
    """[expert, and all] bits of counts [label, expert]."""
    slots, of_label = counts.sum(0), counts.sum(1, keepdims=True)
    share = counts / np.maximum(slots, 1)
    ratio = share * slots.sum() / np.maximum(of_label, TINY)
    bits = (share * np.log2(np.maximum(ratio, TINY))).sum(0)
    return np.r_[bits, (bits * slots).sum() / slots.sum()]
