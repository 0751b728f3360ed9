"""Permutation, bootstrap and false discovery rate: exact where a count is possible,
calibrated where not."""

import math

import jaxtyping
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch

from lenslab import stats
from lenslab.metrics import auroc
from lenslab.runtime import derive_generator


def generator(label="test", seed=0):
    return derive_generator(seed, label)


def numpy_rng(label):
    seeds = torch.randint(2**63 - 1, (2,), generator=generator(label))
    return np.random.default_rng(seeds.tolist())


@pytest.fixture
def unchecked():
    """What a user meets, who does not run with the shape checker."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


# Permutation


def test_permutation_p_is_one_plus_exceedances_over_one_plus_n():
    labels = np.arange(40) < 20
    scores = np.stack([labels, ~labels], axis=1).astype(float)
    result = stats.auroc_permutations(scores, labels, generator(), n=99)
    assert result.p.tolist() == [1 / 100, 1]  # never 0


def test_permutation_stays_within_strata():
    strata = np.array(["web", "book", "web", "book", "web", "book", "web", "book"])
    labels = np.array(
        [True, True, True, False, False, False, False, False]
    )  # 2 of 4 web, 1 of 4 book
    seen = labels[np.stack(list(stats.shuffled_orders(labels, generator(), 200, strata)))]
    assert (seen[:, strata == "web"].sum(1) == 2).all() and (
        seen[:, strata == "book"].sum(1) == 1
    ).all()
    assert len(np.unique(seen, axis=0)) == math.comb(4, 2) * 4  # every such arrangement turns up
    rates = seen.mean(0)
    np.testing.assert_allclose(rates, np.where(strata == "web", 0.5, 0.25), atol=0.12)


def test_a_confounder_is_no_finding_once_it_is_a_stratum():
    """The label goes with the register, the score only with the register: unstratified, that looks
    like a finding."""
    rng = numpy_rng("confounder")
    register = np.arange(200) % 2
    labels = rng.random(200) < np.where(register == 1, 0.8, 0.2)
    scores = (register + 0.5 * rng.standard_normal(200))[:, None]
    free = stats.auroc_permutations(scores, labels, generator(), n=499)
    within = stats.auroc_permutations(scores, labels, generator(), n=499, strata=register)
    assert free.p[0] == 1 / 500
    assert within.p[0] > 0.05
    assert free.observed[0] == within.observed[0]


def test_the_same_generator_gives_the_same_result_and_another_seed_another():
    scores, labels = numpy_rng("same").standard_normal((30, 3)), np.arange(30) < 10
    one, two, three = (
        stats.auroc_permutations(scores, labels, generator(seed=s), n=200) for s in (0, 0, 1)
    )
    assert np.array_equal(one.p, two.p) and np.array_equal(one.null_max, two.null_max)
    assert not np.array_equal(one.null_max, three.null_max)


def test_the_draws_are_those_that_notebooks_printed():
    strata = np.array([0, 1, 0, 1, 0, 1])
    free = next(stats.shuffled_orders(np.arange(6), generator(), 1, None))
    within = next(stats.shuffled_orders(np.arange(6), generator(), 1, strata))
    assert free.tolist() == [2, 4, 0, 3, 1, 5]
    assert within.tolist() == [2, 3, 4, 1, 0, 5]


def test_auroc_permutations_are_those_of_one_shuffle_at_a_time(monkeypatch):
    monkeypatch.setattr(stats, "FEATURES", 3)  # in blocks of features too
    rng = numpy_rng("parity")
    scores, labels = (
        np.maximum(rng.standard_normal((40, 8)), 0).astype(np.float32),
        np.arange(40) % 4 == 0,
    )
    strata = np.arange(40) % 3

    observed = auroc(scores, labels)
    orders = stats.shuffled_orders(labels, generator(), 150, strata)
    null = np.stack([auroc(scores, labels[order]) for order in orders])  # [shuffle, feature]
    fast = stats.auroc_permutations(scores, labels, generator(), n=150, strata=strata)
    np.testing.assert_allclose(fast.observed, observed, rtol=1e-12)
    np.testing.assert_array_equal(fast.p, (1 + (null >= observed - 1e-9).sum(0)) / 151)
    np.testing.assert_allclose(fast.null_max, null.max(1), rtol=1e-12)
    exceeding = (null.max(1)[:, None] >= observed - 1e-9).sum(0)
    np.testing.assert_array_equal(fast.family_p, (1 + exceeding) / 151)


def test_one_feature_has_the_p_of_the_mann_whitney_test():
    rng = numpy_rng("mann-whitney")
    scores, labels = rng.standard_normal((60, 1)), np.arange(60) < 20
    scores[labels] += 0.5
    expected = scipy.stats.mannwhitneyu(
        scores[labels, 0], scores[~labels, 0], alternative="greater", method="exact"
    )
    result = stats.auroc_permutations(scores, labels, generator(), n=4000)
    assert result.p[0] == pytest.approx(expected.pvalue, abs=0.01)


def test_family_p_pays_for_the_search_and_is_p_for_a_single_feature():
    rng = numpy_rng("family")
    scores, labels = rng.standard_normal((50, 400)), np.arange(50) < 15
    result = stats.auroc_permutations(scores, labels, generator(), n=300)
    assert (
        result.p.min() < 0.02 < 0.05 < result.family_p.min()
    )  # the best of 400 noise features looks good until searched
    assert (result.family_p >= result.p).all()
    single = stats.auroc_permutations(scores[:, :1], labels, generator(), n=300)
    np.testing.assert_array_equal(single.family_p, single.p)


def test_error_rate_on_planted_null_and_power_on_planted_signal():
    """BH over 20 features at q = .05: any rejection in at most 7 % of 200 null data sets; power .8
    at AUROC .9."""
    labels, shift = (
        np.arange(60) < 20,
        math.sqrt(2) * scipy.stats.norm.ppf(0.9),
    )  # AUROC of two normals so far apart
    rng = numpy_rng("error rate")
    any_null = any_uncorrected = found = planted = family = 0
    for run in range(200):
        scores = rng.standard_normal((60, 20))
        result = stats.auroc_permutations(scores, labels, generator("null", run), n=999)
        any_null += (stats.benjamini_hochberg(result.p) <= 0.05).any()
        family += (result.family_p <= 0.05).any()
        any_uncorrected += (result.p <= 0.05).any()
        if run % 4 == 0:
            scores[labels, :3] += shift
            result = stats.auroc_permutations(scores, labels, generator("planted", run), n=999)
            found += int((stats.benjamini_hochberg(result.p)[:3] <= 0.05).sum())
            planted += 3
    rates = {
        "BH": any_null / 200,
        "family": family / 200,
        "uncorrected": any_uncorrected / 200,
        "power": found / planted,
    }
    print(rates)
    assert any_null <= 14 and family <= 14
    assert any_uncorrected > 100  # the same data without correction: the test can reject
    assert found / planted >= 0.8


def test_permutations_refuse_one_class_mixed_lengths_and_nan(unchecked):
    scores, labels = np.arange(12.0)[:, None], np.arange(12) < 5

    def run(labels=labels, scores=scores, **options):
        return stats.auroc_permutations(scores, labels, generator(), **options)

    run()
    with pytest.raises(ValueError, match="zip"):
        run(strata=np.zeros(11))
    with pytest.raises(ValueError, match="at least one"):
        run(n=0)
    for strata in (labels.astype(int), np.arange(12)):  # each stratum is one label
        with pytest.raises(ValueError, match="single label"):
            run(strata=strata)
    with pytest.raises(ValueError, match="single label"):
        run(labels=np.ones(12, dtype=bool))
    with pytest.raises(ValueError, match=r"NaN|nan"):
        run(scores=np.full((12, 1), np.nan))


def test_a_stratum_with_both_labels_is_enough_beside_strata_with_one():
    labels, strata = np.array([1, 0, 1, 1, 0, 0]), np.array([0, 0, 1, 1, 2, 2])
    first = np.arange(6)[:, None] == 0  # scores the first text alone
    result = stats.auroc_permutations(first * 1.0, labels, generator(), n=400, strata=strata)
    assert float(result.p[0]) == pytest.approx(0.5, abs=0.1)


def test_matched_aurocs_are_those_of_each_column_with_its_own_label():
    rng = numpy_rng("matched")
    scores, kinds = rng.random((30, 3)).round(1), rng.integers(0, 3, 30)
    labels = kinds[:, None] == np.arange(3)
    result = stats.matched_auroc_permutations(scores, labels, generator(), n=2000)
    for i in range(3):
        alone = stats.auroc_permutations(scores[:, [i]], labels[:, i], generator("other"), n=2000)
        assert result.observed[i] == pytest.approx(alone.observed[0])
        assert result.p[i] == pytest.approx(alone.p[0], abs=0.05)
    assert (result.null_max <= 1).all() and result.null_max.mean() > 0.5  # the largest of three


def test_matched_aurocs_shuffle_whole_rows_within_strata():
    strata = np.repeat([0, 1], 20)
    labels = np.stack([np.arange(40) % 20 < 5 + 10 * strata, np.arange(40) % 2 == 0], axis=1)
    scores = np.stack([strata, np.zeros(40)], axis=1) + 0.0
    inside = stats.matched_auroc_permutations(scores, labels, generator(), n=200, strata=strata)
    assert inside.observed[0] > 0.7 and inside.p.tolist() == [
        1,
        1,
    ]  # the stratum explains all of it
    assert stats.matched_auroc_permutations(scores, labels, generator(), n=200).p[0] < 0.05


def test_matched_aurocs_keep_their_level_over_tests():
    rng, kinds, false = numpy_rng("matched level"), np.repeat(np.arange(5), 12), 0
    for run in range(200):
        labels = rng.permutation(kinds)[:, None] == np.arange(5)
        p = stats.matched_auroc_permutations(
            rng.random((60, 5)), labels, generator("m", run), n=199
        ).p
        false += bool((stats.benjamini_hochberg(p) <= 0.05).any())
    assert 1 <= false <= 17  # of 10 expected


def test_matched_aurocs_refuse_what_they_cannot_rank(unchecked):
    scores, labels = np.random.default_rng(0).random((12, 2)), np.arange(24).reshape(12, 2) < 9
    labels[:, 1] = False
    with pytest.raises(ValueError, match="both classes"):
        stats.matched_auroc_permutations(scores, labels, generator())
    with pytest.raises(ValueError, match="zip"):
        stats.matched_auroc_permutations(scores[:, :1], labels, generator())
    with pytest.raises(ValueError, match="nan"):
        stats.matched_auroc_permutations(scores * np.nan, labels, generator())


def test_difference_of_aurocs_by_hand_and_by_resampling():
    rng = numpy_rng("difference")
    inside = np.arange(40) < 12
    ours, theirs = rng.normal(size=40) + inside, (rng.normal(size=40) + 0.3 * inside).round(1)
    result = stats.auroc_difference(
        ours[:, None], theirs[:, None], inside[:, None], ~inside, generator(), n=4000
    )
    assert result.estimate == pytest.approx(float(auroc(ours, inside) - auroc(theirs, inside)))
    assert result.n == 40
    drawn = []
    for _ in range(700):
        rows = np.concatenate([rng.choice(np.flatnonzero(c), c.sum()) for c in (inside, ~inside)])
        drawn.append(auroc(ours[rows], inside[rows]) - auroc(theirs[rows], inside[rows]))
    assert [result.low, result.high] == pytest.approx(
        np.quantile(drawn, [0.025, 0.975]).tolist(), abs=0.03
    )


def test_difference_of_aurocs_is_averaged_over_groups():
    scores = np.array([[3.0, 0], [1, 0], [0, 3], [0, 1], [2, 2], [0, 0]])
    inside = np.array([[1, 0], [1, 0], [0, 1], [0, 1], [0, 0], [0, 0]], dtype=bool)
    outside = ~inside.any(axis=1)
    apart = stats.auroc_difference(scores, scores * [1, 0], inside, outside, generator(), n=50)
    assert apart.estimate == pytest.approx(((3 / 4 - 3 / 4) + (3 / 4 - 1 / 2)) / 2)
    same = stats.auroc_difference(scores, scores, inside, outside, generator(), n=50)
    assert (same.estimate, same.low, same.high) == (0, 0, 0)


def test_difference_of_aurocs_needs_both_classes_and_numbers():
    scores, inside = np.random.default_rng(0).random((6, 1)), np.arange(6)[:, None] < 2
    with pytest.raises(ZeroDivisionError):
        stats.auroc_difference(scores, scores, inside & False, ~inside[:, 0], generator())
    with pytest.raises(ZeroDivisionError):
        stats.auroc_difference(scores, scores, inside, inside[:, 0] & False, generator())
    unknown = stats.auroc_difference(scores * np.nan, scores, inside, ~inside[:, 0], generator())
    assert math.isnan(unknown.low) and math.isnan(unknown.high)


# Bootstrap


def test_bootstrap_of_a_mean_is_the_interval_of_the_normal_distribution():
    values = numpy_rng("bootstrap").standard_normal(80) + 3
    interval = stats.bootstrap_by_document(values, np.arange(80), generator(), n=4000)
    half = 1.96 * values.std() / math.sqrt(80)
    assert interval.estimate == pytest.approx(values.mean()) and interval.n == 80
    assert interval.level == 0.95
    assert interval.low == pytest.approx(values.mean() - half, abs=0.03)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.03)


def test_drawing_documents_covers_the_truth_and_drawing_tokens_would_not():
    rng = numpy_rng("coverage")
    documents = np.repeat(np.arange(40), 10)
    by_document = by_token = 0
    for run in range(100):
        values = np.repeat(rng.standard_normal(40), 10) + 0.5 * rng.standard_normal(400)  # truth: 0
        clustered = stats.bootstrap_by_document(values, documents, generator("c", run), n=200)
        by_document += clustered.low <= 0 <= clustered.high
        by_token += abs(values.mean()) <= 1.96 * values.std() / 20
    assert by_document / 100 >= 0.9
    assert by_token / 100 < 0.65


def test_documents_may_be_named_differ_in_length_and_come_in_any_order():
    rng = numpy_rng("order")
    documents = np.repeat(["a", "b", "c", "d"], [1, 5, 2, 9])
    values = rng.standard_normal(17)
    shuffle = rng.permutation(17)
    one = stats.bootstrap_by_document(values, documents, generator())
    two = stats.bootstrap_by_document(values[shuffle], documents[shuffle], generator())
    assert (one.low, one.high) == pytest.approx((two.low, two.high), rel=1e-12)
    whole = [values[documents == name].mean() for name in "abcd"]
    assert min(whole) <= one.low <= one.estimate <= one.high <= max(whole)


def test_a_resampled_mean_is_over_the_items_drawn():
    documents = np.repeat(
        [0, 1, 2], [1, 10, 100]
    )  # a draw may hold 3 items or 300: the mean of ones is one
    interval = stats.bootstrap_by_document(np.ones(111), documents, generator())
    assert (interval.low, interval.high) == (1, 1)


def paired_bootstrap(ours, theirs, documents, statistic=np.mean, n=1000):
    """Rows of (ours, theirs), and a statistic that is the difference."""

    def difference(both):  # [item, 2, ...]
        return statistic(both[:, 0]) - statistic(both[:, 1])

    both = np.stack([ours, theirs], axis=1)
    return stats.bootstrap_by_document(both, documents, generator(), difference, n)


def test_pairing_removes_what_both_sides_share():
    rng = numpy_rng("paired")
    hard = 5 * rng.standard_normal(60)  # some documents are hard for both
    ours, theirs = hard + 0.1 + 0.1 * rng.standard_normal(60), hard + 0.1 * rng.standard_normal(60)
    documents = np.arange(60)
    paired = paired_bootstrap(ours, theirs, documents)
    alone = stats.bootstrap_by_document(ours, documents, generator())
    assert 0 < paired.low < 0.1 < paired.high < 0.2
    assert (alone.high - alone.low) > 10 * (paired.high - paired.low)
    mirrored = paired_bootstrap(theirs, ours, documents)
    assert (mirrored.low, mirrored.high) == pytest.approx((-paired.high, -paired.low))


def test_paired_bootstrap_of_a_statistic_that_needs_labels():
    rng = numpy_rng("labels")
    labels = np.arange(80) % 2 == 0
    good, bad = labels + 0.3 * rng.standard_normal(80), rng.standard_normal(80)

    def area(rows):
        return float(auroc(rows[:, 0], rows[:, 1] == 1))

    ours, theirs = np.stack([good, labels], 1), np.stack([bad, labels], 1)
    interval = paired_bootstrap(ours, theirs, np.arange(80), statistic=area, n=200)
    assert interval.estimate == pytest.approx(area(ours) - area(theirs)) and interval.low > 0.2
    same = paired_bootstrap(ours, ours, np.arange(80), statistic=area, n=50)
    assert (same.low, same.estimate, same.high) == (0, 0, 0)


def test_bootstraps_refuse(unchecked):
    values, documents = np.arange(6.0), np.repeat([0, 1], 3)
    with pytest.raises(ValueError, match="two or more"):
        stats.bootstrap_by_document(values, np.zeros(6), generator())
    with pytest.raises(ValueError, match="length"):
        stats.bootstrap_by_document(values, documents[:5], generator())
    spoilt = np.where(values == 2, np.nan, values)
    with pytest.warns(scipy.stats.DegenerateDataWarning):
        assert math.isnan(stats.bootstrap_by_document(spoilt, documents, generator()).low)


# False discovery rate


def test_benjamini_hochberg_rejects_what_the_step_up_rule_rejects():
    rng = numpy_rng("bh")
    for _ in range(50):
        p = np.concatenate([rng.random(30), rng.random(10) ** 4])
        q = stats.benjamini_hochberg(p)
        np.testing.assert_allclose(q, scipy.stats.false_discovery_control(p))
        for level in (0.01, 0.05, 0.2):
            ordered = np.sort(p)
            passing = np.flatnonzero(ordered <= level * np.arange(1, 41) / 40)
            cut = ordered[passing[-1]] if len(passing) else -1
            np.testing.assert_array_equal(q <= level, p <= cut)


def test_benjamini_hochberg_counts_every_entry_of_a_table():
    p = numpy_rng("table").random((7, 3))
    np.testing.assert_array_equal(
        stats.benjamini_hochberg(p).ravel(), stats.benjamini_hochberg(p.ravel())
    )
    assert stats.benjamini_hochberg(p).shape == (7, 3)


@pytest.mark.parametrize("bad", [[0.5, float("nan")], [1.5], [-0.1]])
def test_benjamini_hochberg_refuses(bad):
    with pytest.raises(ValueError, match="between 0 and 1"):
        stats.benjamini_hochberg(np.array(bad, dtype=float))


# Proportions


def test_clopper_pearson_inverts_the_binomial_test():
    for k, n in ((1, 9), (7, 20), (19, 20)):
        interval = stats.clopper_pearson(k, n)
        assert scipy.stats.binom.sf(k - 1, n, interval.low) == pytest.approx(0.025, rel=1e-6)
        assert scipy.stats.binom.cdf(k, n, interval.high) == pytest.approx(0.025, rel=1e-6)
        theirs = scipy.stats.binomtest(k, n).proportion_ci(0.95, method="exact")
        assert (interval.low, interval.high) == pytest.approx((theirs.low, theirs.high), rel=1e-9)
        assert interval.estimate == k / n and interval.n == n


def test_clopper_pearson_of_none_bounds_the_rate_by_about_three_over_n():
    interval = stats.clopper_pearson(0, 1000, level=0.9)
    assert interval.low == 0 and interval.high == pytest.approx(3 / 1000, rel=0.01)
    assert stats.clopper_pearson(1000, 1000).high == 1


@pytest.mark.parametrize(("k", "n"), [(3, 2), (-1, 5), (0, 0)])
def test_clopper_pearson_refuses(k, n):
    with pytest.raises(ValueError, match="must"):
        stats.clopper_pearson(k, n)


def test_results_cannot_be_edited():
    interval = stats.clopper_pearson(1, 2)
    with pytest.raises(AttributeError):
        interval.low = 0.0


# At the edges

LABELS = np.array([0, 0, 0, 1, 1, 1])
SCORES = np.array([[0.1, 9], [0.2, 8], [0.3, 7], [0.9, 3], [0.8, 2], [0.7, 1]])


def test_labels_as_integers_give_what_booleans_give():
    boolean, pair = LABELS.astype(bool), np.stack([LABELS, 1 - LABELS], axis=1)
    for use in (
        lambda y: stats.auroc_permutations(SCORES, y, generator(), 50),
        lambda y: stats.matched_auroc_permutations(SCORES, pair.astype(y.dtype), generator(), 50),
    ):
        ours, theirs = use(LABELS), use(boolean)
        assert np.array_equal(ours.observed, theirs.observed) and np.array_equal(ours.p, theirs.p)
    first, second = SCORES[:, :1], SCORES[:, 1:]
    ours, theirs = (
        stats.auroc_difference(first, second, y[:, None], (y == 0).astype(y.dtype), generator(), 50)
        for y in (LABELS, boolean)
    )
    assert ours == theirs and ours.estimate == 1


@pytest.mark.parametrize("missing", [np.nan, 2.0, -1.0])
def test_labels_that_are_no_marks_get_no_p(missing):
    labels = np.array([0, 0, 0, 1, 1, missing])
    with pytest.raises(ValueError, match="mask"):
        stats.auroc_permutations(SCORES, labels, generator(), 20)
    with pytest.raises(ValueError, match="mask"):
        stats.matched_auroc_permutations(SCORES, np.stack([labels] * 2, 1), generator(), 20)


def test_ties_everywhere_are_no_evidence():
    result = stats.auroc_permutations(0 * SCORES, LABELS, generator(), 50)
    assert np.array_equal(result.observed, [0.5, 0.5]) and np.array_equal(result.p, [1, 1])


def test_a_label_that_cannot_move_within_its_strata_has_p_one():
    moving = np.array([1, 0, 0, 1, 0, 0])
    labels = np.stack([LABELS, moving], axis=1)
    result = stats.matched_auroc_permutations(SCORES, labels, generator(), 50, LABELS)
    assert result.p[0] == 1 and result.p[1] < 1


@pytest.mark.parametrize(
    ("labels", "strata"),
    [
        (LABELS, LABELS),  # nothing can move
        (LABELS, np.arange(6)),
        (0 * LABELS, None),  # one class absent
        (LABELS[:0], None),  # no text
        (LABELS, np.array([0, 0, np.nan, np.nan, 1, 1])),
        (LABELS, np.array(["a", "a", None, None, "b", "b"])),
        (LABELS, np.arange(5)),
    ],
)
def test_labels_that_cannot_be_shuffled_are_refused(labels, strata, unchecked):
    with pytest.raises(ValueError):
        stats.auroc_permutations(SCORES[: len(labels)], labels, generator(), 20, strata)


def test_nan_in_a_column_is_refused():
    with pytest.raises(ValueError, match="nan"):
        stats.auroc_permutations(SCORES * np.array([1, np.nan]), LABELS, generator(), 20)


def test_small_integers_do_not_wrap_in_a_difference():
    small = (10 * SCORES).astype(np.uint8)
    inside, outside = LABELS[:, None].astype(bool), LABELS == 0
    result = stats.auroc_difference(small[:, :1], small[:, 1:], inside, outside, generator(), 50)
    assert result.estimate == 1


def test_documents_go_by_their_place_and_none_may_be_missing(unchecked):
    values, documents = np.arange(12.0), np.repeat(np.arange(4), 3)
    expected = stats.bootstrap_by_document(values, documents, generator(), n=50)
    shuffled = pd.Series(documents, index=numpy_rng("index").permutation(12))
    assert stats.bootstrap_by_document(values, shuffled, generator(), n=50) == expected
    for missing in (np.nan, None):
        broken = np.where(documents == 3, missing, documents)
        with pytest.raises(ValueError, match="None or NaN"):
            stats.bootstrap_by_document(values, broken, generator(), n=50)


def test_seeds_that_differ_by_less_than_the_smallest_difference_are_as_often_as_promised():
    rng = np.random.default_rng(0)
    seeds, pairs = rng.normal(size=(2000, 4)), rng.normal(size=(2000, 2))
    limits = np.array([stats.smallest_difference(values) for values in seeds])
    assert np.mean(np.abs(pairs[:, 0] - pairs[:, 1]) > limits) == pytest.approx(0.05, abs=0.015)
    assert np.isnan(stats.smallest_difference(np.array([1.0])))
    assert stats.smallest_difference(np.array([2.0, 2.0])) == 0
