"""Controls: each describes the same texts as the SAE does, pooled alike, and is what it says.
Floors: SAEs that learned nothing, or on one side only."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TEXTS
from test_sae_pretrained import HOOK, tiny_sae
from test_sae_training import CONFIG, D_SAE, SHORT, equal, interrupted, new, planted, run

from lenslab.capture import harvest
from lenslab.models import load_model, model_name
from lenslab.sae import controls
from lenslab.sae.inputs import sae_key
from lenslab.sae.load import bundled_saes, load_sae
from lenslab.sae.save import save_sae
from lenslab.sae.train import TrainingConfig, build_sae, trainer
from lenslab.sae.train.architectures import ARCHITECTURES
from lenslab.sae.train.base import FROZEN, NEAR
from lenslab.sae.train.convert import to_saelens
from lenslab.sae.train.member import Member
from lenslab.tokens import tokenize


def pooled_by_hand(values, real, how):
    rows = [values[i][real[i]] for i in range(len(real))]
    by_hand = {"max": lambda r: r.max(0).values, "mean": lambda r: r.mean(0)}
    return torch.stack([by_hand[how](r) for r in rows]).numpy()


@pytest.fixture(scope="module")
def batch(model):
    return tokenize(model, TEXTS)


def test_principal_axes_are_those_of_the_real_tokens_and_their_opposites(model, batch):
    x = harvest(model, batch, HOOK, compute="float32")[HOOK]
    found = controls.pca_axes(model, tiny_sae(model), batch)
    assert found.shape == (len(TEXTS), 64)
    tokens = x[batch.real].double()
    _, _, axes = torch.linalg.svd(tokens - tokens.mean(0), full_matrices=False)
    first = ((x - tokens.mean(0)) @ axes[0]).float()[..., None]
    both = {
        tuple(np.round(pooled_by_hand(sign * first, batch.real, "max")[:, 0], 2))
        for sign in (1, -1)
    }
    assert both == {tuple(np.round(found[:, 0], 2)), tuple(np.round(found[:, 32], 2))}


@pytest.mark.parametrize("how", ["max", "mean"])
@pytest.mark.parametrize("texts", [1, 32])
def test_neurons_are_those_of_the_saes_block_however_many_texts_at_a_time(
    model, batch, how, texts, monkeypatch
):
    monkeypatch.setattr(controls, "TEXTS", texts)
    neurons = harvest(model, batch, "blocks.1.mlp.hook_post", compute="float32")[
        "blocks.1.mlp.hook_post"
    ]
    found = controls.control_matrices(model, tiny_sae(model), batch, how)["raw neurons"]
    assert np.allclose(found, pooled_by_hand(neurons, batch.real, how), atol=1e-5)


def test_the_input_of_a_block_was_written_by_the_block_before(model):
    for block, before in ((2, 1), (0, 0)):
        hook = controls.neuron_hook(model, tiny_sae(model, f"blocks.{block}.hook_resid_pre"))
        assert hook == f"blocks.{before}.mlp.out.hook_in"


def test_where_there_are_no_neurons_they_are_left_out(model, olmoe_folder):
    assert controls.neuron_hook(model, tiny_sae(model, "hook_embed")) is None
    mixture = load_model(str(olmoe_folder))
    sae, batch = tiny_sae(mixture), tokenize(mixture, TEXTS)
    assert list(controls.control_matrices(mixture, sae, batch)) == ["PCA axes", "character n-grams"]


def test_random_directions_are_unit_vectors_drawn_from_the_seed(model):
    sae, x = tiny_sae(model), torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    first, again, other = (controls.untrained_sae(sae, x, 3, seed).directions for seed in (0, 0, 1))
    assert torch.allclose(first.norm(dim=1), torch.ones(48))
    assert torch.equal(first, again) and not torch.allclose(first, other)


def test_ngrams_read_the_text_alone():
    found = controls.ngram_features(["ab", "ab ab ab", "xyz"], 4096)
    assert found.sum(1) == pytest.approx([1, 1, 1]) and (found[0] > 0).sum() == 3  # a, b, ab
    assert (found[1][found[0] > 0] > 0).all() and not ((found[0] > 0) & (found[2] > 0)).any()


def test_controls_by_name_all_of_these_texts(model, batch):
    found = controls.control_matrices(model, tiny_sae(model), batch, "mean")
    assert {name: len(matrix) for name, matrix in found.items()} == {
        "PCA axes": 4,
        "raw neurons": 4,
        "character n-grams": 4,
    }
    assert found["character n-grams"].shape[1] == 48


def test_an_sae_is_known_by_its_weights_and_by_how_many_features_it_keeps(model):
    sae = tiny_sae(model, architecture="topk")
    key = sae_key(sae)
    assert key == sae_key(tiny_sae(model, architecture="topk")) != sae_key(tiny_sae(model, seed=1))
    sae.cfg.k = 4
    assert sae_key(sae) != key


def test_a_random_sae_is_known_by_how_many_directions_it_uses(model):
    sae, x = tiny_sae(model), torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    keys = {sae_key(controls.untrained_sae(sae, x, k)) for k in (3, 4)}
    assert len(keys) == 2


@pytest.mark.parametrize(("kind", "axes"), [("PCA", None), ("coordinates", torch.eye(32))])
def test_an_untrained_sae_of_axes_has_both_directions_of_each(model, kind, axes):
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 33) + 5
    null = controls.untrained_sae(tiny_sae(model), x, 5, kind=kind)
    assert null.cfg.d_sae == len(null.directions) == 64 and tiny_sae(model).cfg.d_sae == 48
    assert torch.equal(null.directions[:32], -null.directions[32:])
    assert axes is None or torch.equal(null.directions[:32], axes)
    assert torch.allclose(null.directions[:32] @ null.directions[:32].T, torch.eye(32), atol=1e-5)
    # of axes at right angles all together, one way each, are the vector; some need no scale
    assert null.scale == pytest.approx(1, abs=1e-4)
    whole = controls.untrained_sae(tiny_sae(model), x, 1000, kind=kind)
    assert whole.k == 64 and torch.allclose(whole.decode(whole.encode(x)), x, atol=1e-3)


def test_few_principal_axes_hold_more_than_as_many_coordinates_or_random_directions(model):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 3, generator=generator) @ torch.randn(3, 32, generator=generator)
    left = {}
    for kind in controls.KINDS:
        null = controls.untrained_sae(tiny_sae(model), x, 3, kind=kind)
        left[kind] = float((null.decode(null.encode(x)) - x).square().sum() / x.square().sum())
    assert left["PCA"] < 1e-4 < min(left["random"], left["coordinates"])


def test_a_kind_of_floor_that_there_is_not_is_refused(model, batch):
    with pytest.raises(ValueError, match="random, PCA, coordinates, data, not 'pca'"):
        controls.evaluate_null(model, tiny_sae(model), batch, 6.0, kind="pca")


@pytest.mark.parametrize("kind", controls.NULLS)
def test_every_untrained_sae_is_evaluated_by_one_line(model, batch, kind):
    found = controls.evaluate_null(model, tiny_sae(model), batch, 6.3, kind=kind)
    assert found.l0 == pytest.approx(6, abs=0.01) and found.sae.startswith(controls.NULLS[kind])
    points = min(48, found.n_tokens)  # of data no more directions than points
    assert found.d_sae == {"random": 48, "data": points}.get(kind, 64)
    assert found.variance_explained > 0


@pytest.fixture(scope="module")
def vectors():
    return planted(6000)


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_frozen_stays_and_the_rest_learns(architecture, frozen, vectors, tmp_path):
    sae = new(architecture, frozen=frozen)
    start = {name: value.detach().clone() for name, value in sae.named_parameters()}
    found = run(sae, vectors, CONFIG)
    assert found.history.fvu.iloc[-1] < 0.95 * found.history.fvu.iloc[0]
    moved = {name for name, value in sae.named_parameters() if not torch.equal(value, start[name])}
    loaded = load_sae(save_sae(found.sae, tmp_path / "sae"))
    assert loaded.cfg.metadata.frozen == frozen
    if frozen == "encoder":  # `fit` scales it once, and saving each column
        cosine = torch.cosine_similarity(sae.W_enc, start["W_enc"], dim=0)
        assert torch.allclose(cosine, torch.ones(D_SAE), atol=1e-6)
        factor = sae.W_enc / start["W_enc"]
        assert torch.allclose(factor, factor[0, 0].expand_as(factor), rtol=1e-5)
        assert moved >= {"W_dec", "b_enc"}
        saved = loaded.W_enc, start["W_enc"]
        assert torch.allclose(torch.cosine_similarity(*saved, dim=0), torch.ones(D_SAE), atol=1e-5)
        return
    assert ("W_dec" in moved) == (frozen == "soft decoder") and moved >= {"W_enc", "b_enc"}
    if frozen == "decoder":
        assert torch.allclose(loaded.W_dec, start["W_dec"], atol=1e-6)


@pytest.mark.parametrize("architecture", ["batchtopk", "gated"])
def test_a_soft_frozen_decoder_moves_as_far_as_it_may(architecture, vectors):
    def nearest(frozen):
        sae = new(architecture, frozen=frozen)
        start = sae.W_dec.detach().clone()
        run(sae, vectors, TrainingConfig(256 * 60, batch=256, lr=0.05, dead_after=256 * 1000))
        if architecture == "batchtopk":
            assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(D_SAE), atol=1e-5)
        return float(torch.cosine_similarity(sae.W_dec, start, dim=1).min().detach())

    assert nearest(None) < 0.7
    assert nearest("soft decoder") == pytest.approx(NEAR, abs=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_that_a_step_led_astray_are_brought_back(architecture):
    sae = new(architecture, frozen="soft decoder")
    start = sae.W_dec.detach().clone()
    sae.W_dec.data.copy_(3 * planted(D_SAE))
    sae.after_step()
    cosine = torch.cosine_similarity(sae.W_dec.detach(), start, dim=1)
    assert float(cosine.min()) == pytest.approx(NEAR, abs=1e-5)


@pytest.mark.parametrize("frozen", FROZEN)
def test_a_floor_goes_on_to_the_bit(frozen, vectors, tmp_path):
    straight = run(new("batchtopk", frozen=frozen), vectors, SHORT)
    interrupted(new("batchtopk", frozen=frozen), 25, vectors, SHORT, folder=tmp_path)
    assert equal(straight, run(new("batchtopk", frozen=frozen), vectors, SHORT, folder=tmp_path))


def test_a_floor_is_another_run_than_the_sae(vectors, tmp_path):
    interrupted(new("batchtopk", frozen="decoder"), 25, vectors, SHORT, folder=tmp_path)
    with pytest.raises(ValueError, match="frozen decoder there, None here"):
        run(new("batchtopk"), vectors, SHORT, folder=tmp_path)


def test_a_checkpoint_from_before_there_were_floors_is_gone_on_with(vectors, tmp_path, monkeypatch):
    identity = trainer._identity

    def older(*given):
        return {key: value for key, value in identity(*given).items() if "frozen" not in key}

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_identity", older)
        interrupted(new("batchtopk"), 25, vectors, SHORT, folder=tmp_path)
    assert equal(
        run(new("batchtopk"), vectors, SHORT),
        run(new("batchtopk"), vectors, SHORT, folder=tmp_path),
    )


def test_a_checkpoint_of_another_rule_for_the_rate_is_refused(vectors, tmp_path, monkeypatch):
    """Before there was this one the rate was .001 sqrt(4096 / d_sae), and checkpoints held none."""
    config, identity = replace(SHORT, lr=None), trainer._identity

    def older(*given):
        return {key: value for key, value in identity(*given).items() if key != "sae.lr"}

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_identity", older)
        interrupted(new("batchtopk"), 25, vectors, config, folder=tmp_path)
    with pytest.raises(ValueError, match=r"sae\.lr None there"):
        run(new("batchtopk"), vectors, config, folder=tmp_path)


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("architecture", ["relu", "jumprelu", "gated"])
def test_a_dead_latent_of_a_floor_begins_anew_where_it_may(architecture, frozen, vectors):
    sae = new(architecture, frozen=frozen)
    config = TrainingConfig(256 * 30, batch=256, dead_after=256 * 4)
    member = Member("floor", sae, config, sae.config)
    member.fit({"vectors": vectors})
    member.step(0, {"vectors": vectors[:256]})
    member.silent[:5] = config.dead_after
    before = {name: value.detach().clone() for name, value in sae.named_parameters()}
    member.resample(1, sae.scaled(vectors[:256]), vectors[:256])
    held, rows = FROZEN[frozen], {"W_dec": sae.W_dec[:5], "W_enc": sae.W_enc.T[:5]}
    other = "W_enc" if held == "W_dec" else "W_dec"
    assert torch.equal(sae.get_parameter(held), before[held])
    assert not torch.equal(sae.get_parameter(other), before[other])
    cosine = torch.cosine_similarity(rows[held], rows[other], dim=1)
    assert torch.allclose(cosine, torch.ones(5), atol=1e-5)
    # it fires from a cosine of .5 with the vector drawn for it, whatever the encoder's length
    first = sae.threshold[:5] if architecture == "jumprelu" else -sae.b_enc[:5]
    lengths = (sae.scaled(vectors[:256]) - sae.b_dec).norm(dim=1)  # [vector]
    half = torch.outer(sae.W_enc[:, :5].norm(dim=0), lengths) / 2  # [latent, vector]
    assert torch.isclose(half, first[:, None], rtol=1e-4).any(1).all()


@pytest.mark.parametrize("options", [{"frozen": "both"}, {"frozen": "decoder", "tied": True}])
def test_floors_that_there_are_not_are_refused(options):
    with pytest.raises(ValueError, match="frozen is one of decoder, soft decoder, encoder"):
        build_sae("relu", 16, 64, **options)


def test_a_bundled_floor_is_loaded_by_name_and_found_for_no_model(model, tmp_path, monkeypatch):
    from lenslab.sae import load

    monkeypatch.setattr(load, "data_path", lambda *parts: tmp_path.joinpath(*parts[1:]))
    for frozen in (None, "decoder"):
        metadata = {"hook_name": HOOK, "model_name": model_name(model)}
        sae = build_sae("batchtopk", 32, 64, metadata=metadata, frozen=frozen)
        save_sae(to_saelens(sae), tmp_path / f"mine-{frozen}")
    assert bundled_saes() == ["mine-None", "mine-decoder"] and load_sae("mine-decoder")
    assert bundled_saes(model) == ["mine-None"]
