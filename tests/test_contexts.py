"""Contexts and vocabulary effects: the same as looking at everything at once, never the same place
twice."""

import itertools

import numpy as np
import pytest
import torch
from conftest import TEXTS
from test_sae_pretrained import HOOK, tiny_sae

from lenslab.capture import harvest
from lenslab.features import contexts
from lenslab.features.contexts import find_contexts
from lenslab.features.readings import direct_logits, final_norm, vocabulary_effects
from lenslab.models import load_model
from lenslab.sae.controls import untrained_sae
from lenslab.sae.inputs import SAEMismatch
from lenslab.tokens import pack, token_string, tokenize

WORDS = ["cat", "mat", "sat", "add", "city", "river", "they", "say", "Paris", "a", "2", "def"]


@pytest.fixture(scope="module")
def windows(model):
    """Fifteen windows of 20 tokens, all different."""
    picks = np.random.default_rng(0)
    texts = [" ".join(picks.choice(WORDS, 12)) + "." for _ in range(16)]
    return pack(model, texts, length=20)


@pytest.fixture(scope="module")
def sae(model):
    return tiny_sae(model, architecture="topk", d_sae=32)


@pytest.fixture(scope="module")
def dense(model, sae, windows):
    values = sae.encode(harvest(model, windows, HOOK, compute="float32")[HOOK])
    return values * windows.real[..., None]


@pytest.fixture(scope="module")
def found(model, sae, windows):
    return find_contexts(model, sae, windows, k=4, sample=30, context=6, progress=False)


def test_the_strongest_token_of_the_strongest_windows(found, windows, dense):
    assert found.tokens == windows.n_real
    assert np.array_equal(found.fired, (dense > 0).sum((0, 1)).numpy())
    for feature in range(32):
        best = dense[..., feature].max(1)
        expected = best.values.sort(descending=True)
        n = min(4, int((best.values > 0).sum()))
        table = found.top(feature)
        assert table["activation"].to_numpy() == pytest.approx(
            expected.values[:n].numpy(), rel=1e-5
        )
        for _, row in table.iterrows():
            assert dense[row["window"], row["position"], feature] == pytest.approx(
                row["activation"], rel=1e-5
            )
            assert row["window"] not in table["window"].drop(row.name).tolist()


def test_a_context_shows_the_tokens_around_within_the_document_and_what_they_do(
    found, windows, dense
):
    feature = int(found.fired.argmax())
    for _, row in found.top(feature).iterrows():
        window, position = row["window"], row["position"]
        first = last = position
        while first > position - 6 and windows.real[window, first - 1]:
            first -= 1
        while last < min(position + 6, 19) and windows.real[window, last + 1]:
            last += 1
        strings = windows.strings(window)
        assert row["tokens"] == strings[first : last + 1]
        assert row["context"] == "".join(
            f"«{s}»" if i == position else s for i, s in enumerate(strings[first : last + 1], first)
        )
        expected = dense[window, first : last + 1, feature].tolist()
        assert row["activations"] == pytest.approx(expected, abs=1e-5)


def test_neither_pieces_nor_steps_change_anything(model, sae, windows, found, monkeypatch):
    monkeypatch.setattr(contexts, "CELLS", 4 * 20 * 32)
    pieces = iter([windows[:2], windows[2:9], windows[9:]])
    again = find_contexts(model, sae, pieces, k=4, sample=30, context=6, progress=False)
    assert np.array_equal(again.fired, found.fired) and again.tokens == found.tokens
    for part in ("strongest", "sample"):
        ours, theirs = getattr(again, part), getattr(found, part)
        for column in ("feature", "window", "position"):
            assert ours[column].tolist() == theirs[column].tolist()
        for column in ("ids", "activations"):
            assert np.allclose(np.stack(ours[column]), np.stack(theirs[column]), atol=1e-4)


def test_memory_does_not_grow_with_the_text(model, sae, windows, found):
    endless = itertools.islice(itertools.cycle([windows[:5], windows[5:]]), 6)
    longer = find_contexts(model, sae, endless, k=4, sample=30, context=6, progress=False)
    assert longer.tokens == 3 * found.tokens and np.array_equal(longer.fired, 3 * found.fired)
    assert len(longer.strongest) <= 32 * 4 and len(longer.sample) <= 32 * 30
    for feature in range(32):  # every document was there three times: shown once
        shown = longer.top(feature)["context"]
        assert shown.tolist() == found.top(feature)["context"].tolist() and shown.is_unique


def test_the_sample_is_drawn_evenly_and_from_the_seed(model, sae, windows, found, dense):
    feature = int(found.fired.argmax())
    places = found.sample[found.sample["feature"] == feature][["window", "position"]]
    assert len(places) == min(30, found.fired[feature]) and not places.duplicated().any()
    assert all(dense[window, position, feature] > 0 for window, position in places.to_numpy())
    options = {"context": 6, "progress": False}
    alone = find_contexts(model, sae, windows, sample=30, features=[feature], **options)
    assert alone.sample[["window", "position"]].to_numpy().tolist() == places.to_numpy().tolist()
    other = find_contexts(model, sae, windows, sample=30, features=[feature], seed=1, **options)
    assert other.sample["position"].tolist() != places["position"].tolist()
    assert other.fired[0] == found.fired[feature]
    drawn = [
        find_contexts(model, sae, windows, sample=5, features=[feature], seed=seed, **options)
        for seed in range(8)
    ]
    mean = np.mean([each.sample["activation"].mean() for each in drawn])
    values = dense[..., feature][dense[..., feature] > 0]
    assert abs(mean - float(values.mean())) < 4 * float(values.std()) / np.sqrt(40)


def test_quantiles_go_from_the_strongest_share_to_the_weakest(found):
    feature = int(found.fired.argmax())
    table = found.quantiles(feature, n=3, per=2)
    assert table["quantile"].is_monotonic_increasing and set(table["quantile"]) == {1, 2, 3}
    assert (table["activation"] <= table["high"]).all() and (
        table["activation"] >= table["low"]
    ).all()
    bounds = table.groupby("quantile")[["low", "high"]].first()
    assert (
        bounds.loc[1, "low"]
        >= bounds.loc[2, "high"]
        >= bounds.loc[2, "low"]
        >= bounds.loc[3, "high"]
    )
    assert table["quantile"].value_counts().max() <= 2


def test_features_that_never_fire_have_empty_tables(model, windows):
    silent = tiny_sae(model, d_sae=8)
    silent.b_enc.data[3] = -1e6
    found = find_contexts(model, silent, windows, features=[3, 5], progress=False)
    assert (
        found.fired[0] == 0
        and len(found.top(3)) == 0 == len(found.quantiles(3))
        and len(found.top(5))
    )
    assert list(found.quantiles(3).columns) == list(found.quantiles(5).columns)
    with pytest.raises(ValueError, match="not followed"):
        found.top(4)


def test_features_that_the_sae_has_not_are_refused(model, sae, windows):
    for feature in (32, -1):
        with pytest.raises(ValueError, match="not one of"):
            find_contexts(model, sae, windows, features=[feature])


def test_an_sae_trained_without_bos_is_refused_where_windows_begin_with_one(model, windows):
    bare = tiny_sae(model, architecture="topk", d_sae=32, prepend_bos=False)
    with pytest.raises(SAEMismatch, match="without BOS"):
        find_contexts(model, bare, iter([windows]), progress=False)
    without = tokenize(model, TEXTS, bos=False)
    assert find_contexts(model, bare, without, k=1, progress=False).tokens == without.n_real


def test_no_windows_are_refused(model, sae):
    with pytest.raises(ValueError, match="no windows"):
        find_contexts(model, sae, [])


# Vocabulary


@pytest.mark.parametrize("folder", ["gpt2_folder", "llama_folder"])
def test_the_direct_path_is_the_final_norm_and_the_unembedding(folder, request):
    model = load_model(str(request.getfixturevalue(folder)))
    with torch.no_grad():
        model.ln_final.weight.copy_(torch.rand(32) + 0.5)
    weight, centred = final_norm(model)
    assert centred == ("gpt2" in folder)
    assert torch.allclose(weight, model.ln_final.weight, atol=1e-3)
    x = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(0))
    ours = direct_logits(model, x[0])
    with torch.no_grad():
        bias = getattr(model.ln_final, "bias", None)
        normed = model.ln_final(x) - (0 if bias is None else bias)
        logits = (normed @ model.W_U)[0]
    expected = logits - logits.mean(-1, keepdim=True)
    assert torch.allclose(ours / ours.norm(), expected / expected.norm(), atol=1e-4)


def test_effects_are_sorted_named_and_scaled_by_chance(model, sae):
    frame = vocabulary_effects(model, sae, [4, 7], n=5)
    logits = direct_logits(model, sae.W_dec[[4, 7]]).detach()
    effects = frame.set_index(["feature", "effect", "rank"])["logit"]
    assert effects[4, "promoted", 1] == pytest.approx(float(logits[0].max()))
    assert effects[7, "suppressed", 1] == pytest.approx(float(logits[1].min()))
    for _, rows in frame.groupby(["feature", "effect"]):
        assert rows["rank"].tolist() == [1, 2, 3, 4, 5]
        assert rows["logit"].abs().is_monotonic_decreasing
    assert len(frame) == 20 and (frame["times_control"] > 0).all()
    twice = tiny_sae(model, architecture="topk", d_sae=32)
    twice.W_dec.data *= 2
    double = vocabulary_effects(model, twice, [4, 7], n=5)
    assert np.allclose(double["logit"], 2 * frame["logit"])
    # chance has the same norm as the feature
    assert np.allclose(double["times_control"], frame["times_control"])


def test_a_direction_of_one_token_promotes_that_token(model):
    token = 77
    planted = tiny_sae(model, architecture="topk", d_sae=32)
    row = model.W_U[:, token].detach()
    planted.W_dec.data[3] = (row - row.mean()) / model.ln_final.weight.detach()
    first = vocabulary_effects(model, planted, [3], n=1).iloc[0]
    assert first["token"] == token_string(model.tokenizer, token) and first["times_control"] > 1.3


def test_an_sae_without_a_decoder_matrix_is_asked_by_decoding(model, sae):
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    null = untrained_sae(sae, x, 4)
    found = vocabulary_effects(model, null, [2], n=1)
    expected = float(direct_logits(model, null.directions[[2]]).detach().max())
    assert found["logit"][0] == pytest.approx(expected, rel=1e-4)


def test_saes_that_do_not_write_to_the_stream_are_refused(model, sae):
    with pytest.raises(ValueError, match="residual stream"):
        vocabulary_effects(
            model,
            tiny_sae(
                model,
                "blocks.1.hook_resid_post".replace("resid_post", "resid_mid"),
                hook_name_out="blocks.1.attn.hook_z",
            ),
            [0],
        )
    with pytest.raises(ValueError, match="not one of"):
        vocabulary_effects(model, sae, [32])


def test_texts_of_different_lengths_are_windows_too(model, sae):
    batch = tokenize(model, TEXTS)
    found = find_contexts(model, sae, batch, k=2, context=2, progress=False)
    assert found.tokens == batch.n_real and all(
        (found.top(f)["activation"] > 0).all() for f in range(32)
    )
