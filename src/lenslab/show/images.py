"""How figures leave a notebook: compact plotly data for readers with JavaScript, a PNG beside it
for GitHub.

1. `set_up_figures` makes our renderer plotly's default: `fig.show()` and a figure on a cell's last
   line use it.
2. The renderer stores float arrays as float32 (a picture has no use for more), half of what plotly
   stores.
3. With `LENSLAB_PNG=1` (set by `make notebooks`) it adds `image/png`, drawn by kaleido in Chromium.
   Without Chromium, and with one that dies or hangs, it says so once and goes on: a missing picture
   never fails a notebook.
4. `save_figure` writes a page into `outputs/results/`; all of them share one local `plotly.min.js`,
   so that they open offline and stay small. In a plain script that is what `fig.show()` does.
"""

from __future__ import annotations

import asyncio
import atexit
import base64
import html
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from subprocess import DEVNULL
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
from plotly.io.base_renderers import MimetypeRenderer
from plotly.offline import get_plotlyjs

from lenslab.files import atomic_write, outputs_path

PLOTLY_MIME = "application/vnd.plotly.v1+json"
PAGE_STYLE = "body{font:16px/1.55 Helvetica,Arial,sans-serif;max-width:1000px;margin:2em auto}"

SECONDS = 40  # for a browser to start, and for each figure; usual are 2

# no sandbox: with it a browser does not start as root or in a container; all it opens is our page
PRINT = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
PRINT += ["--no-pdf-header-footer", "--virtual-time-budget=20000"]

# one for all figures of a kernel; False after a failure, since each further attempt costs seconds
_browser: Browser | Literal[False] | None = None


def find_browser() -> str | None:
    """Path of a Chromium or Chrome: `$BROWSER_PATH`, else what kaleido would start, else None."""
    from choreographer.browsers.chromium import Chromium

    named = os.environ.get("BROWSER_PATH")
    return shutil.which(named) if named else Chromium.find_browser(skip_local=False)


def compact(value: Any) -> Any:
    """A figure's JSON with float64 arrays as float32 and floats in lists cut to six significant
    digits, of which float32 holds as many.

    Keeps structure, integers, text and NaN; a value beyond float32's range stays in double
    precision.
    """
    if isinstance(value, list):
        return [compact(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if not isinstance(value, dict):
        return value
    if value.get("dtype") != "f8":
        return {key: compact(item) for key, item in value.items()}
    wide = np.frombuffer(base64.b64decode(value["bdata"]), dtype="<f8")
    with np.errstate(over="ignore"):
        narrow = wide.astype("<f4")
    if not np.array_equal(np.isinf(wide), np.isinf(narrow)):
        return value
    return value | {"dtype": "f4", "bdata": base64.b64encode(narrow.tobytes()).decode("ascii")}


def figure_json(figure: go.Figure | dict[str, Any]) -> dict[str, Any]:
    """`data` and `layout` of a figure, compact."""
    raw = json.loads(pio.to_json(figure, validate=False))
    return {"data": compact(raw.get("data", [])), "layout": raw.get("layout", {})}


class Browser:
    """kaleido's browser in a thread of its own, so that it can be waited for no longer than
    `SECONDS`: kaleido's own server waits for ever for one that died or hangs."""

    def __init__(self, path: str) -> None:
        import kaleido

        self.loop = asyncio.new_event_loop()
        Thread(target=self.loop.run_forever, daemon=True).start()
        # without `mathjax=False` kaleido's page loads it from a CDN
        self.kaleido = kaleido.Kaleido(path=path, mathjax=False)
        atexit.register(self.close)

    def run(self, work: Coroutine, seconds: int) -> Any:
        """What the work gives. TimeoutError where it takes too long."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(seconds)

    def close(self) -> None:
        """End the browser and all that it started, whatever state they are in."""
        with suppress(Exception):
            self.run(self.kaleido.close(), 2)
        with suppress(AttributeError, ProcessLookupError):  # not started, or gone
            process = self.kaleido.subprocess
            os.killpg(process.pid, signal.SIGKILL) if os.name == "posix" else process.kill()


def print_pdf(page: Path) -> Path | None:
    """A page printed beside itself as PDF by Chromium; None, and said, without one or with one that
    does not answer."""
    target = page.with_suffix(".pdf")
    target.unlink(missing_ok=True)  # one of an earlier page would pass for this one's
    browser = find_browser() or "Chromium or Chrome"  # which the error then says is not there
    try:
        profile = TemporaryDirectory(ignore_cleanup_errors=True)
        with atomic_write(target) as temporary, profile as folder:
            command = [browser, *PRINT, f"--user-data-dir={folder}"]
            command += [f"--print-to-pdf={temporary}", page.absolute().as_uri()]
            subprocess.run(command, timeout=2 * SECONDS, stdout=DEVNULL, stderr=DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as problem:
        print(f"No PDF of {page.name} ({problem.__cause__ or problem}).", file=sys.stderr)
        return None
    return target


def render_png(figure: go.Figure | dict[str, Any]) -> bytes | None:
    """The figure as PNG at its own size (plotly's 700 x 500 where it has none), or None without
    Chromium, or with one that does not answer."""
    global _browser
    if _browser is False:
        return None
    try:
        if _browser is None:
            if (path := find_browser()) is None:
                raise FileNotFoundError("no Chromium or Chrome found")
            _browser = Browser(path)
            _browser.run(_browser.kaleido.open(), SECONDS)
        work = _browser.kaleido.calc_fig(figure, {"format": "png", "scale": 1})
        return _browser.run(work, SECONDS)
    except Exception as problem:  # whatever kaleido or the browser raise
        if _browser:
            _browser.close()
        _browser = False
        reason = problem.args[0] if problem.args else f"no answer from the browser in {SECONDS} s"
        print(f"No PNG beside the figures ({type(problem).__name__}: {reason}).", file=sys.stderr)
        return None


class FigureRenderer(MimetypeRenderer):
    """Plotly's own data, compact, and a PNG when `LENSLAB_PNG=1`. Outside a notebook or VSCode, in
    a plain `python phase_1_loading.py`, the figure becomes a page and its path is printed."""

    def to_mimebundle(self, fig_dict: dict[str, Any]) -> dict[str, Any]:
        if not in_kernel():
            print(save_figure(go.Figure(fig_dict)))
            return {}
        bundle = {PLOTLY_MIME: figure_json(fig_dict) | {"config": {"displaylogo": False}}}
        if os.environ.get("LENSLAB_PNG") == "1" and (png := render_png(fig_dict)):
            bundle["image/png"] = base64.b64encode(png).decode("ascii")
        return bundle


def in_kernel() -> bool:
    """True in a notebook, where what is displayed is seen."""
    from IPython import get_ipython

    return getattr(get_ipython(), "kernel", None) is not None


def set_up_figures() -> None:
    """Make our renderer plotly's default; a renderer the user chose by `PLOTLY_RENDERER` stays."""
    pio.renderers["lenslab"] = FigureRenderer()
    if not os.environ.get("PLOTLY_RENDERER"):
        pio.renderers.default = "lenslab"


def figure_element(figure: dict[str, Any], identifier: str) -> str:
    """HTML of one figure (`data`, `layout`) for a page that has loaded `plotly.min.js` already;
    plotly escapes `<` in it, so that no text inside a figure closes its script."""
    parts = {"full_html": False, "include_plotlyjs": False, "validate": False}
    return pio.to_html(figure, {"displaylogo": False}, div_id=identifier, **parts)


def write_plotly_js(folder: Path) -> Path:
    """Put plotly's library into a folder (4.8 MB), unless the same version is there; returns its
    path."""
    target, source = folder / "plotly.min.js", get_plotlyjs()
    if not target.exists() or target.stat().st_size != len(source.encode("utf-8")):
        with atomic_write(target) as temporary:
            temporary.write_text(source, encoding="utf-8")
    return target


def page(title: str, body: str, head: str = "") -> str:
    """A whole HTML document; `title` is escaped here, `body` and `head` are HTML already."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title>\n"
        f'<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">\n'
        f"<style>{PAGE_STYLE}</style>{head}</head>\n<body>\n{body}\n</body></html>\n"
    )


def save_page(name: str | os.PathLike, title: str, body: str, head: str = "") -> Path:
    """Write a page, titled by its name where there is no title; returns its path.

    `name` is with or without `.html`: a file in `outputs/results/`, or where its folder says.
    Raises ValueError for a name without a file, and NotWritten.
    """
    folder, stem = os.path.split(os.fspath(name).removesuffix(".html"))
    if not stem:
        raise ValueError(f"{name!r} cannot name a page: give a file, such as 'feature_7'.")
    file = (Path(folder).expanduser() if folder else outputs_path("results")) / f"{stem}.html"
    with atomic_write(file) as temporary:
        text = page(title or stem.replace("_", " "), body, head)
        temporary.write_text(text, encoding="utf-8")
    return file


def save_figure(figure: go.Figure, name: str | os.PathLike = "") -> Path:
    """Write a figure as a page (interactive, offline); returns its path. `name` as of `save_page`,
    by default made of the title."""
    title = plain(figure.layout.title.text or "")
    name = name or re.sub(r"\W+", "_", title).strip("_").lower() or "figure"
    element = figure_element(figure_json(figure), "figure")
    file = save_page(name, title, element, '<script src="plotly.min.js"></script>')
    write_plotly_js(file.parent)
    return file


def plain(title: str) -> str:
    """A figure's title without plotly's markup (`<b>`, `<br>`, `&lt;`), for links, page titles and
    file names."""
    return html.unescape(" ".join(re.sub(r"<[^>]*>", " ", title).split()))
