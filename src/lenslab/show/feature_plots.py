"""Figures of features: on texts, by category, together, and how often they fire. In the look of
`show.plots`.

Each takes what was computed (`[text, feature]` activations, category means, PMI) and labels.
Heatmaps of activations colour each feature by the share of its own largest value, which stands in
its label: features differ in size, and on one scale the strongest would hide the others. Hovering
gives the activation itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lenslab.metrics import DENSE
from lenslab.show import plots
from lenslab.show.plots import Labels, Values, label, numbers, styled

ACTIVATION = [[0, "#fafafa"], [0.12, "#f5ddd4"], [0.6, plots.ACCENT], [1, "#6e2410"]]
STRIP = ["#c8ccd0", "#80868b"]  # neighbouring categories in turn
MOST_BARS = 40  # features of a figure in three dimensions
KIND = "kind of text"  # what the groups of strengths are
MOST_NUMBERS = 120  # cells of a heatmap that still have room for their number


def text_feature_heatmap(
    values: Values, features: Labels, categories: Labels, *, title: str = "Where the features fire"
) -> go.Figure:
    """Activations `[text, feature]`: a column per text, grouped by category (in order of first
    appearance) under a strip; its number is shown on hovering.

    Raises ValueError where the labels do not number what `values` has.
    """
    values = numbers(values)
    codes, groups = pd.factorize(np.asarray(categories, dtype=object))
    if (n := (codes >= 0).sum()) != len(values) or len(codes) != n:
        raise ValueError(f"{n} categories for {len(values)} rows: one each is needed.")
    order = np.argsort(codes, kind="stable")
    first = np.searchsorted(codes[order], np.arange(len(groups) + 1))  # column of each group
    figure = share_cells(values[order].T, features, order, per_row=True)
    figure.update_traces(hovertemplate="text %{x}<br>%{y}: %{customdata:.3f}<extra></extra>")
    figure.update_xaxes(plots.ticks(order, most=len(order)), showticklabels=False)
    # the strip, each category's name over it, and white lines between them
    above = {"type": "rect", "yref": "paper", "yanchor": 1, "ysizemode": "pixel", "y0": 5, "y1": 17}
    name = {"yref": "paper", "y": 1, "yshift": 18, "yanchor": "bottom", "xanchor": "left"}
    for i, group in enumerate(groups):
        start, end = first[i] - 0.5, first[i + 1] - 0.5
        figure.add_shape(x0=start, x1=end, fillcolor=STRIP[i % 2], line_width=0, **above)
        text = {"text": label(group, 18), "font_size": 11, "textangle": -35, "showarrow": False}
        figure.add_annotation(x=(start + end) / 2, **text, **name)
        figure.add_vline(x=start, line={"color": "#ffffff", "width": 2})
    height = min(200 + 30 * len(features), 1500)
    axes = {"x_title": "texts, by category", "y_title": "feature (its maximum)"}
    figure = styled(figure, title=title, height=height, width=860, **axes)
    return figure.update_layout(margin={"t": 130, "b": 40})


def category_feature_heatmap(
    values: Values, categories: Labels, features: Labels, *, title: str = "Mean activation"
) -> go.Figure:
    """`[category, feature]` means: which features are for which kind of text. Few cells show their
    number. Raises ValueError where the labels do not number what `values` has."""
    values = numbers(values)
    figure = share_cells(values, features, categories)
    figure.update_traces(hovertemplate="%{y}, %{x}<br>mean %{customdata:.3f}<extra></extra>")
    figure.update_traces(xgap=1, ygap=1)
    if values.size <= MOST_NUMBERS:
        figure.update_traces(text=np.round(values, 4), texttemplate="%{text:.3~g}")
    width = min(max(460, 220 + 62 * len(features)), 1100)
    below = 6 * max((len(name) for name in figure.layout.xaxis.ticktext), default=0)
    height = 150 + 30 * len(categories) + below  # under -60 degrees
    axes = {"x_title": "feature (its maximum)", "y_title": "category of texts"}
    return styled(figure, title=title, height=height, width=width, **axes)


def share_cells(
    values: np.ndarray, features: Labels, others: Labels, *, per_row: bool = False
) -> go.Figure:
    """`[other, feature]`, or `[feature, other]` where a feature has a row: colours are shares of
    the feature's largest value, `customdata` the values themselves."""
    largest = np.nanmax(np.abs(values), axis=1 if per_row else 0, keepdims=True, initial=0)
    if len(features) != largest.size:
        raise ValueError(f"{len(features)} names for {largest.size} features: one each is needed.")
    names = [f"{f} (max {most:.3g})" for f, most in zip(features, largest.flat, strict=True)]
    signed = bool((values < 0).any())
    figure = plots.cells(
        values / np.where(largest > 0, largest, 1),
        others if per_row else names,
        names if per_row else others,
        customdata=np.round(values, 4),
        colorscale="RdBu_r" if signed else ACTIVATION,
        zmin=-1 if signed else 0,
        zmax=1,
    )
    bar = {"title_text": "share of max", "tickformat": ".0%", "dtick": 0.5}
    return figure.update_traces(colorbar=bar)


def coactivation_heatmap(
    pmi: Values, features: Labels, *, title: str = "Which features fire together"
) -> go.Figure:
    """How features fire together: `[feature, feature]` PMI in nats, red above and blue below what
    independence gives, grey where two never fire together and on the diagonal, which says nothing.

    Raises ValueError for a PMI that is not symmetric: its rows and columns are not the same.
    """
    pmi = numbers(pmi).copy()
    pmi[~np.isfinite(pmi)] = np.nan
    if not np.allclose(pmi, pmi.T, atol=1e-6, equal_nan=True):
        raise ValueError("This PMI is not symmetric: rows and columns must be the same features.")
    np.fill_diagonal(pmi, np.nan)
    most = max(np.nanmax(np.abs(pmi), initial=0), 1e-9)
    scale = {"colorscale": "RdBu_r", "zmin": -most, "zmax": most}
    figure = plots.cells(pmi, features, features, hoverongaps=False, **scale)
    hover = "%{y} and %{x}: %{z:.3f}<extra></extra>"
    figure.update_traces(xgap=1, ygap=1, colorbar_title_text="PMI, nats", hovertemplate=hover)
    figure.update_xaxes(tickangle=-90)
    side = min(max(260, 22 * len(features)), 760)
    axes = {"x_title": "feature", "y_title": "feature"}
    figure = styled(figure, title=title, height=side + 150, width=side + 200, **axes)
    return figure.update_layout(plot_bgcolor="#d5d8dc")


def firing_density(
    rates: Mapping[str, Values], *, title: str = "How often features fire"
) -> go.Figure:
    """How many features fire how often, one line per dictionary; controls, by name, grey.

    The legend says how many never fired (no place on a logarithmic axis); the dotted line is where
    'dense' begins. Raises ValueError for rates that are no shares.
    """
    shares = {name: numbers(rate).ravel() for name, rate in rates.items()}
    every = np.concatenate([[], *shares.values()])
    if not ((every >= 0) & (every <= 1)).all():
        raise ValueError("Firing rates are shares between 0 and 1.")
    lowest = np.floor(np.log10(every[every > 0].min(initial=0.1)))
    edges = np.linspace(lowest, 0, int(-lowest) * 6 + 1)  # six bins a decade
    figure = go.Figure()
    for name, colour in plots.colours(shares).items():
        rate = shares[name]
        dash = "dash" if plots.is_control(name) else "solid"
        figure.add_scatter(
            x=10 ** ((edges[:-1] + edges[1:]) / 2),
            y=np.histogram(np.log10(rate[rate > 0]), bins=edges)[0],
            mode="lines",
            name=f"{label(name, 40)}: {(rate == 0).sum():,} of {len(rate):,} never",
            line={"shape": "hvh", "width": 2, "color": colour, "dash": dash},
        )
    figure.add_vline(x=DENSE, line=plots.DOTTED)
    note = {"text": "dense", "showarrow": False, "y": 1, "yref": "paper", "yanchor": "bottom"}
    figure.add_annotation(x=np.log10(DENSE), **note)
    figure.update_xaxes(type="log", dtick=1, range=[lowest, 0], exponentformat="power")
    titles = {"x_title": "share of tokens on which a feature fires", "y_title": "features per bin"}
    return styled(figure, title=title, legend=True, **titles)


def strength_map(means: Mapping[str, Values], groups: Labels, *, title: str) -> go.Figure:
    """All features at once, `name -> [group, feature]` activations: a column each, grouped by the
    row in which it is strongest, strongest first. Groups are kinds of text.

    Colours are shares of the feature's own largest. Each entry has its panel: grouping makes steps
    of random directions, too, so that what counts is the contrast. Features that never fire are
    left out and counted.
    """
    inner = 30 + 15 * min(len(groups), 40)  # pixels of a panel; 90 lie between two
    spacing = 90 / max(len(means) * (inner + 90) - 90, 91)
    names = [label(name, 40) for name in means]
    figure = make_subplots(len(means), 1, subplot_titles=names, vertical_spacing=spacing)
    for row, values in enumerate(map(numbers, means.values())):
        known = np.nan_to_num(values)  # a group of no texts has no mean, and stays a gap
        largest = known.max(0, initial=0)
        order = np.lexsort((-largest, known.argmax(0)))
        order = order[largest[order] > 0]
        figure.layout.annotations[row].text += f": {len(order):,} of {len(largest):,} features fire"
        panel = plots.cells(values[:, order] / largest[order], order, groups, coloraxis="coloraxis")
        panel.update_traces(hovertemplate="%{y}: %{z:.0%}<extra></extra>")
        figure.add_trace(panel.data[0], row + 1, 1)
        figure.update_yaxes(panel.layout.yaxis, row=row + 1, title_text=KIND)
    bar = {"thickness": 12, "title": {"text": "share of its largest", "side": "right"}}
    figure.update_coloraxes(cmin=0, cmax=1, colorscale=ACTIVATION, colorbar=bar)
    axes = {"x_title": "features, by where they are strongest", "y_title": KIND}
    figure = styled(figure, title=title, height=40 + len(means) * (inner + 90), **axes)
    return figure.update_layout(margin_t=74)


def strength_bars(means: Mapping[str, Values], groups: Labels, *, title: str) -> go.Figure:
    """The strongest features in three dimensions, `name -> [group, feature]` activations: a bar for
    each group, the strongest feature on the left; all panels have one scale."""
    names = [label(name, 40) for name in means]
    spaced = {"specs": [[{"type": "scene"}] * len(means)], "horizontal_spacing": 0.03}
    figure = make_subplots(1, len(means), subplot_titles=names, **spaced)
    top = max(np.nanmax(numbers(values), initial=0) for values in means.values())
    for column, values in enumerate(map(numbers, means.values()), 1):
        strongest = np.argsort(-np.nanmax(values, 0, initial=0), kind="stable")[:MOST_BARS]
        rank, hue = np.arange(len(strongest)), cycle(plots.PALETTE)
        for row, (group, own) in enumerate(zip(groups, values[:, strongest], strict=True)):
            # a thick line from the ground to each value, and a gap before the next
            z = np.stack([0 * rank, own, np.nan * rank], 1).ravel()
            place = {"x": np.repeat(rank, 3), "y": np.full(z.shape, row), "z": z}
            look = {"mode": "lines", "line": {"color": next(hue), "width": 9}, "name": label(group)}
            hover = {"text": np.repeat(strongest, 3), "hovertemplate": "feature %{text}: %{z:.3f}"}
            figure.add_trace(go.Scatter3d(**place, **look, **hover), 1, column)
    figure.update_scenes(
        xaxis={"title_text": "rank by strength"},
        yaxis={"title_text": KIND, **plots.ticks(groups, most=24)},
        zaxis={"title_text": "activation", "range": [0, 1.02 * top]},
        aspectratio={"x": 1.4, "y": 1.0, "z": 0.8},
        camera={"eye": dict(x=1.6, y=-1.85, z=1.1), "center": dict(x=-0.1, y=-0.1, z=-0.2)},
    )
    return styled(figure, title=title, height=460, width=1000, x_title="", y_title=KIND)
