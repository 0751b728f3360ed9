"""Figures of what was computed, by plotly; nothing here computes a finding.

One look for all: white ground, thin grid, colours for what the text is about and greys for its
controls, so that a reader knows which is which before reading the legend. A control is known by its
name. `**titles` are `title` (what one sees), `x_title` and `y_title` (with the direction of better,
where there is one), all needed. Where there is nothing to draw, the figure says so.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from torch import Tensor

from lenslab.metrics import as_mask

Values = Any  # numbers in a list, an array, a sparse matrix or a tensor
Labels = Sequence | np.ndarray | pd.Series | pd.Index | Tensor  # names or numbers
Number = int | float | np.number | Tensor

ACCENT, CONTROL, INK = "#c8502d", "#9aa0a6", "#3c4043"
PALETTE = [ACCENT, "#2f6690", "#5b8e55", "#8d6a9f", "#c49a2c", "#4aa3a2", "#c76b98"]
GREYS = [CONTROL, "#5f6368", "#80868b", "#b3b8bd"]  # of several controls in one figure
CONTROLS = ("control", "twin", "random", "shuffled", "null", "pca", "neuron", "n-gram")
CONTROLS += ("frozen", "coordinate", "data point")
SYMBOLS = ["circle", "diamond", "square", "triangle-up", "x", "star"]
DOTTED = {"color": INK, "width": 1, "dash": "dot"}  # of lines that mark a value
LOGARITHMIC = {"type": "log", "dtick": "D2"}  # 1, 2, 5, 10: all digits would overlap
LOGARITHMIC["tickformat"] = "~g"  # or .2 would be named "2"
MOST_MARKERS = 60  # of a line
MOST_POINTS = 5000  # of a scatter: a notebook keeps every point
MOST_NAMES = 12  # of marked points: more would overlap
MOST_LABELS = 80  # of a heatmap's axis: of more, every so many is named


def numbers(values: Values) -> np.ndarray:
    """Lists, arrays, sparse matrices, and tensors of any device and precision as float64."""
    if isinstance(values, list | tuple) and any(hasattr(value, "detach") for value in values):
        values = [numbers(value) for value in values]
    if hasattr(values, "detach"):
        values = values.detach().cpu().double()
    if hasattr(values, "toarray"):
        values = values.toarray()
    return np.asarray(values, dtype=float)


def label(text: Any, length: int = 28) -> str:
    """A label that plotly shows as it stands: one line, cut with an ellipsis, markup and `$` (TeX)
    escaped."""
    text = str(text).replace("\n", "↵").replace("\t", "→")
    if len(text) > length:
        text = text[: length - 1].rstrip() + "…"
    return html.escape(text, quote=False).replace("$", "&#36;")


def is_control(name: str) -> bool:
    """True for names that say they are a control: those are drawn grey."""
    return any(word in name.lower() for word in CONTROLS)


def colours(names: Iterable[str], controls: Iterable[str] | None = None) -> dict[str, str]:
    """A colour for each name, in order; a grey for controls, by default those that say they are."""
    grey = set(filter(is_control, names) if controls is None else controls)
    accents = cycle(PALETTE)
    greys = cycle(GREYS)
    return {name: next(greys if name in grey else accents) for name in names}


def styled(
    figure: go.Figure,
    *,
    title: str,
    x_title: str,
    y_title: str,
    height: int = 380,
    width: int = 760,
    legend: bool = False,
) -> go.Figure:
    """The house style on any figure: fonts, margins, axis titles, the legend in a line below the
    title."""
    names = [len(trace.name or "") for trace in figure.data]
    in_a_line = max((width - 90) // (45 + 7 * max(names, default=0)), 1)
    top = 64 + 20 * math.ceil(len(names) / in_a_line) if legend else 52
    figure.update_layout(
        template="plotly_white",
        title={"text": title, "x": 0.01, "y": 1 - 18 / height, "yanchor": "top", "font_size": 16},
        font={"family": "Helvetica, Arial, sans-serif", "size": 12},
        height=height,
        width=width,
        margin={"l": 64, "r": 24, "t": top, "b": 56},
        showlegend=legend,
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
    )
    figure.update_xaxes(title_text=x_title)
    figure.layout.yaxis.title.text = y_title  # once, where figures stand side by side
    drawn = (t.z if t.type == "heatmap" else np.add(t.x, t.y) for t in figure.data)
    if not any(np.isfinite(numbers(values)).any() for values in drawn):
        place = {"xref": "paper", "yref": "paper", "x": 0.5, "y": 0.5}
        figure.add_annotation(text="Nothing to draw: no values", showarrow=False, **place)
    return figure


def points(
    figure: go.Figure, series: Mapping[str, Values], x: Labels | Mapping[str, Labels] | None
) -> Iterator[tuple[str, str, list, np.ndarray]]:
    """(name, colour, x, y) of each entry; `x` is one for all, or by name. Names among it become
    ticks at 0, 1, ...: plotly puts names that repeat on one place and reads "10" as a number, `<s>`
    as markup.

    ValueError where `x` does not number the values: plotly would leave out what is over.
    """
    if not isinstance(x, Mapping):
        if x is not None and any(isinstance(place, str) for place in x):
            figure.update_xaxes(ticks(x))
            x = range(len(x))
        x = dict.fromkeys(series, x)
    for name, colour in colours(series).items():
        y = numbers(series[name])
        at = numbers(range(len(y)) if x[name] is None else x[name])
        if y.shape != at.shape or y.ndim != 1:
            raise ValueError(f"{name}: {list(y.shape)} values for {len(at)} places: one each.")
        yield name, colour, at.tolist(), y


def lines(
    series: Mapping[str, Values],
    x: Labels | Mapping[str, Labels] | None = None,
    *,
    spread: Mapping[str, tuple[Values, Values]] | None = None,
    log_x: bool = False,
    log_y: bool = False,
    reference: Number | None = None,
    **titles: str,
) -> go.Figure:
    """One line per entry; controls, by name, are grey and dashed.

    Args:
        x: for all entries, or name -> its own; a logarithmic axis has no place for what is 0.
        spread: name -> (low, high), such as the least and the most of several seeds.
        reference: a dotted line at a value, e.g. 1 for a ratio.

    Raises ValueError where `x` or `spread` does not number the values.
    """
    figure = go.Figure()
    for name, colour, at, y in points(figure, series, x):
        figure.add_scatter(
            x=at,
            y=y.tolist(),
            name=label(name, 40),
            mode="lines+markers" if len(at) <= MOST_MARKERS else "lines",
            line={"color": colour, "dash": "dash" if is_control(name) else "solid", "width": 2},
            error_y=error_bars(y, *(spread or {}).get(name, (None, None))),
        )
    if reference is not None:
        figure.add_hline(y=float(reference), line=DOTTED)
    figure.update_xaxes(LOGARITHMIC if log_x else {})
    figure.update_yaxes(LOGARITHMIC if log_y else {})
    return styled(figure, legend=len(series) > 1, **titles)


def bars(
    series: Mapping[str, Values], x: Labels | None = None, *, overlay: bool = False, **titles: str
) -> go.Figure:
    """Grouped (or overlaid) bars, one colour per entry; never stacked: a stacked bar reads as a
    height it is not. ValueError where `x` does not number the values."""
    figure = go.Figure()
    for name, colour, at, y in points(figure, series, x):
        figure.add_bar(
            x=at,
            y=np.round(y, 4).tolist(),
            name=label(name, 40),
            marker_color=colour,
            opacity=0.75 if overlay else 1.0,
        )
    figure.update_layout(barmode="overlay" if overlay else "group", bargap=0.1)
    return styled(figure, legend=len(series) > 1, **titles)


def ticks(labels: Labels, most: int = MOST_LABELS) -> dict[str, Any]:
    """An axis with the labels at 0, 1, 2, ...; of more than `most`, about sixteen of them."""
    labels = list(labels)
    named = range(0, len(labels), 1 if len(labels) <= most else len(labels) // 16)
    return {"tickvals": list(named), "ticktext": [label(labels[i], 44) for i in named]}


def cells(values: Values, x: Labels, y: Labels, **options: Any) -> go.Figure:
    """A heatmap of `[row, column]` at positions, named on the axes: labels that repeat ("the"
    twice) would otherwise fall on one row. `options` are those of plotly's heatmap."""
    values = numbers(values)
    if values.shape != (len(y), len(x)):
        raise ValueError(f"{list(values.shape)} values for {len(y)} rows and {len(x)} columns.")
    figure = go.Figure(go.Heatmap(z=np.round(values, 4), **options))
    figure.update_traces(colorbar_thickness=12, colorbar_title_side="right")
    crowded = len(x) > 6 or max((len(str(name)) for name in x), default=0) > 9
    angle = -60 if crowded and len(x) <= MOST_LABELS else 0
    bare = {"showgrid": False, "zeroline": False}
    figure.update_xaxes(ticks(x), tickangle=angle, **bare)
    return figure.update_yaxes(ticks(y), autorange="reversed", ticklabelstandoff=4, **bare)


def heatmap(
    values: Values, x: Labels, y: Labels, *, centre: bool = False, **titles: str
) -> go.Figure:
    """`[row, column]` as colours; `centre=True` for signed values (red and blue around zero)."""
    scale = {"colorscale": "RdBu_r", "zmid": 0} if centre else {"colorscale": "Viridis"}
    height = 60 + min(max(300, 60 + 24 * len(y)), 900)
    width = min(max(420, 160 + 24 * len(x)), 1000)
    return styled(cells(values, x, y, **scale), height=height, width=width, **titles)


def attention_map(patterns: Values, tokens: Labels, *, title: str) -> go.Figure:
    """Attention `[query, key]`, rows summing to one, with the tokens on both axes: of one head, or
    of several, by name, side by side under their names. Every such figure has one scale, 0 to 1."""
    named = patterns if isinstance(patterns, Mapping) else {"": patterns}
    names = [label(name, 60) for name in named]
    spaced = {"horizontal_spacing": 0.06 / len(named), "shared_yaxes": True}
    figure = make_subplots(1, len(named), subplot_titles=names, **spaced)
    for column, pattern in enumerate(named.values(), 1):
        head = cells(pattern, tokens, tokens, coloraxis="coloraxis")
        figure.add_trace(head.data[0], row=1, col=column)
    figure.update_xaxes(head.layout.xaxis).update_yaxes(head.layout.yaxis)
    figure.update_coloraxes(cmin=0, cmax=1, colorscale="Viridis", colorbar_thickness=12)
    figure.update_coloraxes(colorbar_title={"text": "attention weight", "side": "right"})
    side = min(max(300, 60 + 24 * len(tokens)), 900)
    size = {"height": side + 60, "width": min(160 + side * len(named), 1200)}
    titles = {"title": title, "x_title": "attends to (key)", "y_title": "from (query)"}
    return styled(figure, legend=len(named) > 1, **size, **titles)


def error_bars(value: np.ndarray, low: Values | None, high: Values | None) -> dict | None:
    """Plotly's error bars from `low` to `high` around `value`; None where there is no interval.
    ValueError where not every value has both ends."""
    if low is None and high is None:
        return None
    low, high = numbers(low), numbers(high)  # None: a single NaN
    if not low.shape == high.shape == value.shape:
        raise ValueError(f"{value.shape} values, {low.shape} low and {high.shape} high ends.")
    above = np.maximum(high - value, 0).tolist()
    below = np.maximum(value - low, 0).tolist()
    return {"array": above, "arrayminus": below, "symmetric": False, "thickness": 2, "width": 0}


def intervals(
    series: Mapping[str, tuple[Values, Values | None, Values | None]],
    labels: Labels,
    *,
    reference: Number | None = None,
    controls: Sequence[str] | None = None,
    **titles: str,
) -> go.Figure:
    """A row per label with a dot and its interval for every entry: what was found beside its
    controls.

    Args:
        series: name -> (value, low, high), each `[label]`; low and high None where there is no
            interval.
        reference: a dotted line, e.g. at chance.
        controls: entries that are drawn grey; default those whose names say so.
    """
    figure = go.Figure()
    step = min(0.72 / max(len(series), 1), 0.22)
    colour = colours(series, controls)
    for i, (name, (value, low, high)) in enumerate(series.items()):
        value = numbers(value)
        if value.shape != (len(labels),):
            raise ValueError(f"{name}: {len(value)} values for {len(labels)} labels.")
        figure.add_scatter(
            x=value.tolist(),
            y=(np.arange(len(labels)) + (i - (len(series) - 1) / 2) * step).tolist(),
            error_x=error_bars(value, low, high),
            mode="markers",
            name=label(name, 40),
            marker_color=colour[name],
            marker_size=7 if colour[name] in GREYS else 10,
            marker_symbol=SYMBOLS[i % len(SYMBOLS)],
            text=[label(text) for text in labels],
            hovertemplate="%{text}: %{x:.3f}",
        )
    if reference is not None:
        figure.add_vline(x=float(reference), line=DOTTED)
    figure.update_yaxes(ticks(labels), range=[len(labels) - 0.5, -0.5], showgrid=False)
    figure.update_yaxes(zeroline=False, ticklabelstandoff=6)
    height = min(130 + len(labels) * max(26, 16 * len(series)), 1400)
    return styled(figure, height=height, legend=len(series) > 1, **titles)


def scatter(
    x: Values,
    y: Values,
    *,
    names: Labels | None = None,
    marked: Values | None = None,
    marked_name: str = "marked",
    diagonal: bool = False,
    **titles: str,
) -> go.Figure:
    """Two scores against each other: `marked` points in the accent colour (named, up to twelve),
    the rest grey.

    `diagonal` draws the line where both are equal. Of more than 5,000 grey points every so-manieth
    is drawn, and the legend says so. ValueError for other numbers of y, names or marks than of x,
    and for marks that are positions.
    """
    x = numbers(x)
    y = numbers(y)
    chosen = np.zeros(len(x), dtype=bool) if marked is None else as_mask(numbers(marked))
    text = np.array([label(name) for name in (range(len(x)) if names is None else names)])
    if not len(x) == len(y) == len(chosen) == len(text):
        sizes = f"{len(x)} x, {len(y)} y, {len(chosen)} marks and {len(text)} names"
        raise ValueError(f"{sizes}: one each is needed.")
    figure = go.Figure()
    if diagonal:
        both = np.concatenate([x, y])
        ends = [np.nanmin(both, initial=np.inf), np.nanmax(both, initial=-np.inf)]
        figure.add_scatter(x=ends, y=ends, mode="lines", line=DOTTED, name="equal")
    rest = np.flatnonzero(~chosen)
    drawn = rest[:: max(-(-len(rest) // MOST_POINTS), 1)]
    thinned = f" ({len(drawn):,} of {len(rest):,} drawn)" if len(drawn) < len(rest) else ""
    mode = "markers+text" if chosen.sum() <= MOST_NAMES else "markers"
    grey = {"mode": "markers", "marker": {"color": CONTROL, "size": 5, "opacity": 0.6}}
    accent = {"mode": mode, "marker": {"color": ACCENT, "size": 9}, "textposition": "top center"}
    accent["cliponaxis"] = False  # a name may reach beyond the axes
    marks = np.flatnonzero(chosen)
    for rows, name, style in ((drawn, f"others{thinned}", grey), (marks, marked_name, accent)):
        if len(rows):
            points = {"x": x[rows], "y": y[rows], "text": text[rows], "name": label(name, 60)}
            hover = "%{text}: %{x:.3f}, %{y:.3f}"
            figure.add_scatter(**points, **style, hovertemplate=hover)
    return styled(figure, height=480, legend=True, **titles)
