"""Phase 5: figures of routing by hand, and the phase run whole on other mixtures of experts."""

import re
import runpy
import shutil

import numpy as np
import pytest
import test_moe_routing
from conftest import TEXTS
from test_moe_routing import FAMILIES, save_and_load
from test_sae_pretrained import tiny_sae

from lenslab.circuits.interventions import ablate_features
from lenslab.features.activations import encode_features
from lenslab.files import REPOSITORY, data_path
from lenslab.moe.experts import expert_contributions, expert_neurons
from lenslab.moe.routing import NoRouting, Routing, capture_routing
from lenslab.show import plots
from lenslab.show import routing as show
from lenslab.tokens import tokenize

SOURCE = REPOSITORY / "notebooks" / "interactive" / "phase_5_moe_routing.py"


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory):
    return save_and_load(tmp_path_factory.mktemp("olmoe"), *FAMILIES["olmoe"])


def drawn(figure):
    return np.array(figure.data[0].z, dtype=float)


def test_one_call_draws_what_a_layer_does(olmoe):
    batch = tokenize(olmoe, TEXTS)
    routing, few = capture_routing(olmoe, batch), show.MOST_TOKENS
    figures = show.analyze_texts(TEXTS, olmoe, layer=2, expert=4)
    assert list(figures) == ["gates", "first experts", "logits", "contributions", "neurons"]
    ids, weights = routing.ids[:few, 2], routing.weights[:few, 2]
    gates = drawn(figures["gates"])  # [expert, token]
    for token, (experts, used) in enumerate(zip(ids, weights, strict=True)):
        assert gates[experts, token] == pytest.approx(used, abs=1e-4)
        assert np.isfinite(gates[:, token]).sum() == 3
    assert drawn(figures["first experts"]) == pytest.approx(routing.weights[:few, :, 0].T, abs=1e-4)
    assert np.array_equal(figures["first experts"].data[0].text, routing.ids[:few, :, 0].T)
    box = figures["logits"].data[0]
    at_four = np.array(box.y)[np.array(box.x) == 4]
    assert at_four == pytest.approx(routing.logits[:, 2, 4], abs=1e-3)
    added = expert_contributions(olmoe, batch, 2).norm(dim=-1)
    for rank, bar in enumerate(figures["contributions"].data):
        assert bar.y == pytest.approx(added[:few, rank].tolist(), rel=1e-3)
    sent = np.flatnonzero((routing.ids[:, 2] == 4).any(1))[:few]
    most = [int(name) for name in figures["neurons"].layout.yaxis.ticktext]
    neurons = expert_neurons(olmoe, batch, 2, 4)[sent][:, most]
    assert drawn(figures["neurons"]) == pytest.approx(neurons.T.numpy(), abs=1e-3)
    sizes = expert_neurons(olmoe, batch, 2, 4)[sent].abs().mean(0)
    assert sizes[most].min() >= np.delete(sizes.numpy(), most).max()


def test_an_saes_features_are_drawn_with_what_they_are_needed_for(olmoe):
    sae = tiny_sae(olmoe, "blocks.1.hook_mlp_out")
    figures = show.analyze_texts(TEXTS, olmoe, sae=sae)
    batch = tokenize(olmoe, TEXTS)
    fa = encode_features(olmoe, sae, batch, progress=False)
    dense = fa.matrix.toarray()
    top = np.argsort(-dense.mean(0), kind="stable")[: show.NEURONS]
    assert [int(name) for name in figures["features"].layout.yaxis.ticktext] == top.tolist()
    assert drawn(figures["features"]) == pytest.approx(dense[: show.MOST_TOKENS, top].T, abs=1e-4)
    rise = 1000 * ablate_features(olmoe, sae, fa, top).mean(1)
    assert figures["importance"].data[0].y == pytest.approx(rise.tolist(), abs=1e-3)
    both = np.corrcoef(dense[:, top[0]], dense[:, top[1]])[0, 1]
    assert drawn(figures["correlation"])[0, 1] == pytest.approx(both, abs=1e-3)


def test_by_default_it_is_the_busiest_expert_of_the_middle_layer(olmoe):
    routing = capture_routing(olmoe, tokenize(olmoe, TEXTS))
    busiest = np.bincount(routing.ids[:, 1].ravel()).argmax()
    title = show.analyze_texts(TEXTS, olmoe)["neurons"].layout.title.text
    assert title == f"Expert {busiest}, layer 1"


def test_what_is_not_there_is_refused_by_name(olmoe, model):
    with pytest.raises(NoRouting, match="is dense"):
        show.analyze_texts(TEXTS, model)
    with pytest.raises(NoRouting, match="Layer 9 has no router"):
        show.analyze_texts(TEXTS, olmoe, layer=9)
    with pytest.raises(ValueError, match="Expert 6 is out of range: 0 to 5"):
        show.analyze_texts(TEXTS, olmoe, expert=6)


def test_both_stacks_of_an_encoder_decoder_are_drawn(tmp_path):
    switch = save_and_load(tmp_path, *FAMILIES["switch encoder"])
    for stack in ("encoder", "decoder"):
        routing = capture_routing(switch, tokenize(switch, TEXTS), stack=stack)
        figures = show.analyze_texts(TEXTS, switch, stack=stack)
        assert np.nansum(drawn(figures["gates"])) == pytest.approx(
            routing.weights[: show.MOST_TOKENS, len(routing.layers) // 2].sum(), abs=1e-2
        ), "where an expert is full nobody is drawn"


def test_bands_of_a_sankey_are_the_tokens_of_a_group():
    ids = np.array([[0, 1, 1], [0, 1, 0], [0, 1, 1], [1, 0, -1]])[:, :, None]
    origin = dict.fromkeys(("text", "position", "token"), np.arange(4))
    routing = Routing(ids, np.ones(ids.shape, np.float32), (2, 5, 6), 2, **origin)
    groups = np.array(["bank", "river", "river", "<b>"])
    figure = show.flows(routing, groups, "Routes")
    node, link = figure.data[0].node, figure.data[0].link
    bands = zip(link.source, link.target, link.label, link.value, link.color, strict=True)
    bands = {(node.label[a], node.label[b], name): (n, colour) for a, b, name, n, colour in bands}
    assert {band: n for band, (n, _) in bands.items()} == {
        ("2: 0", "5: 1", "bank"): 1,
        ("2: 0", "5: 1", "river"): 2,
        ("2: 1", "5: 0", "<b>"): 1,
        ("5: 1", "6: 1", "bank"): 1,
        ("5: 1", "6: 0", "river"): 1,
        ("5: 1", "6: 1", "river"): 1,
        ("5: 0", "6: none", "<b>"): 1,
    }
    colour = plots.colours(["<b>", "bank", "river"])
    assert {name: shade for (_, _, name), (_, shade) in bands.items()} == {
        name: shade + "88" for name, shade in colour.items()
    }
    numbered = show.flows(routing, np.array([1, 2, 2, np.nan]), "Routes").data[0]
    assert sum(numbered.link.value) == 8 and set(numbered.link.label) == {"1.0", "2.0", "nan"}
    assert "&lt;b&gt;" in figure.layout.title.text and "<b>" not in figure.layout.title.text


# The phase on other models


@pytest.fixture
def run_whole(tmp_path, monkeypatch, capsys):
    def run(model):
        monkeypatch.setenv("LENSLAB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("LENSLAB_OUTPUTS", str(tmp_path / "outputs"))
        monkeypatch.setenv("LENSLAB_MODEL", str(model))
        monkeypatch.setattr("plotly.graph_objects.Figure.show", lambda figure: None)
        monkeypatch.chdir(tmp_path)
        runpy.run_path(str(SOURCE))
        printed = capsys.readouterr().out
        told = [line for line in printed.splitlines() if line.startswith("So:")]
        assert len(told) == 10 and not re.search(r"\bnan\b|\binf\b", "\n".join(told))
        return printed

    return run


@pytest.mark.slow
def test_the_phase_runs_on_one_expert_a_token(run_whole):
    printed = run_whole("pocket-switch")
    assert "A token has one expert: none fires together with another." in printed
    assert "17 checkpoints; the last has 100% of this model's first experts" in printed


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "deepseek_v2", "gemma 4"])
def test_the_phase_runs_on_other_families_and_says_what_is_missing(
    run_whole, tmp_path, monkeypatch, family
):
    def bundled_tokenizer(folder):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(data_path("models", "pocket-moe", name), folder)

    monkeypatch.setattr(test_moe_routing, "make_tokenizer", bundled_tokenizer)
    kind, config, *other = FAMILIES[family]
    folder = tmp_path / "tiny"
    folder.mkdir()
    save_and_load(folder, kind, config | {"max_position_embeddings": 96}, *other)
    printed = run_whole(folder)
    assert "No record of the training of these weights is at hand." in printed
    assert "So: of this model's training there is no record" in printed
    beyond = re.search(r"(\d+) of (\d+) experts are specialised", printed)
    assert int(beyond[1]) <= 0.07 * int(beyond[2]), "weights are random"


@pytest.mark.slow
def test_a_dense_model_is_named_and_the_mixture_that_ships_is_read(run_whole):
    printed = run_whole("pocket-gpt")
    assert (
        "pocket-gpt (GPT2LMHeadModel) is dense: it has no layer with experts. Instead of"
        " pocket-gpt:" in printed
    )
    assert "pocket-moe: layers [0, 1, 2, 3, 4, 5] have experts" in printed


@pytest.mark.slow
def test_the_record_of_a_training_is_told_from_that_of_other_weights(run_whole, monkeypatch):
    monkeypatch.setenv("LENSLAB_MODEL_TWIN", "1")
    printed = run_whole("pocket-moe")
    assert "No record of the training of these weights is at hand." in printed
