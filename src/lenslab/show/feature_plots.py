"""Figures of features: on texts, by category, together, and how often they fire. In the look of
`show.plots`.

Each takes what was computed (`[text, feature]` activations, category means, co-activation) and
labels. Heatmaps of activations colour each feature by the share of its own largest value, which
stands in its label: features differ in size, and on one scale the strongest would hide the others.
Hovering gives the activation itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lenslab.show.plots import (
    ACCENT,
    CONTROL,
    GREYS,
    PALETTE,
    Labels,
    Values,
    is_control,
    label,
    roomy,
    styled,
)

ACTIVATION = [
    [0, "#fafafa"],
    [0.12, "#f5ddd4"],
    [0.6, ACCENT],
    [1, "#6e2410"],
]  # of tokens' colour, then darker


STRIP = ["#c8ccd0", "#80868b"]  # neighbouring categories in turn


MOST_NUMBERS = 120  # cells of a heatmap that still have room for their number


DENSE = 0.1


def text_feature_heatmap(
    values: Values,
    features: Labels,
    categories: Labels,
    texts: Labels | None = None,
    *,
    rows: bool = False,
    relative: bool = True,
    title: str = "",
) -> go.Figure:
    """Activations `[text, feature]`, texts grouped by category (in order of first appearance) under
    a strip.

    Args:
        features: their numbers or names.
        categories: of each text.
        texts: their beginnings are shown on hovering, and in front of the rows.
        rows: a row per text (for up to about seventy); else a column per text, for hundreds.
        relative: colours as share of the feature's largest value; else one scale for all.

    Raises ValueError where the labels do not number what `values` has.
    """
    features, categories = list(features), list(categories)
    texts = None if texts is None else list(texts)
    values = _matrix(values, categories, features, "texts", "features")
    order = sorted(
        range(len(categories)), key=lambda i: list(dict.fromkeys(categories)).index(categories[i])
    )
    values, groups = values[order], [categories[i] for i in order]
    # numbered, so that texts that begin alike stay apart
    shown = [f"{i}: {label(texts[i], 60)}" if texts is not None else f"text {i}" for i in order]
    starts = [i for i, group in enumerate(groups) if not i or group != groups[i - 1]]
    ends = [*starts[1:], len(groups)]
    z, names, scale = _coloured(values, features, relative)
    position = list(range(len(groups)))
    strip = np.repeat(np.arange(len(starts)) % 2, np.diff([*starts, len(groups)]))
    figure = go.Figure()
    common = {
        "showscale": False,
        "colorscale": [[0, STRIP[0]], [1, STRIP[1]]],
        "zmin": 0,
        "zmax": 1,
        "hoverinfo": "skip",
    }
    title = (
        title
        or f"Where {len(features)} features fire: {len(groups)} texts of {len(starts)} categories"
    )
    if rows:
        hover = "%{y}<br>%{x}: %{customdata:.3f}<extra></extra>"
        figure.add_heatmap(
            z=z, x=names, y=shown, customdata=_float32(values), hovertemplate=hover, **scale
        )
        figure.add_heatmap(z=strip[:, None], x=[0], y=shown, xaxis="x2", **common)
        tags = [
            f"{label(group, 12)} · {label(texts[i], 40) if texts is not None else i}"
            for group, i in zip(groups, order, strict=True)
        ]
        figure.update_yaxes(
            tickvals=position,
            ticktext=tags,
            autorange="reversed",
            type="category",
            tickfont_size=11,
            anchor="free",
            position=0,
            ticklabelstandoff=4,
        )
        figure.update_xaxes(tickangle=-60 if len(names) > 4 else 0, side="bottom", type="category")
        figure.update_layout(
            xaxis={"domain": [0.022, 1]},
            xaxis2={"domain": [0, 0.015], "showticklabels": False, "anchor": "y", "type": "linear"},
        )
        lines = [
            {"type": "line", "xref": "x domain", "x0": 0, "x1": 1, "y0": s - 0.5, "y1": s - 0.5}
            for s in starts[1:]
        ]
        height, width = 190 + 15 * len(groups), min(460 + 34 * len(names), 1000)
        margin = {"l": 40 + int(6 * max(map(len, tags))), "b": 110}
    else:
        hover = "%{x}<br>%{y}: %{customdata:.3f}<extra></extra>"
        figure.add_heatmap(
            z=z.T, x=shown, y=names, customdata=_float32(values.T), hovertemplate=hover, **scale
        )
        figure.add_heatmap(z=strip[None], x=shown, y=[0], yaxis="y2", **common)
        centres = [(a + b - 1) / 2 for a, b in zip(starts, ends, strict=True)]
        narrow = max(len(groups[s]) * 7 for s in starts) > 640 * min(
            np.subtract(ends, starts)
        ) / len(groups)
        height, width = 150 + 30 * len(names) + (50 if narrow else 0), 860
        figure.update_xaxes(
            showticklabels=False, type="category", range=[-0.5, len(groups) - 0.5], showgrid=False
        )
        figure.update_yaxes(showgrid=False, ticklabelstandoff=4)
        figure.update_layout(
            yaxis={
                "domain": [0, 1 - 18 / max(height - 140, 60)],
                "autorange": "reversed",
                "type": "category",
            },
            yaxis2={
                "domain": [1 - 12 / max(height - 140, 60), 1],
                "showticklabels": False,
                "anchor": "x",
                "type": "linear",
            },
        )
        for centre, start in zip(centres, starts, strict=True):
            figure.add_annotation(
                x=centre, y=1, yref="paper", yanchor="bottom", text=label(groups[start], 18), showarrow=False,
                textangle=-35 if narrow else 0, xanchor="left" if narrow else "center", font={"size": 11},
            )  # fmt: skip
        lines = [
            {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": s - 0.5, "x1": s - 0.5}
            for s in starts[1:]
        ]
        margin = {"l": 30 + int(6.6 * max(map(len, names))), "b": 24, "t": 130 if narrow else 78}
    figure.update_layout(
        shapes=[{**line, "line": {"color": "#ffffff", "width": 2}} for line in lines]
    )
    figure = styled(figure, title, height=min(height, 1500), width=width)
    return figure.update_layout(
        margin=margin, title_y=1 - 18 / min(height, 1500), title_yanchor="top"
    )


def category_feature_heatmap(
    values: Values,
    categories: Labels,
    features: Labels,
    *,
    relative: bool = True,
    title: str = "",
    what: str = "mean activation",
) -> go.Figure:
    """`[category, feature]`: which features are for which kind of text. Few cells show their
    number.

    `what` says what the values are; `relative` as in `text_feature_heatmap`. Raises ValueError as
    there.
    """
    values = _matrix(values, categories, features, "categories", "features")
    z, names, scale = _coloured(values, features, relative)
    few = values.size <= MOST_NUMBERS
    figure = go.Figure(
        go.Heatmap(
            z=z,
            x=names,
            y=[label(c) for c in categories],
            customdata=_float32(values),
            text=_float32(values) if few else None,
            texttemplate="%{text:.3~g}" if few else None,
            **scale,
            xgap=1,
            ygap=1,
            hovertemplate=f"%{{y}}, %{{x}}<br>{label(what, 60)} %{{customdata:.3f}}<extra></extra>",
        )
    )
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False, ticklabelstandoff=4)
    figure.update_xaxes(type="category", tickangle=-60 if len(names) > 6 else 0, showgrid=False)
    title = (
        title or f"{what.capitalize()} of {len(features)} features in {len(categories)} categories"
    )
    width = min(max(460, 220 + (62 if few else 26) * len(names)), 1100)
    figure = styled(figure, title, height=190 + 30 * len(categories), width=width)
    return roomy(figure, categories).update_layout(margin_b=110 if len(names) > 6 else 60)


def category_means(
    mean: Values,
    categories: Labels,
    features: Labels,
    *,
    low: Values | None = None,
    high: Values | None = None,
    highlight: Sequence[str | None] | str | None = None,
    title: str = "",
    x_title: str = "mean activation",
) -> go.Figure:
    """A panel per feature: its mean in each category `[feature, category]`, with intervals from
    `low` to `high`.

    `highlight` names the category each panel is about (one for all, or one each): accent colour,
    the rest grey. Up to six features. Raises ValueError for more, and where labels do not number
    what `mean` has.
    """
    categories, features = list(categories), list(features)
    mean = _matrix(
        np.atleast_2d(np.asarray(mean, dtype=float)), features, categories, "features", "categories"
    )
    if len(features) > 6:
        raise ValueError(f"{len(features)} panels are too small to read: choose up to 6 features.")
    chosen = (
        [highlight] * len(features)
        if highlight is None or isinstance(highlight, str)
        else list(highlight)
    )
    ends = [
        None if bound is None else np.atleast_2d(np.asarray(bound, dtype=float))
        for bound in (low, high)
    ]
    figure = make_subplots(
        1, len(features), shared_yaxes=True, subplot_titles=[label(f, 22) for f in features]
    )
    for i, row in enumerate(mean):
        colours = [ACCENT if category == chosen[i] else CONTROL for category in categories]
        for j, colour in enumerate(colours):
            error = None
            if ends[0] is not None and ends[1] is not None:
                spread = [[max(ends[1][i, j] - row[j], 0)], [max(row[j] - ends[0][i, j], 0)]]
                error = {
                    "array": spread[0],
                    "arrayminus": spread[1],
                    "symmetric": False,
                    "thickness": 2,
                    "width": 0,
                }
            name = label(categories[j])
            marker = {"color": colour, "size": 9}
            hover = f"{name}: %{{x:.3f}}<extra></extra>"
            figure.add_scatter(
                x=[row[j]], y=[j], error_x=error, mode="markers", marker=marker, hovertemplate=hover, name=name,
                showlegend=False, row=1, col=i + 1,
            )  # fmt: skip
    ticks = {"tickvals": list(range(len(categories))), "ticktext": [label(c) for c in categories]}
    figure.update_yaxes(**ticks, range=[len(categories) - 0.5, -0.5], zeroline=False)
    for i in range(len(mean)):  # from just below zero, so that a dot at zero is whole
        ends_i = np.concatenate([mean[i], *(bound[i] for bound in ends if bound is not None)])
        span = max(float(np.nanmax(ends_i, initial=0)) - float(np.nanmin(ends_i, initial=0)), 1e-9)
        limits = [
            float(np.nanmin(ends_i, initial=0)) - 0.06 * span,
            float(np.nanmax(ends_i, initial=0)) + 0.06 * span,
        ]
        figure.update_xaxes(range=limits, nticks=4, title_text=x_title, row=1, col=i + 1)
    title = (
        title
        or f"Mean activation by category of {len(features)} feature{'s' * (len(features) > 1)}"
    )
    width = min(max(520, 170 + 200 * len(features)), 1100)
    figure = styled(figure, title, height=180 + 26 * len(categories), width=width)
    figure.update_annotations(font_size=12)
    return roomy(figure, categories).update_layout(margin_t=84, title_y=0.97, title_yanchor="top")


def coactivation_heatmap(
    values: Values,
    features: Labels,
    *,
    kind: str = "pmi",
    groups: Labels | None = None,
    title: str = "",
) -> go.Figure:
    """How features fire together `[feature, feature]`; the diagonal, which says nothing, is left
    blank.

    Args: kind: 'pmi' (nats, symmetric, red above and blue below what independence gives, grey where
        two never fire
            together) or 'conditional' (share of the row's firings at which the column's fires too;
            not symmetric).
        groups: what each feature belongs to, named before its number; features should come sorted
            by it.

    Raises ValueError for another kind, a shape that is not square, and a PMI that is not symmetric.
    """
    features = list(features)
    groups = None if groups is None else list(groups)
    values = _matrix(values, features, features, "features", "features").copy()
    if kind not in ("pmi", "conditional"):
        raise ValueError(f"kind is 'pmi' or 'conditional', not {kind!r}.")
    together = np.isfinite(values)
    if kind == "pmi" and not (
        np.array_equal(together, together.T)
        and np.allclose(values[together], values.T[together], atol=1e-6)
    ):
        raise ValueError(
            "This PMI is not symmetric: rows and columns must be the same features in the same order."
        )
    values[~together] = np.nan
    np.fill_diagonal(values, np.nan)
    names = [label(f"{group} {f}" if groups is not None else f, 24)
             for f, group in zip(features, groups or features, strict=True)]  # fmt: skip
    numbered = [f"{name}{chr(0x200B) * names[:i].count(name)}" for i, name in enumerate(names)]
    most = max(float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 1.0, 1e-9)
    scale = {"colorscale": "RdBu_r", "zmid": 0, "zmin": -most, "zmax": most}
    share = {"colorscale": ACTIVATION, "zmin": 0, "zmax": 1}
    bar = {
        "thickness": 12,
        "title": {"text": "PMI, nats" if kind == "pmi" else "share", "side": "right"},
    }
    hover = (
        "%{y} and %{x}: %{z:.3f}" if kind == "pmi" else "%{x} at %{z:.1%} of the firings of %{y}"
    )
    figure = go.Figure(
        go.Heatmap(
            z=_float32(values), x=numbered, y=numbered, colorbar=bar, xgap=1, ygap=1, hoverongaps=False,
            hovertemplate=hover + "<extra></extra>", **(scale if kind == "pmi" else share),
        )
    )  # fmt: skip
    side = min(max(260, 22 * len(features)), 760)
    room = 44 + int(6.6 * max(map(len, names)))
    default = (
        "Which features fire together (PMI; grey: never, or itself)"
        if kind == "pmi"
        else "How often the column's feature fires where the row's does"
    )
    figure = styled(figure, title or default, height=side + room + 60, width=side + room + 110)
    ticks = {
        "type": "category",
        "showgrid": False,
        "tickfont_size": 10 if len(names) > 24 else 12,
        "dtick": 1,
    }
    figure.update_xaxes(**ticks, tickangle=-90)
    figure.update_yaxes(**ticks, autorange="reversed")
    return figure.update_layout(margin={"l": room, "b": room, "t": 56}, plot_bgcolor="#d5d8dc")


def firing_density(
    rates: Mapping[str, Values],
    *,
    title: str = "",
    x_title: str = "share of tokens on which a feature fires",
) -> go.Figure:
    """How many features fire how often, one line per dictionary; controls (by name) grey.

    The legend says how many never fired (no place on a logarithmic axis); the dotted line is where
    'dense' begins.
    """
    arrays = {name: np.asarray(rate, dtype=float).ravel() for name, rate in rates.items()}
    for name, rate in arrays.items():
        if not len(rate) or not (np.isfinite(rate).all() and rate.min() >= 0 and rate.max() <= 1):
            raise ValueError(f"{name}: firing rates are shares between 0 and 1.")
    alive = np.concatenate([rate[rate > 0] for rate in arrays.values()])
    lowest = np.floor(np.log10(alive.min())) if len(alive) else -4.0
    edges = np.linspace(lowest, 0, int(-lowest) * 6 + 1)
    figure = go.Figure()
    colours, greys = iter(PALETTE * len(arrays)), iter(GREYS * len(arrays))
    for name, rate in arrays.items():
        control = is_control(name)
        counts, _ = np.histogram(np.log10(rate[rate > 0]), bins=edges)
        figure.add_scatter(
            x=10 ** ((edges[:-1] + edges[1:]) / 2),
            y=counts,
            mode="lines",
            name=f"{label(name, 36)}: {int((rate == 0).sum()):,} of {len(rate):,} never",
            line={
                "shape": "hvh",
                "width": 2,
                "color": next(greys) if control else next(colours),
                "dash": "dash" if control else "solid",
            },
        )
    figure.add_vline(x=DENSE, line={"color": "#3c4043", "width": 1, "dash": "dot"})
    dense = {
        "text": f"dense: above {DENSE:.0%}",
        "showarrow": False,
        "xanchor": "center",
        "yanchor": "bottom",
    }
    figure.add_annotation(
        x=float(np.log10(DENSE)), y=1, yref="paper", **dense
    )  # on a log axis: the exponent
    figure.update_xaxes(type="log", dtick=1, range=[lowest, 0], exponentformat="power")
    figure = styled(figure, title or "How often features fire", x_title, "features per bin")
    return roomy(figure, ["0,000"], legend=True)


def _matrix(
    values: Values, rows: Labels, columns: Labels, row_name: str, column_name: str
) -> np.ndarray:
    values = values.toarray() if hasattr(values, "toarray") else values
    values = np.asarray(values, dtype=float)
    if values.shape != (len(rows), len(columns)):
        raise ValueError(
            f"The values are {list(values.shape)}; there are {len(rows)} {row_name}, {len(columns)} {column_name}."
        )
    return values


def _coloured(
    values: np.ndarray, features: Labels, relative: bool
) -> tuple[np.ndarray, list[str], dict]:
    """What the colours show, the features' labels (with their largest value), and the colour
    scale's options."""
    names = [label(f, 22) for f in features]
    if len(set(names)) < len(names):
        names = [f"{name} ({i})" for i, name in enumerate(names)]
    largest = np.nanmax(np.abs(values), axis=0, initial=0)
    bar = {"thickness": 12, "title": {"text": "activation", "side": "right"}}
    if relative:
        names = [f"{name} (max {most:.3g})" for name, most in zip(names, largest, strict=True)]
        bar |= {
            "title": {"text": "share of max", "side": "right"},
            "tickformat": ".0%",
            "dtick": 0.5,
        }
        values = values / np.where(largest > 0, largest, 1)
    most = 1.0 if relative else max(float(largest.max(initial=0)), 1e-9)
    signed = bool((values < 0).any())
    colours = {
        "colorscale": "RdBu_r" if signed else ACTIVATION,
        "zmin": -most if signed else 0,
        "zmax": most,
    }
    return _float32(values), names, {**colours, "colorbar": bar}


def _float32(values: np.ndarray) -> np.ndarray:
    return np.round(values, 4).astype(np.float32)
