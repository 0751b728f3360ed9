"""The SAEs at hand for a model: cards read as they are, and an SAE for every model."""

import json

import pytest
import torch
from tqdm.std import tqdm as Bar

from lenslab import runtime
from lenslab.files import data_path
from lenslab.hooks import stream_hook
from lenslab.models import load_model, random_twin
from lenslab.sae import find
from lenslab.sae.find import card_table, find_sae
from lenslab.sae.inputs import check_sae, sae_hook, sae_key
from lenslab.sae.load import bundled_saes, finish, load_sae
from lenslab.sae.registry import NotAnSAE

TWINS = {"pocket-gpt-random-twin-resid-3", "smollm2-135m-q4-random-twin-resid-15"}


@pytest.fixture(scope="module")
def pocket():
    return load_model("pocket-gpt")


def test_every_bundled_sae_has_a_card_that_beats_its_null():
    table = card_table()
    assert set(table["sae"]) == set(bundled_saes())
    # of an untrained model nothing is lost by ablation, so no share of it can be recovered
    assert set(table[table.isna().any(axis=1)]["sae"]) <= TWINS
    floor = table["sae"].str.contains("frozen")  # it learned one side only
    assert (table["variance_explained"] > table["null"] + 0.1 * ~floor).all() and floor.any()
    assert table.groupby("sae")["ships"].sum().eq(1).all(), "one sparsity of each ships"


def test_the_table_says_what_the_cards_say(pocket):
    name = bundled_saes(pocket)[0]
    card = json.loads(data_path("saes", name, "card.json").read_text())
    row = card_table(pocket).query("sae == @name and ships").iloc[0]
    assert row["l0"] == card["sae"]["l0"] and row["null"] == card["null"]["variance_explained"]


def test_the_bundled_sae_of_the_middle_layer_is_found(pocket):
    found = find_sae(pocket)
    assert (
        sae_hook(found.sae) == stream_hook(pocket, 3)
        and found.origin == "bundled"
        and found.name in bundled_saes()
    )
    name = bundled_saes(pocket)[0]
    config = json.loads(data_path("saes", name, "cfg.json").read_text())
    assert sae_hook(find_sae(pocket, name).sae) == config["metadata"]["hook_name"]


def test_the_sae_of_the_random_twin_is_found_on_every_processor(pocket):
    found = find_sae(random_twin(pocket))
    assert found.origin == "bundled" and "twin" in found.name


@pytest.fixture
def trainings(tmp_path, monkeypatch):
    """A cache of our own, and the batches that small SAEs are trained on."""
    batches, train = [], find.train
    monkeypatch.setenv("LENSLAB_CACHE", str(tmp_path))

    def noted(saes, source, config):
        batches.append(source.batch)
        return train(saes, source, config)

    monkeypatch.setattr(find, "train", noted)
    return batches


def test_a_model_without_saes_gets_one_trained_once(model, trainings, tmp_path):
    found = find_sae(random_twin(model), documents=60, steps=3)
    check_sae(found.sae, random_twin(model))
    assert found.sae.cfg.d_in == model.cfg.d_model and "trained" in found.origin
    again = find_sae(random_twin(model), documents=60, steps=3)
    assert again[1:] == found[1:] and torch.equal(again.sae.W_enc, found.sae.W_enc)
    assert sae_key(again.sae) == sae_key(found.sae) and len(trainings) == 1
    for options in (dict(documents=60, steps=4), dict(documents=61, steps=3)):
        find_sae(random_twin(model), **options)
    find_sae(random_twin(model, seed=1), documents=60, steps=3)
    assert len(trainings) == 4 == len(list(tmp_path.glob("saes/*")))


def test_a_kept_sae_that_is_damaged_is_trained_anew(model, trainings, tmp_path):
    find_sae(model, documents=60, steps=3)
    (config,) = tmp_path.glob("saes/*/cfg.json")
    config.write_text(config.read_text().replace("blocks.1", "blocks.0"))
    found = find_sae(model, documents=60, steps=3)
    assert sae_hook(found.sae) == stream_hook(model, 1) and len(trainings) == 2


def test_a_small_sae_that_cannot_be_kept_is_given_with_a_word(model, trainings, tmp_path):
    (tmp_path / "saes").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="not kept"):
        assert "trained" in find_sae(model, documents=60, steps=3).origin


def test_a_small_sae_is_trained_on_one_pool_with_bars(model, trainings, monkeypatch):
    bars = []
    monkeypatch.setattr(find, "POOL", 5000)
    monkeypatch.setattr(
        runtime, "tqdm", lambda *given, **options: bars.append(options) or Bar(*given, **options)
    )
    monkeypatch.delenv("TQDM_DISABLE")
    find_sae(model, documents=60, steps=3)
    assert 4000 < trainings[0].n_real < 5000
    assert [(bar["desc"], bar["disable"]) for bar in bars] == [
        (what, False) for what in ("tokenize", "harvest", "train")
    ]


def test_other_weights_that_go_by_a_bundled_name_are_not_given_its_sae(model, trainings):
    twin = random_twin(model, label="pocket-gpt")
    assert bundled_saes(twin), "by name there are some"
    assert "trained" in find_sae(twin, documents=60, steps=3).origin


def test_an_sae_of_one_head_or_of_some_positions_is_refused():
    for part, value in (("hook_head_index", 3), ("seqpos_slice", [1, 5])):
        sae = load_sae("pocket-gpt-resid-1")
        setattr(sae.cfg.metadata, part, value)
        with pytest.raises(NotAnSAE, match=part):
            finish(sae, "mine")
