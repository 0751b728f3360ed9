"""Feature activations and what stands out in them: every number counted by hand on a matrix of a
few texts."""

import json
import warnings

import jaxtyping
import numpy as np
import pytest
import scipy.sparse
import scipy.stats
import torch
from conftest import TEXTS
from test_sae_pretrained import tiny_sae

from lenslab.capture import harvest
from lenslab.features import activations, ranking
from lenslab.features.activations import FeatureActivations, columns_of, encode_features
from lenslab.features.contexts import find_contexts
from lenslab.features.ranking import category_profile, summarize_features
from lenslab.features.readings import token_classes, vocabulary_effects
from lenslab.features.together import coactivation, concept_features
from lenslab.runtime import derive_generator
from lenslab.sae.inputs import SAEMismatch, sae_hook
from lenslab.show.explore import explore_feature
from lenslab.stats import shuffled_orders
from lenslab.tokens import tokenize

HOOK = "blocks.1.hook_resid_post"
# six texts, two of each kind; feature 4 never fires, features 1 and 2 tie in several ways
MATRIX = np.array(
    [  # 0    1    2    3    4
        [9.0, 0.0, 6.0, 1.0, 0],
        [6.0, 0.0, 0.0, 1.0, 0],
        [0.0, 7.0, 0.0, 1.0, 0],
        [0.0, 0.0, 0.0, 2.0, 0],
        [5.0, 0.0, 6.0, 1.0, 0],
        [0.0, 0.0, 0.0, 1.0, 0],
    ],
    dtype=np.float32,
)
KINDS = ["a", "a", "b", "b", "c", "c"]


@pytest.fixture
def unchecked():
    """What a user meets, who does not run with the shape checker: our own errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def found(model):
    return encode_features(model, tiny_sae(model), tokenize(model, TEXTS), progress=False)


# Encode, pool, show


def test_every_real_token_is_encoded_and_no_other(model, found):
    batch, sae = tokenize(model, TEXTS), tiny_sae(model)
    dense = sae.encode(harvest(model, batch, HOOK, compute="float32")[HOOK])
    assert found.matrix.shape == (batch.n_real, 48) and found.hook == sae_hook(sae)
    expected = dense[batch.real].numpy()
    assert np.allclose(found.matrix.toarray(), expected, atol=1e-6) and (expected > 0).any()
    one = found.of(3)
    assert torch.allclose(one, dense[..., 3] * batch.real, atol=1e-6)
    assert float(one[:, 0].abs().sum()) == 0  # BOS


@pytest.mark.parametrize("how", ["max", "mean", "fraction"])
def test_pooling_equals_that_of_the_dense_activations(found, how):
    dense, real = torch.stack([found.of(f) for f in range(48)], 2), found.batch.real
    by_hand = {
        "max": lambda rows: rows.max(0).values,
        "mean": lambda rows: rows.mean(0),
        "fraction": lambda rows: (rows > 0).float().mean(0),
    }[how]
    expected = torch.stack([by_hand(dense[i][real[i]]) for i in range(len(real))]).numpy()
    assert np.allclose(found.pool(how).toarray(), expected, atol=1e-6)


def test_the_maximum_of_a_text_counts_the_tokens_where_the_feature_is_zero(model, found):
    negative = FeatureActivations(-found.matrix, found.batch, "n", "m", "h", "k")
    dense = -found.matrix.toarray()
    expected = np.stack([dense[found.text == i].max(0) for i in range(len(TEXTS))])
    assert np.allclose(negative.pool("max").toarray(), expected) and (expected < 0).any()


def test_batches_and_companions_do_not_change_a_text(model, found):
    alone = encode_features(
        model, tiny_sae(model), tokenize(model, TEXTS[2]), batch_size=1, progress=False
    )
    assert np.allclose(alone.pool().toarray(), found.pool()[[2]].toarray(), atol=1e-5)


def test_some_texts_in_another_order(found):
    few = found[[2, 0]]
    assert few.batch.texts == (TEXTS[2], TEXTS[0]) and few.key != found.key
    assert np.array_equal(few.pool().toarray(), found.pool().toarray()[[2, 0]])
    assert torch.equal(few.of(3), found.of(3)[[2, 0]])
    assert np.array_equal(found[1:3].pool("mean").toarray(), found.pool("mean").toarray()[1:3])


@pytest.mark.parametrize("none", [[], slice(2, 2), np.array([], dtype=int)])
def test_no_text_at_all_is_refused(found, none):
    with pytest.raises(ValueError, match="No text is chosen"):
        found[none]


def test_top_texts_rank_by_the_largest_value(found):
    value = found.pool("max").toarray()[:, 3]
    table = found.top_texts(3, n=2)
    assert table["text"].tolist() == np.argsort(-value, kind="stable")[:2].tolist()
    assert table["activation"].to_numpy() == pytest.approx(np.sort(value)[::-1][:2])
    assert table["excerpt"][0] in " ".join(TEXTS[table["text"][0]].split())


def test_a_link_only_where_there_are_pages(model, found):
    assert found.link(3) is None
    linked = encode_features(
        model,
        tiny_sae(model, neuronpedia_id="gpt2-small/1-res-jb"),
        tokenize(model, TEXTS[:1]),
        progress=False,
    )
    assert linked.link(17) == "https://www.neuronpedia.org/gpt2-small/1-res-jb/17"


def test_the_matrix_is_kept_by_content_and_read_back(model, found, tmp_path, monkeypatch):
    batch, sae = tokenize(model, TEXTS), tiny_sae(model)
    first = encode_features(model, sae, batch, folder=tmp_path, progress=False)
    assert [f.name for f in tmp_path.iterdir()] == [f"{first.key}.npz"]
    monkeypatch.setattr(activations, "harvest", None)  # not needed a second time
    again = encode_features(model, sae, batch, folder=tmp_path, progress=False)
    assert (again.matrix != first.matrix).nnz == 0 and again.key == first.key == found.key
    monkeypatch.undo()
    other = encode_features(model, tiny_sae(model, seed=1), batch, folder=tmp_path, progress=False)
    assert other.key != first.key and len(list(tmp_path.iterdir())) == 2


def test_an_sae_of_another_hook_or_one_that_gives_nan_is_refused(model):
    batch = tokenize(model, TEXTS)
    with pytest.raises(SAEMismatch):
        encode_features(model, _other_width(model), batch)
    broken = tiny_sae(model)
    broken.b_enc[0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        encode_features(model, broken, batch, progress=False)


def _other_width(model):
    sae = tiny_sae(model)
    sae.cfg.d_in = 31
    return sae


def test_unknown_pooling_and_features_are_refused(found):
    with pytest.raises(ValueError, match="max, mean, fraction"):
        found.pool("last")
    with pytest.raises(ValueError, match="not one of"):
        found.of(-1)


# What stands out


@pytest.mark.parametrize(
    "matrix", [MATRIX, scipy.sparse.csr_array(MATRIX)], ids=["dense", "sparse"]
)
def test_summary_by_hand(matrix):
    found = summarize_features(matrix, KINDS)
    assert found.largest.tolist() == [9, 7, 6, 2, 0]
    assert found.fired.tolist() == [3, 1, 2, 6, 0]
    assert found.strong.tolist() == [
        3,
        1,
        2,
        1,
        0,
    ]  # above half of the own largest: 4.5, 3.5, 3, 1 (1.0 is not above)
    assert found.mean == pytest.approx([20 / 6, 7 / 6, 2, 7 / 6, 0])
    assert found.composite == pytest.approx([20 / 12, 7 / 36, 4 / 6, 7 / 6, 0])
    assert found.least_fraction.tolist() == [0, 0, 0, 1, 0]
    assert found.strongest(2).index.tolist() == [0, 1]
    assert found.frequent(1).index.tolist() == [3]
    assert found.most_composite(2).index.tolist() == [0, 3]
    assert found.general().index.tolist() == [3]


def test_selective_features_are_ranked_by_strength_and_ties_are_told():
    table = summarize_features(MATRIX).selective(3)
    assert table.index.tolist() == [1, 3, 2] and table["tied"].tolist() == [
        2,
        2,
        1,
    ]  # the silent feature is none
    with pytest.raises(ValueError, match="categories"):
        summarize_features(MATRIX).general()


def test_profile_by_hand():
    table = category_profile(scipy.sparse.csc_array(MATRIX), KINDS, [2, 0]).set_index(
        ["feature", "category"]
    )
    assert table.loc[(2, "a"), "fraction"] == 0.5 and table.loc[(2, "a"), "mean"] == 3
    assert table.loc[(0, "a"), "largest"] == 9 and table.loc[(0, "b"), "fired"] == 0


def test_a_summary_is_saved_with_versions_and_without_nan(tmp_path):
    found = coactivation(MATRIX, [0, 1, 3])
    found.save(tmp_path / "result.json", seed=0, texts=np.int64(6))
    saved = json.loads((tmp_path / "result.json").read_text())
    assert saved["result"] == "CoActivation" and saved["config"] == {"seed": 0, "texts": 6}
    assert saved["values"]["joint"] == [[3, 0, 3], [0, 1, 1], [3, 1, 6]]
    assert saved["values"]["pmi"][0][1] is None and saved["versions"]["torch"]


def test_what_no_number_can_be_made_of_is_refused(unchecked):
    with pytest.raises(ValueError, match="5 labels"):
        summarize_features(MATRIX, KINDS[:5])
    broken = MATRIX.copy()
    broken[3, 1] = np.nan
    for bad in (broken, scipy.sparse.csr_array(broken)):
        with pytest.raises(ValueError, match="text 3, feature 1"):
            summarize_features(bad)
    with pytest.raises(ValueError, match="empty"):
        summarize_features(MATRIX[:0])
    with pytest.raises(ValueError, match="not one of 0 to 4"):
        columns_of(MATRIX, [5])


# Together


def test_coactivation_by_hand():
    fires = np.array([[1, 1, 0], [1, 1, 0], [1, 0, 1], [0, 0, 1]], dtype=float)
    found = coactivation(fires, [0, 1, 2])
    assert found.fired.tolist() == [3, 2, 2]
    assert found.joint.tolist() == [[3, 2, 1], [2, 2, 0], [1, 0, 2]]
    pairs = found.to_frame().set_index(["feature", "other"])
    assert pairs.loc[(0, 1), "p_other_given_feature"] == pytest.approx(2 / 3)
    assert pairs.loc[(0, 1), "p_feature_given_other"] == 1
    assert found.pmi[0, 1] == pytest.approx(np.log(2 / 4 / (3 / 4 * 2 / 4))) and np.isnan(
        found.pmi[1, 2]
    )
    assert found.expected[0, 1] == pytest.approx(1.5)
    assert found.p[0, 1] == pytest.approx(0.5)  # both of two within three of four: 3 of 6 pairs
    assert found.p[1, 2] == pytest.approx(1) and np.isnan(found.p[0, 0])
    assert found.to_frame().loc[0, ["feature", "other"]].tolist() == [0, 1]


def test_coactivation_within_strata_is_the_permutation_test():
    rng = np.random.default_rng(0)
    strata = np.repeat([0, 1, 2], [12, 20, 8])
    shared = rng.random((3,))[strata] > 0.4
    fires = np.stack([rng.random(40) < 0.2 + 0.5 * shared for _ in range(2)], axis=1)
    fires[:6, 1] = fires[:6, 0]
    exact = coactivation(fires.astype(float), [0, 1], strata)
    orders = shuffled_orders(fires[:, 1], derive_generator(0, "t"), 4000, strata)
    joint = np.array([(fires[order, 1] & fires[:, 0]).sum() for order in orders])
    sampled = np.mean(joint >= exact.joint[0, 1])
    assert exact.p[0, 1] == pytest.approx(sampled, abs=0.03) and 0.001 < exact.p[0, 1] < 0.9
    assert (
        exact.p[0, 1] > coactivation(fires.astype(float), [0, 1]).p[0, 1]
    )  # the strata explain a part


def test_features_that_fire_with_their_category_only_are_not_together_within_it():
    fires = np.zeros((40, 2))
    fires[:20] = 1
    assert coactivation(fires, [0, 1]).p[0, 1] < 1e-9
    assert coactivation(fires, [0, 1], np.repeat([0, 1], 20)).p[0, 1] == 1


# Concepts


def test_concept_search_by_hand():
    concept = np.array([[3.0, 1, 0, 0], [2, 0, 0, 0], [2, 1, 0, 0]])
    background = np.array([[0.0, 1, 5, 0], [1, 0, 5, 0], [0, 1, 5, 0], [0, 0, 5, 0], [2, 0, 5, 0]])
    found = concept_features(concept, scipy.sparse.csr_array(background), n=400)
    assert found["feature"].tolist() == [0, 1, 3, 2]
    found = found.sort_values("feature")
    expected = [14 / 15, (2 * 3 + 1 * 0 + 0.5 * (2 * 2 + 3)) / 15, 0, 0.5]
    assert found["auroc"].to_numpy() == pytest.approx(expected)
    # over all texts, the silent ones too
    assert found["mean_concept"].to_numpy() == pytest.approx([7 / 3, 2 / 3, 0, 0])
    best = found.iloc[0]
    assert best["mean_background"] == pytest.approx(3 / 5)
    assert best["fired_background"] == pytest.approx(2 / 5)
    # one of 56 ways to choose three of eight, and four features were tried
    assert best["family_p"] > 2 / 56
    assert found.iloc[3]["family_p"] > 0.9


def test_concept_search_by_chance_is_not_a_finding():
    values = np.random.default_rng(0).random((25, 1000))
    found = concept_features(values[:5], values[5:], n=300)
    assert found["auroc"].max() > 0.9 and found["family_p"].min() > 0.05


# Counting


def test_leaders_by_count_by_hand():
    table = ranking.count_leaders(MATRIX).drop(columns="leader")
    # features above 5.0 on some text: 0 (5.0 itself is not), 1 and 2, on 2, 1 and 2 texts
    assert table.to_numpy().tolist() == [[0, 9, 1], [3, 6, 1], [1, 1, 1]]
    halves = ranking.count_leaders(MATRIX, "half").set_index("leader")
    # features 1 and 3: the lower id, and it says that there are two
    assert halves.loc["most selective"].tolist() == [1, 1, 2]


def test_where_no_feature_is_above_the_threshold_there_is_no_most_selective_one():
    table = ranking.count_leaders(MATRIX, 50).set_index("leader")
    assert table.loc["strongest"].tolist() == [0, 9, 1]
    assert table.loc["most selective"].tolist() == [-1, 0, 0]
    silent = ranking.count_leaders(MATRIX * 0)
    assert (silent["feature"] == -1).all() and (silent["tied"] == 0).all()
    null = ranking.count_specialists_null(MATRIX / 10, KINDS, n=3)
    assert null.observed == 0 and null.null.tolist() == [0, 0, 0]


def test_older_specialists_by_hand():
    table = ranking.count_specialists(scipy.sparse.csr_array(MATRIX), KINDS).set_index("category")
    # a: features 0 (2 strong in, 0 out), 2 (1, 1); b: feature 1 (1, 0); c: features 2 (1, 1), 0 (0,
    # 2)
    assert table.loc["a", ["feature", "score"]].tolist() == [0, 2]
    assert table.loc["b", ["feature", "score"]].tolist() == [1, 1]
    assert table.loc["c", ["feature", "score", "tied"]].tolist() == [
        2,
        0,
        3,
    ]  # 2, 3 and 4 have score 0


def test_of_equal_scores_the_feature_with_the_largest_value_inside_is_the_older_specialist():
    table = ranking.count_specialists(
        np.array([[6, 9], [6, 9], [0, 0], [0, 0]]), list("aabb")
    ).set_index("category")
    assert table.loc["a", ["feature", "score", "tied"]].tolist() == [1, 2, 2]
    same = ranking.count_specialists(
        np.array([[9, 9], [9, 9], [0, 0], [0, 0]]), list("aabb")
    ).set_index("category")
    assert same.loc["a", ["feature", "tied"]].tolist() == [0, 2], "then the lowest id"


def test_older_specialist_score_starts_at_minus_one():
    values = np.array([[6.0], [6], [6], [0]])
    table = ranking.count_specialists(values, ["a", "b", "b", "a"]).set_index("category")
    assert table.loc["a", ["feature", "score"]].tolist() == [
        -1,
        -1,
    ]  # 1 inside, 2 outside: no better than the start
    assert table.loc["b", ["feature", "score"]].tolist() == [0, 1]


def test_meaningless_labels_have_specialists_too():
    rng = np.random.default_rng(0)
    values = np.where(rng.random((70, 400)) < 0.03, rng.gamma(2, 4, (70, 400)), 0)
    null = ranking.count_specialists_null(values, np.repeat(np.arange(7), 10), n=40)
    assert null.mean_null > 3 and len(null.null) == 40


def test_the_null_repeats_what_the_table_counts():
    table = ranking.count_specialists(MATRIX, KINDS)
    assert (
        ranking.count_specialists_null(MATRIX, KINDS, n=3).observed
        == int((table["score"] > 0).sum())
        == 2
    )


def test_features_per_category_by_hand():
    table = ranking.features_per_category(scipy.sparse.csr_array(MATRIX), KINDS, top=2)
    assert table.to_numpy().tolist() == [
        ["a", 0, 2, 2],
        ["a", 3, 2, 2],
        ["b", 3, 2, 2],
        ["b", 1, 1, 2],
        ["c", 3, 2, 2],
        ["c", 0, 1, 2],
    ]


@pytest.mark.parametrize(
    "use",
    [
        lambda labels: ranking.count_specialists(MATRIX, labels),
        lambda labels: ranking.features_per_category(MATRIX, labels),
        lambda labels: ranking.count_specialists_null(MATRIX, labels, n=2),
        lambda labels: category_profile(MATRIX, labels, [0]),
        lambda labels: coactivation(MATRIX, [0, 2], strata=labels),
        lambda labels: summarize_features(MATRIX, labels),
    ],
)
def test_labels_of_another_length_are_refused(use):
    with pytest.raises(ValueError, match=r"5 labels"):
        use(KINDS[:5])


# What would be wrong in silence


def _byte_changed(file, share):
    raw = bytearray(file.read_bytes())
    raw[int(len(raw) * share)] ^= 1
    file.write_bytes(raw)


def _values_changed(file, share):
    with np.load(file) as parts:
        np.savez(file, **{**parts, "data": parts["data"] * 2})


def _of_an_older_version(file, share):
    with np.load(file) as parts:
        parts = dict(parts)
    del parts["seal"]
    np.savez(file, **parts)


@pytest.mark.parametrize(
    ("damage", "share"),
    [(_byte_changed, share) for share in (0.001, 0.02, 0.3, 0.5, 0.7, 0.9, 0.999)]
    + [
        (_values_changed, 0),
        (_of_an_older_version, 0),
        (lambda file, share: file.write_bytes(b""), 0),
        (lambda file, share: file.write_text("text"), 0),
        (lambda file, share: file.write_bytes(file.read_bytes()[:-40]), 0),
    ],
)
def test_a_kept_matrix_that_is_damaged_is_encoded_again(model, found, tmp_path, damage, share):
    batch, sae = tokenize(model, TEXTS), tiny_sae(model)
    encode_features(model, sae, batch, folder=tmp_path, progress=False)
    file = tmp_path / f"{found.key}.npz"
    whole = file.read_bytes()
    damage(file, share)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        again = encode_features(model, sae, batch, folder=tmp_path, progress=False)
    assert (again.matrix != found.matrix).nnz == 0
    # a byte that means nothing (a date in the archive) may differ without a word
    assert said or damage is _byte_changed
    assert not said or file.read_bytes()[: len(whole) // 2] == whole[: len(whole) // 2]


def test_a_kept_matrix_of_another_sae_is_not_taken_for_this_one(model, found, tmp_path):
    batch, other = tokenize(model, TEXTS), tiny_sae(model, seed=1)
    elsewhere = encode_features(model, other, batch, folder=tmp_path, progress=False)
    (tmp_path / f"{elsewhere.key}.npz").rename(tmp_path / f"{found.key}.npz")
    with pytest.warns(UserWarning, match="something else"):
        ours = encode_features(model, tiny_sae(model), batch, folder=tmp_path, progress=False)
    assert (ours.matrix != found.matrix).nnz == 0


@pytest.mark.parametrize("blocked", ["the folder is a file", "a folder has the name", "full disk"])
def test_a_matrix_that_cannot_be_kept_is_not_lost(model, found, tmp_path, blocked, monkeypatch):
    folder = tmp_path / "cache"
    if blocked == "the folder is a file":
        folder.write_text("")
    elif blocked == "a folder has the name":
        (folder / f"{found.key}.npz").mkdir(parents=True)
    else:
        monkeypatch.setattr(np, "savez", _full)
    with pytest.warns(UserWarning, match="not kept"):
        fa = encode_features(
            model, tiny_sae(model), tokenize(model, TEXTS), folder=folder, progress=False
        )
    assert (fa.matrix != found.matrix).nnz == 0
    assert not list(tmp_path.rglob("*.npz.*")) and not list(tmp_path.rglob(".*-*"))


def _full(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("feature", [2.9, 3.0, True, float("nan"), -1, 48])
def test_what_is_no_feature_is_refused_wherever_one_is_asked_for(model, found, feature, unchecked):
    matrix = found.pool()
    labels = ["a", "a", "b", "b"]
    for ask in (
        lambda: columns_of(matrix, [feature]),
        lambda: found.of(feature),
        lambda: found.top_texts(feature),
        lambda: category_profile(matrix, labels, [feature]),
        lambda: coactivation(matrix, [feature]),
        lambda: explore_feature(found, feature),
        lambda: token_classes(found, [feature]),
        lambda: vocabulary_effects(model, tiny_sae(model), [feature]),
        lambda: find_contexts(model, tiny_sae(model), found.batch, features=[feature]),
    ):
        with pytest.raises(ValueError, match="Feature"):
            ask()
    assert columns_of(matrix, [np.int32(3)]).shape == columns_of(matrix, torch.tensor([3])).shape


def test_a_feature_named_twice_counts_once_or_is_refused():
    twice, once = (category_profile(MATRIX, KINDS, f) for f in ([1, 1], [1]))
    assert twice.equals(once)
    with pytest.raises(ValueError, match="twice"):
        coactivation(MATRIX, [1, 1])


@pytest.mark.parametrize("missing", [None, float("nan")])
@pytest.mark.parametrize(
    "use",
    [
        lambda labels: summarize_features(MATRIX, labels),
        lambda labels: ranking.features_per_category(MATRIX, labels),
        lambda labels: category_profile(MATRIX, labels, [0]),
        lambda labels: ranking.count_specialists(MATRIX, labels),
        lambda labels: coactivation(MATRIX, [0, 1], labels),
    ],
)
def test_missing_labels_and_labels_of_another_number_are_refused(use, missing):
    with pytest.raises(ValueError, match="None or NaN"):
        use([*KINDS[:5], missing])
    with pytest.raises(ValueError, match="one each"):
        use(KINDS[:5])


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.float16, bool])
def test_matrices_of_small_numbers_give_what_floats_give(dtype):
    """Minus one is 255 in a byte: the features that never fire came first."""
    small, floats = MATRIX.astype(dtype), MATRIX.astype(dtype).astype(np.float32)
    for use in (
        lambda m: ranking.count_specialists(m, KINDS, "half"),
        lambda m: summarize_features(m, KINDS).to_frame(),
        lambda m: concept_features(m[:2], m[2:], n=20),
        lambda m: coactivation(m, [0, 1, 2]).to_frame(),
        lambda m: category_profile(m, KINDS, [0, 3]),
    ):
        assert use(small).equals(use(floats))


def test_negative_activations_and_silent_ones_are_refused(found):
    with pytest.raises(ValueError, match="Negative"):
        summarize_features(-MATRIX)
    with pytest.raises(ValueError, match="Negative"):
        token_classes(FeatureActivations(-found.matrix, found.batch, "n", "m", "h", "k"), [0])
    silent = concept_features(0 * MATRIX[:2], 0 * MATRIX[2:], n=20)
    assert (silent["auroc"] == 0.5).all() and (silent["family_p"] == 1).all()
    with pytest.raises(ValueError, match=r"\[text, feature\]"):
        ranking.count_specialists(MATRIX[:, 0], KINDS)
