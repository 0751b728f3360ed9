"""Discriminating features and specialists: by hand where texts are few, on planted data where they
are many."""

import json
from dataclasses import replace

import jaxtyping
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch

from lenslab.features.planted import error_rate_and_power
from lenslab.features.specialists import (
    Ranked,
    discriminate,
    find_specialists,
    halves,
    language_folds,
    precision_at_best_f1,
    search,
)
from lenslab.metrics import auroc
from lenslab.texts import label_texts


@pytest.fixture
def unchecked():
    """What a user meets, who does not run with the shape checker: our own errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def table(n=20, kinds=("a", "b", "c"), **columns):
    """n texts of each kind, in turns, all different and of many lengths; halves in turns."""
    rows = [(kind, f"{kind} {i} " + "x" * (7 * i % 40)) for i in range(n) for kind in kinds]
    frame = pd.DataFrame(rows, columns=["category", "text"])
    return frame.assign(
        split=["discovery" if i // len(kinds) % 2 else "held_out" for i in range(len(rows))],
        **columns,
    )


# Labels


def test_texts_that_cannot_count_are_left_out_and_it_says_why():
    frame = pd.DataFrame(
        [
            ("a", "one"),
            ("a", "  "),
            ("a", "one \n"),
            ("b", "half \ud83d of a pair"),
            (None, "two"),
            ("b", "two faces"),
            ("a", "two  faces"),
            ("a", 7),
            *[("a", f"a {i}") for i in range(8)],
            *[("b", f"b {i}") for i in range(8)],
            ("c", "alone"),
        ],
        columns=["category", "text"],
    )
    labels = label_texts(frame)
    why = {skipped.which: skipped.reason for skipped in labels.skipped}
    assert why[1] == why[7] == "no text" and "same text as row 0" in why[2] and "Unicode" in why[3]
    assert why[4] == "no category" and "another category" in why[5] and "another category" in why[6]
    assert why["c"] == "0 texts in one half: 3 are needed in each" and labels.categories == (
        "a",
        "b",
    )
    assert (
        len(labels) == 18 and labels.texts[0] == "one" and labels.row[1] == 8
    )  # 'alone' is still one of the rest
    assert labels.held_out.sum() == 8 and labels.to_frame()["text"].tolist() == list(labels.texts)
    assert np.array_equal(labels.held_out, label_texts(frame).held_out)
    assert not np.array_equal(labels.held_out, label_texts(frame, seed=1).held_out)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (table().drop(columns="text"), "no column text"),
        (table().assign(split="train"), "split is"),
        (table(n=4), "No category can be analysed"),
        (table().assign(category="a"), "there is no other"),
        (table().assign(text=""), "No text is left"),
    ],
)
def test_tables_that_cannot_be_used_are_refused(frame, message):
    with pytest.raises(ValueError, match=message):
        label_texts(frame)


def test_strata_are_lengths_and_registers_only_where_several_categories_have_them():
    nested = label_texts(table(register=["of " + k for k in "abc"] * 20), bins=4)
    assert len(np.unique(nested.stratum)) == 4 and "cannot be strata" in nested.strata
    crossed = label_texts(table(register=["plain", "fancy"] * 30), bins=4)
    assert (
        len(np.unique(crossed.stratum)) == 8
        and crossed.strata == "register and 4 bins of length in characters"
    )
    order = np.argsort([len(t) for t in nested.texts])
    assert (np.diff(nested.stratum[order]) >= 0).all() and np.bincount(nested.stratum).min() >= 12
    by_tokens = nested.with_lengths(torch.arange(60))
    assert np.array_equal(by_tokens.stratum, np.arange(60) // 15) and "tokens" in by_tokens.strata
    with pytest.raises(ValueError, match="60 texts"):
        nested.with_lengths(torch.arange(59))


# Search


def test_the_search_is_the_best_auroc_of_the_discovery_half_ties_to_the_stronger():
    labels = label_texts(table())
    values = np.random.default_rng(0).random((60, 30)).astype(np.float32)
    feature, best, tied = Ranked(values, ~labels.held_out).best(labels.inside)
    for c in range(3):
        seen = torch.from_numpy(values[~labels.held_out])
        every = auroc(seen, torch.from_numpy(labels.inside[~labels.held_out, c]))
        assert (
            feature[c] == int(every.argmax())
            and best[c] == pytest.approx(float(every.max()))
            and tied[c] == 1
        )
    twice = np.concatenate([values, 2 * values], axis=1)
    again, _, tied = Ranked(scipy.sparse.csc_array(twice), ~labels.held_out).best(labels.inside)
    assert again.tolist() == (feature + 30).tolist() and tied.tolist() == [2, 2, 2]


def test_restricted_to_those_of_highest_variance():
    labels = label_texts(table())
    values = np.random.default_rng(0).random((60, 6)) * [1, 2, 3, 4, 5, 6]
    values[:, 0] = labels.inside[:, 0]  # the best by far, and the one of least variance
    assert search(values, halves(labels)[:1], [6, 5])[:, 0].tolist()[0] == 0
    assert search(values, halves(labels)[:1], [6, 5])[1, 0] != 0


def test_a_language_left_out_is_not_searched_and_all_of_it_is_scored():
    labels = label_texts(table(language=["xx"] * 30 + ["yy"] * 30))
    folds = [fold for fold in language_folds(labels) if fold.category == "a"]
    assert [fold.language for fold in folds] == ["xx", "yy"]
    fold, inside = folds[0], labels.inside[:, 0]
    assert (fold.inside == (inside & (labels.language == "xx"))).all() and fold.inside.sum() == 10
    assert not (fold.rows & fold.inside).any() and not (fold.rows & labels.held_out).any()
    assert (fold.searched == (inside & ~labels.held_out & (labels.language == "yy"))).all()
    assert (fold.outside == (labels.held_out & ~inside)).all()
    assert language_folds(label_texts(table())) == []


def test_precision_by_hand_at_the_threshold_of_discovery():
    values = np.array([5.0, 4, 3, 1, 0, 0, 9, 3.5, 3, 1, 0, 0])[:, None]
    inside = np.array([1, 1, 0, 1, 0, 0, 1, 0, 1, 0, 1, 0], dtype=bool)[:, None]
    held = np.arange(12) >= 6
    # thresholds 5, 4, 1: F1 = 1/2, 4/5, 6/7; at 1 the held-out half has 9, 3.5, 3, 1: two of four
    # inside
    cut, precision, recall = precision_at_best_f1(values, inside, held)
    assert (cut[0], precision[0], recall[0]) == (1, 0.5, pytest.approx(2 / 3))
    silent = precision_at_best_f1(values * 0, inside, held)
    assert np.isnan(silent[0][0]) and silent[1][0] == silent[2][0] == 0


# Discriminating


def noisy(labels, features=40, seed=0, good=0.0):
    """Sparse features that know nothing, but for number 3, which fires on the first category to the
    degree `good`."""
    rng = np.random.default_rng(seed)
    values = np.where(
        rng.random((len(labels), features)) < 0.3, rng.gamma(2, 2, (len(labels), features)), 0
    )
    values[:, 3] = values[:, 3] * (1 - good) + good * 30 * labels.inside[:, 0]
    return values.astype(np.float32)


def test_a_planted_feature_is_found_and_the_others_are_not():
    labels = label_texts(table())
    found = discriminate(
        {"planted": noisy(labels, good=1), "null": noisy(labels, seed=1)}, labels, n=500
    )
    assert found.names == ("planted", "null") and found.categories == ("a", "b", "c")
    assert (
        found.feature[0, 0] == 3
        and found.auroc[0, 0] == 1
        and found.precision[0, 0] == found.recall[0, 0] == 1
    )
    assert found.discriminating.tolist() == [[True, False, False], [False, False, False]]
    assert found.p[0, 0] == pytest.approx(1 / 501) and found.q[0, 0] == pytest.approx(6 / 501)
    assert (found.auroc_discovery >= found.auroc - 0.35).all() and (
        found.auroc_discovery[1] > 0.6
    ).all()
    frame = found.to_frame()
    assert len(frame) == 6 and frame["feature"][0] == 3 and frame["discriminating"].sum() == 1


def test_dense_and_sparse_give_the_same_and_so_does_another_run():
    labels = label_texts(table())
    values = noisy(labels, good=0.5)
    dense, sparse = (
        discriminate({"x": m}, labels, n=50) for m in (values, scipy.sparse.csr_array(values))
    )
    pd.testing.assert_frame_equal(dense.to_frame(), sparse.to_frame())
    pd.testing.assert_frame_equal(
        dense.to_frame(), discriminate({"x": values}, labels, n=50).to_frame()
    )


def test_the_held_out_half_is_not_seen_by_the_search():
    labels = label_texts(table())
    values = noisy(labels)
    values[:, 5] = (
        labels.held_out & labels.inside[:, 1]
    )  # tells b from the rest on the held-out half only
    assert discriminate({"x": values}, labels, n=20).feature[0, 1] != 5


def test_a_feature_that_follows_the_length_only_is_not_discriminating():
    frame = table(n=40, kinds=("a", "b"))
    frame["text"] = [
        k + "x" * int(30 + 40 * (k == "a") + i % 37) + str(i)
        for i, k in enumerate(frame["category"])
    ]
    labels = label_texts(frame)
    length = np.array([[len(text)] for text in labels.texts], dtype=np.float64)
    found = discriminate({"length": np.concatenate([length, noisy(labels)], axis=1)}, labels, n=300)
    assert found.auroc[0, 0] > 0.9 and found.feature[0, 0] == 0
    unaware = discriminate(
        {"x": length}, replace(labels, stratum=np.zeros(len(labels), dtype=int)), n=300
    )
    assert unaware.p[0, 0] < 0.01 < found.p[0, 0]


def test_the_worst_register_is_told():
    labels = label_texts(table(register=(["x"] * 6 + ["y"] * 6) * 5))
    values = (labels.inside[:, [0]] & (labels.register == "y")[:, None]).astype(float)
    found = discriminate({"x": np.concatenate([values, values * 0], axis=1)}, labels, n=20)
    assert found.worst_register[0, 0] == 0.5 and found.auroc[0, 0] > 0.7


def test_features_that_never_fire_are_no_finding():
    labels = label_texts(table())
    found = discriminate({"dead": np.zeros((60, 5))}, labels, n=20)
    assert (found.auroc == 0.5).all() and (found.tied == 5).all() and (found.p == 1).all()
    assert not found.discriminating.any() and found.to_dict()["threshold"] == [[None] * 3]


def test_what_was_skipped_travels_with_the_result_and_is_saved(tmp_path):
    frame = pd.concat(
        [table(), pd.DataFrame([("a", "", "discovery")], columns=["category", "text", "split"])]
    )
    labels = label_texts(frame)
    found = discriminate({"x": noisy(labels)}, labels, n=20)
    found.save(tmp_path / "d.json", model="m")
    saved = json.loads((tmp_path / "d.json").read_text())
    assert saved["values"]["skipped"] == [{"kind": "text", "which": 60, "reason": "no text"}]
    assert saved["values"]["n_permutations"] == 20 and saved["config"] == {"model": "m"}


def test_matrices_of_other_texts_nan_and_none_are_refused(unchecked):
    labels = label_texts(table())
    values = noisy(labels)
    with pytest.raises(ValueError, match="59 texts but 60 labels"):
        discriminate({"x": values[:59]}, labels)
    with pytest.raises(ValueError, match="No matrix"):
        discriminate({}, labels)
    values[7, 2] = np.inf
    with pytest.raises(ValueError, match="text 7, feature 2"):
        discriminate({"x": values}, labels)


# Specialists


def test_a_specialist_beats_controls_that_know_nothing_and_not_one_that_knows_as_much():
    labels = label_texts(table(n=40))
    ours = noisy(labels, good=0.8)
    found = find_specialists(
        ours, labels, {"nothing": noisy(labels, seed=2), "small": noisy(labels, 6, 3)}, n=300
    )
    assert found.specialist.tolist() == [True, False, False] and found.candidates == {
        "SAE": 40,
        "nothing": 40,
        "small": 6,
    }
    assert (found.low[:, 0] > 0).all() and not found.by_language.any()
    assert np.array_equal(
        found.low[0], found.equal_low[0]
    )  # as many candidates: the same comparison
    rival = find_specialists(ours, labels, {"nothing": noisy(labels, seed=2), "rival": ours}, n=300)
    assert not rival.specialist.any() and rival.beats[:, 0].tolist() == [True, False]
    assert (rival.difference[1] == 0).all() and rival.to_frame()["not_beaten"][0] == "rival"
    frame = rival.comparisons()
    assert len(frame) == 6 and frame.loc[3, ["control", "category"]].tolist() == ["rival", "a"]


def test_fewer_candidates_in_the_control_are_met_with_as_few():
    labels = label_texts(table(n=40))
    ours = noisy(labels, good=1) * 1.0
    ours[:, 3] *= 0.01  # the good feature has the least variance, so it is not among the few
    found = find_specialists(ours, labels, {"small": noisy(labels, 6, 3)}, n=200)
    assert found.low[0, 0] > 0 > found.equal_low[0, 0] and not found.specialist[0]


def test_a_specialist_needs_precision():
    kinds = ("a", *"bcdefghij")
    labels = label_texts(table(n=20, kinds=kinds))
    ours = noisy(labels)
    rng = np.random.default_rng(5)
    ours[:, 3] = np.where(
        labels.inside[:, 0] | (rng.random(len(labels)) < 0.3), 1, 0
    )  # AUROC .85, precision .25
    found = find_specialists(ours, labels, {"nothing": noisy(labels, seed=2)}, n=200)
    assert (
        found.discrimination.discriminating[0, 0] and found.beats[0, 0] and not found.specialist[0]
    )
    assert found.discrimination.precision[0, 0] < 0.5 < 0.8 < found.discrimination.auroc[0, 0]


def test_a_category_of_several_languages_is_compared_on_languages_left_out():
    language = ["xx" if (i // 6) % 2 else "yy" for i in range(120)]
    labels = label_texts(table(n=40, language=language))
    inside = labels.inside[:, 0]
    ours, control = noisy(labels), noisy(labels, seed=2)
    ours[:, 3] = inside * 5  # fires in every language
    control[:, 0], control[:, 1] = (
        inside & (labels.language == "xx"),
        inside & (labels.language == "yy"),
    )
    found = find_specialists(ours, labels, {"spelling": control}, n=200)
    assert found.by_language.all() and found.specialist[0]
    rows = found.left_out[found.left_out["category"] == "a"].set_index("language")
    assert (
        rows.loc["xx", "auroc"] == 1
        and rows.loc["xx", "spelling"] < 0.8
        and rows.loc["xx", "texts"] == 20
    )
    expected = 1 - rows["spelling"].mean()
    assert found.difference[0, 0] == pytest.approx(expected)


def test_the_older_score_and_its_null_stand_beside(tmp_path):
    labels = label_texts(table(n=10))
    values = noisy(labels, good=1)
    found = find_specialists(values, labels, {"nothing": noisy(labels, seed=2)}, n=50)
    frame = found.to_frame().set_index("category")
    assert frame.loc["a", "count_score_5.0"] == 10 and [
        null.threshold for null in found.count_nulls
    ] == ["half", 5.0]
    found.save(tmp_path / "s.json")
    saved = json.loads((tmp_path / "s.json").read_text())["values"]
    assert len(saved["count_nulls"][0]["null"]) == 200 and saved["controls"] == ["nothing"]


def test_features_that_never_fire_are_refused_with_the_reason():
    labels = label_texts(table(n=10))
    with pytest.raises(ValueError, match="No feature fires on any text"):
        find_specialists(noisy(labels) * 0, labels, {"nothing": noisy(labels, seed=2)}, n=20)


def test_controls_and_a_fitting_discrimination_are_needed(unchecked):
    labels = label_texts(table())
    values = noisy(labels)
    with pytest.raises(ValueError, match="give some"):
        find_specialists(values, labels, {})
    with pytest.raises(ValueError, match="50 texts"):
        find_specialists(values, labels, {"short": values[:50]})
    with pytest.raises(ValueError, match="lacks 'mine'"):
        found = discriminate({"x": values}, labels, n=10)
        find_specialists(values, labels, {"c": values}, name="mine", discrimination=found)


def test_several_saes_are_corrected_together():
    labels = label_texts(table(n=40))
    both = {"one": noisy(labels, good=0.8), "two": noisy(labels, seed=4)}
    together = discriminate(both, labels, n=200)
    found = find_specialists(
        both["one"], labels, {"n": both["two"]}, name="one", discrimination=together, n=200
    )
    assert found.row == 0 and found.specialist[0] and (found.to_frame()["sae"] == "one").all()


# Error rate and power


def test_the_procedure_keeps_its_error_rate_and_finds_what_is_planted():
    labels = label_texts(table(n=60, kinds=tuple("abcde")))
    values = noisy(labels, 300, good=1)  # what the real labels say is shuffled away
    found = error_rate_and_power(values, labels, n_shuffles=200, n=300, seed=1)
    print(found.to_frame())
    assert found.error_rate.estimate <= 0.07 and found.power.estimate >= 0.8
    assert found.specialist_error is None and found.to_frame()["holds"].tolist() == [True, True]


def test_hardly_anything_planted_is_hardly_found():
    labels = label_texts(table(n=20))
    values = noisy(labels)
    weak = error_rate_and_power(values, labels, planted_auroc=0.55, n_shuffles=20, n=200)
    strong = error_rate_and_power(values, labels, planted_auroc=0.97, n_shuffles=20, n=200)
    assert weak.power.estimate < 0.5 < strong.power.estimate


def test_error_and_power_of_specialists_with_controls():
    labels = label_texts(table(n=40))
    values = noisy(labels)
    found = error_rate_and_power(
        values,
        labels,
        controls={"n": noisy(labels, seed=3)},
        planted_auroc=0.97,
        n_shuffles=15,
        n=200,
    )
    assert (
        found.specialist_power.estimate > 0.5
        and found.specialist_error.estimate <= found.error_rate.estimate
    )
    assert found.specialist_power.estimate <= found.power.estimate and len(found.to_frame()) == 4
    rival = {"n": values, "m": noisy(labels, seed=3)}
    assert (
        error_rate_and_power(
            values, labels, controls=rival, n_shuffles=5, n=200
        ).specialist_error.estimate
        == 0
    )


@pytest.mark.parametrize("planted", [0.5, 1.0])
def test_a_planted_auroc_must_be_one(planted):
    labels = label_texts(table())
    with pytest.raises(ValueError, match=r"between 0\.5 and 1"):
        error_rate_and_power(noisy(labels), labels, planted_auroc=planted)
