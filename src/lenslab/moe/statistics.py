"""Statistics of routing, each with its chance level, the excess over it, and an interval.

Every function returns a table whose rows are what was measured, with
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

from collections.abc import Callable

import numpy as np
import pandas as pd
import scipy.sparse
import scipy.stats
from jaxtyping import Float, Int, Num, Shaped
from scipy.spatial.distance import jensenshannon

from lenslab.moe.routing import Codes, Routing
from lenslab.runtime import derive_generator
from lenslab.stats import benjamini_hochberg, shuffled_orders

BLOCKS = 100  # groups of texts at most
DRAWS = 200  # of a null, and of texts
TINY = 1e-30

Array = np.ndarray
Labels = Shaped[Array, " token"]
Table = pd.DataFrame


def measured(rows: Table, value: Array, null: Array, drawn: Array) -> Table:
    """The table of values `[row]`, given draws of their null `[draw, row]`, or one line of what is
    known of it, and values of drawn texts `[draw, row]`. These are centred: drawing adds a bias."""
    table = rows.assign(value=value.ravel(), chance=null.mean(0))
    table["excess"] = table["value"] - table["chance"]
    for name, level in (("low", 0.025), ("high", 0.975)):
        table[name] = table["excess"] + np.quantile(drawn - drawn.mean(0), level, axis=0)
    if len(null) > 1:
        both = np.vstack([value, null])
        z = (both - both.mean(0)) / np.maximum(both.std(0), 1e-12)
        largest = np.nanmax(z, 1, initial=-np.inf, keepdims=True)
        table["p"] = np.where(np.isnan(z[0]), np.nan, (largest >= z[0] - 1e-9).mean(0))
    return table


def grid(**axes) -> Table:
    """One row per combination, the last axis fastest."""
    return pd.MultiIndex.from_product(axes.values(), names=axes).to_frame(index=False)


def divergence(counts: Num[Array, "... e"], others: Num[Array, "... e"]) -> Array | np.floating:
    """Jensen-Shannon divergence in bits, the square of the distance, of two distributions given as
    counts; 0 where one has none."""
    with np.errstate(invalid="ignore"):
        bits = np.nan_to_num(jensenshannon(counts, others, base=2, axis=-1) ** 2)
    return bits + 0 * counts.sum(-1)  # NaN stays NaN


def random(seed: int, what: str) -> np.random.Generator:
    """NumPy's generator for a seed and what it is for."""
    return np.random.default_rng(derive_generator(seed, what).initial_seed())


def check_labels(routing: Routing, labels: Labels) -> None:
    """ValueError for labels that are not one for each token, none missing."""
    n = len(routing.token)
    if np.shape(labels) != (n,) or pd.isna(labels).any():
        told = f"{len(labels)} labels for {n} tokens: one each is needed, none missing"
        raise ValueError(f"{told}. Of labels of texts give labels[routing.text].")


def texts_of(routing: Routing) -> Codes:
    """The texts of the tokens, numbered from 0. ValueError for a single one."""
    codes = np.unique(routing.text, return_inverse=True)[1]
    if codes.max() < 1:
        raise ValueError("All tokens are of one text: nothing can be said of other texts.")
    return codes


def blocks_of(routing: Routing) -> Codes:
    """The groups of texts that intervals draw. ValueError as `texts_of`."""
    return texts_of(routing) % BLOCKS


def counts_of(ids: Int[Array, "token layer rank"], codes: Codes, e: int, n: int = 0) -> Array:
    """[code, layer, expert] how many slots, at `e` experts, the tokens of each code have; of codes
    up to `n`, or up to the largest."""
    n, bins = n or int(codes.max()) + 1, e + 1  # the first bin is that of no expert
    slots = codes[:, None] * bins + 1
    each = [np.bincount((slots + i).ravel(), None, n * bins) for i in ids.swapaxes(0, 1)]
    return np.stack(each, dtype=np.float32).reshape(-1, n, bins).swapaxes(0, 1)[..., 1:]


def resampled(counts: Float[Array, "block ..."], seed: int) -> Float[Array, "draw ..."]:
    """Sums of the blocks' counts over `DRAWS` samples of the blocks, with replacement."""
    n = len(counts)
    weights = random(seed, "texts").multinomial(n, np.full(n, 1 / n), DRAWS) / (n > 1 or np.nan)
    return np.tensordot(weights.astype(np.float32), counts, 1)


def sums_of(codes: Codes, values: Float[Array, "token ..."]) -> Float[Array, "code ..."]:
    """Sums of the values of each code."""
    ones = np.ones(len(codes), np.float32)
    chosen = scipy.sparse.csr_array((ones, (codes, np.arange(len(codes)))))
    return (chosen @ values.reshape(len(values), -1)).reshape(-1, *values.shape[1:])


def means(values: Array, blocks: Codes, rows: Table, null: Array, seed: int) -> Table:
    """The table of the means of `[token, row]`."""
    each = np.hstack([values, np.ones((len(values), 1))]).astype(np.float32)
    drawn = resampled(sums_of(blocks, each), seed)
    return measured(rows, values.mean(0), null, drawn[:, :-1] / drawn[:, -1:])


def compared(rows: Table, own: Array, null: Array, statistic: Callable, seed: int) -> Table:
    """The table of a statistic of counts `[block, ...]`, and of draws of their null."""
    each = (statistic(c) for c in (own.sum(0, keepdims=True), null, resampled(own, seed)))
    return measured(rows, *(value.reshape(len(value), -1) for value in each))


def load(routing: Routing, seed: int = 0) -> Table:
    """Load of each `layer` and `expert`, as a multiple of its fair share."""
    counts = counts_of(routing.ids, blocks_of(routing), routing.n_experts)
    rows = grid(layer=routing.layers, expert=range(routing.n_experts))
    return compared(rows, counts, np.ones((1, *counts.shape[1:])), _loads, seed)


def balance(routing: Routing, seed: int = 0) -> Table:
    """How even the load of each `layer` is, by `statistic`: "entropy", as a share of the largest
    possible, "divergence" from even loads in bits (Kullback-Leibler), and "in use", the share of
    experts with at least a tenth of the fair load. Chance: as many slots drawn evenly, so `p` is
    of loads less even only for "divergence"."""
    counts = counts_of(routing.ids, blocks_of(routing), routing.n_experts)
    slots, e = counts.sum((0, 2)).astype(int), routing.n_experts
    even = random(seed, "even loads").multinomial(slots, np.full(e, 1 / e), (DRAWS, len(slots)))

    def statistics(counts: Array) -> Array:  # [draw, layer, statistic]
        bits = scipy.stats.entropy(counts, base=2, axis=-1)
        in_use = (_loads(counts) >= 0.1).mean(-1)
        return np.stack([bits / np.log2(e), np.log2(e) - bits, in_use], -1)

    rows = grid(layer=routing.layers, statistic=["entropy", "divergence", "in use"])
    return compared(rows, counts, even, statistics, seed)


def _loads(counts: Array) -> Array:
    return counts * counts.shape[-1] / counts.sum(-1, keepdims=True)


def coactivation(routing: Routing, seed: int = 0) -> Table:
    """How often two experts of a layer fire together: the smaller of P(other | expert) and
    P(expert | other), which is 1 for a pair that is never apart, whatever its ranks. Rows: `layer`,
    `expert`, `other`.

    `p` is of excess over chance from block to block of texts (t), `q` Benjamini and Hochberg's over
    all pairs. ValueError where a token has one expert.
    """
    k, e = routing.ids.shape[2], routing.n_experts
    if k < 2 or (routing.ids < 0).any():
        raise ValueError("A token has one expert, or fewer than others: nothing to fire together.")
    blocks, tables, pairs = blocks_of(routing), [], np.triu_indices(e, 1)
    order, size = np.argsort(blocks, kind="stable"), np.bincount(blocks)
    for index, layer in enumerate(routing.layers):
        member = counts_of(routing.ids[order][:, [index]], np.arange(len(order)), e)[:, 0]
        member = np.split(member, size.cumsum()[:-1])
        joint = np.stack([m.T @ m for m in member])  # [block, expert, other]
        rates = np.diag(joint.sum(0)) / size.sum()
        both = pairs_by_chance(rates, k)[pairs]
        chance = both / np.maximum(np.maximum(*rates[np.array(pairs)]), TINY)
        value, drawn = map(_together, (joint.sum(0, keepdims=True), resampled(joint, seed)))
        rows = pd.DataFrame({"layer": layer, "expert": pairs[0], "other": pairs[1]})
        table = measured(rows, value[:, *pairs], chance[None], drawn[:, *pairs])
        beyond = joint[:, *pairs] - both * size[:, None]
        t = beyond.mean(0) / np.maximum(scipy.stats.sem(beyond), 1e-9)
        tables.append(table.assign(p=scipy.stats.t.sf(t, len(size) - 1)))
    table = pd.concat(tables, ignore_index=True)
    return table.assign(q=benjamini_hochberg(table["p"].to_numpy()))


def _together(joint: Array) -> Array:
    fired = np.diagonal(joint, axis1=1, axis2=2)
    return joint / np.maximum(np.maximum(fired[:, None], fired[:, :, None]), 1)


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


def _sets(odds: Array, k: int) -> Array | np.floating:
    """Sum over all sets of k of the product of their odds `[..., e]`."""
    sums = np.zeros((k + 1, *odds.shape[:-1]))
    sums[0] = 1
    for one in np.moveaxis(odds, -1, 0):
        sums[1:] = sums[1:] + one * sums[:-1]
    return sums[k]


def contrast(
    routing: Routing, labels: Labels, strata: Labels | int = 0, average: bool = False, seed: int = 0
) -> Table:
    """How far the texts of a label are from the other texts of their stratum: the `divergence`
    between the experts of both. Rows: `stratum`, `label`, `layer`; with `average` the mean over a
    stratum's labels.

    Kinds of text as labels: their routing signatures, beyond loads, which all kinds share. Meanings
    as labels, words as strata, averaged, on the rows of those words: ICS.

    ValueError where a text has several labels or strata, and as `shuffled_orders`.
    """
    for given in (labels, strata) if np.ndim(strata) else (labels,):
        check_labels(routing, given)
    texts = texts_of(routing)
    facts = pd.DataFrame({"stratum": strata, "label": labels}).groupby(texts)
    if (facts.nunique() > 1).any(axis=None):
        raise ValueError("A text has several labels or strata: labels are of texts here.")
    grouped = facts.first().groupby(["stratum", "label"])
    group, rows = grouped.ngroup().to_numpy(), grouped.size().index.to_frame(index=False)
    above = pd.factorize(rows["stratum"])[0]  # [group]
    if (alone := rows[~rows["stratum"].duplicated(keep=False)]["stratum"].tolist())[:1]:
        raise ValueError(f"There is one label in stratum {alone[0]}: it has no others.")
    counts = counts_of(routing.ids, texts, routing.n_experts)  # [text, layer, expert]

    def apart(group: Array, texts: Array | slice = slice(None)) -> Array:
        own = sums_of(group, counts[texts])
        value = divergence(own, sums_of(above, own)[above] - own)  # [group, layer]
        return (sums_of(above, value) / np.bincount(above)[:, None] if average else value).ravel()

    orders = shuffled_orders(group, derive_generator(seed, "labels"), DRAWS, above[group])
    null = np.stack([apart(group[order]) for order in orders])
    same, rng = pd.Series(np.arange(len(group))).groupby(group), random(seed, "texts")
    draws = (same.sample(frac=1, replace=True, random_state=rng).to_numpy() for _ in range(DRAWS))
    drawn = np.stack([apart(group[draw], draw) for draw in draws])  # as many of each label
    if (single := same.size().to_numpy() < 2).any():  # drawn again it is the same text
        single = sums_of(above, single.astype(float)) > 0 if average else single
        drawn[:, np.repeat(single, len(routing.layers))] = np.nan
    rows = rows[["stratum"]].drop_duplicates() if average else rows
    rows = rows.merge(pd.DataFrame({"layer": routing.layers}), how="cross")
    return measured(rows, apart(group), null, drawn)


def token_statistics(routing: Routing, tokens: Codes, per: int = 300, seed: int = 0) -> Table:
    """Of tokens given by id, by `token`, `layer` and `statistic`: "TIS", the `divergence` between a
    token's experts and those of all other tokens; "coverage 1" and "coverage 4", the share of its
    slots at its one and its four most used experts. Of at most `per` occurrences each, drawn.

    ValueError for a token that never occurs.
    """
    rng, texts, e = random(seed, "occurrences"), texts_of(routing), routing.n_experts
    order, zeros, results = np.argsort(texts, kind="stable"), np.zeros_like(texts), []
    total = counts_of(routing.ids, zeros, e)
    for token in tokens:
        rows = np.flatnonzero(routing.token == token)
        if not len(rows):
            raise ValueError(f"Token {token} never occurs in these texts.")
        others = total - counts_of(routing.ids[rows], zeros[rows], e)
        rows = rng.permutation(rows)[:per]
        where, rest = texts[rows], order[routing.token[order] != token]
        size = np.bincount(texts[rest], minlength=texts.max() + 1)
        some = where[size[where] > 0]  # of a text of this token alone nothing can be drawn
        place = (size.cumsum() - size)[some] + rng.integers(size[some], size=(DRAWS, len(some)))
        draws = np.arange(DRAWS).repeat(len(some))
        null = counts_of(routing.ids[rest[place].ravel()], draws, e, DRAWS)
        own = counts_of(routing.ids[rows], np.unique(where, return_inverse=True)[1], e)
        for counts in (own.sum(0, keepdims=True), null, resampled(own, seed)):
            shares = -np.sort(-counts / np.maximum(counts.sum(-1, keepdims=True), 1), -1)
            each = [divergence(counts, others), shares[..., 0], shares[..., :4].sum(-1)]
            results.append(np.stack(each, -1).reshape(len(counts), -1))
    rows = grid(token=tokens, layer=routing.layers, statistic=["TIS", "coverage 1", "coverage 4"])
    return measured(rows, *(np.concatenate(results[i::3], 1) for i in range(3)))


def router_geometry(weights: Float[Array, "layer e d"], seed: int = 0) -> Table:
    """How far the rows of each router are from right angles, ||cosines - I|| / E * sqrt(D), by
    `router`. Chance: rows of normal numbers. The interval draws dimensions."""
    rng, (n, _, d) = random(seed, "routers"), weights.shape
    normal = (rng.standard_normal(weights.shape) for _ in range(DRAWS))
    dimensions = (weights[..., rng.integers(d, size=d)] for _ in range(DRAWS))
    values = (np.stack([*map(_skew, some)]) for some in ([weights], normal, dimensions))
    return measured(grid(router=range(n)), *values)


def _skew(weights: Array) -> Array:
    rows = weights / np.maximum(np.linalg.norm(weights, axis=2, keepdims=True), TINY)
    cosines = rows @ rows.swapaxes(1, 2) - np.eye(rows.shape[1])
    return np.linalg.norm(cosines, axis=(1, 2)) / rows.shape[1] * rows.shape[2] ** 0.5
