"""Training goes on from a saved SAE: it begins where the saved one was, on other data than its own,
and what does not belong together is refused."""

from dataclasses import replace

import pytest
import torch
from test_sae_pretrained import HOOK, tiny_sae
from test_sae_training import CONFIG, SPARSITY, K, new, planted, run

from lenslab.capture import harvest
from lenslab.metrics import FeatureActivity, ReconstructionError
from lenslab.models import load_model, model_key, model_name, random_twin
from lenslab.sae.inputs import sae_key
from lenslab.sae.load import load_sae
from lenslab.sae.save import save_sae
from lenslab.sae.train import ModelSource, TensorSource, TrainingConfig, from_saelens, train
from lenslab.sae.train.architectures import ARCHITECTURES, TOPK_FAMILY
from lenslab.sae.train.base import TrainingFailed
from lenslab.sae.train.convert import to_saelens
from lenslab.texts import sampled_text
from lenslab.tokens import pack

GOES_ON = [name for name in ARCHITECTURES if name != "transcoder"]
SCALES = [("mean", True), ("mean", False), ("none", True), ("none", False), ("unit", False)]
FIELDS = ("W_enc", "W_dec", "b_enc", "b_dec")


def sparse(architecture):
    """What has to be said for an architecture to be trained on."""
    return {"k": K} if architecture in TOPK_FAMILY else {"sparsity": SPARSITY[architecture]}


def same(found, expected, x):
    """Features and reconstructions are equal but for rounding."""
    features = expected.encode(x)
    torch.testing.assert_close(found.encode(x), features, rtol=1e-5, atol=1e-5)
    size = float(x.norm(dim=1).mean())
    difference = found.decode(found.encode(x)) - expected.decode(expected.encode(x))
    assert float(difference.abs().max()) < 1e-5 * size
    assert 0 < float((features > 0).float().mean()) < 1


@pytest.fixture(scope="module")
def trained():
    """A saved SAE of every architecture and scale, loaded again."""
    vectors, short = planted(3000), replace(CONFIG, vectors=256 * 20)
    saes = {
        (name, scale, centre): new(name, scale=scale, centre=centre)
        for name in GOES_ON
        for scale, centre in SCALES
    }
    results = train(
        {str(key): sae for key, sae in saes.items()}, TensorSource(vectors), short, progress=False
    )
    return {key: results[str(key)].sae for key in saes}


@pytest.mark.parametrize("scale, centre", SCALES)
@pytest.mark.parametrize("name", GOES_ON)
def test_the_start_computes_what_the_saved_sae_does_on_whatever_data(name, scale, centre, trained):
    """Also once scale and centre are those of other data: 3 times as long, far from the origin."""
    sae, x = trained[name, scale, centre], planted(500, "other")
    for options in ({}, {"centre": False}, {"scale": "none"}, {"scale": "none", "centre": False}):
        if scale == "unit" and "scale" in options:
            continue
        start = from_saelens(sae, **sparse(name), **options)
        same(to_saelens(start), sae, x)
        start.fit(3 * planted(2000, "new") + 5)
        same(to_saelens(start), sae, x)
        if scale != "unit":
            assert (start.scale != 1) == (options.get("scale") is None)
            assert bool(start.centre.any()) == options.get("centre", True)


@pytest.mark.parametrize("in_input", [True, False])
@pytest.mark.parametrize("kind", ["standard", "topk", "jumprelu", "gated"])
def test_an_sae_of_saelens_is_a_start_too_whichever_way_it_reads(kind, in_input, model):
    """Published SAEs subtract b_dec from the input or do not; their thresholds differ, and may lie
    below zero, where SAELens's ReLU comes first."""
    sae = tiny_sae(model, architecture=kind)
    sae.cfg.apply_b_dec_to_input = in_input
    if kind == "topk":
        sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
    else:
        sae.fold_W_dec_norm()
    if kind == "jumprelu":
        sae.threshold[:9] = -0.1
    x = 2 * torch.randn(400, 32, generator=torch.Generator().manual_seed(0)) + 1
    options = {} if kind == "topk" else {"sparsity": 0.1}
    start = from_saelens(sae, **options)
    same(to_saelens(start), sae, x)
    start.fit(x * 7 - 3)
    same(to_saelens(start), sae, x)


def test_decoder_rows_of_several_lengths_stay_so_where_a_training_lets_them(model):
    sae, x = tiny_sae(model), torch.randn(300, 32)
    start = from_saelens(sae, sparsity=0.1)
    start.fit(x + 4)
    back = to_saelens(start)
    torch.testing.assert_close(back.decode(back.encode(x)), sae.decode(sae.encode(x)))
    start.fitted = False
    assert float(sae.W_dec.norm(dim=1).std()) > 0.05  # else there was nothing to keep


def test_the_loaded_sae_is_left_as_it_was_and_named_as_the_start(trained):
    sae = trained["topk", "mean", True]
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    result = run(from_saelens(sae), planted(3000, "new"), replace(CONFIG, vectors=256 * 4))
    assert all(torch.equal(before[name], value) for name, value in sae.state_dict().items())
    about = result.sae.cfg.metadata
    assert about.began_from == sae_key(sae) != sae_key(result.sae)
    assert about.training_vectors == 256 * 4 and about.trained_as == "topk"


@pytest.mark.parametrize("name", GOES_ON)
def test_a_warm_start_begins_where_the_saved_sae_was_and_goes_on_from_there(name, trained):
    sae, vectors = trained[name, "mean", True], planted(6000, "new")
    config = replace(CONFIG, vectors=256 * 40, log_every=1)
    fvu = ReconstructionError().update(vectors, sae.decode(sae.encode(vectors))).fvu
    warm = run(from_saelens(sae, **sparse(name)), vectors, config).history["fvu"]
    assert warm[0] == pytest.approx(fvu, rel=0.15)  # one batch, before the first step
    assert warm.iloc[-1] < fvu


def test_it_goes_on_from_its_checkpoints_and_not_from_those_of_another_start(trained, tmp_path):
    vectors, config = planted(3000, "new"), replace(CONFIG, vectors=256 * 12)
    sae, other = trained["batchtopk", "mean", True], trained["batchtopk", "none", True]
    whole = run(from_saelens(sae, k=K), vectors, config)
    run(from_saelens(sae, k=K), vectors, config, folder=tmp_path)
    again = run(from_saelens(sae, k=K), vectors, config, folder=tmp_path)  # loads the last step
    for name in FIELDS:
        assert torch.equal(getattr(again.trained, name), getattr(whole.trained, name))
    with pytest.raises(ValueError, match="another run"):
        run(from_saelens(other, k=K), vectors, config, folder=tmp_path)


def test_a_start_that_is_far_off_learns_and_one_that_runs_away_is_still_stopped(trained):
    """As where a notebook runs on a random twin: nothing diverged yet. TrainingFailed is for what a
    step made worse."""
    sae, vectors = trained["topk", "mean", True], planted(6000, "new")
    with torch.no_grad():
        sae = to_saelens(from_saelens(sae))
        sae.b_enc += 3000.0
    config = replace(CONFIG, vectors=256 * 20, log_every=1, lr=1e-2)
    fvu = run(from_saelens(sae), vectors, config).history["fvu"]
    assert fvu[0] > 1000 and fvu.iloc[-1] < 0.99 * fvu[0]
    with pytest.raises(TrainingFailed):
        run(from_saelens(sae), vectors, replace(config, lr=1e3))


def test_it_goes_on_at_a_rate_that_does_not_undo_what_was_learned(trained):
    start = from_saelens(trained["topk", "mean", True])
    went_on = run(start, planted(2000), replace(CONFIG, vectors=256 * 20, lr=None))
    assert went_on.history["lr"].max() <= 1e-4


def test_saved_and_loaded_it_is_an_sae_like_others(trained, tmp_path):
    result = run(from_saelens(trained["relu", "unit", False], sparsity=0.1), planted(3000))
    loaded = load_sae(save_sae(result.sae, tmp_path / "sae"), device="cpu")
    same(loaded, result.sae, planted(200, "other"))
    assert loaded.cfg.normalize_activations == "constant_norm_rescale"
    assert loaded.cfg.metadata.began_from == sae_key(trained["relu", "unit", False])


# What does not belong together


@pytest.mark.parametrize(
    "kind, change, options, message",
    [
        ("standard", {"normalize_activations": "layer_norm"}, {"sparsity": 1.0}, "layer_norm"),
        ("standard", {}, {"sparsity": 1.0, "scale": "unit", "centre": False}, "scaling 'none'"),
        ("standard", {}, {"sparsity": 1.0, "tied": True}, "not tied"),
        ("standard", {}, {"sparsity": 1.0, "frozen": "soft decoder"}, "or frozen"),
        ("standard", {}, {}, "Say sparsity"),
        ("gated", {}, {"k": 4}, "Say sparsity"),
        ("standard", {}, {"sparsity": 1.0, "k": 4}, "k is for"),
        ("topk", {}, {}, "rows of length 1"),
        ("matching_pursuit", {}, {"sparsity": 1.0}, "No training goes on from a matching_pursuit"),
        ("jumprelu_transcoder", {}, {"k": 4}, "from a jumprelu_transcoder"),
    ],
)
def test_what_cannot_be_trained_on_as_it_is_is_refused_by_name(
    kind, change, options, message, model
):
    more = {"jumprelu_transcoder": {"d_out": 32}, "matching_pursuit": {"residual_threshold": 0.1}}
    sae = tiny_sae(model, architecture=kind, options=more.get(kind, {}))
    for name, value in change.items():
        setattr(sae.cfg, name, value)
    with pytest.raises(ValueError, match=message):
        from_saelens(sae, **options)


def test_a_batchtopk_that_was_given_a_threshold_for_each_latent_is_refused(trained):
    sae = from_saelens(trained["batchtopk", "mean", True], k=K)
    changed = to_saelens(sae)
    with torch.no_grad():
        changed.threshold[3] += 1
    with pytest.raises(ValueError, match="one threshold"):
        from_saelens(changed, k=K)


@pytest.fixture(scope="module")
def batch(model):
    return pack(model, ["A cat sat on the mat. " * 8, "2 + 2 = 4, they say. " * 8] * 4, length=32)


def start_of(model, **metadata):
    about = {"model_key": model_key(model), "prepend_bos": True} | metadata
    sae = tiny_sae(model, **about)
    return sae, replace(CONFIG, vectors=256, batch=64)


def test_data_of_another_hook_model_or_bos_are_refused(model, batch):
    sae, config = start_of(model)
    assert run(from_saelens(sae, sparsity=0.1), ModelSource(model, batch, HOOK), config)
    other = ModelSource(model, batch, "blocks.2.hook_resid_post")
    with pytest.raises(ValueError, match=f"no hook_name {HOOK} of width 32"):
        run(from_saelens(sae, sparsity=0.1), other, config)
    with pytest.raises(ValueError, match="is meant for model_"):
        source = ModelSource(random_twin(model), batch, HOOK)
        run(from_saelens(sae, sparsity=0.1), source, config)
    sae.cfg.metadata.model_key = "0123456789abcdef"
    with pytest.raises(ValueError, match="model_key 0123456789abcdef"):
        run(from_saelens(sae, sparsity=0.1), ModelSource(model, batch, HOOK), config)
    sae.cfg.metadata.model_key = None  # as for a fine-tune
    assert run(from_saelens(sae, sparsity=0.1), ModelSource(model, batch, HOOK), config)
    sae.cfg.metadata.prepend_bos = False
    with pytest.raises(ValueError, match="prepend_bos False"):
        run(from_saelens(sae, sparsity=0.1), ModelSource(model, batch, HOOK), config)


def test_vectors_of_another_width_are_refused(trained):
    start = from_saelens(trained["topk", "mean", True])
    with pytest.raises(ValueError, match="of width 16"):
        run(start, planted(3000)[:, :8])


def test_an_sae_that_reads_a_processed_model_is_not_trained_on_an_unprocessed_one(model, batch):
    sae, config = start_of(model, model_from_pretrained_kwargs={"center_writing_weights": True})
    with pytest.raises(ValueError, match="center_writing_weights"):
        run(from_saelens(sae, sparsity=0.1), ModelSource(model, batch, HOOK), config)
    centred = torch.randn(600, 32)
    result = run(from_saelens(sae, sparsity=0.1), TensorSource({HOOK: centred}), config)
    assert result.sae.cfg.metadata.model_from_pretrained_kwargs == {"center_writing_weights": True}


def test_the_twin_that_stands_in_for_a_notebook_is_trained_on_from_the_models_sae(
    model, batch, monkeypatch
):
    sae, config = start_of(model)
    twin = random_twin(model, label=model_name(model))
    with pytest.raises(ValueError, match="meant for model_key"):
        run(from_saelens(sae, sparsity=0.1), ModelSource(twin, batch, HOOK), config)
    monkeypatch.setenv("LENSLAB_MODEL_TWIN", "1")
    result = run(from_saelens(sae, sparsity=0.1), ModelSource(twin, batch, HOOK), config)
    assert result.sae.cfg.metadata.model_key == model_key(twin)


def test_one_model_has_several_names(model, batch):
    """Published SAEs say gpt2-small, where the model may have been loaded as gpt2."""
    sae, config = start_of(model)
    sae.cfg.metadata.model_name = f"someone/{model_name(model).upper()}"
    assert run(from_saelens(sae, sparsity=0.1), ModelSource(model, batch, HOOK), config)


def test_the_bundled_sae_is_not_lost_by_training_on(recwarn):
    """On 16,000 vectors of a sample, after which an SAE from the start explains little."""
    model, sae = load_model("pocket-gpt"), load_sae("pocket-gpt-resid-3", device="cpu")
    hook, texts = sae.cfg.metadata.hook_name, sampled_text(200)
    source = ModelSource(model, pack(model, texts[::2], length=128), hook)
    held_out = pack(model, texts[1::8], length=128)
    x = harvest(model, held_out, hook, compute="float32")[hook][held_out.real]

    def measured(of):
        features = of.encode(x)
        error = ReconstructionError().update(x, of.decode(features))
        return error.fvu, FeatureActivity().update(features).l0

    config = TrainingConfig(16_384, batch=1024, lr=2e-4, log_every=1)
    result = train({"sae": from_saelens(sae, k=16)}, source, config, progress=False)["sae"]
    (before, l0), (after, l0_after) = measured(sae), measured(result.sae)
    assert result.history["fvu"][0] == pytest.approx(before, rel=0.1)
    assert after < 1.02 * before and l0_after == pytest.approx(l0, rel=0.15)


def test_a_floor_is_not_trained_on_as_if_it_had_learned():
    sae = to_saelens(new("topk", frozen="decoder"))
    with pytest.raises(ValueError, match="frozen: decoder"):
        from_saelens(sae, k=K)
