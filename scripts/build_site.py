"""The index of a run: `outputs/index.html` and a page per executed notebook, all offline.

1. Every executed notebook in `outputs/notebooks/` becomes a page beside it: text, code, output,
   live figures.
2. Figures and tables on it get an anchor; what they are called is the figure's title, or the
   sentence above the cell.
3. Files that notebooks saved in `outputs/results/`, `dashboards/` and `reports/` are listed too.
4. `index.html` links all of them. The pages share one `plotly.min.js` in `outputs/`; nothing else
   is loaded.

What a notebook printed is escaped; its HTML tables, which our own code and pandas wrote, are kept.
`make run` does this after every notebook; `python scripts/build_site.py` does it again.
"""

from __future__ import annotations

import html
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import mistune

from lenslab.files import atomic_write, outputs_path
from lenslab.show.images import PLOTLY_MIME, figure_element, page, plain, write_plotly_js

FOLDERS = ("results", "dashboards", "reports")
ANSI = re.compile(r"\x1b\[[0-9;]*m")
STYLE = """<style>
body { max-width: 860px } h1, h2, h3 { line-height: 1.25 } a { color: #2f6690 }
code { font-size: 90% } .scroll { overflow-x: auto }
pre { background: #f6f8fa; padding: .7em 1em; overflow-x: auto; font-size: 13px; line-height: 1.45 }
pre.out { background: none; border-left: 3px solid #d0d7de } pre.error { border-color: #c8502d }
table { border-collapse: collapse; font-size: 14px }
th, td { padding: .25em .7em; border-bottom: 1px solid #d0d7de; text-align: right }
td:first-child, th:first-child { text-align: left }
.failed { color: #b3261e } .muted { color: #656d76; font-size: 14px }
</style>"""
PLOTLY = '<script src="../plotly.min.js"></script>'


@dataclass(frozen=True)
class Entry:
    """Something to look at: what it is called, where it is (relative to `outputs/`), 'figure',
    'table' or 'file'."""

    title: str
    href: str
    kind: str


def render_output(
    output: dict[str, Any], identifier: str, sentence: str
) -> tuple[str, Entry | None]:
    """One output of a code cell as HTML, and its entry for the index if it is a figure or a
    table; `sentence` is what it is called where it has no title."""
    kind = output.get("output_type")
    if kind == "stream":
        shown = "" if output.get("name") == "stderr" else joined(output.get("text", ""))
        return printed(shown), None
    if kind == "error":
        raised = f"{output.get('ename')}: {output.get('evalue')}"
        return printed("\n".join(output.get("traceback", [])) or raised, "out error"), None
    data = output.get("data", {})
    if PLOTLY_MIME in data:
        figure = data[PLOTLY_MIME]
        title = figure.get("layout", {}).get("title") or ""
        title = plain(title if isinstance(title, str) else title.get("text") or "")
        entry = Entry(title=title or sentence, href=f"#{identifier}", kind="figure")
        return figure_element(figure, identifier), entry
    if "image/png" in data:
        source = f"data:image/png;base64,{html.escape(joined(data['image/png']))}"
        element = f'<img id="{identifier}" alt="{html.escape(sentence)}" src="{source}">'
        return element, Entry(title=sentence, href=f"#{identifier}", kind="figure")
    if "text/html" in data:
        content = joined(data["text/html"])
        entry = Entry(title=sentence, href=f"#{identifier}", kind="table")
        element = f'<div class="scroll" id="{identifier}">{content}</div>'
        return element, entry if "<table" in content else None
    text = joined(data.get("text/plain", ""))
    if text.startswith("So: "):  # what was found: a paragraph, bold at its beginning
        return f'<p class="so"><b>So:</b> {html.escape(text.removeprefix("So: "))}</p>', None
    return printed(text), None


def printed(text: str, kind: str = "out") -> str:
    """Printed text as HTML, escaped, without terminal colours; nothing for none."""
    return f'<pre class="{kind}">{html.escape(ANSI.sub("", text))}</pre>' if text else ""


def joined(text: str | list[str]) -> str:
    """Notebook files keep text as one string or as a list of lines."""
    return text if isinstance(text, str) else "".join(text)


def first_sentence(markdown: str) -> str:
    """The last paragraph's first sentence, without markup: what the cell below it is for."""
    parts = re.split(r"\n\s*\n", markdown.strip())
    paragraphs = [part for part in parts if part and not part.startswith(("|", "<"))]
    lines = [line for line in (paragraphs or [""])[-1].splitlines() if not line.startswith("#")]
    text = re.sub(r"[*_`]|\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(lines)).strip()
    return re.split(r"(?<=[.?!:]) ", text)[0].rstrip(":.") or "untitled"


def render_notebook(notebook: dict[str, Any], name: str) -> tuple[str, str, list[Entry]]:
    """An executed notebook as (title, HTML document, entries). Anchors are `output-CELL-NUMBER`."""
    # not escaped: our own text folds solutions into <details>
    markdown = mistune.create_markdown(escape=False, plugins=["table", "strikethrough"])
    body = [f'<p class="muted"><a href="../index.html">index</a> / {name}</p>']
    entries = []
    title = ""
    sentence = ""
    for number, cell in enumerate(notebook["cells"]):
        source = joined(cell["source"])
        if cell["cell_type"] != "code":
            sentence = first_sentence(source)
            heading = re.search(r"^# (.+)$", source, re.MULTILINE)
            title = title or (heading.group(1).strip() if heading else "")
            body.append(str(markdown(source)))
            continue
        body.append(f"<pre><code>{html.escape(source)}</code></pre>")
        for i, output in enumerate(cell.get("outputs", [])):
            element, entry = render_output(output, f"output-{number}-{i}", sentence)
            body.append(element)
            if entry:
                href = f"notebooks/{quote(name)}.html{entry.href}"
                entries.append(Entry(title=entry.title, href=href, kind=entry.kind))
    title = title or name
    return title, page(title, "\n".join(body), STYLE + PLOTLY), entries


def saved_files(outputs: Path) -> list[Entry]:
    """Everything below the folders of results, in order; plotly's library is no result."""
    files = [f for folder in FOLDERS for f in sorted((outputs / folder).rglob("*")) if f.is_file()]
    names = [
        f.relative_to(outputs).as_posix()
        for f in files
        if f.name != "plotly.min.js" and not f.name.startswith(".")
    ]
    return [Entry(title=name, href=quote(name), kind="file") for name in names]


def links(entries: list[Entry]) -> str:
    """A list of links, escaped."""
    rows = [f'<li><a href="{html.escape(e.href)}">{html.escape(e.title)}</a>' for e in entries]
    return f"<ul>{''.join(rows)}</ul>" if rows else '<p class="muted">none</p>'


def write_index(outputs: Path) -> Path:
    """Write `index.html` and the notebooks' pages below `outputs`; returns the index's path.

    Reads `outputs/run.json` (how each notebook of the last run ended) where it exists.
    """
    record = outputs / "run.json"
    runs = json.loads(record.read_text(encoding="utf-8")) if record.exists() else []
    endings = {run["name"]: ending(run) for run in runs}
    write_plotly_js(outputs)
    body = ["<h1>lenslab: what was run</h1>"]
    for file in sorted((outputs / "notebooks").glob("*.ipynb"), key=phase):
        notebook = json.loads(file.read_text(encoding="utf-8"))
        title, document, entries = render_notebook(notebook, file.stem)
        write(file.with_suffix(".html"), document)
        figures, tables = ([e for e in entries if e.kind == kind] for kind in ("figure", "table"))
        name = quote(file.stem)
        unfinished = '<p class="muted">not finished in the last run</p>'
        body += [
            f'<h2><a href="notebooks/{name}.html">{html.escape(title)}</a></h2>',
            endings.get(file.stem, unfinished),
            f'<p class="muted"><a href="notebooks/{name}.ipynb">as a notebook</a></p>',
            f"<h3>Figures</h3>{links(figures)}",
            f"<h3>Tables</h3>{links(tables)}",
        ]
    body.append(f"<h2>Files</h2>{links(saved_files(outputs))}")
    write(outputs / "index.html", page("lenslab: what was run", "\n".join(body), STYLE))
    return outputs / "index.html"


def phase(file: Path) -> list[int]:
    """The numbers in a notebook's name, which order the notebooks."""
    return [int(digits) for digits in re.findall(r"\d+", file.stem)]


def write(file: Path, text: str) -> None:
    """Write a page atomically."""
    with atomic_write(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def ending(run: dict[str, Any]) -> str:
    """How a notebook's run ended, in a line, and its error in another."""
    memory = f", {run['peak_mb'] / 1000:.1f} GB" if run.get("peak_mb") else ""
    line = f"{run['done']} of {run['cells']} cells in {run['seconds']:.0f} s{memory}"
    failed = ""
    if run.get("error"):
        failed = f'<p class="failed">code cell {run["cell"]}: {html.escape(run["error"])}</p>'
    return f'<p class="muted">{line}</p>{failed}'


if __name__ == "__main__":
    print(f"Open {write_index(Path(sys.argv[1]) if sys.argv[1:] else outputs_path())}")
