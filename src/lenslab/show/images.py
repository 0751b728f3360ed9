"""How figures leave a notebook: compact plotly data for readers with JavaScript, a PNG beside it
for GitHub.

1. `set_up_figures` makes our renderer plotly's default: `fig.show()` and a figure on a cell's last
   line use it.
2. The renderer stores float arrays as float32 (a picture has no use for more), half of what plotly
   stores.
3. With `LENSLAB_PNG=1` (set by `make notebooks`) it adds `image/png`, drawn by kaleido in Chromium.
   Without Chromium it says so once and goes on: a missing picture never fails a notebook.
4. `save_figure` and `save_table` write into `outputs/results/`; every saved figure shares one local
   `plotly.min.js`, so that pages open offline and stay small.
"""

from __future__ import annotations

import base64
import html
import json
import os
import re
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
from plotly.io.base_renderers import MimetypeRenderer
from plotly.offline import get_plotlyjs

from lenslab.files import atomic_write, outputs_path

PLOTLY_MIME = "application/vnd.plotly.v1+json"


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


MAC_BROWSER = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")


DIGITS = 6  # significant digits of floats in a figure's lists: float32 holds as many


_png_failed = False  # one message and no further attempts: each attempt costs seconds


def find_browser() -> str | None:
    """Path of a Chromium or Chrome: `$BROWSER_PATH`, else the usual names on PATH, else None."""
    named = os.environ.get("BROWSER_PATH")
    if named:
        return shutil.which(named)
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    return found or (str(MAC_BROWSER) if MAC_BROWSER.exists() else None)


def compact(value: Any) -> Any:
    """A figure's JSON with float64 arrays as float32 and floats in lists cut to six significant
    digits.

    Keeps structure, integers, text and NaN; a value beyond float32's range stays in double
    precision.
    """
    if isinstance(value, dict):
        if value.get("dtype") == "f8" and "bdata" in value:
            wide = np.frombuffer(base64.b64decode(value["bdata"]), dtype="<f8")
            with np.errstate(over="ignore"):
                narrow = wide.astype("<f4")
            if np.array_equal(np.isinf(wide), np.isinf(narrow)):
                return {
                    **value,
                    "dtype": "f4",
                    "bdata": base64.b64encode(narrow.tobytes()).decode("ascii"),
                }
            return value
        return {key: compact(item) for key, item in value.items()}
    if isinstance(value, list):
        return [compact(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def figure_json(figure: go.Figure | dict[str, Any]) -> dict[str, Any]:
    """`data` and `layout` of a figure, compact, without plotly's default template spelled out
    twice."""
    raw = json.loads(pio.to_json(figure, validate=False))
    return {"data": compact(raw.get("data", [])), "layout": raw.get("layout", {})}


def render_png(figure: go.Figure | dict[str, Any]) -> bytes | None:
    """The figure as PNG at its own size (plotly's 700 x 500 where it has none), or None without
    Chromium."""
    global _png_failed
    if _png_failed:
        return None
    try:
        import kaleido

        browser = find_browser()
        if browser is None:
            raise FileNotFoundError("no Chromium or Chrome found")
        # One browser for all figures of a kernel. Without `mathjax=False` kaleido's page loads it
        # from a CDN.
        kaleido.start_sync_server(path=browser, mathjax=False, silence_warnings=True)
        with (
            warnings.catch_warnings()
        ):  # plotly passes options that a running server has no use for
            warnings.filterwarnings("ignore", message="The kopts argument")
            return pio.to_image(figure, format="png", scale=1, validate=False)
    except (
        Exception
    ) as problem:  # whatever kaleido or the browser raise: a notebook must not fail over a picture
        _png_failed = True
        print(f"No PNG beside the figures ({type(problem).__name__}: {problem}).", file=sys.stderr)
        return None


class FigureRenderer(MimetypeRenderer):
    """Plotly's own data, compact, and a PNG when `LENSLAB_PNG=1`; nothing outside a notebook or
    VSCode."""

    def to_mimebundle(self, fig_dict: dict[str, Any]) -> dict[str, Any]:
        if not _in_kernel():  # a plain `python phase_1_loading.py` would print the JSON
            return {}
        bundle: dict[str, Any] = {
            PLOTLY_MIME: {**figure_json(fig_dict), "config": {"displaylogo": False}}
        }
        png = render_png(fig_dict) if os.environ.get("LENSLAB_PNG") == "1" else None
        if png is not None:
            bundle["image/png"] = base64.b64encode(png).decode("ascii")
        return bundle


def _in_kernel() -> bool:
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    return getattr(get_ipython(), "kernel", None) is not None


def set_up_figures() -> None:
    """Make our renderer plotly's default; a renderer the user chose by `PLOTLY_RENDERER` stays."""
    pio.renderers["lenslab"] = FigureRenderer()
    if not os.environ.get("PLOTLY_RENDERER"):
        pio.renderers.default = "lenslab"


def figure_element(figure: dict[str, Any], identifier: str) -> str:
    """HTML of one figure (`data`, `layout`) for a page that has loaded `plotly.min.js` already."""
    # `<` as \\u003c: no text inside a figure can close the script element
    data, layout = (
        json.dumps(figure.get(part, {})).replace("<", "\\u003c") for part in ("data", "layout")
    )
    height = figure.get("layout", {}).get("height", 450)
    return (
        f'<div id="{html.escape(identifier)}" class="figure" style="min-height:{int(height)}px"></div>\n'
        f"<script>Plotly.newPlot({json.dumps(identifier)},{data},{layout},{{displaylogo:false,responsive:true}});</script>"
    )


def write_plotly_js(folder: Path) -> Path:
    """Put plotly's library into a folder (4.8 MB), unless the same version is there; returns its
    path."""
    target, source = folder / "plotly.min.js", get_plotlyjs()
    if not target.exists() or target.stat().st_size != len(source.encode("utf-8")):
        with atomic_write(target) as temporary:
            temporary.write_text(source, encoding="utf-8")
    return target


def result_file(name: str, suffix: str) -> Path:
    """`outputs/results/NAME.suffix`; raises ValueError for a name that is no plain file name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ValueError(
            f"{name!r} cannot name a result: use letters, digits, '_', '-' and '.' only."
        )
    return outputs_path("results", f"{name}{suffix}")


def save_figure(figure: go.Figure, name: str) -> Path:
    """Write `outputs/results/NAME.html` (interactive, offline) and NAME.png where PNGs are switched
    on.

    Returns the path of the page. Raises ValueError for a name that is no plain file name.
    """
    page = result_file(name, ".html")
    write_plotly_js(page.parent)
    content = figure_json(figure)
    title = (content["layout"].get("title") or {}).get("text") or name.replace("_", " ")
    text = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(plain(title))}</title>'
        f'<link rel="icon" href="data:,"><script src="plotly.min.js"></script></head>\n<body>\n'
        f"{figure_element(content, 'figure')}\n</body></html>\n"
    )
    with atomic_write(page) as temporary:
        temporary.write_text(text, encoding="utf-8")
    png = render_png(figure) if os.environ.get("LENSLAB_PNG") == "1" else None
    if png is not None:
        with atomic_write(page.with_suffix(".png")) as temporary:
            temporary.write_bytes(png)
    return page


def save_table(frame: pd.DataFrame, name: str) -> Path:
    """Write `outputs/results/NAME.csv` (for people) and NAME.json (records, full precision);
    returns the CSV."""
    file = result_file(name, ".csv")
    with atomic_write(file) as temporary:
        frame.to_csv(temporary)
    with atomic_write(result_file(name, ".json")) as temporary:
        frame.reset_index().to_json(
            temporary, orient="records", indent=1, double_precision=15, force_ascii=False
        )
    return file


def plain(title: str) -> str:
    """A figure's title without plotly's markup (`<b>`, `<br>`), for links and page titles."""
    return " ".join(re.sub(r"<[^>]*>", " ", title).split())
