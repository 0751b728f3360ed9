"""Controls: each describes the same texts as the SAE does, pooled alike, and is what it says."""

import numpy as np
import pytest
import torch
from conftest import TEXTS
from test_sae_pretrained import HOOK, tiny_sae

from lenslab.capture import harvest
from lenslab.models import load_model
from lenslab.sae import controls
from lenslab.sae.load import sae_key
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
    found = controls.raw_neurons(model, tiny_sae(model), batch, how)
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
    first, again, other = (controls.random_sae(sae, x, 3, seed).directions for seed in (0, 0, 1))
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
    keys = {sae_key(controls.random_sae(sae, x, k)) for k in (3, 4)}
    assert len(keys) == 2
