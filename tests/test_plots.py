"""Figures show what they were given, and a control looks like one."""

import numpy as np
import pandas as pd
import pytest

from lenslab.show.feature_plots import (
    category_feature_heatmap,
    category_means,
    coactivation_heatmap,
    firing_density,
    text_feature_heatmap,
)
from lenslab.show.images import figure_json
from lenslab.show.plots import (
    ACCENT,
    CONTROL,
    GREYS,
    MOST_POINTS,
    attention_map,
    bars,
    heatmap,
    intervals,
    label,
    lines,
    null_histogram,
    scatter,
)


def test_a_control_is_grey_and_dashed_and_nothing_else_is():
    figure = lines({"model": [1, 2], "random twin": [1, 1]})
    model, twin = figure.data
    assert (model.line.color, model.line.dash) == (ACCENT, "solid")
    assert (twin.line.color, twin.line.dash) == (CONTROL, "dash")
    assert tuple(model.y) == (1, 2)


@pytest.mark.parametrize(("values", "dtick"), [([1, 1000], 1), ([1, 2], None)])
def test_log_axes_name_whole_decades_where_there_are_some(values, dtick):
    figure = lines({"a": values}, log_y=True)
    assert figure.layout.yaxis.type == "log" and figure.layout.yaxis.dtick == dtick


def test_bars_are_never_stacked():
    """W4.13: stacked bars were read as peaks."""
    for overlay in (True, False):
        assert bars({"a": [1], "b": [2]}, overlay=overlay).layout.barmode in {"group", "overlay"}


def test_labels_that_repeat_keep_their_own_rows():
    figure = attention_map(np.eye(3), ["the", "cat", "the"])
    assert figure.data[0].z.shape == (3, 3) and tuple(figure.layout.xaxis.ticktext) == (
        "the",
        "cat",
        "the",
    )
    assert len(set(figure.data[0].x)) == 3


def test_signed_values_are_centred_on_zero():
    assert heatmap(np.array([[-1.0, 2.0]]), ["a", "b"], ["row"], centre=True).data[0].zmid == 0


def test_labels_show_as_they_stand():
    """Plotly reads `<b>` as markup and `$...$` as TeX."""
    assert label("<b>a</b>\n$x$") == "&lt;b&gt;a&lt;/b&gt;↵&#36;x&#36;"
    assert label("a" * 40, 10) == "a" * 9 + "…" and label(17) == "17"
    assert tuple(attention_map(np.eye(1), ["<|bos|>"]).layout.yaxis.ticktext) == ("&lt;|bos|&gt;",)


def test_the_first_series_is_the_finding_and_the_others_are_controls():
    figure = intervals(
        {"SAE": ([0.9], [0.8], [0.95]), "PCA": ([0.7], None, None), "n-grams": ([0.6], None, None)},
        ["a"],
    )
    assert [trace.marker.color for trace in figure.data] == [ACCENT, *GREYS[:2]]
    assert len({trace.marker.symbol for trace in figure.data}) == 3  # told apart without colour too
    assert np.allclose(figure.data[0].error_x.array, 0.05) and np.allclose(
        figure.data[0].error_x.arrayminus, 0.1
    )
    assert figure.data[1].error_x.array is None
    rows = [trace.y[0] for trace in figure.data]
    assert rows == sorted(rows) and len(set(rows)) == 3
    with pytest.raises(ValueError, match="2 values for 1 labels"):
        intervals({"SAE": ([1, 2], None, None)}, ["a"])


def test_a_null_of_whole_numbers_has_a_bar_for_each():
    figure = null_histogram([5, 5, 6, 7], {"SAE": 7.0}, name="shuffled")
    assert tuple(figure.data[0].x) == (5, 6, 7) and tuple(figure.data[0].y) == (2, 1, 1)
    assert figure.data[0].marker.color == CONTROL and figure.data[1].line.color == ACCENT
    assert tuple(figure.data[1].x) == (7, 7) and figure.layout.annotations[0].text == "SAE: 7"
    assert figure.layout.yaxis.title.text == "of 4 draws"


def test_a_null_of_other_numbers_keeps_every_draw_and_what_was_observed_in_sight():
    null = np.linspace(0.4, 0.6, 101)
    figure = null_histogram(null, {"SAE": 0.9, "n-grams": 0.1})
    assert sum(figure.data[0].y) == 101
    low, high = figure.layout.xaxis.range
    assert low < 0.1 and high > 0.9
    assert {note.text: note.font.color for note in figure.layout.annotations}[
        "n-grams: 0.1"
    ] != ACCENT
    with pytest.raises(ValueError, match="without NaN"):
        null_histogram([0.5, np.nan], {})


def test_marked_points_are_named_and_the_rest_is_thinned_and_says_so():
    n = MOST_POINTS * 2 + 3
    figure = scatter(
        np.arange(n),
        np.arange(n),
        marked=np.arange(n) < 3,
        marked_name="specialists",
        diagonal=True,
    )
    equal, others, marked = figure.data
    assert (
        equal.name == "equal"
        and marked.name == "specialists"
        and tuple(marked.text) == ("0", "1", "2")
    )
    assert len(others.x) == MOST_POINTS and f"{MOST_POINTS:,} of {n - 3:,} drawn" in others.name
    assert others.marker.color == CONTROL and marked.marker.color == ACCENT
    with pytest.raises(ValueError, match="2 x, 1 y"):
        scatter([1, 2], [1])


VALUES = np.array([[4.0, 0.0], [0.0, 10.0], [2.0, 5.0]])  # three texts, two features


@pytest.mark.parametrize("rows", [False, True])
def test_texts_are_grouped_by_category_and_features_keep_their_own_scale(rows):
    figure = text_feature_heatmap(
        VALUES, [7, 9], ["web", "math", "web"], ["a", "<b>", "c"], rows=rows
    )
    cells, strip = figure.data
    z, values = (
        np.array(part if rows else part.T, dtype=float) for part in (cells.z, cells.customdata)
    )
    assert np.allclose(
        z, [[1, 0], [0.5, 0.5], [0, 1]]
    )  # texts 0, 2, 1; each feature over its largest value
    assert np.allclose(values, VALUES[[0, 2, 1]])
    names, texts = (cells.x, cells.y) if rows else (cells.y, cells.x)
    assert tuple(names) == ("7 (max 4)", "9 (max 10)") and texts[2] == "1: &lt;b&gt;"
    assert np.array(strip.z).ravel().tolist() == [0, 0, 1] and len(figure.layout.shapes) == 1
    assert (cells.zmin, cells.zmax) == (0, 1)


def test_on_one_scale_the_activations_themselves_are_coloured():
    cells = text_feature_heatmap(VALUES, [7, 9], ["web"] * 3, relative=False).data[0]
    assert np.allclose(np.array(cells.z, dtype=float), VALUES.T) and cells.zmax == 10
    assert tuple(cells.y) == ("7", "9")


def test_labels_that_do_not_number_the_values_are_refused():
    for function in (text_feature_heatmap, category_feature_heatmap):
        with pytest.raises(ValueError, match=r"\[3, 2\]"):
            function(VALUES, [1, 2, 3], [1, 2, 3])


def test_columns_of_a_table_are_labels_too():
    kinds, features = pd.Series(["web", "math", "web"], index=[5, 6, 7]), np.array([7, 9])
    by_list = text_feature_heatmap(VALUES, [7, 9], kinds.tolist(), list("abc"))
    assert (
        text_feature_heatmap(VALUES, features, kinds, pd.Series(list("abc"), index=[5, 6, 7]))
        == by_list
    )
    assert coactivation_heatmap(np.eye(2), features, groups=kinds[:2]) == coactivation_heatmap(
        np.eye(2), [7, 9], groups=["web", "math"]
    )


def test_a_figure_of_hundreds_of_texts_stays_small():
    texts = ["word " * 60] * 420
    figure = text_feature_heatmap(np.ones((420, 10)), list(range(10)), ["a", "b"] * 210, texts)
    assert len(str(figure_json(figure))) < 150_000


def test_few_cells_show_their_number_and_signed_values_get_two_hues():
    few = category_feature_heatmap(VALUES, ["a", "b", "c"], [7, 9])
    assert np.allclose(np.array(few.data[0].text, dtype=float), VALUES) and few.data[0].texttemplate
    assert (
        category_feature_heatmap(np.ones((20, 20)), list("abcdefghijklmnopqrst"), range(20))
        .data[0]
        .text
        is None
    )
    signed = category_feature_heatmap(VALUES - 5, ["a", "b", "c"], [7, 9]).data[0]
    assert (signed.zmin, signed.zmax) == (-1, 1)
    assert few.layout.title.text == "Mean activation of 2 features in 3 categories"


def test_the_category_a_feature_is_about_is_in_the_accent_colour():
    figure = category_means(
        VALUES.T,
        ["a", "b", "c"],
        [7, 9],
        low=VALUES.T - 1,
        high=VALUES.T + 2,
        highlight=["b", None],
    )
    colours = [trace.marker.color for trace in figure.data]
    assert colours == [CONTROL, ACCENT, CONTROL, CONTROL, CONTROL, CONTROL]
    assert figure.data[0].error_x.array == (2,) and figure.data[0].error_x.arrayminus == (1,)
    assert figure.layout.xaxis.range[0] < -1 and figure.layout.xaxis2.range[1] > 12
    one = category_means([1.0, 2.0], ["a", "b"], ["feature 7"], highlight="b")
    assert [trace.marker.color for trace in one.data] == [CONTROL, ACCENT]
    with pytest.raises(ValueError, match="7 panels"):
        category_means(np.ones((7, 2)), ["a", "b"], range(7))


def test_coactivation_is_symmetric_centred_on_zero_and_blank_on_its_diagonal():
    pmi = np.array([[9.0, 1.0, -np.inf], [1.0, 9.0, -2.0], [-np.inf, -2.0, 9.0]])
    figure = coactivation_heatmap(pmi, [7, 7, 9], groups=["web", "web", "math"])
    z = np.array(figure.data[0].z, dtype=float)
    assert np.isnan(z.diagonal()).all() and np.isnan(z[0, 2]) and z[1, 2] == -2
    assert (figure.data[0].zmin, figure.data[0].zmax, figure.data[0].zmid) == (-2, 2, 0)
    assert len(set(figure.data[0].x)) == 3  # two rows of one name stay two
    pmi[0, 1] = 3
    with pytest.raises(ValueError, match="not symmetric"):
        coactivation_heatmap(pmi, [1, 2, 3])
    share = coactivation_heatmap(np.array([[1, 0.2], [0.9, 1]]), [1, 2], kind="conditional").data[0]
    assert (share.zmin, share.zmax) == (0, 1)
    with pytest.raises(ValueError, match="'pmi' or 'conditional'"):
        coactivation_heatmap(np.eye(2), [1, 2], kind="jaccard")


def test_every_feature_is_in_the_density_and_dead_ones_in_its_legend():
    figure = firing_density({"SAE": [0, 0, 0.001, 0.01, 0.5], "random directions": [0.1, 0.2, 1.0]})
    sae, control = figure.data
    assert sae.name == "SAE: 2 of 5 never" and sum(sae.y) == 3 and sum(control.y) == 3
    assert sae.line.color == ACCENT and control.line.color in GREYS and control.line.dash == "dash"
    assert firing_density({"dead": [0.0, 0.0]}).data[0].name == "dead: 2 of 2 never"
    with pytest.raises(ValueError, match="between 0 and 1"):
        firing_density({"counts": [3, 4]})


def test_every_title_says_what_is_shown():
    figures = [
        text_feature_heatmap(VALUES, [7, 9], ["web"] * 3),
        category_feature_heatmap(VALUES, ["a", "b", "c"], [7, 9]),
        category_means(VALUES.T, ["a", "b", "c"], [7, 9]),
        coactivation_heatmap(np.eye(2), [1, 2]),
        firing_density({"SAE": [0.1]}),
    ]
    assert all(len(figure.layout.title.text) > 10 for figure in figures)


def test_hundreds_of_columns_are_not_all_named():
    few, many = (heatmap(np.zeros((2, n)), list(range(n)), ["a", "b"]) for n in (80, 256))
    assert len(few.layout.xaxis.ticktext) == 80 and len(many.layout.xaxis.ticktext) == 16
    assert many.layout.xaxis.ticktext[1] == "16" and list(many.layout.xaxis.tickvals)[1] == 16
