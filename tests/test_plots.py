"""Figures show what they were given, and a control looks like one."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch

from lenslab.show import plots
from lenslab.show.feature_plots import (
    category_feature_heatmap,
    coactivation_heatmap,
    firing_density,
    strength_bars,
    strength_map,
    text_feature_heatmap,
)
from lenslab.show.images import figure_json
from lenslab.show.plots import ACCENT, CONTROL, GREYS, MOST_POINTS, label

TITLES = {"title": "what one sees", "x_title": "layer", "y_title": "norm"}
DRAW = (plots.lines, plots.bars, plots.heatmap, plots.intervals, plots.scatter)
lines, bars, heatmap, intervals, scatter = (partial(draw, **TITLES) for draw in DRAW)
attention_map = partial(plots.attention_map, title="one head")


def test_a_control_is_grey_and_dashed_and_nothing_else_is():
    figure = lines({"model": [1, 2], "random twin": [1, 1], "shuffled": [0, 1]})
    model, twin, shuffled = figure.data
    assert (model.line.color, model.line.dash) == (ACCENT, "solid")
    assert (twin.line.color, twin.line.dash) == (CONTROL, "dash")
    assert shuffled.line.color in GREYS and shuffled.line.color != CONTROL
    assert tuple(model.y) == (1, 2)


@pytest.mark.parametrize("draw", DRAW)
@pytest.mark.parametrize("missing", TITLES)
def test_a_figure_needs_its_title_and_both_axes_named(draw, missing):
    given = {name: text for name, text in TITLES.items() if name != missing}
    values = ([[1.0]], ["a"], ["a"]) if draw is plots.heatmap else ({"a": [1.0]}, ["a"])
    values = ([1.0], [2.0]) if draw is plots.scatter else values
    values = ({"a": ([1.0], None, None)}, ["a"]) if draw is plots.intervals else values
    assert axes(draw(*values, **TITLES)) == ["layer", "norm"]
    with pytest.raises(TypeError, match=missing):
        draw(*values, **given)


def axes(figure) -> list[str]:
    return [figure.layout.xaxis.title.text, figure.layout.yaxis.title.text]


def test_figures_of_features_name_their_axes():
    for figure in (
        text_feature_heatmap(VALUES, [7, 9], ["a"] * 3),
        category_feature_heatmap(VALUES, ["a", "b", "c"], [7, 9]),
        coactivation_heatmap(np.eye(2), [7, 9]),
        firing_density({"SAE": [0.1]}),
    ):
        assert all(axes(figure))


@pytest.mark.parametrize(
    "draw",
    [
        lambda: lines({}),
        lambda: lines({"a": [np.nan, np.nan]}, log_y=True),
        lambda: bars({"a": []}),
        lambda: heatmap(np.full((1, 2), np.nan), "ab", "x"),
        lambda: intervals({"a": ([], None, None)}, []),
        lambda: scatter([], [], diagonal=True),
        lambda: scatter([np.nan], [1.0], marked=[False]),
        lambda: text_feature_heatmap(np.zeros((0, 2)), [7, 9], []),
        lambda: category_feature_heatmap(np.zeros((2, 0)), ["a", "b"], []),
        lambda: coactivation_heatmap(np.eye(1), [7]),
        lambda: firing_density({}),
        lambda: strength_map({"SAE": np.zeros((2, 3))}, "ab", title="t"),
        lambda: strength_bars({"SAE": np.zeros((2, 0))}, "ab", title="t"),
    ],
)
def test_where_there_is_nothing_to_draw_the_figure_says_so(draw):
    assert "Nothing to draw" in [note.text[:15] for note in draw().layout.annotations]


def test_a_figure_with_one_value_says_nothing_of_the_kind():
    assert not lines({"a": [np.nan, 1.0]}).layout.annotations


def test_a_ratio_has_its_reference_line():
    figure = lines({"model": [3, 9], "random twin": [1, 1]}, reference=1)
    assert [(line.y0, line.y1) for line in figure.layout.shapes] == [(1, 1)]
    assert not lines({"model": [3, 9]}).layout.shapes


def test_heads_side_by_side_share_one_scale_and_their_tokens():
    tokens = ["<s>", "the", "the"]
    figure = attention_map({"3.1 <induction>": np.eye(3), "2.0": np.eye(3) / 2}, tokens)
    assert [cells.coloraxis for cells in figure.data] == ["coloraxis", "coloraxis"]
    scale = figure.layout.coloraxis
    assert (scale.cmin, scale.cmax) == (0, 1)
    assert [cells.xaxis for cells in figure.data] == ["x", "x2"]
    assert [note.text for note in figure.layout.annotations] == ["3.1 &lt;induction&gt;", "2.0"]
    for axis in (figure.layout.xaxis, figure.layout.xaxis2, figure.layout.yaxis):
        assert tuple(axis.ticktext) == ("&lt;s&gt;", "the", "the")
    assert figure.layout.yaxis2.showticklabels is False and not figure.layout.yaxis2.title.text
    with pytest.raises(ValueError, match=r"\[2, 2\]"):
        attention_map({"a": np.eye(3), "b": np.eye(2)}, tokens)


def test_a_legend_of_several_lines_keeps_clear_of_the_title():
    short, long = (lines({f"{'name' * n}{i}": [1] for i in range(6)}) for n in (1, 6))
    assert long.layout.margin.t >= short.layout.margin.t + 20


def test_features_are_drawn_under_their_names():
    names = ["1025 full stops and commas", "7 <indentation>"]
    shown = ["1025 full stops and commas (max 4)", "7 &lt;indentation&gt; (max 10)"]
    figure = text_feature_heatmap(VALUES, names, ["a"] * 3)
    assert list(figure.layout.yaxis.ticktext) == shown
    figure = category_feature_heatmap(VALUES, ["a", "b", "c"], names)
    assert list(figure.layout.xaxis.ticktext) == shown and figure.layout.xaxis.tickangle == -60


def test_a_log_axis_is_one_on_request():
    assert lines({"a": [1, 1000]}, log_y=True).layout.yaxis.type == "log"
    assert lines({"a": [1, 1000]}).layout.yaxis.type is None


@pytest.mark.parametrize("overlay", [True, False])
def test_bars_are_never_stacked(overlay):
    """W4.13: stacked bars were read as peaks."""
    assert bars({"a": [1], "b": [2]}, overlay=overlay).layout.barmode in {"group", "overlay"}


def test_a_misspelt_title_is_an_error():
    with pytest.raises(TypeError, match="titel"):
        bars({"a": [1]}, titel="A")


def test_tensors_of_any_precision_and_sparse_matrices_are_taken():
    half = torch.tensor([1.0, 2.0], dtype=torch.bfloat16, requires_grad=True)
    assert tuple(lines({"a": half}).data[0].y) == (1, 2)
    sparse = scipy.sparse.csr_array(VALUES)
    assert text_feature_heatmap(sparse, [7, 9], ["a"] * 3) == text_feature_heatmap(
        VALUES, [7, 9], ["a"] * 3
    )


def test_labels_that_repeat_keep_their_own_rows():
    figure = attention_map(np.eye(3), ["the", "cat", "the"])
    assert figure.data[0].z.shape == (3, 3)
    for axis in (figure.layout.xaxis, figure.layout.yaxis):
        assert tuple(axis.ticktext) == ("the", "cat", "the") and tuple(axis.tickvals) == (0, 1, 2)


def test_signed_values_are_centred_on_zero():
    assert heatmap(np.array([[-1.0, 2.0]]), ["a", "b"], ["row"], centre=True).data[0].zmid == 0


def test_labels_show_as_they_stand():
    """Plotly reads `<b>` as markup and `$...$` as TeX."""
    assert label("<b>a</b>\n$x$") == "&lt;b&gt;a&lt;/b&gt;↵&#36;x&#36;"
    assert label("a" * 40, 10) == "a" * 9 + "…" and label(17) == "17"
    assert tuple(attention_map(np.eye(1), ["<|bos|>"]).layout.yaxis.ticktext) == ("&lt;|bos|&gt;",)


def test_controls_of_an_interval_are_grey_and_told_apart_by_their_symbols():
    series = {
        "SAE": ([0.9], [0.8], [0.95]),
        "PCA": ([0.7], None, None),
        "n-grams": ([0.6], None, None),
    }
    figure = intervals(series, ["a"])
    assert [trace.marker.color for trace in figure.data] == [ACCENT, *GREYS[:2]]
    assert len({trace.marker.symbol for trace in figure.data}) == 3
    assert np.allclose(figure.data[0].error_x.array, 0.05)
    assert np.allclose(figure.data[0].error_x.arrayminus, 0.1)
    assert figure.data[1].error_x.array is None
    rows = [trace.y[0] for trace in figure.data]
    assert rows == sorted(rows) and len(set(rows)) == 3
    assert not {t.marker.color for t in intervals(series, ["a"], controls=[]).data} & set(GREYS)
    with pytest.raises(ValueError, match="2 values"):
        intervals({"SAE": ([1, 2], None, None)}, ["a"])


def test_marked_points_are_named_and_the_rest_is_thinned_and_says_so():
    n = MOST_POINTS * 2 + 3
    figure = scatter(
        range(n), range(n), marked=np.arange(n) < 3, marked_name="specialists", diagonal=True
    )
    equal, others, marked = figure.data
    assert equal.name == "equal" and marked.name == "specialists"
    assert tuple(marked.text) == ("0", "1", "2") and marked.mode == "markers+text"
    assert len(others.x) == MOST_POINTS and f"{MOST_POINTS:,} of {n - 3:,} drawn" in others.name
    assert others.marker.color == CONTROL and marked.marker.color == ACCENT
    with pytest.raises(ValueError, match="2 x, 1 y"):
        scatter([1, 2], [1])


VALUES = np.array([[4.0, 0.0], [0.0, 10.0], [2.0, 5.0]])  # three texts, two features


def test_texts_are_grouped_by_category_and_features_keep_their_own_scale():
    figure = text_feature_heatmap(VALUES, [7, 9], ["web", "math", "web"])
    cells = figure.data[0]
    # texts 0, 2, 1; each feature over its largest value
    assert np.allclose(cells.z.T, [[1, 0], [0.5, 0.5], [0, 1]])
    assert np.allclose(cells.customdata.T, VALUES[[0, 2, 1]]) and (cells.zmin, cells.zmax) == (0, 1)
    assert tuple(figure.layout.yaxis.ticktext) == ("7 (max 4)", "9 (max 10)")
    assert tuple(figure.layout.xaxis.ticktext) == ("0", "2", "1")
    strip = [(shape.x0, shape.x1) for shape in figure.layout.shapes if shape.type == "rect"]
    assert strip == [(-0.5, 1.5), (1.5, 2.5)]
    assert [note.text for note in figure.layout.annotations] == ["web", "math"]


def test_labels_that_do_not_number_the_values_are_refused():
    for function in (text_feature_heatmap, category_feature_heatmap):
        for rows, columns in ((3, 3), (2, 2), (3, 1)):
            with pytest.raises(ValueError):
                labels = (range(rows), range(columns))
                function(VALUES, *(labels if "category" in function.__name__ else labels[::-1]))
    with pytest.raises(ValueError, match=r"\[3, 2\]"):
        heatmap(VALUES, ["a"], ["b", "c", "d"])


def test_columns_of_a_table_are_labels_too():
    kinds = pd.Series(["web", "math", "web"], index=[5, 6, 7])
    by_list = text_feature_heatmap(VALUES, [7, 9], kinds.tolist())
    assert text_feature_heatmap(VALUES, np.array([7, 9]), kinds) == by_list


def test_a_figure_of_hundreds_of_texts_stays_small():
    figure = text_feature_heatmap(np.ones((420, 10)), list(range(10)), ["a", "b"] * 210)
    assert len(str(figure_json(figure))) < 150_000


def test_few_cells_show_their_number_and_signed_values_get_two_hues():
    few = category_feature_heatmap(VALUES, ["a", "b", "c"], [7, 9]).data[0]
    assert np.allclose(few.text, VALUES) and few.texttemplate
    many = category_feature_heatmap(np.ones((20, 20)), range(20), range(20)).data[0]
    assert many.text is None
    signed = category_feature_heatmap(VALUES - 5, ["a", "b", "c"], [7, 9]).data[0]
    assert (signed.zmin, signed.zmax) == (-1, 1)


def test_coactivation_is_symmetric_centred_on_zero_and_blank_on_its_diagonal():
    pmi = np.array([[9.0, 1.0, -np.inf], [1.0, 9.0, -2.0], [-np.inf, -2.0, 9.0]])
    figure = coactivation_heatmap(pmi, ["web 7", "web 7", "math 9"])
    z = figure.data[0].z
    assert np.isnan(z.diagonal()).all() and np.isnan(z[0, 2]) and z[1, 2] == -2
    assert (figure.data[0].zmin, figure.data[0].zmax) == (-2, 2)
    assert pmi[0, 0] == 9  # what was given stays as it was
    pmi[0, 1] = 3
    with pytest.raises(ValueError, match="not symmetric"):
        coactivation_heatmap(pmi, [1, 2, 3])


def test_every_feature_is_in_the_density_and_dead_ones_in_its_legend():
    figure = firing_density({"SAE": [0, 0, 0.001, 0.01, 0.5], "random directions": [0.1, 0.2, 1.0]})
    sae, control = figure.data
    assert sae.name == "SAE: 2 of 5 never" and sum(sae.y) == 3 and sum(control.y) == 3
    assert sae.line.color == ACCENT and control.line.color in GREYS and control.line.dash == "dash"
    assert firing_density({"dead": [0.0, 0.0]}).data[0].name == "dead: 2 of 2 never"
    for rates in ([3, 4], [np.nan]):
        with pytest.raises(ValueError, match="between 0 and 1"):
            firing_density({"counts": rates})


def test_hundreds_of_columns_are_not_all_named():
    few, many = (heatmap(np.zeros((2, n)), list(range(n)), ["a", "b"]) for n in (80, 256))
    assert len(few.layout.xaxis.ticktext) == 80 and len(many.layout.xaxis.ticktext) == 16
    assert many.layout.xaxis.ticktext[1] == "16" and list(many.layout.xaxis.tickvals)[1] == 16


# What plotly would leave out or put together in silence

KINDS = {
    "bfloat16": lambda v: torch.tensor(v, dtype=torch.bfloat16),
    "gradient": lambda v: torch.tensor(v, requires_grad=True),
    "list of gradients": lambda v: list(torch.tensor(v, requires_grad=True)),
    "list of bfloat16": lambda v: [torch.tensor(x, dtype=torch.bfloat16) for x in v],
}


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_every_kind_can_be_drawn(kind):
    row, table = KINDS[kind]([1.0, 0.0, 2.0]), KINDS[kind]([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]])
    for draw in (lines, bars):
        trace = draw({"a": row}, row).data[0]
        assert tuple(trace.x) == tuple(trace.y) == (1, 0, 2)
    assert np.array_equal(heatmap(table, "abc", "xy").data[0].z, [[1, 0, 2], [0, 1, 1]])
    assert tuple(scatter(row, row).data[0].x) == (1, 0, 2)
    assert len(scatter([1, 2, 3], row, marked=KINDS[kind]([1.0, 0.0, 1.0])).data[1].x) == 2
    figure = intervals({"a": (row, row, row)}, "xyz", reference=row[0])
    assert tuple(figure.data[0].error_x.array) == (0, 0, 0)
    assert figure.layout.shapes[0].x0 == 1


@pytest.mark.parametrize("draw", [lines, bars])
@pytest.mark.parametrize("names", [["the", "the", "a"], ["10", "2", "3"], ["<s>", "$x$", "<b>"]])
def test_names_keep_a_place_each_and_are_shown_as_they_are(draw, names):
    figure = draw({"a": [1, 2, 3]}, names)
    assert tuple(figure.data[0].x) == tuple(figure.layout.xaxis.tickvals) == (0, 1, 2)
    assert list(figure.layout.xaxis.ticktext) == [label(name) for name in names]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: lines({"a": [1, 2, 3]}, ["x", "y"]),
        lambda: lines({"a": [1, 2]}, [1, 2, 3]),
        lambda: bars({"a": [1, 2, 3], "b": [1, 2]}, [5, 6, 7]),
        lambda: bars({"a": [[1, 2, 3]]}),
        lambda: heatmap(VALUES, ["x"], ["a", "b", "c"]),
        lambda: heatmap(VALUES, ["x", "y"], ["a", "b", "c", "d"]),
        lambda: scatter([1, 2, 3], [1, 2, 3], names=["a", "b"]),
        lambda: scatter([1, 2, 3], [1, 2, 3], names=["a", "b", "c", "d"]),
        lambda: scatter([1, 2, 3], [1, 2, 3], marked=[0, 2, 2]),  # positions are no marks
        lambda: intervals({"a": ([1, 2, 3], [0, 1], [2, 3])}, ["x", "y", "z"]),
        lambda: intervals({"a": ([1, 2, 3], [0], [4])}, ["x", "y", "z"]),
        lambda: intervals({"a": ([1, 2, 3], [0, 1, 2], None)}, ["x", "y", "z"]),
        lambda: text_feature_heatmap(VALUES, [7], ["a"] * 3),
        lambda: text_feature_heatmap(VALUES, [7, 9], ["a", None, "b"]),
        lambda: text_feature_heatmap(VALUES, [7, 9], ["a"] * 4),
        lambda: text_feature_heatmap(VALUES, [7, 9], ["a", "b", "a", None]),
        lambda: category_feature_heatmap(VALUES, ["a", "b", "c"], [7, 9, 11]),
        lambda: category_feature_heatmap(VALUES, ["a", "b"], [7, 9]),
    ],
)
def test_labels_of_another_number_are_refused(draw):
    with pytest.raises(ValueError, match=r"one each|rows and|ends|mask"):
        draw()


def test_gaps_stay_gaps():
    assert np.isnan(lines({"a": [1, np.nan, 3]}).data[0].y[1])
    assert np.isnan(heatmap([[1, np.nan]], "ab", "x").data[0].z[0, 1])


# Lines with places and spreads of their own; features by what they are for


def test_every_line_can_have_its_own_places_and_spread():
    series, places = (
        {"a": [1.0, 2.0], "frozen decoder": [3.0]},
        {"a": [4, 8], "frozen decoder": [5]},
    )
    figure = lines(series, places, spread={"a": ([0.5, 2.0], [1.0, 4.0])}, log_x=True)
    assert [tuple(line.x) for line in figure.data] == [(4, 8), (5,)]
    assert tuple(figure.data[0].error_y.array) == (0, 2)
    assert tuple(figure.data[0].error_y.arrayminus) == (0.5, 0)
    assert figure.data[1].error_y.array is None and figure.data[1].line.color == CONTROL
    with pytest.raises(ValueError, match=r"\[2\] values for 1 places"):
        lines({"a": [1, 2]}, {"a": [1]})


def test_a_logarithmic_axis_names_whole_numbers():
    """plotly writes .2 as "2", small, where it names places between powers of ten."""
    axis = lines({"a": [0.1, 0.4]}, log_y=True).layout.yaxis
    assert axis.type == "log" and axis.tickformat == "~g"


def test_a_line_of_thousands_has_no_markers():
    assert lines({"a": range(2000)}).data[0].mode == "lines"


def test_features_lie_under_the_row_in_which_they_are_strongest_and_strongest_first():
    """W2.9: not by their number."""
    means = np.array([[1.0, 0.0, 4.0, 0.0], [2.0, 9.0, 1.0, 0.0]])  # the last never fires
    figure = strength_map({"SAE": means, "<random>": means}, ["web", "math"], title="t")
    assert np.allclose(figure.data[0].z, [[1, 0, 0.5], [0.25, 1, 1]])
    notes = [note.text for note in figure.layout.annotations]
    assert notes == [f"{name}: 3 of 4 features fire" for name in ("SAE", "&lt;random&gt;")]
    assert tuple(figure.layout.yaxis2.ticktext) == ("web", "math")


def test_bars_in_three_dimensions_are_sorted_and_of_one_scale():
    means = np.array([[1.0, 0.0, 4.0], [2.0, 9.0, 1.0]])
    figure = strength_bars({"SAE": means, "random": means / 3}, ["web", "math"], title="t")
    web, math = (trace.z.reshape(3, 3)[:, 1] for trace in figure.data[:2])
    assert np.allclose(web, [0, 4, 1]) and np.allclose(math, [9, 1, 2])
    assert figure.layout.scene.zaxis.range == figure.layout.scene2.zaxis.range
    assert tuple(figure.layout.scene.yaxis.ticktext) == ("web", "math")


def test_a_group_without_texts_is_a_gap_and_hides_no_feature():
    means = {"SAE": np.array([[1.0, 0.0, 4.0], [np.nan] * 3, [2.0, 9.0, 1.0]])}
    flat = strength_map(means, "abc", title="t")
    assert flat.layout.annotations[0].text == "SAE: 3 of 3 features fire"
    assert np.isnan(flat.data[0].z[1]).all() and np.nanmax(flat.data[0].z) == 1
    solid = strength_bars(means, "abc", title="t")
    assert solid.layout.scene.zaxis.range == (0, pytest.approx(1.02 * 9))
    assert solid.data[0].text.tolist()[::3] == [1, 2, 0]


@pytest.mark.parametrize("draw", [strength_map, strength_bars])
@pytest.mark.parametrize("names", ["ab", "abcd"])
def test_groups_of_another_number_than_the_rows_are_refused(draw, names):
    with pytest.raises(ValueError):
        draw({"SAE": np.ones((3, 4))}, names, title="t")
