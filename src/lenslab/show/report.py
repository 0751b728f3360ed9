"""A training, shown: its curves while it runs, and a report of it, as a page and as PDF.

1. `live_curves` is what `train(..., watch=...)` calls with new rows: one figure, drawn again every
   few seconds; the last one stays.
2. `feature_page` is what is known of one feature.
3. `save_report` writes sections of text, tables, figures and views as one HTML page, and has the
   browser that draws the figures' PNGs print it. Without a browser the page is the report.
"""

from __future__ import annotations

import html
import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from IPython.display import DisplayHandle
from plotly.subplots import make_subplots
from transformer_lens.model_bridge import TransformerBridge

from lenslab.features.activations import FeatureActivations, Index
from lenslab.features.readings import vocabulary_effects
from lenslab.sae.load import RESIDUAL, SparseAutoencoder
from lenslab.sae.train import TrainingConfig
from lenslab.show import images
from lenslab.show.explore import explore_feature
from lenslab.show.plots import Labels, bars, colours, label, styled
from lenslab.show.tokens import View

EVERY = 2.0  # seconds between two pictures of a training
CURVES = {"fvu": "FVU (lower is better)", "l0": "L0: active per token", "dead": "dead latents"}
Part = str | pd.DataFrame | go.Figure | View

PRINTED = 700  # pixels across a printed page
STYLE = """
table{border-collapse:collapse;font-size:13px;margin:.6em 0}
td,th{text-align:left;padding:.15em 1em .15em 0;border-bottom:1px solid #ddd}
td,th,h1,h2,p{overflow-wrap:anywhere;unicode-bidi:plaintext}
tr,.r,.lh,.figure{break-inside:avoid}.lh,h2{break-after:avoid}
@page{size:A4;margin:12mm}
@media print{body{margin:0;max-width:none;print-color-adjust:exact}
section+section{break-before:page}.figure{zoom:var(--zoom)}}
"""


def training_curves(histories: Mapping[str, pd.DataFrame], *, title: str = "Training") -> go.Figure:
    """FVU, L0 and dead latents of trainings, by name: each from `TrainingResult.history`."""
    figure = make_subplots(1, 3, horizontal_spacing=0.09)
    for name, colour in colours(histories).items():
        for column, key in enumerate(CURVES, 1):
            figure.add_scatter(
                x=histories[name]["vectors"].tolist(),
                y=histories[name][key].tolist(),
                name=label(name, 40),
                line={"color": colour, "width": 2},
                showlegend=column == 1,
                row=1,
                col=column,
            )
    figure = styled(figure, title=title, height=320, x_title="vectors", y_title="", legend=True)
    for column, y_title in enumerate(CURVES.values(), 1):
        figure.update_yaxes(title_text=y_title, title_standoff=4, row=1, col=column)
    return figure.update_yaxes(type="log", row=1, col=1)


def live_curves(
    config: TrainingConfig, *, title: str = "Training"
) -> Callable[[str, dict[str, float | int]], None]:
    """For `train(..., config, watch=live_curves(config))`: `training_curves` that grow, in a
    notebook. Outside one, the whole figure at the end."""
    rows: dict[str, list[dict]] = defaultdict(list)
    handle = DisplayHandle()
    due = 0.0
    drawn = False

    def watch(name: str, row: dict[str, float | int]) -> None:
        nonlocal due, drawn
        # a training that was stopped and goes on brings its rows again
        rows[name] = [r for r in rows[name] if r["step"] < row["step"]] + [row]
        done = all(seen[-1]["step"] == config.steps for seen in rows.values())
        if not done and (time.monotonic() < due or not images.in_kernel()):
            return
        figure = training_curves({n: pd.DataFrame(seen) for n, seen in rows.items()}, title=title)
        figure.update_xaxes(range=[0, config.steps * config.batch])
        due = time.monotonic() + EVERY
        if not images.in_kernel():
            figure.show()
            return
        bundle = {images.PLOTLY_MIME: images.figure_json(figure)}
        if done:  # with its PNG
            bundle = images.FigureRenderer().to_mimebundle(figure.to_dict())
        show = handle.update if drawn else handle.display
        # JupyterLab's plotly does not draw again: something else has to take its place first
        show({"text/plain": ""}, raw=True)
        handle.update(bundle, raw=True)
        drawn = True

    return watch


def feature_page(
    model: TransformerBridge,
    sae: SparseAutoencoder,
    fa: FeatureActivations,
    feature: Index,
    *,
    categories: Labels | None = None,
    n: int = 4,
) -> list[Part]:
    """A feature for `save_report`: its texts and kinds (`explore_feature`), how strongly it fires,
    and what it does to the next token (of SAEs that write into the residual stream)."""
    fired = fa.matrix[:, [int(feature)]].data
    counts, edges = np.histogram(fired, bins=30)
    figure = bars(
        {"tokens": counts},
        (edges[:-1] + edges[1:]) / 2,
        title=f"How strongly feature {feature} fires, where it does",
        x_title="activation",
        y_title="tokens",
    )
    view = explore_feature(fa, feature, categories=categories, n=n, spread=n // 2)
    parts = [view, figure.update_layout(height=240)]
    if RESIDUAL.search(fa.hook):
        effects = vocabulary_effects(model, sae, [feature], n=5).drop(columns="feature")
        parts += ["The next token, by the direct path:", effects.round(2)]
    return parts


def save_report(
    name: str | os.PathLike, title: str, sections: Mapping[str, Sequence[Part]]
) -> Path:
    """Write a report: sections by title, each on a page of its own, of texts, tables, figures and
    views. Returns the PDF's path, or the page's (`.html`, beside it) where no browser prints.

    `name` as of `save_page`, which also says what is raised.
    """
    body = [f"<h1>{html.escape(title)}</h1>"]
    for heading, parts in sections.items():
        inside = "".join(_element(part, f"figure-{len(body)}-{i}") for i, part in enumerate(parts))
        body.append(f"<section><h2>{html.escape(heading)}</h2>{inside}</section>")
    head = f'<script src="plotly.min.js"></script><style>{STYLE}</style>'
    page = images.save_page(name, title, "".join(body), head)
    images.write_plotly_js(page.parent)
    return images.print_pdf(page) or page


def _element(part: Part, identifier: str) -> str:
    """A part as HTML; what it holds is escaped."""
    if isinstance(part, View):
        return str(part)
    if isinstance(part, pd.DataFrame):
        return part.to_html(border=0, na_rep="", float_format="{:.4g}".format)
    if isinstance(part, go.Figure):
        shrink = f"--zoom:{min(1, PRINTED / (part.layout.width or PRINTED)):.3f}"
        element = images.figure_element(images.figure_json(part), identifier)
        return f'<div class="figure" style="{shrink}">{element}</div>'
    return f"<p>{html.escape(part)}</p>"
