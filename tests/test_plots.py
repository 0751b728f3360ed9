"""Figures show what they were given, and a control looks like one."""

import numpy as np
import pytest

from lenslab.show.plots import ACCENT, CONTROL, attention_map, bars, heatmap, lines


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
    assert figure.data[0].z.shape == (3, 3) and tuple(figure.layout.xaxis.ticktext) == ("the", "cat", "the")
    assert len(set(figure.data[0].x)) == 3


def test_signed_values_are_centred_on_zero():
    assert heatmap(np.array([[-1.0, 2.0]]), ["a", "b"], ["row"], centre=True).data[0].zmid == 0
