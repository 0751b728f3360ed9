"""Statistics of routing: by hand where a number can be had by hand; on planted routers they find
what was planted, with the right number; on random routers nothing beyond the error rate."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import entropy

from lenslab.moe import experts, paths
from lenslab.moe import statistics as moe
from lenslab.moe.routing import Routing


def route(logits, text, k=2, **fields):
    """A routing of `[token, layer, expert]` logits."""
    ids = np.argsort(-logits, axis=-1, kind="stable")[..., :k]
    weights = np.take_along_axis(logits, ids, -1).astype(np.float32)
    first = np.unique(text, return_index=True)[1]
    position = np.arange(len(text)) - first[np.unique(text, return_inverse=True)[1]]
    fields = dict(token=np.zeros(len(text), int)) | fields
    layers = tuple(range(logits.shape[1]))
    arrays = dict(ids=ids.astype(np.int16), weights=weights, text=text, position=position)
    return Routing(**arrays, layers=layers, n_experts=logits.shape[2], **fields)


def random_routing(seed=0, texts=30, tokens=20, layers=2, experts=6, kinds=5, k=2, **fields):
    """Logits that know of nothing; `text`, `token` and `inputs` beside them."""
    rng = np.random.default_rng(seed)
    text = np.repeat(np.arange(texts), tokens)
    logits = rng.standard_normal((len(text), layers, experts))
    fields = dict(token=rng.integers(kinds, size=len(text))) | fields
    inputs = rng.standard_normal((len(text), layers, 8)).astype(np.float32)
    return route(logits, text, k, inputs=inputs, **fields), logits, rng


# By hand


def test_load_and_balance_by_hand():
    ids = np.array([[0, 1], [0, 2], [0, 1], [0, 3]])[:, None]
    routing = Routing(
        ids, np.ones_like(ids, dtype=float), (4,), 5, np.array([0, 0, 1, 1]), *[np.arange(4)] * 2
    )
    table = moe.load(routing)
    assert table["value"].tolist() == pytest.approx([2.5, 1.25, 0.625, 0.625, 0])
    assert set(table["layer"]) == {4} and (table["chance"] == 1).all()
    value = moe.balance(routing).set_index("statistic")["value"]
    entropy = -sum(p * np.log2(p) for p in (1 / 2, 1 / 4, 1 / 8, 1 / 8))
    assert value["entropy"] == pytest.approx(entropy / np.log2(5))
    assert value["divergence"] == pytest.approx(np.log2(5) - entropy)
    assert value["in use"] == pytest.approx(4 / 5)


def test_the_divergence_is_the_entropy_of_the_mixture_beyond_that_of_its_parts():
    p, q = np.random.default_rng(0).integers(0, 9, (2, 7, 5)).astype(float)
    p[0] = [3, 0, 0, 0, 0]
    a, b = (x / x.sum(1, keepdims=True) for x in (p, q))
    parts = (entropy(a, base=2, axis=1) + entropy(b, base=2, axis=1)) / 2
    assert moe.divergence(p, q) == pytest.approx(entropy((a + b) / 2, base=2, axis=1) - parts)
    assert moe.divergence(p, 3 * p) == pytest.approx(np.zeros(7), abs=1e-12)
    assert moe.divergence(p[0], np.array([0, 1, 1, 0, 0])) == pytest.approx(1)
    assert moe.divergence(p[0], np.zeros(5)) == 0  # nothing to compare with


@pytest.mark.parametrize("k", [2, 3])
def test_pairs_by_chance_are_those_of_all_sets_of_k(k):
    odds = np.array([4.0, 1, 1, 0.5, 0.2, 2])
    sets = list(itertools.combinations(range(6), k))
    p = np.array([odds[list(chosen)].prod() for chosen in sets])
    p /= p.sum()
    rates = np.array([sum(q for q, s in zip(p, sets, strict=True) if e in s) for e in range(6)])
    both = moe.pairs_by_chance(rates, k)
    for i, j in itertools.combinations(range(6), 2):
        expected = sum(q for q, s in zip(p, sets, strict=True) if {i, j} <= set(s))
        assert both[i, j] == pytest.approx(expected, rel=1e-4)


def test_continuity_by_hand():
    ids = np.array(
        [
            [[0, 1], [1, 2], [2, 3]],
            [[0, 1], [0, 1], [1, 3]],
            [[0, 1], [2, 3], [2, 1]],
            [[0, 1], [3, 2], [0, 1]],
        ]
    )
    routing = Routing(ids, np.ones(ids.shape), (0, 1, 2), 4, np.arange(4), *[np.arange(4)] * 2)
    assert paths.continuity(routing)["value"].tolist() == [0.5, 0.75]
    assert paths.continuity(routing, 2)["value"].tolist() == [0.25]
    with pytest.raises(ValueError, match="A span is from 1 to 2 here, not 3"):
        paths.continuity(routing, 3)


def test_routers_at_right_angles_and_all_alike():
    alike = np.ones((1, 4, 16)) + 1e-9 * np.eye(4, 16)
    assert moe.router_geometry(np.eye(4, 16)[None])["value"][0] == 0
    table = moe.router_geometry(np.concatenate([alike, np.eye(4, 16)[None]]))
    assert table["value"][0] == pytest.approx(12**0.5 / 4 * 4)
    assert table["p"][0] < 0.05 < table["p"][1]


def test_random_routers_have_the_loads_that_they_are_given():
    routing, *_ = random_routing(texts=50, tokens=40)
    loads = np.array([100, 300, 500, 700, 1000, 1400])
    for ids in itertools.islice(
        experts.random_routers(routing.inputs[:, 0], loads, 2, np.random.default_rng(0)), 5
    ):
        found = np.bincount(ids.ravel(), minlength=6)
        assert np.abs(found - loads).sum() / 2 < 0.01 * loads.sum()


def test_one_text_is_refused():
    routing, *_ = random_routing()
    one = routing[routing.text == 3]
    for statistic in (
        moe.load,
        moe.balance,
        moe.coactivation,
        lambda r: moe.token_statistics(r, np.arange(1)),
        paths.continuity,
    ):
        with pytest.raises(ValueError, match="All tokens are of one text"):
            statistic(one)


def test_bad_input_is_refused():
    routing, *_ = random_routing()
    with pytest.raises(ValueError, match="Token 77 never occurs"):
        moe.token_statistics(routing, np.array([0, 77]))
    with pytest.raises(ValueError, match="A text has several labels"):
        moe.contrast(routing, np.arange(600) % 2)
    with pytest.raises(ValueError, match="one label in stratum 0"):
        moe.contrast(routing, np.zeros(600, int))
    with pytest.raises(ValueError, match="inputs=True"):
        experts.specialisation(route(np.zeros((4, 1, 3)), np.arange(4)), {"kind": np.arange(4)})
    with pytest.raises(ValueError, match="A token has one expert"):
        moe.coactivation(random_routing(k=1)[0])


# Planted


def test_a_pair_that_always_fires_together_scores_1_whatever_its_ranks():
    routing, logits, rng = random_routing(1, texts=100, experts=8)
    both = rng.random(len(logits)) < 0.3
    logits[:, 1, :2] = np.where(both[:, None], 9 + rng.random((len(logits), 2)), -9)
    table = moe.coactivation(route(logits, routing.text)).set_index(["layer", "expert", "other"])
    pair = table.loc[1, 0, 1]
    assert pair["value"] == 1 and pair["low"] > 0.5 and pair["q"] < 1e-3
    rates = np.bincount(route(logits, routing.text).ids[:, 1].ravel()) / len(logits)
    expected = moe.pairs_by_chance(rates, 2)[0, 1] / max(rates[:2])
    assert pair["chance"] == pytest.approx(expected, abs=1e-4) and pair["chance"] < 0.3
    assert table["excess"].idxmax() == (1, 0, 1)
    assert table.loc[1, 0, 5]["value"] == 0
    assert (table.loc[0]["q"] > 0.05).all()


def test_a_domain_expert_is_found_and_signatures_with_it():
    routing, logits, _ = random_routing(2, texts=60)
    kind = np.array(["code", "prose", "verse"])[routing.text % 3]
    logits[kind == "code", 1, 4] += 3
    planted = route(logits, routing.text, inputs=routing.inputs, token=routing.token)
    table = experts.specialisation(planted, {"kind": kind, "token": routing.token})
    found = table[table["p"] <= 0.05].set_index(["labels", "layer", "expert"])
    assert ("kind", 1, 4) in found.index
    assert {(labels, layer) for labels, layer, _ in found.index} == {("kind", 1)}
    slots = planted.ids[:, 1] == 4
    share = np.array([slots[kind == name].sum() for name in np.unique(kind)]) / slots.sum()
    assert found.loc["kind", 1, 4]["value"] == pytest.approx(
        (share * np.log2(3 * share)).sum(), abs=1e-3
    )
    table = moe.contrast(planted, kind).set_index(["label", "layer"])
    assert (table.loc["code", 1]["p"], table["excess"].idxmax()) == (1 / 201, ("code", 1))
    assert (table.xs(0, level="layer")["p"] > 0.05).all()


def test_what_a_random_router_shows_too_is_no_specialisation():
    """The inputs know the kind: a random router on them sends kinds to different experts."""
    routing, _, rng = random_routing(3, texts=60)
    kind = routing.text % 3
    inputs = routing.inputs + 2 * rng.standard_normal((3, 1, 8))[kind].astype(np.float32)
    logits = np.einsum("tld,led->tle", inputs - inputs.mean(0), rng.standard_normal((2, 6, 8)))
    routing = route(logits, routing.text, inputs=inputs)
    assert (moe.contrast(routing, kind, average=True)["p"] < 0.05).all()
    table = experts.specialisation(routing, {"kind": kind})
    assert (table["value"] > 0.02).any() and (table["p"] > 0.05).all()


@pytest.mark.parametrize("by", ["token", "context", "nothing"])
def test_a_router_of_tokens_and_one_of_contexts_are_told_apart(by):
    """Three words of two meanings, one a text: TIS finds the first router, ICS the second."""
    rng = np.random.default_rng(4)
    text = np.repeat(np.arange(120), 10)
    token = rng.integers(10, 20, len(text))
    token[::10] = text[::10] % 3  # the word, at the beginning of each text
    meaning = text // 3 % 2
    logits = 0.3 * rng.standard_normal((len(text), 2, 6))
    if by == "token":
        logits[:, 1] += rng.standard_normal((20, 6))[token]
    if by == "context":
        logits[:, 1] += rng.standard_normal((2, 3, 6))[meaning, text % 3]
    routing = route(logits, text, k=1, token=token)
    words = routing[::10]
    ics = moe.contrast(words, meaning[::10], words.token, average=True)
    tis = moe.token_statistics(routing, np.arange(3))
    tis = tis[tis["statistic"] == "TIS"]
    for table, finds in ((ics, "context"), (tis, "token")):
        assert (table[table["layer"] == 0]["p"] > 0.05).all()
        assert (table[table["layer"] == 1]["p"] <= 0.05).all() == (by == finds)
    coverage = moe.token_statistics(routing, np.arange(3)).set_index(["statistic", "layer"])
    one = coverage.loc["coverage 1", 1]
    top = [np.bincount(words.ids[words.token == t, 1, 0]).max() / 40 for t in range(3)]
    assert one["value"].tolist() == pytest.approx(top)
    assert (one["excess"] > 0.2).all() == (by == "token")


def test_an_interval_covers_the_truth_where_tokens_of_a_text_resemble_each_other():
    """Loads of experts that prefer whole texts: intervals from tokens would be far too narrow."""
    covered = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        text = np.repeat(np.arange(40), 20)
        logits = rng.standard_normal((len(text), 1, 4)) + 2 * rng.standard_normal((40, 1, 4))[text]
        table = moe.load(route(logits, text, k=1))  # the truth is 1 for each
        covered += ((table["low"] <= 0) & (table["high"] >= 0)).tolist()
    assert 0.88 < np.mean(covered) <= 1


# Nothing beyond the error rate


def first_half(routing):
    return routing.text % 2


def linear(routing):
    """A random router of the kind that `specialisation` draws."""
    weights = np.random.default_rng(len(routing.token) + int(routing.ids.sum())).standard_normal(
        (2, 8, 4)
    )
    return route(
        np.einsum("tld,lde->tle", routing.inputs, weights), routing.text, inputs=routing.inputs
    )


ALARMS = {
    "coactivation": lambda r: moe.coactivation(r)["q"],
    "contrast": lambda r: moe.contrast(r, first_half(r))["p"],
    "ICS": lambda r: moe.contrast(r, first_half(r), r.text // 2 % 3, average=True)["p"],
    "token_statistics": lambda r: moe.token_statistics(r, np.arange(5))["p"],
    "continuity": lambda r: paths.continuity(r)["p"],
    "specialisation": lambda r: experts.specialisation(linear(r), {"kind": first_half(r)})["p"],
}


@pytest.mark.parametrize("name", ALARMS)
def test_random_routers_give_alarms_in_at_most_7_of_100(name, monkeypatch):
    monkeypatch.setattr(moe, "DRAWS", 20)  # p is 1 / 21 at least
    alarms = 0
    for seed in range(200):
        routing, *_ = random_routing(1000 + seed, tokens=10, experts=4)
        alarms += bool((ALARMS[name](routing) <= 0.05).any())
    assert alarms <= 14


# Labels that say nothing


def few_texts():
    rng = np.random.default_rng(0)
    text = np.repeat(np.arange(6), 5)
    ids = rng.integers(4, size=(30, 2, 1))
    origin = dict(text=text, position=np.tile(np.arange(5), 6), token=np.r_[99, np.arange(29) % 7])
    return Routing(ids, np.ones(ids.shape, np.float32), (0, 1), 4, **origin)


def test_labels_of_texts_or_missing_ones_are_refused_and_told_what_to_give():
    routing = few_texts()
    of_texts = np.array(list("aabbcc"))
    with_inputs = replace(routing, inputs=np.ones((30, 2, 3), np.float32))
    for measure in (
        lambda labels: moe.contrast(routing, labels),
        lambda labels: paths.predict_experts(routing, labels),
        lambda labels: experts.specialisation(with_inputs, {"kind": labels}),
    ):
        with pytest.raises(ValueError, match=r"6 labels for 30 tokens.*labels\[routing\.text\]"):
            measure(of_texts)
        missing = of_texts.astype(object)[routing.text]
        missing[3] = None
        with pytest.raises(ValueError, match="none missing"):
            measure(missing)


def test_a_stratum_of_one_label_and_strata_that_are_missing_are_refused():
    routing = few_texts()
    labels, strata = np.array(list("abcabc"))[routing.text], (routing.text > 2).astype(float)
    with pytest.raises(ValueError, match="one label in stratum 0"):
        moe.contrast(routing, 0 * routing.text)
    with pytest.raises(ValueError, match=r"one label in stratum 1\.0"):
        moe.contrast(routing, np.where(strata > 0, "a", labels), strata)
    with pytest.raises(ValueError, match="none missing"):
        moe.contrast(routing, labels, np.where(strata > 0, np.nan, 0))


def test_what_has_no_value_has_no_p_and_takes_none_from_the_others():
    routing = few_texts()
    ids = routing.ids.copy()
    ids[:, 0] = -1  # the experts of the first layer were full
    table = moe.balance(replace(routing, ids=ids)).set_index(["layer", "statistic"])
    assert table.loc[0, "p"].isna().any() and table.loc[1, "p"].notna().all()
    alone = moe.balance(
        replace(routing, ids=routing.ids[:, 1:], layers=(1,), weights=routing.weights[:, 1:])
    )
    assert (table.loc[1, "p"] > 0.004).all() and alone["p"].notna().all()


def test_the_chance_of_a_token_is_that_of_other_tokens():
    text = np.repeat(np.arange(8), 4)
    token = np.tile([5, 5, 5, 9], 8)
    ids = np.where(token == 5, 0, 1)[:, None, None]
    origin = dict(text=text, position=np.tile(np.arange(4), 8), token=token)
    routing = Routing(ids, np.ones(ids.shape, np.float32), (0,), 2, **origin)
    found = moe.token_statistics(routing, np.array([5])).set_index("statistic")
    assert found.loc["TIS", ["value", "chance"]].tolist() == pytest.approx([1, 0])
    alone = moe.token_statistics(replace(routing, token=0 * token), np.array([0]))
    assert alone["chance"].tolist() == [0, 0, 0]


def test_one_text_has_no_interval():
    """Drawn with replacement it is always the same: an interval of no width would be a lie."""
    routing = few_texts()
    found = moe.token_statistics(routing, np.array([99, 3]))
    once = found[found["token"] == 99]
    assert once[["low", "high"]].isna().all(axis=None) and once["value"].notna().all()
    assert found.loc[found["token"] == 3, ["low", "high"]].notna().all(axis=None)
    labels = np.array(list("aaabbc"))[routing.text]  # "c" is one text
    table = moe.contrast(routing, labels).set_index("label")
    assert table.loc["c", ["low", "high"]].isna().all(axis=None)
    assert table.loc[["a", "b"], ["low", "high"]].notna().all(axis=None)
    mean = moe.contrast(routing, labels, average=True)
    assert mean[["low", "high"]].isna().all(axis=None) and mean["p"].notna().all()
