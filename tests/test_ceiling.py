"""Directions that labels fit, on planted data: what they can reach, and that nothing of the
held-out half goes into them."""

import numpy as np
import pandas as pd
import pytest

from lenslab.features.ceiling import ceiling, probe, supervised_directions
from lenslab.features.specialists import discriminate
from lenslab.runtime import derive_generator
from lenslab.stats import auroc_difference
from lenslab.texts import label_texts


@pytest.fixture(scope="module")
def planted():
    """Three kinds of 40 texts; a feature that tells `a` apart with noise, mean activations with one
    direction per kind, and descriptions without any."""
    rng = np.random.default_rng(0)
    rows = [(kind, f"{kind} {i} " + "x" * (7 * i % 40)) for i in range(40) for kind in "abc"]
    frame = pd.DataFrame(rows, columns=["category", "text"])
    frame["split"] = ["discovery" if i // 3 % 2 else "held_out" for i in range(len(frame))]
    labels = label_texts(frame)
    pooled = rng.random((len(frame), 30))
    pooled[:, 7] += 0.8 * (labels.category == "a")
    vectors = rng.normal(size=(len(frame), 10)) + 3 * np.eye(3, 10)[labels.inside.argmax(1)]
    nothing = rng.normal(size=(len(frame), 10))
    return labels, pooled, vectors, nothing


def test_labels_reach_what_is_planted_and_nothing_where_nothing_is(planted):
    labels, pooled, vectors, nothing = planted
    found = discriminate({"SAE": pooled}, labels, n=200)
    table = ceiling(pooled, found, vectors, labels, {"twin": nothing})
    auroc = table.pivot(index="way", columns="category", values="auroc")
    for way in ("difference of means", "logistic regression"):
        assert (auroc.loc[way] > 0.95).all()
        assert (auroc.loc[f"twin: {way}"] - 0.5).abs().max() < 0.3
    # the feature beside them is the one that was found, scored alike
    best = table[table["way"] == "best feature"].set_index("category")
    assert best["auroc"].to_numpy() == pytest.approx(found["auroc"].to_numpy())
    assert (best[["difference", "low", "high"]] == 0).all(axis=None)
    lead = table[table["way"] == "logistic regression"].set_index("category")
    assert (lead["auroc"] - lead["difference"]).to_numpy() == pytest.approx(best["auroc"])
    # b and c have no feature: labels are surely better there
    assert (lead.loc[["b", "c"], "low"] > 0).all()


def test_intervals_hold_for_all_categories_together(planted):
    labels, pooled, vectors, _ = planted
    found = discriminate({"SAE": pooled}, labels, n=200)
    table = ceiling(pooled, found, vectors, labels, {})
    lead = table[table["way"] == "difference of means"].set_index("category").loc["a"]
    held, inside = labels.held_out, labels.inside[:, 0]
    scores = supervised_directions(vectors, labels)["difference of means"][:, [0]]
    feature = pooled[:, [found["feature"][0]]]
    both = scores, feature, (inside & held)[:, None], ~inside & held
    single = auroc_difference(*both, derive_generator(1, "one"), 5000)
    assert lead["high"] - lead["low"] > 1.1 * (single.high - single.low)


def test_the_held_out_half_takes_no_part_in_the_fit(planted):
    labels, _, vectors, nothing = planted
    changed = np.where(labels.held_out[:, None], nothing, vectors)
    before, after = (supervised_directions(x, labels) for x in (vectors, changed))
    kept = ~labels.held_out
    for way, scores in before.items():
        assert scores[kept] == pytest.approx(after[way][kept])


def test_a_sparse_probe_uses_k_dimensions_and_none_that_is_constant(planted):
    labels, pooled, _, _ = planted
    matrix = np.concatenate([pooled, np.ones((len(pooled), 2))], axis=1)
    one = probe(matrix, labels, k=1)[:, 0]  # of `a`, for which feature 7 is planted
    order = np.argsort(matrix[:, 7])
    assert (np.diff(one[order]) >= 0).all() and np.ptp(one) > 0
    with pytest.raises(ValueError):
        ceiling(pooled[:-1], pd.DataFrame({"feature": [0, 0, 0]}), pooled, labels, {})


def test_features_of_other_categories_or_of_several_saes_are_refused(planted):
    labels, pooled, vectors, _ = planted
    found = discriminate({"SAE": pooled, "other": pooled[:, ::-1]}, labels, n=20)
    one = found[found["sae"] == "SAE"]
    assert len(ceiling(pooled, one, vectors, labels, {}))
    for wrong in (found, one.iloc[::-1], one.iloc[:2]):
        with pytest.raises(ValueError, match="one SAE, in the order"):
            ceiling(pooled, wrong, vectors, labels, {})
