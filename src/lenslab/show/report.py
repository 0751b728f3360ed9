"""A training, shown: its curves while it runs, and a report of it, as a page and as PDF.

1. `live_curves` is what `train(..., watch=...)` calls with new rows: one figure, drawn again every
   few seconds; the last one stays.
2. `feature_page` is what is known of one feature.
3. `save_report` writes sections of text, tables, figures and views as one HTML page, and has the
   browser that draws the figures' PNGs print it. Without a browser the page is the report.
"""

from __future__ import annotations

import base64
import html
import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from IPython.display import clear_output
from plotly.subplots import make_subplots
from transformer_lens.model_bridge import TransformerBridge

from lenslab.features.activations import FeatureActivations, Index
from lenslab.features.readings import vocabulary_effects
from lenslab.sae.inputs import RESIDUAL, SparseAutoencoder
from lenslab.sae.train import TrainingConfig
from lenslab.show import images
from lenslab.show.explore import explore_feature
from lenslab.show.plots import LOGARITHMIC, Labels, bars, colours, label, styled
from lenslab.show.tokens import View

EVERY = 2.0  # seconds between two pictures of a training
CURVES = {"fvu": "FVU (lower is better)", "l0": "L0: active per token", "dead": "dead latents"}
Row = dict[str, float | int]
Part = str | pd.DataFrame | go.Figure | View

PRINTED = 700  # pixels across a printed page
STYLE = """
table{border-collapse:collapse;font-size:12px;margin:.4em 0}
td,th{text-align:left;padding:.1em 1em .1em 0;border-bottom:1px solid #ddd}
td,h1,h2,p{overflow-wrap:anywhere;unicode-bidi:plaintext}
th{overflow-wrap:break-word;max-width:16em}
img{max-width:100%}
tr,.r,.figure{break-inside:avoid}
.lh,h2,p{break-after:avoid}
@page{size:A4;margin:10mm 12mm}
@media print{
body{margin:0;max-width:none;font-size:13px;print-color-adjust:exact}
section:not(:last-child){break-after:page}
.modebar-container{display:none}
}
"""


def training_curves(histories: Mapping[str, pd.DataFrame], title: str = "Training") -> go.Figure:
    """FVU, L0 and dead latents of trainings, by name: each from `TrainingResult.history`."""
    figure = make_subplots(1, 3, horizontal_spacing=0.09)
    for name, colour in colours(histories).items():
        x = histories[name]["vectors"].tolist()
        for column, key in enumerate(CURVES, 1):
            y = histories[name][key].tolist()
            line = go.Scatter(x=x, y=y, name=label(name, 40), line_color=colour)
            figure.add_trace(line.update(showlegend=column == 1), 1, column)
            figure.update_yaxes(title_text=CURVES[key], title_standoff=4, row=1, col=column)
    titles = {"title": title, "x_title": "vectors", "y_title": CURVES["fvu"]}
    figure = styled(figure, height=320, legend=True, **titles)
    return figure.update_yaxes(rangemode="tozero").update_yaxes(LOGARITHMIC, row=1, col=1)


def live_curves(config: TrainingConfig, title: str = "Training") -> Callable[[str, Row], None]:
    """For `train(..., config, watch=live_curves(config))`: `training_curves` that grow, in a
    notebook, in place of what its cell showed before. Outside one, the whole figure at the end."""
    rows: dict[str, list[Row]] = defaultdict(list)
    due = 0.0
    # a notebook that is built keeps the last picture alone, and PNGs of the others cost time
    live = images.in_kernel() and os.environ.get("LENSLAB_PNG") != "1"

    def watch(name: str, row: Row) -> None:
        nonlocal due
        # a training that was stopped and goes on brings its rows again
        rows[name] = [r for r in rows[name] if r["step"] < row["step"]] + [row]
        done = all(seen[-1]["step"] == config.steps for seen in rows.values())
        if not done and (time.monotonic() < due or not live):
            return
        figure = training_curves({n: pd.DataFrame(seen) for n, seen in rows.items()}, title=title)
        figure.update_xaxes(range=[0, config.steps * config.batch])
        if live:
            clear_output(wait=True)
        figure.show()
        due = time.monotonic() + EVERY

    return watch


def feature_page(
    model: TransformerBridge,
    sae: SparseAutoencoder,
    fa: FeatureActivations,
    feature: Index,
    *,
    categories: Labels | None = None,
) -> list[Part]:
    """A feature for `save_report`: its texts and kinds (`explore_feature`), how strongly it fires,
    and what it does to the next token (of SAEs that write into the residual stream)."""
    counts, edges = np.histogram(fa.matrix[:, [int(feature)]].data, bins=30)
    titles = {"title": f"How strong feature {feature} is", "x_title": "activation"}
    figure = bars({"tokens": counts}, (edges[:-1] + edges[1:]) / 2, y_title="tokens", **titles)
    view = explore_feature(fa, feature, categories=categories, n=3, spread=1)
    parts = [view, figure.update_layout(height=200)]
    if RESIDUAL.search(fa.hook):
        table = vocabulary_effects(model, sae, [feature], n=5)
        table["token"] = table["token"].map(repr) + table["times_control"].map(" {:.2f}".format)
        said = table.groupby("effect")["token"].agg(", ".join).items()
        parts += [f"{effect}, times a random direction's most: {few}" for effect, few in said]
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
        data = images.figure_json(part)
        data["layout"]["width"] = min(data["layout"].get("width", PRINTED), PRINTED)
        png = images.render_png(data) if "scene" in data["layout"] else None
        if png:  # what WebGL draws is not printed
            return f'<img src="data:image/png;base64,{base64.b64encode(png).decode("ascii")}">'
        return f'<div class="figure">{images.figure_element(data, identifier)}</div>'
    return f"<p>{html.escape(part)}</p>"
