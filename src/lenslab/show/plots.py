"""Figures: each function takes what was computed and returns a plotly figure; nothing here computes
a finding.

One look for all: white ground, thin grid, one accent colour for what the text is about and grey for
its control, so that a reader knows which is which before reading the legend.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

Values = Any  # numbers in a list, an array or a tensor on the CPU


Labels = Sequence | np.ndarray | pd.Series  # names or numbers


Number = int | float | np.number


ACCENT, CONTROL, SECOND, THIRD = "#c8502d", "#9aa0a6", "#2f6690", "#5b8e55"


PALETTE = [ACCENT, SECOND, THIRD, "#8d6a9f", "#c49a2c", "#4aa3a2", "#6d6875"]


GREYS = ["#80868b", "#b3b8bd", "#5f6368", "#9aa0a6"]  # of several controls in one figure


SYMBOLS = ["circle", "diamond", "square", "triangle-up", "x", "star"]


MOST_POINTS, MOST_NAMES = (
    5000,
    12,
)  # of a scatter: a notebook keeps every point, and more names would overlap


MOST_LABELS = 80  # of a heatmap's columns: of more, every so many is named


def styled(
    figure: go.Figure,
    title: str = "",
    x: str = "",
    y: str = "",
    height: int = 380,
    width: int = 760,
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


def label(text: Any, length: int = 28) -> str:
    """A label that plotly shows as it stands: one line, cut with an ellipsis, markup and `$` (TeX)
    escaped."""
    text = str(text).replace("\n", "↵").replace("\t", "→")
    cut = text if len(text) <= length else text[: length - 1].rstrip() + "…"
    return html.escape(cut, quote=False).replace("$", "&#36;")


CONTROLS = ("control", "twin", "random", "shuffled", "null", "pca", "neuron", "n-gram")


def is_control(name: str) -> bool:
    """True for names that say they are a control: those are drawn grey."""
    return any(word in name.lower() for word in CONTROLS)


def _colours(names: Sequence[str]) -> list[str]:
    """One colour a name, in order; grey for names that say they are a control."""
    coloured = iter(PALETTE * (1 + len(names) // len(PALETTE)))
    return [CONTROL if is_control(name) else next(coloured) for name in names]


def _decades(series: Mapping[str, Values]) -> float:
    """How many powers of ten the positive values span."""
    values = np.concatenate([np.asarray(v, dtype=float).ravel() for v in series.values()])
    values = values[values > 0]
    return float(np.log10(values.max() / values.min())) if len(values) else 0.0


def lines(
    series: Mapping[str, Values],
    x: Labels | None = None,
    *,
    title: str = "",
    x_title: str = "",
    y_title: str = "",
    log_y: bool = False,
) -> go.Figure:
    """One line per entry. Names that contain 'control', 'twin', 'random' or 'shuffled' are drawn
    grey and dashed."""
    figure = go.Figure()
    for (name, values), colour in zip(series.items(), _colours(list(series)), strict=True):
        line = {"color": colour, "dash": "dash" if colour == CONTROL else "solid", "width": 2}
        axis = list(range(len(values))) if x is None else list(x)
        figure.add_scatter(
            x=axis,
            y=np.asarray(values, dtype=float).tolist(),
            name=name,
            line=line,
            mode="lines+markers",
        )
    if log_y:
        figure.update_yaxes(
            type="log", minor={"ticks": ""}, dtick=1 if _decades(series) > 1 else None
        )
    return styled(figure, title, x_title, y_title)


def bars(
    series: Mapping[str, Values],
    x: Labels | None = None,
    *,
    title: str = "",
    x_title: str = "",
    y_title: str = "",
    overlay: bool = False,
) -> go.Figure:
    """Grouped (or overlaid) bars, one colour per entry; never stacked: a stacked bar reads as a
    height it is not."""
    figure = go.Figure()
    for (name, values), colour in zip(series.items(), _colours(list(series)), strict=True):
        axis = list(range(len(values))) if x is None else list(x)
        y = np.round(np.asarray(values, dtype=float), 4).tolist()
        figure.add_bar(
            x=axis, y=y, name=name, marker_color=colour, opacity=0.75 if overlay else 1.0
        )
    figure.update_layout(barmode="overlay" if overlay else "group", bargap=0.1)
    return styled(figure, title, x_title, y_title)


def heatmap(
    values: Values,
    x: Labels,
    y: Labels,
    *,
    title: str = "",
    x_title: str = "",
    y_title: str = "",
    centre: bool = False,
) -> go.Figure:
    """`[row, column]` as colours; `centre=True` for signed values (red and blue around zero).
    Labels may repeat."""
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
    shown = range(0, len(x), 1 if len(x) <= MOST_LABELS else len(x) // 16)
    figure.update_xaxes(
        tickmode="array",
        tickvals=list(shown),
        ticktext=[label(x[i]) for i in shown],
        tickangle=-60 if 8 < len(x) <= MOST_LABELS else 0,
    )
    figure.update_yaxes(
        tickmode="array",
        tickvals=list(range(len(y))),
        ticktext=[label(t) for t in y],
        autorange="reversed",
    )
    side = min(max(300, 60 + 24 * len(y)), 900)
    return styled(
        figure,
        title,
        x_title,
        y_title,
        height=side + 60,
        width=min(max(420, 160 + 24 * len(x)), 1000),
    )


def attention_map(pattern: Values, tokens: Labels, *, title: str = "") -> go.Figure:
    """One head's attention `[query, key]`, rows summing to one, with the tokens on both axes."""
    return heatmap(
        pattern, tokens, tokens, title=title, x_title="attends to (key)", y_title="from (query)"
    )


def intervals(
    series: Mapping[str, tuple[Values, Values | None, Values | None]],
    labels: Labels,
    *,
    title: str = "",
    x_title: str = "",
    reference: Number | None = None,
    controls: Sequence[str] | None = None,
) -> go.Figure:
    """A row per label with a dot and its interval for every entry: what was found beside its
    controls.

    Args: series: name -> (value, low, high), each `[label]`; low and high None where there is no
        interval. reference: a dotted line, e.g. at chance. controls: entries that are drawn grey;
        default all but the first.
    """
    names = list(series)
    grey = names[1:] if controls is None else list(controls)
    colours, greys = iter(PALETTE * len(names)), iter(GREYS * len(names))
    figure = go.Figure()
    step = min(0.72 / max(len(names), 1), 0.22)
    for i, (name, (value, low, high)) in enumerate(series.items()):
        value = np.asarray(value, dtype=float)
        if len(value) != len(labels):
            raise ValueError(f"{name}: {len(value)} values for {len(labels)} labels.")
        error = None
        if low is not None and high is not None:
            up, down = np.asarray(high, dtype=float) - value, value - np.asarray(low, dtype=float)
            error = {
                "type": "data",
                "symmetric": False,
                "array": np.maximum(up, 0).tolist(),
                "thickness": 2,
                "width": 0,
            }
            error["arrayminus"] = np.maximum(down, 0).tolist()
        colour = next(greys) if name in grey else next(colours)
        figure.add_scatter(
            x=value.tolist(),
            y=(np.arange(len(labels)) + (i - (len(names) - 1) / 2) * step).tolist(),
            error_x=error,
            mode="markers",
            name=label(name, 40),
            marker={
                "color": colour,
                "size": 7 if name in grey else 10,
                "symbol": SYMBOLS[i % len(SYMBOLS)],
            },
            text=[label(t) for t in labels],
            hovertemplate="%{text}: %{x:.3f}",
        )
    if reference is not None:
        figure.add_vline(x=reference, line={"color": "#3c4043", "width": 1, "dash": "dot"})
    figure.update_yaxes(
        tickvals=list(range(len(labels))),
        ticktext=[label(t) for t in labels],
        range=[len(labels) - 0.5, -0.5],
        showgrid=False,
        zeroline=False,
        ticklabelstandoff=6,
    )
    height = 130 + len(labels) * max(26, 16 * len(names))
    figure = styled(figure, title, x_title, height=min(height, 1400))
    return roomy(figure, labels, legend=len(names) > 1)


def null_histogram(
    null: Values,
    observed: Mapping[str, Number],
    *,
    title: str = "",
    x_title: str = "",
    name: str = "shuffled labels",
) -> go.Figure:
    """What chance gives, as grey bars, and what was observed, as lines. Whole numbers get a bar
    each."""
    null = np.asarray(null, dtype=float).ravel()
    if not len(null) or not np.isfinite(null).all():
        raise ValueError("A null distribution needs numbers, without NaN and Inf.")
    if np.array_equal(null, np.round(null)) and np.ptp(null) <= 60:
        centres, counts = np.unique(null, return_counts=True)
        width = 1.0
    else:
        counts, edges = np.histogram(null, bins=min(40, max(10, len(null) // 10)))
        centres, width = (edges[:-1] + edges[1:]) / 2, edges[1] - edges[0]
    figure = go.Figure(
        go.Bar(x=centres, y=counts, width=width * 0.92, marker_color=CONTROL, name=label(name, 40))
    )
    top = float(counts.max())
    colours = dict(zip(observed, _colours(list(observed)), strict=True))
    for i, (text, value) in enumerate(sorted(observed.items(), key=lambda item: item[1])):
        height = top * (
            1.06 + 0.13 * (i % 4)
        )  # labels of neighbouring lines must not lie on each other
        line = {"color": colours[text], "width": 2}
        figure.add_scatter(
            x=[value, value],
            y=[0, height],
            mode="lines",
            line=line,
            showlegend=False,
            hoverinfo="skip",
        )
        figure.add_annotation(
            x=value, y=height, text=f"{label(text, 40)}: {value:.3g}", showarrow=False, yanchor="bottom", borderpad=1,
            font={"color": "#3c4043" if colours[text] == CONTROL else colours[text]}, bgcolor="rgba(255,255,255,.85)",
        )  # fmt: skip
    ends = [*(centres - width), *(centres + width), *observed.values()]
    room = 0.05 * (max(ends) - min(ends))
    figure.update_xaxes(range=[min(ends) - room, max(ends) + room], showgrid=False)
    if width == 1 and max(ends) - min(ends) < 20:
        figure.update_xaxes(dtick=1)
    figure.update_yaxes(range=[0, top * (1.22 + 0.13 * min(len(observed) - 1, 3))])
    figure.update_layout(showlegend=True)
    return styled(figure, title, x_title, f"of {len(null):,} draws")


def scatter(
    x: Values,
    y: Values,
    *,
    names: Labels | None = None,
    marked: Values | None = None,
    marked_name: str = "marked",
    other_name: str = "others",
    diagonal: bool = False,
    title: str = "",
    x_title: str = "",
    y_title: str = "",
) -> go.Figure:
    """Two scores against each other: `marked` points in the accent colour (named, up to twelve),
    the rest grey.

    `diagonal` draws the line where both are equal. Of more than 5,000 grey points every so-manieth
    is drawn, and the legend says so.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    chosen = np.zeros(len(x), dtype=bool) if marked is None else np.asarray(marked, dtype=bool)
    if not len(x) == len(y) == len(chosen):
        raise ValueError(
            f"{len(x)} x, {len(y)} y and {len(chosen)} marks: one of each is needed for a point."
        )
    labels = [label(n) for n in (range(len(x)) if names is None else names)]
    rest = np.flatnonzero(~chosen)
    drawn = rest[:: -(-len(rest) // MOST_POINTS) or 1]
    figure = go.Figure()
    if diagonal:
        ends = [float(np.nanmin([x, y])), float(np.nanmax([x, y]))]
        line = {"color": "#3c4043", "width": 1, "dash": "dot"}
        figure.add_scatter(x=ends, y=ends, mode="lines", line=line, name="equal", hoverinfo="skip")
    more = f" ({len(drawn):,} of {len(rest):,} drawn)" if len(drawn) < len(rest) else ""
    for where, name, colour in (
        (drawn, other_name + more, CONTROL),
        (np.flatnonzero(chosen), marked_name, ACCENT),
    ):
        if len(where):
            named = colour == ACCENT and len(where) <= MOST_NAMES
            figure.add_scatter(
                x=x[where],
                y=y[where],
                mode="markers+text" if named else "markers",
                name=label(name, 60),
                text=[labels[i] for i in where],
                textposition="top center",
                marker={
                    "color": colour,
                    "size": 9 if colour == ACCENT else 5,
                    "opacity": 1 if named else 0.6,
                },
                hovertemplate="%{text}: %{x:.3f}, %{y:.3f}",
            )
    return roomy(styled(figure, title, x_title, y_title, height=480), ["0.00 0.00"], legend=True)


def roomy(figure: go.Figure, labels: Labels, *, legend: bool = False) -> go.Figure:
    """Margins that hold the row labels on the left and, above the plot, title and legend without
    overlap."""
    longest = max((len(label(text)) for text in labels), default=0)
    figure.update_layout(margin={"l": 40 + int(6.6 * longest), "t": 84 if legend else 52})
    if legend:
        figure.update_layout(legend={"x": 0, "xanchor": "left"}, title_y=0.97, title_yanchor="top")
    return figure
