"""Paths through layers: counted by hand, found where they were planted; predictors are scored on
texts that they were not fitted on."""

from dataclasses import replace

import numpy as np
import pytest
from test_moe_statistics import random_routing, route

from lenslab.moe import paths, statistics
from lenslab.moe.routing import Routing


def planted(share=0.4, seed=0, texts=60, layers=4, **options):
    """Random top-1 routers; that share of the tokens takes the path 1, 2, 3, 0."""
    routing, logits, rng = random_routing(seed, texts, layers=layers, experts=4, k=1, **options)
    on = rng.random(len(logits)) < share
    logits[on, np.arange(layers)[:, None], np.array([1, 2, 3, 0])[:, None]] += 50
    return route(logits, routing.text, 1, token=routing.token, inputs=routing.inputs), on


def by_hand(experts):
    experts = np.array(experts)[..., None]
    tokens = np.arange(len(experts))
    return Routing(experts, np.ones(experts.shape), (3, 5), 3, tokens, tokens, tokens)


def test_coverage_by_hand():
    table = paths.path_coverage(by_hand([[0, 1]] * 5 + [[0, 2]] * 3 + [[1, 1], [2, 2]]))
    value = table.set_index(["layer", "statistic"])["value"].loc[5]
    assert value[paths.COVERAGE[:5]].tolist() == [4, 2, 4, 1, 1]
    p = np.array([0.5, 0.3, 0.1, 0.1])
    assert value["entropy"] == pytest.approx(-(p * np.log2(p)).sum() / (2 * np.log2(3)))
    with pytest.raises(ValueError, match="two layers or more"):
        paths.path_coverage(random_routing(layers=1)[0])


def test_top_10_and_top_50_are_the_commonest_paths():
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 9, 80)
    found = paths._coverage(counts, 2, 9)
    assert found[0] == 80
    assert found[3:5] == pytest.approx(
        [np.sort(counts)[-n:].sum() / counts.sum() for n in (10, 50)]
    )
    running = np.sort(counts)[::-1].cumsum() / counts.sum()
    assert found[1:3].tolist() == [1 + (running < q).sum() for q in (0.8, 0.95)]


def test_a_planted_path_is_found_with_its_share():
    routing, on = planted()
    alone, experts = paths.paths_as_experts(routing, at_least=30)
    assert experts.tolist() == [[1, 2, 3, 0]] and alone.n_experts == 1
    took = alone.ids[:, 0, 0] == 0
    assert took[on].all() and took.sum() == (routing.ids[..., 0] == [1, 2, 3, 0]).all(1).sum()
    table = paths.path_coverage(routing).set_index(["layer", "statistic"])
    assert table.loc[3, "entropy"]["excess"] < -0.05 and table.loc[3, "entropy"]["high"] < 0
    assert table.loc[3, "top 10"]["excess"] > 0.1 and table.loc[3, "top 10"]["p"] == 1 / 21
    with pytest.raises(ValueError, match="No path has 9999 tokens"):
        paths.paths_as_experts(routing, at_least=9999)
    few, pairs = paths.paths_as_experts(routing, layers=[2, 3])
    assert pairs[0].tolist() == [3, 0] and few.layers == (3,)


def test_a_path_that_a_kind_takes_is_found_by_the_statistics_of_experts():
    routing, logits, rng = random_routing(5, 80, layers=3, experts=4, k=1)
    kind = routing.text % 2
    on = (rng.random(len(logits)) < 0.3) & (kind == 1)
    logits[on, np.arange(3)[:, None], np.array([0, 1, 2])[:, None]] += 50
    planted = route(logits, routing.text, 1, token=routing.token)
    alone, experts = paths.paths_as_experts(planted)
    assert experts[0].tolist() == [0, 1, 2]
    assert (statistics.contrast(alone, kind)["p"] == 1 / 201).all()
    nothing = rng.permutation(80)[routing.text] % 2
    assert (statistics.contrast(alone, nothing)["p"] > 0.05).all()


def test_clusters_of_paths_are_found_where_they_are():
    routing, on = planted(texts=30)
    ids = routing.ids.copy()
    others = np.flatnonzero(~on)[:120]
    ids[others, :, 0] = [0, 0, 1, 1]
    clusters, common, share = paths.path_clusters(
        replace(routing, ids=ids), tokens=600, smallest=60
    )
    for tokens, path in ((np.flatnonzero(on), [1, 2, 3, 0]), (others, [0, 0, 1, 1])):
        cluster = common.tolist().index(path)
        assert (clusters.ids[tokens, 0, 0] == cluster).all()
    row = share.iloc[0]
    assert row["tokens"] == 600 and row["value"] == (clusters.ids >= 0).mean()
    assert row["low"] > 0
    nothing = paths.path_clusters(random_routing(layers=4, experts=8, k=1)[0], smallest=60)
    assert nothing[1].shape == (0, 4) and nothing[2]["low"][0] <= 0


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_predictors_foretell_what_decides_and_nothing_else(share):
    rng = np.random.default_rng(1)
    text = np.repeat(np.arange(60), 20)
    token, kind = rng.integers(8, size=len(text)), np.array(["a", "b", "c"])[text % 3]
    before = np.r_[0, token[:-1]]
    logits = rng.standard_normal((len(text), 4, 8)) * (1 - share)
    inputs = rng.standard_normal((len(text), 4, 30)).astype(np.float32)
    place = np.arange(len(text))
    for layer, decides in enumerate((token, (3 * before + token) % 8, text % 3, place % 20 % 7)):
        logits[place, layer, decides] += share
        inputs[place, layer, decides] += 6 * share
    routing = route(logits, text, 1, token=token, inputs=inputs)
    table = paths.predict_experts(routing, kind).set_index(["layer", "predictor"])
    beyond = table["low"] > 0
    right = [(0, "token"), (0, "bigram"), (1, "bigram"), (2, "kind"), (3, "position")]
    if share:
        assert {row for row in right if beyond[row]} == set(right)
        assert table.loc[(0, "token"), "value"] > 0.999 and table.loc[(1, "bigram"), "value"] > 0.85
        assert table.loc[(1, "token"), "value"] < 0.4 and table.loc[(2, "token"), "value"] < 0.6
    else:
        assert beyond.sum() <= 1
    probe = paths.predict_from_dimensions(routing, (0.3, 1.0))
    probe = probe.set_index(["dimensions", "share", "layer"])
    if share:  # the planted dimensions are the largest
        assert (probe.loc["largest", 1.0]["value"] > 0.95).all()
        assert (probe.loc["largest", 0.3]["value"] > probe.loc["random", 0.3]["value"] + 0.2).all()
    else:
        assert (probe["low"] > 0).sum() <= 1
    assert (probe["value"] - probe["chance"]).to_numpy() == pytest.approx(probe["excess"])


def test_no_text_is_in_both_halves_and_new_tokens_are_left_to_the_most_frequent_expert():
    routing, *_ = random_routing(6, token=np.arange(600))
    fit = paths.fitted_half(routing, 0)
    assert not set(routing.text[fit]) & set(routing.text[~fit])
    table = paths.predict_experts(routing).set_index("predictor")
    assert (table.loc[["token", "bigram"], "excess"] == 0).all()
    with pytest.raises(ValueError, match="inputs=True"):
        paths.predict_from_dimensions(route(np.zeros((4, 1, 3)), np.arange(4)))


def test_shuffled_layers_give_alarms_in_at_most_7_of_100(monkeypatch):
    monkeypatch.setattr(statistics, "DRAWS", 5)
    alarms = 0
    for seed in range(200):
        routing, *_ = random_routing(seed, 10, 6, layers=3, experts=4, k=1)
        alarms += bool((paths.path_coverage(routing)["p"] <= 0.05).any())
    assert alarms <= 14


def test_coverage_of_many_tokens_is_that_of_some(monkeypatch):
    """The number of paths grows with that of tokens: 300 of 600 have fewer."""
    routing, *_ = random_routing(7, layers=3, experts=6, k=1)
    every = paths.path_coverage(routing).set_index(["layer", "statistic"])["value"]
    monkeypatch.setattr(paths, "SOME", 300)
    some = paths.path_coverage(routing).set_index(["layer", "statistic"])["value"]
    assert some[2, "paths"] < every[2, "paths"] <= 216 and some[2, "paths"] > 100
    assert some[2, "entropy"] == pytest.approx(every[2, "entropy"], abs=0.05)
