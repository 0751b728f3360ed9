"""Figures: each function takes what was computed and returns a plotly figure; nothing here computes a finding.

One look for all: white ground, thin grid, one accent colour for what the text is about and grey for its
control, so that a reader knows which is which before reading the legend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

Values = Any  # numbers in a list, an array or a tensor on the CPU

ACCENT, CONTROL, SECOND, THIRD = "#c8502d", "#9aa0a6", "#2f6690", "#5b8e55"
PALETTE = [ACCENT, SECOND, THIRD, "#8d6a9f", "#c49a2c", "#4aa3a2", "#6d6875"]


def styled(
    figure: go.Figure, title: str = "", x: str = "", y: str = "", height: int = 380, width: int = 760
) -> go.Figure:
    """The house style on any figure: fonts, margins, axis titles."""
    figure.update_layout(
        template="plotly_white",
        title={"text": title, "x": 0.01, "font": {"size": 16}},
        font={"family": "Helvetica, Arial, sans-serif", "size": 12},
        height=height,
        width=width,
        margin={"l": 64, "r": 24, "t": 48 if title else 16, "b": 56},
        colorway=PALETTE,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 1, "xanchor": "right"},
    )
    if x:
        figure.update_xaxes(title_text=x)
    if y:
        figure.update_yaxes(title_text=y)
    return figure


CONTROLS = ("control", "twin", "random", "shuffled")


def _colours(names: Sequence[str]) -> list[str]:
    """One colour a name, in order; grey for names that say they are a control."""
    coloured = iter(PALETTE * (1 + len(names) // len(PALETTE)))
    return [CONTROL if any(word in name.lower() for word in CONTROLS) else next(coloured) for name in names]


def _decades(series: Mapping[str, Values]) -> float:
    """How many powers of ten the positive values span."""
    values = np.concatenate([np.asarray(v, dtype=float).ravel() for v in series.values()])
    values = values[values > 0]
    return float(np.log10(values.max() / values.min())) if len(values) else 0.0


def lines(
    series: Mapping[str, Values],
    x: Sequence | None = None,
    *,
    title: str = "",
    x_title: str = "",
    y_title: str = "",
    log_y: bool = False,
) -> go.Figure:
    """One line per entry. Names that contain 'control', 'twin', 'random' or 'shuffled' are drawn grey and dashed."""
    figure = go.Figure()
    for (name, values), colour in zip(series.items(), _colours(list(series)), strict=True):
        line = {"color": colour, "dash": "dash" if colour == CONTROL else "solid", "width": 2}
        axis = list(range(len(values))) if x is None else list(x)
        figure.add_scatter(
            x=axis, y=np.asarray(values, dtype=float).tolist(), name=name, line=line, mode="lines+markers"
        )
    if log_y:
        figure.update_yaxes(type="log", minor={"ticks": ""}, dtick=1 if _decades(series) > 1 else None)
    return styled(figure, title, x_title, y_title)


def bars(
    series: Mapping[str, Values],
    x: Sequence | None = None,
    *,
    title: str = "",
    x_title: str = "",
    y_title: str = "",
    overlay: bool = False,
) -> go.Figure:
    """Grouped (or overlaid) bars, one colour per entry; never stacked: a stacked bar reads as a height it is not."""
    figure = go.Figure()
    for (name, values), colour in zip(series.items(), _colours(list(series)), strict=True):
        axis = list(range(len(values))) if x is None else list(x)
        y = np.round(np.asarray(values, dtype=float), 4).tolist()
        figure.add_bar(x=axis, y=y, name=name, marker_color=colour, opacity=0.75 if overlay else 1.0)
    figure.update_layout(barmode="overlay" if overlay else "group", bargap=0.1)
    return styled(figure, title, x_title, y_title)


def heatmap(
    values: Values,
    x: Sequence[str],
    y: Sequence[str],
    *,
    title: str = "",
    x_title: str = "",
    y_title: str = "",
    centre: bool = False,
) -> go.Figure:
    """`[row, column]` as colours; `centre=True` for signed values (red and blue around zero). Labels may repeat."""
    z = np.round(np.asarray(values, dtype=float), 4)
    figure = go.Figure(
        go.Heatmap(
            z=z,
            x=list(range(len(x))),
            y=list(range(len(y))),
            colorscale="RdBu_r" if centre else "Viridis",
            zmid=0 if centre else None,
            colorbar={"thickness": 12},
        )
    )
    # positions with tick texts: labels that repeat ("the" twice) would otherwise fall on one row
    figure.update_xaxes(
        tickmode="array", tickvals=list(range(len(x))), ticktext=list(x), tickangle=-60 if len(x) > 8 else 0
    )
    figure.update_yaxes(tickmode="array", tickvals=list(range(len(y))), ticktext=list(y), autorange="reversed")
    side = min(max(300, 60 + 24 * len(y)), 900)
    return styled(figure, title, x_title, y_title, height=side + 60, width=min(max(420, 160 + 24 * len(x)), 1000))


def attention_map(pattern: Values, tokens: Sequence[str], *, title: str = "") -> go.Figure:
    """One head's attention `[query, key]`, rows summing to one, with the tokens on both axes."""
    return heatmap(pattern, tokens, tokens, title=title, x_title="attends to (key)", y_title="from (query)")
