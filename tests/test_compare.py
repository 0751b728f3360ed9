"""Matching of SAEs on planted pairs whose correspondence is known, nulls that say nothing, and
comparisons that lack something."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse
import torch
from conftest import TEXTS
from test_sae_pretrained import HOOK, tiny_sae

from lenslab.capture import harvest
from lenslab.compare import (
    KINDS,
    SHARED,
    Dictionary,
    children,
    comparable_kinds,
    comparable_saes,
    compare,
    describe,
    match,
    null_dictionaries,
    open_saes,
    similarity,
)
from lenslab.features.activations import encode_features, encode_saes
from lenslab.features.readings import direct_logits
from lenslab.sae.inputs import SAEMismatch
from lenslab.sae.registry import repository_of
from lenslab.sae.save import save_sae
from lenslab.tokens import tokenize

LATENTS, WIDTH, TOKENS = 60, 48, 3000


def dictionary(name, rows, fires, **changed) -> Dictionary:
    unit = torch.nn.functional.normalize(torch.as_tensor(rows, dtype=torch.float32), dim=1)
    fields = dict(decoder=unit, encoder=unit, vocabulary=unit, model="m", tokens="t")
    fields["latents"] = np.arange(len(unit))
    fires = scipy.sparse.csc_array(np.asarray(fires, dtype=np.float32))
    return Dictionary(name=name, fires=fires, **fields | changed)


@pytest.fixture(scope="module")
def planted():
    """(a, b, where each latent of a is in b, or -1): 40 of 60 are the same up to noise and order,
    in direction and in firing; the others are of b's own."""
    rng = np.random.default_rng(0)
    rows, fires = rng.normal(size=(LATENTS, WIDTH)), rng.random((TOKENS, LATENTS)) < 0.05
    order = rng.permutation(LATENTS)
    noisy = rows + 0.5 * rng.normal(size=rows.shape)
    flipped = fires ^ (rng.random(fires.shape) < 0.005)
    noisy[40:], flipped[:, 40:] = rng.normal(size=(20, WIDTH)), rng.random((TOKENS, 20)) < 0.05
    truth = np.where(np.arange(LATENTS) < 40, np.argsort(order), -1)
    return dictionary("a", rows, fires), dictionary("b", noisy[order], flipped[:, order]), truth


def nulls(a, seed=1):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=a.decoder.shape)
    return {"random": dictionary("random", rows, a.fires.toarray()[rng.permutation(TOKENS)])}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_planted_is_found_and_nothing_else(planted, kind):
    a, b, truth = planted
    found = match(similarity(a, b, kind))
    claimed = (found["similarity"] >= SHARED).to_numpy()
    right = (found["partner"] == truth).to_numpy()
    assert right[claimed].mean() == 1, "precision"
    assert (claimed & right).sum() / (truth >= 0).sum() >= 0.95, "recall"


@pytest.mark.parametrize("kind", KINDS)
def test_an_sae_in_another_order_is_itself(planted, kind):
    a, _, _ = planted
    order = np.random.default_rng(2).permutation(LATENTS)
    b = dictionary("b", a.decoder[order], a.fires.toarray()[:, order])
    found = match(similarity(a, b, kind))
    assert (found["partner"] == np.argsort(order)).all()
    assert np.allclose(found["similarity"], 1, atol=1e-5)


def test_the_correction_takes_away_what_a_null_reaches(planted):
    a, b, _ = planted
    same = compare(a, a, nulls(a)).summary
    assert np.allclose(same["value"], 1) and np.allclose(same["corrected"], 1, atol=1e-6)
    chance = compare(a, nulls(a, 2)["random"], nulls(a)).summary.set_index("kind")
    assert chance["corrected"].abs().max() < 0.03
    assert chance.loc["decoder", "value"] > 0.3, "not corrected, chance looks like likeness"
    half = compare(a, b, nulls(a)).summary
    assert half["corrected"].between(0.3, 0.8).all() and (half["shared_null"] < 0.05).all()


def test_the_strictest_null_is_taken_and_firings_dealt_out_anew_count_for_firings_alone(planted):
    a, b, _ = planted
    several = nulls(a) | {"itself": a} | {"shuffled firings": a}
    summary = compare(a, b, several).summary.set_index("kind")
    assert np.allclose(summary["null"], 1, atol=1e-6)
    assert summary["shuffled firings"].notna().to_dict() == {k: k == "firing" for k in KINDS}


def test_a_silent_latent_is_not_compared_and_a_wider_sae_leaves_none_over(planted):
    a, b, _ = planted
    fires = a.fires.toarray()
    fires[:, :5] = 0
    silent = dictionary("silent", a.decoder, fires)
    assert compare(silent, b, nulls(a)).latents["latent"].min() == 5
    wide = match(similarity(a, b, "decoder")[:10])
    assert (wide["partner"] >= 0).all() and wide["partner"].is_unique
    narrow = match(similarity(a, b, "decoder")[:, :10])
    assert (narrow["partner"] == -1).sum() == LATENTS - 10
    assert narrow["similarity"].isna().sum() == LATENTS - 10


def test_near_ties_are_counted():
    values = np.array([[0.9, 0.88, 0.1], [0.2, 0.3, 0.31], [0.0, 0.0, 0.8]])
    assert match(values)["near"].tolist() == [1, 1, 0]


def test_what_has_nothing_to_compare_is_refused_and_told_by_kind(planted):
    a, b, _ = planted
    elsewhere = dictionary("other model", b.decoder, b.fires.toarray(), model="n")
    assert comparable_kinds(a, elsewhere) == ["firing"]
    assert compare(a, elsewhere, nulls(a)).summary["kind"].tolist() == ["firing"]
    other_texts = dictionary("other texts", b.decoder, b.fires.toarray(), tokens="u")
    assert "firing" not in comparable_kinds(a, other_texts)
    with pytest.raises(SAEMismatch, match="other tokens"):
        similarity(a, other_texts, "firing")
    with pytest.raises(SAEMismatch, match="in another space"):
        similarity(a, elsewhere, "decoder")
    neither = dictionary("neither", b.decoder, b.fires.toarray(), model="n", tokens="u")
    with pytest.raises(SAEMismatch, match="neither a model nor texts"):
        compare(a, neither, nulls(a))
    with pytest.raises(ValueError, match="says nothing without nulls"):
        compare(a, b, {})
    with pytest.raises(ValueError, match="kind is one of decoder"):
        similarity(a, b, "cosine")


# On a model


@pytest.fixture(scope="module")
def encoded(model):
    batch = tokenize(model, TEXTS * 2)
    sae = tiny_sae(model)
    return sae, encode_features(model, sae, batch, name="tiny", progress=False)


def test_an_sae_is_described_by_unit_rows_and_the_logits_that_they_write(model, encoded):
    sae, fa = encoded
    found = describe(model, sae, fa)
    assert torch.allclose(found.decoder.norm(dim=1), torch.ones(48), atol=1e-5)
    logits = direct_logits(model, sae.W_dec.detach())
    cosines = torch.nn.functional.cosine_similarity(logits[:, None], logits[None], dim=2)
    assert np.allclose(similarity(found, found, "vocabulary"), cosines.detach().numpy(), atol=1e-4)
    fires = fa.matrix.toarray() > 0
    moving = (found.rate > 0) & (found.rate < 1)
    phi = np.corrcoef(fires[:, moving].T)
    ours = similarity(found, found, "firing")
    assert np.allclose(ours[np.ix_(moving, moving)], phi, atol=1e-6)
    assert (ours[~moving] == 0).all()


def test_several_saes_encoded_in_one_run_are_as_one_by_one(model, encoded):
    first, fa = encoded
    second = tiny_sae(model)
    with torch.no_grad():
        second.W_enc.neg_()
    together = encode_saes(model, {"first": first, "second": second}, fa.batch, progress=False)
    for name, sae in (("first", first), ("second", second)):
        alone = encode_features(model, sae, fa.batch, name=name, progress=False)
        assert together[name].key == alone.key and together[name].name == name
        assert (together[name].matrix != alone.matrix).nnz == 0
    assert (together["first"].matrix != together["second"].matrix).nnz > 0


def test_nulls_are_as_large_as_the_sae_and_keep_what_they_promise(model, encoded):
    sae, fa = encoded
    own = describe(model, sae, fa)
    x = harvest(model, fa.batch, HOOK, progress=False)[HOOK][fa.batch.real]
    found = null_dictionaries(model, sae, fa, x, twin=replace(own, model="another"))
    assert list(found) == ["random directions", "data points", "twin's SAE", "shuffled firings"]
    assert all(comparable_kinds(own, null) == list(KINDS) for null in found.values())
    assert all(null.decoder.shape == own.decoder.shape for null in found.values())
    assert np.allclose(found["shuffled firings"].rate, own.rate)
    centred = torch.nn.functional.normalize(x - x.mean(0), dim=1)
    assert (found["data points"].decoder @ centred.T).amax(1).min() > 0.999
    with pytest.raises(ValueError, match="40 inputs for"):
        null_dictionaries(model, sae, fa, x[:40])


def test_of_a_wide_sae_the_latents_that_fire_most_are_compared_under_their_own_numbers(
    model, encoded, monkeypatch
):
    sae, fa = encoded
    whole = describe(model, sae, fa)
    monkeypatch.setattr("lenslab.compare.MOST", 10)
    part = describe(model, sae, fa)
    assert part.latents.tolist() == sorted(np.argsort(-whole.rate, kind="stable")[:10])
    assert torch.equal(part.decoder, whole.decoder[part.latents])
    assert torch.equal(part.encoder, whole.encoder[part.latents])
    assert np.array_equal(part.fires.toarray(), whole.fires.toarray()[:, part.latents])
    x = harvest(model, fa.batch, HOOK, progress=False)[HOOK][fa.batch.real]
    found = null_dictionaries(model, sae, fa, x, kinds=["data"])
    assert list(found) == ["data points", "shuffled firings"]
    assert len(found["data points"].latents) == 10
    latents = compare(part, part, found).latents
    assert (latents["partner"] == latents["latent"]).all()
    assert set(latents["latent"]) == set(part.latents)


def test_saes_that_cannot_be_compared_are_named_with_the_reason(model, tmp_path, monkeypatch):
    save_sae(tiny_sae(model), tmp_path / "good")
    for bad in ("half", "damaged"):
        save_sae(tiny_sae(model), tmp_path / bad)
    (tmp_path / "half" / "sae_weights.safetensors").unlink()
    weights = tmp_path / "damaged" / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    release = ("gpt2-small-res-jb", "blocks.8.hook_resid_pre")
    names = [str(tmp_path / n) for n in ("good", "half", "damaged")]
    saes, missing = open_saes(model, [*names, "pocket-gpt-resid-3", release, "no-such"])
    assert list(saes) == [names[0]] and len(missing) == 5
    assert "needs cfg.json and sae_weights" in missing[names[1]]
    assert "cut off" in missing[names[2]]
    assert "made for pocket-gpt" in missing["pocket-gpt-resid-3"]
    assert "lenslab.sae.hub download gpt2-small-res-jb" in missing["/".join(release)]
    assert "No bundled SAE" in missing["no-such"]
    with pytest.raises(ValueError, match=r"No SAE to compare.*no-such"):
        open_saes(model, ["no-such"])
    with pytest.raises(ValueError, match="none is named"):
        open_saes(model, [])


def test_one_name_stands_for_the_three_streams_of_a_published_model(model, monkeypatch):
    assert comparable_saes(model) == []
    monkeypatch.setattr("lenslab.compare.model_name", lambda model: "gpt2")  # none is bundled
    names = comparable_saes(model)
    streams = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out")
    wanted = [f"blocks.{layer}.{stream}" for stream in streams for layer in (6, 8, 10, 11)]
    assert sorted(sae_id for _, sae_id in names) == sorted(wanted)
    assert all(repository_of(*name) for name in names)


# Widths


def widths(encoded, *matrices):
    _, fa = encoded
    names = ("narrow", "wide")
    made = [scipy.sparse.csr_array(np.asarray(m, dtype=np.float32)) for m in matrices]
    return [replace(fa, matrix=m, name=n) for n, m in zip(names, made, strict=True)]


def test_a_feature_that_splits_is_followed_into_its_children(encoded):
    n = encoded[1].matrix.shape[0]
    assert n > 75
    rows = np.arange(n)
    narrow = np.stack([rows < 60, rows >= 65], 1)
    wide = np.stack([rows < 35, (rows >= 35) & (rows < 60), rows >= 65, rows < 4], 1)
    found = children(*widths(encoded, narrow, wide))
    assert found["parent"].tolist() == [0, 0, 1][: len(found)]
    assert found["child"].tolist()[:2] == [0, 1], "one that fires four times is no child"
    first = found.iloc[0]
    assert first["inside"] == 1 and first["covers"] == pytest.approx(35 / 60)
    assert first["expected"] == pytest.approx(60 / n)


def test_widths_on_other_texts_are_refused(model, encoded):
    sae, fa = encoded
    other = encode_features(model, sae, tokenize(model, TEXTS[:2]), progress=False)
    with pytest.raises(SAEMismatch, match="other texts"):
        children(fa, other)
