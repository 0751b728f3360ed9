"""The SAEs at hand for a model: cards read as they are, and an SAE for every model."""

import json

import pytest

from lenslab.models import load_model, random_twin, stream_hook
from lenslab.paths import data_path
from lenslab.sae.bundled import SHOWN, card_table, read_card, sae_for
from lenslab.sae.pretrained import bundled_saes, check_sae, sae_hook

TWIN = "pocket-gpt-random-twin-resid-3"


@pytest.fixture(scope="module")
def pocket():
    return load_model("pocket-gpt")


def test_every_bundled_sae_has_a_card_that_beats_its_null():
    table = card_table()
    assert set(table["sae"]) == set(bundled_saes())
    # of an untrained model nothing is lost by ablation, so no share of it can be recovered
    assert table[list(SHOWN)].notna().all().all() or set(table[table.isna().any(axis=1)]["sae"]) == {TWIN}
    assert (table["variance_explained"] > table["null"] + 0.1).all()
    assert table.groupby("sae")["ships"].sum().eq(1).all(), "one sparsity of each ships"


def test_the_table_says_what_the_cards_say(pocket):
    name = bundled_saes(pocket)[0]
    card = json.loads(data_path("saes", name, "card.json").read_text())
    row = card_table(pocket).query("sae == @name and ships").iloc[0]
    assert row["l0"] == card["sae"]["l0"] and row["null"] == card["null"]["variance_explained"]


def test_an_unknown_card_names_those_there_are():
    with pytest.raises(FileNotFoundError, match=bundled_saes()[0]):
        read_card("no-such-sae")


def test_the_bundled_sae_of_the_middle_layer_is_found(pocket):
    assert sae_hook(sae_for(pocket)) == stream_hook(pocket, 3)
    name = bundled_saes(pocket)[0]
    assert (
        sae_hook(sae_for(pocket, name))
        == json.loads(data_path("saes", name, "cfg.json").read_text())["metadata"]["hook_name"]
    )


def test_a_model_without_saes_gets_one_trained(model):
    sae = sae_for(random_twin(model), documents=60, steps=3)
    check_sae(sae, random_twin(model))
    assert sae.cfg.d_in == model.cfg.d_model
