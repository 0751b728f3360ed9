"""Discriminating features and specialists: by hand where texts are few, on planted data where they
are many. The error rate and the power of the whole procedure are in test_error_rate.py."""

import json
from dataclasses import replace

import jaxtyping
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch

from lenslab.features.specialists import (
    Ranked,
    discriminate,
    find_specialists,
    halves,
    label_rows,
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
    rows = [
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
    ]
    frame = pd.DataFrame(rows, columns=["category", "text"])
    labels = label_texts(frame)
    why = labels.skipped.set_index("which")["reason"].to_dict()
    assert why[1] == why[7] == "no text" and "same text as row 0" in why[2] and "Unicode" in why[3]
    assert why[4] == "no category" and "another category" in why[5] and "another category" in why[6]
    assert why["c"].startswith("0 texts in one half") and labels.categories == ("a", "b")
    assert labels.skipped["kind"].tolist() == ["text"] * 7 + ["category"]
    # 'alone' is still one of the rest
    assert len(labels) == 18 and labels.texts[0] == "one" and labels.row[1] == 8
    assert labels.held_out.sum() == 8
    assert np.array_equal(labels.held_out, label_texts(frame).held_out)
    assert not np.array_equal(labels.held_out, label_texts(frame, seed=1).held_out)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (table().assign(split="train"), "train"),
        (table(n=4), "2 texts in one half"),
        (table().assign(category="a"), "No two categories"),
        (table().assign(text=""), "no text"),
    ],
)
def test_tables_that_cannot_be_used_are_refused(frame, message):
    with pytest.raises(ValueError, match=message):
        label_texts(frame)


def test_strata_are_lengths_and_registers_only_where_several_categories_have_them():
    nested = label_texts(table(register=["of " + k for k in "abc"] * 20))
    order = np.argsort([len(text) for text in nested.texts])
    assert len(np.unique(nested.stratum)) == 5 and (np.diff(nested.stratum[order]) >= 0).all()
    assert np.bincount(nested.stratum).min() >= 9
    assert np.array_equal(nested.with_lengths(torch.arange(60)).stratum, np.arange(60) // 12)
    crossed = label_texts(table(register=["plain", "fancy"] * 30))
    assert len(np.unique(crossed.stratum)) == 10
    for stratum in range(10):
        assert len(np.unique(crossed.register[crossed.stratum == stratum])) == 1


# Search


def test_the_search_is_the_best_auroc_of_the_discovery_half_ties_to_the_stronger():
    labels = label_texts(table())
    values = np.random.default_rng(0).random((60, 30)).astype(np.float32)
    best = Ranked(values, ~labels.held_out).best(labels.inside)
    for c in range(3):
        seen = torch.from_numpy(values[~labels.held_out])
        every = auroc(seen, torch.from_numpy(labels.inside[~labels.held_out, c]))
        assert best.candidate[c] == int(every.argmax()) and best.tied[c] == 1
        assert best.auroc[c] == pytest.approx(float(every.max()))
    twice = np.concatenate([values, 2 * values], axis=1)
    again = Ranked(scipy.sparse.csc_array(twice), ~labels.held_out).best(labels.inside)
    assert again.candidate.tolist() == (best.candidate + 30).tolist()
    assert again.tied.tolist() == [2, 2, 2]
    same = Ranked(np.concatenate([values, values], axis=1), ~labels.held_out).best(labels.inside)
    assert same.candidate.tolist() == best.candidate.tolist()  # as strong: the lower number


def test_restricted_to_those_of_highest_variance():
    labels = label_texts(table())
    values = np.random.default_rng(0).random((60, 6)) * [1, 2, 3, 4, 5, 6]
    values[:, 0] = labels.inside[:, 0]  # the best by far, and the one of least variance
    everyone, fewer = search(values, halves(labels)[:1], [6, 5])[:, 0]
    assert everyone == 0 and fewer != 0


def test_a_language_left_out_is_not_searched_and_all_of_it_is_scored():
    labels = label_texts(table(language=["xx"] * 30 + ["yy"] * 30))
    folds = [fold for fold in language_folds(labels) if fold.category == "a"]
    assert [fold.language for fold in folds] == ["xx", "yy"]
    fold, member = folds[0], labels.inside[:, 0]
    own = member & (labels.language == "xx")
    assert (fold.member == member).all() and own.sum() == 10
    assert (fold.searched == (~labels.held_out & ~own)).all()
    assert (fold.scored == (own | (labels.held_out & ~member))).all()
    assert language_folds(label_texts(table())) == []


def test_precision_by_hand_at_the_threshold_of_discovery():
    values = np.array([5.0, 4, 3, 1, 0, 0, 9, 3.5, 3, 1, 0, 0])[:, None]
    inside = np.array([1, 1, 0, 1, 0, 0, 1, 0, 1, 0, 1, 0], dtype=bool)[:, None]
    held_out = np.arange(12) >= 6
    # thresholds 5, 4, 1: F1 = 1/2, 4/5, 6/7; at 1 the held-out half has 9, 3.5, 3, 1: two of four
    # inside
    row = precision_at_best_f1(values, inside, held_out).loc[0]
    assert row.tolist() == [1, 0.5, pytest.approx(2 / 3)]
    silent = precision_at_best_f1(values * 0, inside, held_out).loc[0]
    assert np.isnan(silent["threshold"]) and silent["precision"] == silent["recall"] == 0


# Discriminating


def noisy(labels, features=40, seed=0, good=0.0):
    """Sparse features that know nothing, but for number 3, which fires on the first category to the
    degree `good`."""
    rng = np.random.default_rng(seed)
    shape = (len(labels), features)
    values = np.where(rng.random(shape) < 0.3, rng.gamma(2, 2, shape), 0)
    values[:, 3] = values[:, 3] * (1 - good) + good * 30 * labels.inside[:, 0]
    return values.astype(np.float32)


def test_a_planted_feature_is_found_and_the_others_are_not():
    labels = label_texts(table())
    matrices = {"planted": noisy(labels, good=1), "null": noisy(labels, seed=1)}
    found = discriminate(matrices, labels, n=500)
    assert found["sae"].tolist() == ["planted"] * 3 + ["null"] * 3
    assert found["category"].tolist() == ["a", "b", "c"] * 2
    best = found.loc[0]
    assert best["feature"] == 3 and best["auroc"] == best["precision"] == best["recall"] == 1
    assert found["discriminating"].tolist() == [True] + [False] * 5
    assert best["p"] == pytest.approx(1 / 501) and best["q"] == pytest.approx(6 / 501)
    # the best of forty on discovery is too good where there is nothing
    assert (found["auroc_discovery"][3:] > 0.6).all()
    assert (found["auroc"][3:] < found["auroc_discovery"][3:]).all()


def test_dense_and_sparse_give_the_same_and_so_does_another_run():
    labels = label_texts(table())
    values = noisy(labels, good=0.5)
    dense = discriminate({"x": values}, labels, n=50)
    pd.testing.assert_frame_equal(
        dense, discriminate({"x": scipy.sparse.csr_array(values)}, labels, n=50)
    )
    pd.testing.assert_frame_equal(dense, discriminate({"x": values}, labels, n=50))


def test_the_held_out_half_is_not_seen_by_the_search():
    labels = label_texts(table())
    values = noisy(labels)
    before = discriminate({"x": values}, labels, n=20)["feature"]
    # tells b from the rest on the held-out half only
    values[:, 5] = np.where(labels.held_out, labels.inside[:, 1], values[:, 5])
    assert before[1] != 5 and discriminate({"x": values}, labels, n=20)["feature"].equals(before)


def test_a_feature_that_follows_the_length_only_is_not_discriminating():
    frame = table(n=40, kinds=("a", "b"))
    frame["text"] = [
        k + "x" * int(30 + 40 * (k == "a") + i % 37) + str(i)
        for i, k in enumerate(frame["category"])
    ]
    labels = label_texts(frame)
    length = np.array([[len(text)] for text in labels.texts], dtype=np.float64)
    matrix = np.concatenate([length, noisy(labels)], axis=1)
    found = discriminate({"length": matrix}, labels, n=300).loc[0]
    assert found["auroc"] > 0.9 and found["feature"] == 0
    one_stratum = replace(labels, stratum=np.zeros(len(labels), dtype=int))
    unaware = discriminate({"x": length}, one_stratum, n=300).loc[0]
    assert unaware["p"] < 0.01 < found["p"]


def test_the_worst_register_is_told():
    labels = label_texts(table(register=(["x"] * 6 + ["y"] * 6) * 5))
    values = (labels.inside[:, [0]] & (labels.register == "y")[:, None]).astype(float)
    found = discriminate({"x": np.concatenate([values, values * 0], axis=1)}, labels, n=20).loc[0]
    assert found["worst_register"] == 0.5 and found["auroc"] > 0.7


def test_features_that_never_fire_are_no_finding():
    labels = label_texts(table())
    found = discriminate({"dead": np.zeros((60, 5))}, labels, n=20)
    assert (found["auroc"] == 0.5).all() and (found["tied"] == 5).all() and (found["p"] == 1).all()
    assert not found["discriminating"].any() and found["threshold"].isna().all()


def test_matrices_of_other_texts_and_nan_are_refused(unchecked):
    labels = label_texts(table())
    values = noisy(labels)
    with pytest.raises(ValueError, match="59 texts"):
        discriminate({"x": values[:59]}, labels)
    values[7, 2] = np.inf
    with pytest.raises(ValueError, match="text 7, feature 2"):
        discriminate({"x": values}, labels)


# Specialists


def test_a_specialist_beats_controls_that_know_nothing_and_not_one_that_knows_as_much():
    labels = label_texts(table(n=40))
    ours, nothing = noisy(labels, good=0.8), noisy(labels, seed=2)
    found = find_specialists(
        ours, labels, {"nothing": nothing, "small": noisy(labels, 6, 3)}, n=300
    )
    assert found.table["specialist"].tolist() == [True, False, False]
    assert found.candidates == {"SAE": 40, "nothing": 40, "small": 6}
    assert not found.table["by_language"].any() and found.left_out.empty
    rows = found.comparisons.set_index(["control", "category"])
    assert (rows["low"].xs("a", level="category") > 0).all()
    # as many candidates: the same comparison
    assert rows.loc["nothing", "low"].equals(rows.loc["nothing", "equal_low"])
    rival = find_specialists(ours, labels, {"nothing": nothing, "rival": ours}, n=300)
    rows = rival.comparisons.set_index(["control", "category"])
    assert not rival.table["specialist"].any() and rival.table["not_beaten"][0] == "rival"
    assert rows.loc[("nothing", "a"), "beats"] and not rows.loc[("rival", "a"), "beats"]
    assert (rows.loc["rival", "difference"] == 0).all() and len(rows) == 6


def test_fewer_candidates_in_the_control_are_met_with_as_few():
    labels = label_texts(table(n=40))
    ours = noisy(labels, good=1) * 1.0
    ours[:, 3] *= 0.01  # the good feature has the least variance, so it is not among the few
    found = find_specialists(ours, labels, {"small": noisy(labels, 6, 3)}, n=200)
    row = found.comparisons.loc[0]
    assert row["low"] > 0 > row["equal_low"] and not found.table["specialist"][0]


def test_a_specialist_needs_precision():
    labels = label_texts(table(n=20, kinds=tuple("abcdefghij")))
    ours = noisy(labels)
    chance = np.random.default_rng(5).random(len(labels)) < 0.3
    ours[:, 3] = labels.inside[:, 0] | chance  # AUROC .85, precision .25
    found = find_specialists(ours, labels, {"nothing": noisy(labels, seed=2)}, n=200)
    row = found.table.loc[0]
    assert row["discriminating"] and row["not_beaten"] == "" and not row["specialist"]
    assert row["precision"] < 0.5 < 0.8 < row["auroc"]


def test_a_category_of_several_languages_is_compared_on_languages_left_out():
    language = ["xx" if (i // 6) % 2 else "yy" for i in range(120)]
    labels = label_texts(table(n=40, language=language))
    inside = labels.inside[:, 0]
    ours, control = noisy(labels), noisy(labels, seed=2)
    ours[:, 3] = inside * 5  # fires in every language
    control[:, 0] = inside & (labels.language == "xx")
    control[:, 1] = inside & (labels.language == "yy")
    found = find_specialists(ours, labels, {"spelling": control}, n=200)
    assert found.table["by_language"].all() and found.table["specialist"][0]
    rows = found.left_out[found.left_out["category"] == "a"].set_index("language")
    assert rows.loc["xx", "auroc"] == 1 and rows.loc["xx", "texts"] == 20
    assert rows.loc["xx", "spelling"] < 0.8
    assert found.comparisons["difference"][0] == pytest.approx(1 - rows["spelling"].mean())


def test_the_older_score_and_its_null_stand_beside_and_all_is_saved(tmp_path):
    labels = label_texts(table(n=10))
    values = noisy(labels, good=1)
    found = find_specialists(values, labels, {"nothing": noisy(labels, seed=2)}, n=50)
    assert found.to_frame().set_index("category").loc["a", "count_score_5.0"] == 10
    assert [null.threshold for null in found.count_nulls] == ["half", 5.0]
    found.save(tmp_path / "s.json", model="m")
    saved = json.loads((tmp_path / "s.json").read_text())
    assert len(saved["values"]["count_nulls"][0]["null"]) == 200
    kept = saved["values"]["table"]
    first = dict(zip(kept["columns"], kept["data"][0], strict=True))
    assert first["feature"] == 3 and saved["values"]["seed"] == 0


def test_features_that_never_fire_are_no_specialists():
    labels = label_texts(table(n=10))
    found = find_specialists(noisy(labels) * 0, labels, {"nothing": noisy(labels, seed=2)}, n=20)
    assert not found.table["specialist"].any() and not any(n.observed for n in found.count_nulls)


def test_best_by_count_names_no_kind_where_no_score_is_above_zero():
    labels = label_texts(table(n=10))
    controls = {"nothing": noisy(labels, seed=2)}
    found = find_specialists(noisy(labels, good=1), labels, controls, n=20)
    assert found.best_by_count() == found.best_by_count(5.0) == "a"
    for score in (-1, 0):
        found.table["count_score_half"] = score
        assert found.best_by_count() is None and found.best_by_count(5.0) == "a"


# A matrix and its labels


def test_a_matrix_and_plain_labels_are_enough():
    labels = label_texts(table())
    values = noisy(labels, good=1)
    found = discriminate(scipy.sparse.csr_array(values), labels.category.tolist(), n=99)
    assert found["category"].tolist() == ["a", "b", "c"] and (found["sae"] == "SAE").all()
    assert found["feature"][0] == 3 and found["auroc"][0] == 1 and found["discriminating"][0]
    rows = label_rows(labels.category)
    again = discriminate({"SAE": values}, rows, n=99)
    pd.testing.assert_frame_equal(found, again)
    assert np.bincount(rows.held_out).tolist() == [30, 30] and not rows.stratum.any()
    other = discriminate(values, labels.category, n=99, seed=1)
    assert not other["auroc_discovery"].equals(found["auroc_discovery"])
    frame = pd.Series(labels.category, index=range(100, 160))  # a Series goes by its order
    pd.testing.assert_frame_equal(found, discriminate(values, frame, n=99))


def test_halves_and_strata_may_be_given():
    labels = label_texts(table())
    values = noisy(labels, good=0.5)
    marks = labels.held_out.astype(int)
    rows = label_rows(labels.category, held_out=marks, strata=labels.stratum.astype(str))
    found, expected = (discriminate({"x": values}, one, n=99) for one in (rows, labels))
    pd.testing.assert_frame_equal(found, expected)
    one = discriminate(values, label_rows(labels.category, held_out=marks), n=99)
    assert one["auroc"].equals(expected["auroc"]) and not one["p"].equals(expected["p"])


@pytest.mark.parametrize("missing", [None, np.nan, ""])
def test_a_missing_label_or_stratum_is_refused(missing):
    labels = ["a", "b"] * 10
    with pytest.raises(ValueError, match="missing"):
        label_rows([*labels[:-1], missing])
    if missing != "":
        with pytest.raises(ValueError, match="missing"):
            label_rows(labels, strata=[*labels[:-1], missing])
    with pytest.raises(ValueError, match="20 texts but 19 labels"):
        discriminate(np.ones((20, 2)), labels[:-1])


def test_controls_and_a_fitting_discrimination_are_needed(unchecked):
    labels = label_texts(table())
    values = noisy(labels)
    with pytest.raises(ValueError, match="controls"):
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
    controls = {"n": both["two"]}
    found = find_specialists(
        both["one"], labels, controls, name="one", discrimination=together, n=200
    )
    assert found.table["specialist"][0] and (found.table["sae"] == "one").all()
    assert found.table["q"].tolist() == together["q"][:3].tolist()


def test_a_held_out_half_given_as_integers_is_a_mask(unchecked):
    """`~` of the integer 1 is -2: every text would be searched, or some of them many times."""
    labels = label_texts(table())
    matrix = np.random.default_rng(0).normal(size=(len(labels), 20))
    as_integers = replace(labels, held_out=labels.held_out.astype(np.int64))
    ours, theirs = (discriminate({"SAE": matrix}, texts, n=50) for texts in (labels, as_integers))
    assert ours.equals(theirs)
    with pytest.raises(ValueError, match="mask"):
        discriminate({"SAE": matrix}, replace(labels, held_out=np.arange(len(labels))), n=50)
