"""The index of a run: `outputs/index.html` and a page per executed notebook, all offline.

1. Every executed notebook in `outputs/notebooks/` becomes a page beside it: text, code, output,
   live figures.
2. Figures and tables on it get an anchor; what they are called is the figure's title, or the
   sentence above the cell.
3. Files that notebooks saved in `outputs/results/`, `dashboards/` and `reports/` are listed too.
4. `index.html` links all of them. The pages share one `plotly.min.js` in `outputs/`; nothing else
   is loaded.

What a notebook printed is escaped; its HTML tables, which our own code and pandas wrote, are kept.
"""

from __future__ import annotations

import html
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import mistune

from lenslab.files import atomic_write
from lenslab.show.images import PLOTLY_MIME, figure_element, plain, write_plotly_js

FOLDERS = ("results", "dashboards", "reports")


ANSI = re.compile(r"\x1b\[[0-9;]*m")


STYLE = """
body { font: 16px/1.55 Helvetica, Arial, sans-serif; max-width: 860px; margin: 2em auto; padding: 0 1em }
h1, h2, h3 { line-height: 1.25 } a { color: #2f6690 } code { font-size: 90% }
pre { background: #f6f8fa; padding: .7em 1em; overflow-x: auto; font-size: 13px; line-height: 1.45 }
pre.out { background: none; border-left: 3px solid #d0d7de } pre.error { border-left: 3px solid #c8502d }
table { border-collapse: collapse; font-size: 14px } th, td { padding: .25em .7em; border-bottom: 1px solid #d0d7de }
td, th { text-align: right } td:first-child, th:first-child { text-align: left }
.scroll { overflow-x: auto } .failed { color: #b3261e } .muted { color: #656d76; font-size: 14px }
"""


@dataclass(frozen=True)
class Entry:
    """Something to look at: what it is called, where it is (relative to `outputs/`), 'figure',
    'table' or 'file'."""

    title: str
    href: str
    kind: str


def page(title: str, body: str, script: str = "") -> str:
    """A whole HTML document; `title` is escaped here, `body` is HTML already."""
    load = f'<script src="{html.escape(script)}"></script>' if script else ""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">\n'
        f"<style>{STYLE}</style>{load}</head>\n<body>\n{body}\n</body></html>\n"
    )


def render_output(
    output: dict[str, Any], identifier: str, sentence: str
) -> tuple[str, Entry | None]:
    """One output of a code cell as HTML, and its entry for the index if it is a figure or a
    table."""
    kind = output.get("output_type")
    if kind == "stream":
        text = html.escape(ANSI.sub("", joined(output.get("text", ""))))
        return ("" if output.get("name") == "stderr" else f'<pre class="out">{text}</pre>'), None
    if kind == "error":
        text = (
            "\n".join(output.get("traceback", []))
            or f"{output.get('ename')}: {output.get('evalue')}"
        )
        return f'<pre class="out error">{html.escape(ANSI.sub("", text))}</pre>', None
    data = output.get("data", {})
    if PLOTLY_MIME in data:
        figure = data[PLOTLY_MIME]
        title = figure.get("layout", {}).get("title") or {}
        title = title if isinstance(title, str) else title.get("text") or ""
        return figure_element(figure, identifier), Entry(
            plain(title) or sentence, f"#{identifier}", "figure"
        )
    if "image/png" in data:
        picture = joined(data["image/png"]).replace("\n", "")
        element = f'<img id="{identifier}" alt="{html.escape(sentence)}" src="data:image/png;base64,{html.escape(picture)}">'
        return element, Entry(sentence, f"#{identifier}", "figure")
    if "text/html" in data:
        content = joined(data["text/html"])
        table = "<table" in content
        return f'<div class="scroll" id="{identifier}">{content}</div>', (
            Entry(sentence, f"#{identifier}", "table") if table else None
        )
    text = joined(data.get("text/plain", ""))
    return (f'<pre class="out">{html.escape(text)}</pre>' if text else ""), None


def joined(text: str | list[str]) -> str:
    """Notebook files keep text as one string or as a list of lines."""
    return text if isinstance(text, str) else "".join(text)


def first_sentence(markdown: str) -> str:
    """The last paragraph's first sentence, without markup: what the cell below it is for."""
    paragraphs = [
        part
        for part in re.split(r"\n\s*\n", markdown.strip())
        if part and not part.startswith(("|", "<"))
    ]
    lines = [line for line in (paragraphs or [""])[-1].splitlines() if not line.startswith("#")]
    text = re.sub(r"[*_`]|\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(lines)).strip()
    return re.split(r"(?<=[.?!:]) ", text)[0].rstrip(":.") or "untitled"


def render_notebook(notebook: dict[str, Any], name: str) -> tuple[str, str, list[Entry]]:
    """An executed notebook as (title, HTML document, entries). Anchors are `output-CELL-NUMBER`."""
    markdown = mistune.create_markdown(
        escape=False, plugins=["table", "strikethrough"]
    )  # <details> of our own text
    body, entries, sentence, title = (
        [f'<p class="muted"><a href="../index.html">index</a> / {name}</p>'],
        [],
        "",
        "",
    )
    for number, cell in enumerate(notebook["cells"]):
        source = joined(cell["source"])
        if cell["cell_type"] != "code":
            sentence = first_sentence(source)
            heading = re.search(r"^# (.+)$", source, re.MULTILINE)
            title = title or (heading.group(1).strip() if heading else "")
            body.append(str(markdown(source)))
            continue
        body.append(f"<pre><code>{html.escape(source)}</code></pre>")
        for place, output in enumerate(cell.get("outputs", [])):
            element, entry = render_output(output, f"output-{number}-{place}", sentence)
            body.append(element)
            if entry:
                entries.append(
                    Entry(entry.title, f"notebooks/{quote(name)}.html{entry.href}", entry.kind)
                )
    title = title or name
    return title, page(title, "\n".join(body), script="../plotly.min.js"), entries


def saved_files(outputs: Path) -> list[Entry]:
    """Everything below the folders of results, in order; plotly's library is no result."""
    files = [f for folder in FOLDERS for f in sorted((outputs / folder).rglob("*")) if f.is_file()]
    shown = [f for f in files if f.name != "plotly.min.js" and not f.name.startswith(".")]
    return [
        Entry(str(f.relative_to(outputs)), quote(f.relative_to(outputs).as_posix()), "file")
        for f in shown
    ]


def links(entries: list[Entry]) -> str:
    """A list of links, escaped."""
    items = [
        f'<li><a href="{html.escape(e.href)}">{html.escape(e.title)}</a></li>' for e in entries
    ]
    return f"<ul>{''.join(items)}</ul>" if items else '<p class="muted">none</p>'


def write_index(outputs: Path) -> Path:
    """Write `index.html` and the notebooks' pages below `outputs`; returns the index's path.

    Reads `outputs/run.json` (how each notebook of the last run ended) where it exists.
    """
    record = outputs / "run.json"
    runs = (
        {run["name"]: run for run in json.loads(record.read_text(encoding="utf-8"))}
        if record.exists()
        else {}
    )
    write_plotly_js(outputs)
    body = ["<h1>lenslab: what was run</h1>"]
    for file in sorted(
        (outputs / "notebooks").glob("*.ipynb"),
        key=lambda f: [int(n) for n in re.findall(r"\d+", f.stem)],
    ):
        notebook = json.loads(file.read_text(encoding="utf-8"))
        title, document, entries = render_notebook(notebook, file.stem)
        with atomic_write(file.with_suffix(".html")) as temporary:
            temporary.write_text(document, encoding="utf-8")
        figures, tables = ([e for e in entries if e.kind == kind] for kind in ("figure", "table"))
        name = quote(file.stem)
        body.append(
            f'<h2><a href="notebooks/{name}.html">{html.escape(title)}</a></h2>\n{_ending(runs.get(file.stem))}'
            f'<p class="muted"><a href="notebooks/{name}.ipynb">as a notebook</a></p>'
            f"<h3>Figures</h3>{links(figures)}\n<h3>Tables</h3>{links(tables)}"
        )
    body.append(f"<h2>Files</h2>{links(saved_files(outputs))}")
    index = outputs / "index.html"
    with atomic_write(index) as temporary:
        temporary.write_text(page("lenslab: what was run", "\n".join(body)), encoding="utf-8")
    return index


def _ending(run: dict[str, Any] | None) -> str:
    """How a notebook's run ended, in a line."""
    if run is None:
        return '<p class="muted">not finished in the last run</p>'
    memory = f", {run['peak_mb'] / 1000:.1f} GB" if run.get("peak_mb") else ""
    line = f"{run['done']} of {run['cells']} cells in {run['seconds']:.0f} s{memory}"
    failed = (
        f'<p class="failed">code cell {run["cell"]}: {html.escape(run["error"])}</p>'
        if run.get("error")
        else ""
    )
    return f'<p class="muted">{line}</p>{failed}'
