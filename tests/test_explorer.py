"""One feature as a page, and the widget: what it shows, what it does on input, what is left without
a kernel."""

import re
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from IPython.core.formatters import DisplayFormatter
from nbformat.v4 import new_code_cell, new_notebook, new_output

from lenslab.features.activations import FeatureActivations, encode_features
from lenslab.files import REPOSITORY
from lenslab.models import model_name
from lenslab.show.explore import FeatureExplorer, explore_feature, linked_table, side_by_side
from lenslab.tokens import tokenize

sys.path.insert(0, str(REPOSITORY / "scripts"))

TEXTS = ["A cat sat", "2 + 2 = 4", "Paris", "on the mat"]
KINDS = ["prose", "math", "prose", "<b>prose"]
HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def sae(model):
    from sae_lens import SAE

    config = dict(
        architecture="topk", k=5, d_in=model.cfg.d_model, d_sae=48, dtype="float32", device="cpu"
    )
    config |= dict(
        apply_b_dec_to_input=True, normalize_activations="none", reshape_activations="none"
    )
    config["metadata"] = dict(hook_name=HOOK, model_name=model_name(model))
    sae = SAE.from_dict(config)
    generator = torch.Generator().manual_seed(0)
    for value in sae.state_dict().values():
        value.copy_(torch.randn(value.shape, generator=generator) * 0.2)
    return sae.eval().requires_grad_(False)


@pytest.fixture
def fa(model):
    """Feature 1 fires on texts 0, 1 and 2 at their first token, with 4, 2 and 1; feature 0
    never."""
    batch = tokenize(model, TEXTS)
    text = batch.real.nonzero()[:, 0].numpy()
    dense = np.zeros((len(text), 3), dtype=np.float32)
    for row, value in ((0, 4.0), (1, 2.0), (2, 1.0)):
        dense[np.flatnonzero(text == row)[0], 1] = value
    page = "https://www.neuronpedia.org/some-model/1-res/0"
    return FeatureActivations(scipy.sparse.csr_array(dense), batch, "S<A>E", "m", HOOK, "key", page)


@pytest.fixture
def explorer(model, sae):
    encoded = encode_features(model, sae, tokenize(model, TEXTS))
    return FeatureExplorer(model, sae, encoded, categories=KINDS, text="A cat sat on the mat.")


def listed(explorer) -> list[int]:
    return [value for _, value in explorer.strongest.options if value is not None]


def test_a_features_page_holds_statistics_texts_categories_and_its_link(fa):
    body = explore_feature(fa, 1, categories=KINDS, n=2, spread=4).body
    assert f"fires on 3 of {fa.batch.n_real} tokens" in body and "in 3 of 4 texts" in body
    assert "largest 4.000" in body and "where it fires 2.333" in body
    assert "Strongest texts: 2 of 3" in body and "Weaker texts: 1" in body
    assert maxima(body) == [4.0, 2.0, 1.0]
    assert 'href="https://www.neuronpedia.org/some-model/1-res/1"' in body
    assert "S&lt;A&gt;E" in body and "&lt;b&gt;prose" in body and ">prose</b>" in body
    cells = [re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<td>(.*?)</td>", body)]
    assert cells == [
        *("prose", "2", "2", "2.500", "4.000"),
        *("math", "1", "1", "2.000", "2.000"),
        *("&lt;b&gt;prose", "0", "1", "0.000", "0.000"),
    ]


def maxima(body: str) -> list[float]:
    """The maxima of the texts on a page, in order."""
    return [float(most) for most in re.findall(r"max (\d+\.\d{3})<", body)]


@pytest.mark.parametrize(
    ("n", "spread", "weaker"),
    [(2, 2, [6, 2]), (2, 3, [7, 4, 2]), (4, 4, [6, 4, 3, 1]), (8, 4, [2, 1])],
)
def test_weaker_texts_are_spread_evenly_over_the_ranks(model, n, spread, weaker):
    """Ten texts with 10 to 1: the middles of equal shares of those below the strongest."""
    batch = tokenize(model, ["A cat sat"] * 10)
    text, position = (axis.numpy() for axis in batch.real.nonzero(as_tuple=True))
    values = np.where(position == position.min(), 10 - text, 0).astype(np.float32)
    matrix = scipy.sparse.csr_array(values[:, None])
    ranked = FeatureActivations(matrix, batch, "SAE", "m", HOOK, "key", None)
    body = explore_feature(ranked, 0, n=n, spread=spread).body
    assert maxima(body) == [*range(10, 10 - n, -1), *weaker]
    assert f"Weaker texts: {len(weaker)}, evenly over the other {10 - n}" in body


def test_all_its_texts_are_on_one_scale(fa):
    body = explore_feature(fa, 1, n=1, spread=2).body
    assert body.count("4.000</span> one scale") == 2
    assert re.findall(r'class="(p\d+)">max', body) == ["p12", "p6", "p3"]


def test_a_feature_that_never_fires_says_so_and_one_that_is_not_there_is_refused(fa):
    assert "never active in these 4 texts" in explore_feature(fa, 0, categories=KINDS).body
    with pytest.raises(ValueError, match="Feature 3"):
        explore_feature(fa, 3)
    with pytest.raises(ValueError, match="2"):
        explore_feature(fa, 1, categories=["a", "b"])


def test_the_explorer_begins_with_the_strongest_feature_of_the_text(explorer, model, sae):
    encoded = encode_features(model, sae, tokenize(model, "A cat sat on the mat."))
    pooled = encoded.pool("max").toarray()[0]
    by_strength = [int(f) for f in np.argsort(-pooled, kind="stable") if pooled[f] > 0]
    assert listed(explorer) == by_strength and explorer.here.pool("max").nnz == len(by_strength)
    assert explorer.number.value == explorer.strongest.value == explorer.telling[0]
    assert f"Feature {explorer.number.value} in this text" in explorer.output.value


def test_dense_features_do_not_come_first(explorer):
    explorer.rates[:] = 0.0
    explorer.rates[explorer.features[0]] = 0.5
    assert explorer.telling == explorer.features[1:]
    explorer.rates[:] = 1.0
    assert explorer.telling == explorer.features  # better than nothing


def test_typing_a_text_reads_it_and_shows_its_tokens(explorer):
    explorer.text.value = "2 + 2 = 4"
    assert explorer.problem.value == "" and explorer.here.batch.texts == ("2 + 2 = 4",)
    assert explorer.number.value in listed(explorer)
    values = explorer.here.of(explorer.number.value)
    assert f"max {float(values.max()):.3f}" in explorer.output.value


def test_the_list_steps_through_the_texts_features(explorer):
    for feature in listed(explorer):
        explorer.strongest.value = feature
        assert explorer.number.value == feature
        assert f"Feature {feature} in this text" in explorer.output.value


def test_one_change_shows_a_feature_once(explorer, monkeypatch):
    """The list and the number box follow each other: a loop would draw every page several times."""
    calls = []
    original = FeatureExplorer.view

    def counted(self):
        calls.append(self.number.value)
        return original(self)

    monkeypatch.setattr(FeatureExplorer, "view", counted)
    explorer.strongest.value = second = listed(explorer)[1]
    explorer.number.value = other = next(f for f in range(48) if f not in listed(explorer))
    explorer.text.value = "Paris"
    assert calls == [second, other, explorer.number.value]


def test_the_number_box_goes_to_any_feature(explorer):
    absent = next(f for f in range(48) if f not in listed(explorer))
    explorer.number.value = absent
    assert explorer.number.value == absent and explorer.strongest.value is None
    assert f"Feature {absent} in this text" in explorer.output.value
    assert "Not active" in explorer.output.value or "not active" in explorer.output.value
    explorer.strongest.value = listed(explorer)[2]
    assert explorer.number.value == listed(explorer)[2]
    explorer.number.value = 10_000  # the box keeps to what there is
    assert explorer.number.value == 47


def test_a_bad_text_is_named_in_the_widget_which_goes_on_working(explorer):
    before = explorer.output.value
    for text, message in (
        ("", "no token"),
        ("word " * 100, "64 tokens"),
        ("\ud83d", "not valid Unicode"),
    ):
        explorer.text.value = text
        assert message in explorer.problem.value and 'role="alert"' in explorer.problem.value
        assert "Traceback" not in explorer.problem.value and explorer.output.value == before
    explorer.text.value = "Paris"
    assert explorer.problem.value == "" and explorer.output.value != before


def test_an_error_nobody_foresaw_is_shown_and_escaped(explorer, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("<script>out of memory")

    monkeypatch.setattr("lenslab.show.explore.encode_features", broken)
    explorer.text.value = "Paris"
    assert "RuntimeError: &lt;script&gt;out of memory" in explorer.problem.value


def test_a_script_in_a_text_stays_text(explorer):
    explorer.text.value = "<script>alert(1)</script>"
    assert explorer.problem.value == ""
    assert not re.search(r"<script|javascript:|onerror=", explorer.output.value)


def test_what_it_begins_with_is_checked_at_once(explorer, model, sae, fa):
    with pytest.raises(ValueError, match="3 features"):
        FeatureExplorer(model, sae, fa)
    with pytest.raises(ValueError, match="no token"):
        FeatureExplorer(model, sae, explorer.fa, text="")


@pytest.fixture
def shown(explorer, monkeypatch) -> list:
    """Outputs of a cell that ends in the explorer, as a notebook keeps them."""
    outputs = []

    def display(thing, raw=False):
        data = thing if raw else DisplayFormatter().format(thing)[0]
        outputs.append(new_output("display_data", data))

    monkeypatch.setattr("lenslab.show.explore.display", display)
    explorer._ipython_display_()
    return outputs


def test_where_no_kernel_runs_the_same_page_is_left(explorer, shown):
    """The widget's output is dropped from what is committed; the page beside it is kept, and shown
    by our pages."""
    from build_site import render_output
    from notebook_execution import without_widgets

    kept = without_widgets(shown)
    assert len(shown) == 2 and len(kept) == 1
    page, _ = render_output(kept[0], "output-1-0", "An explorer")
    assert f"Feature {explorer.number.value} in this text" in page
    assert "strongest features of this text" in page and "<script" not in page


def test_a_saved_notebook_shows_the_page_and_no_list_of_widgets(explorer, shown):
    """As a user's own notebook is: saved with the widget's output, then exported or listed."""
    from build_site import render_notebook
    from nbconvert import HTMLExporter

    notebook = new_notebook(cells=[new_code_cell("explorer", outputs=shown)])
    for document in (
        render_notebook(notebook, "mine")[1],
        HTMLExporter().from_notebook_node(notebook)[0],
    ):
        assert f"Feature {explorer.number.value} in this text" in document
        assert "VBox" not in document and f"{explorer.static_class}{{display" not in document


def test_the_live_widget_hides_the_page_beside_it(explorer):
    name = re.search(r'<div class="(lenslab-static-\d+)">', str(explorer.static())).group(1)
    assert f".{name}{{display:none}}" in explorer.output.value
    assert f".{name}{{display:none}}" not in str(explorer.static())


def test_only_parts_of_ipywidgets_itself_are_used(explorer):
    def parts(widget):
        yield widget
        for child in getattr(widget, "children", ()):
            yield from parts(child)

    modules = {part._model_module for part in parts(explorer.box)}
    assert modules == {"@jupyter-widgets/controls"}


def test_categories_may_be_a_column_of_a_table(fa):
    column = pd.Series(KINDS, index=[7, 5, 3, 1])
    by_list = explore_feature(fa, 1, categories=KINDS).body
    assert explore_feature(fa, np.int64(1), categories=column).body == by_list


def test_the_typed_text_and_the_others_are_on_one_scale(explorer):
    feature = explorer.number.value
    largest = max(float(explorer.here.of(feature).max()), float(explorer.fa.of(feature).max()))
    scales = re.findall(r"([\d.]+)</span> one scale", explorer.output.value)
    assert len(scales) >= 2 and set(scales) == {f"{largest:.3f}"}
    other = max(listed(explorer), key=lambda f: float(explorer.fa.of(f).max()))
    explorer.number.value = other  # one that is stronger in the others
    assert float(explorer.fa.of(other).max()) > float(explorer.here.of(other).max())
    assert f"{float(explorer.fa.of(other).max()):.3f}</span> one scale" in explorer.output.value
    assert "above the scale" not in explorer.output.value


@pytest.mark.browser
def test_the_page_left_without_a_kernel_opens_offline_and_runs_nothing(
    explorer, tmp_path, monkeypatch
):
    from test_browser import open_page

    monkeypatch.setenv("LENSLAB_OUTPUTS", str(tmp_path))
    explorer.text.value = "<script>document.title='owned'</script><img src=x onerror=alert(1)>"
    page = explorer.static().save("explorer")
    dom, console = open_page(page, tmp_path / "profile")
    assert not console and "<title>Features</title>" in dom
    assert "<script" not in dom and "<img" not in dom
    assert f"Feature {explorer.number.value} in this text" in dom and "<mark" in dom


def test_two_features_stand_side_by_side_and_links_are_escaped(model, sae):
    batch = tokenize(model, ["A cat <script>", "2 + 2"])
    fa = encode_features(model, sae, batch, name="<b>one</b>", progress=False)
    fa = replace(fa, neuronpedia='https://example.org/"x/0')
    view = str(side_by_side([(fa, 1), (replace(fa, neuronpedia=None), 2)]))
    assert "Feature 1" in view and "Feature 2" in view
    assert "<script>" not in view and "<b>one" not in view
    table = pd.DataFrame({"sae": ["one", "<two>"], "feature": [1, 2], "<x>": [0.12345, "<i>"]})
    page = str(linked_table(table, {"one": fa}))
    assert page.count("<a href") == 1 and "&quot;x/1" in page and "0.123" in page
    assert "<two>" not in page and "<i>" not in page and "<x>" not in page
