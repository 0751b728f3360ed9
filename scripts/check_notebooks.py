"""Do the notebooks keep to the policy, and does comparing their printed text mean anything?

- `policy`: what can be read off the files (also a test): built from their source, executed, short,
  small, printing, with findings in words and pictures that can be read.
- `stability`: executed with 1 and 2 threads and on other instruction sets, every compared cell
  prints the same.
- `sensitivity`: executed on the random-weight twin, at least 40 % of the compared cells print
  something else, and at least half of the verdicts do; else the comparison would pass whatever the
  model does.

What counts:
1. A *printed verdict* is a printed line that starts with `So: `. A *written* one is a paragraph of
   a markdown cell that starts with `**So:**`.
2. A *section* begins at a heading `## ` and ends before the next. It is numbered where the heading
   begins with a number, `## 3. `. Every numbered section after section 1 that has a code cell needs
   a verdict, printed or written.
3. The last section, and no other, is `## What was found, and what was not`.
4. A figure is plotly's data in an output. Its axes are named: `x` and `y`, and each further axis
   that shows its tick labels, has a title that is not blank. (Figures without axes have none.)
5. A figure has a point: a number in `z` of a heatmap, in `y` of any other trace (Inf, NaN and null
   are none).
6. A cell that draws a figure ends in `.show()`, or `live_curves` draws it, which shows it: a plain
   `python NAME.py` shows it no other way.
7. Of verdicts, *sensitivity* compares the n-th printed by a cell with the n-th printed by the same
   cell on the twin; one that is missing there has changed, but in a cell that fails none has.
   Verdicts that are written say how to read a number and are not counted.

The last two execute everything several times (`make check-notebooks`, minutes) and write what they
measured to `benchmarks/results/notebooks.json`.
"""

from __future__ import annotations

import argparse
import base64
import importlib.metadata
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import nbformat
import numpy as np
from nbformat import NotebookNode
from notebook_execution import (
    REFERENCE,
    code_cells,
    execute,
    find_notebooks,
    printed,
    progress,
    read_source,
    same_source,
)

from lenslab.files import REPOSITORY, write_json
from lenslab.runtime import machine_summary
from lenslab.show.images import PLOTLY_MIME

LIMIT_BYTES = 1_500_000
PRINT_SHARE = 0.6  # of code cells that print something to compare
SHORT_LINES = 12
SHORT_SHARE = 0.9  # of code cells that have no more lines than that
LONGEST_OUTPUT = 40  # lines
SENSITIVE_SHARE = 0.4  # of compared cells that print something else on the twin
SENSITIVE_VERDICTS = 0.5  # of printed verdicts
MAY_DEFINE = ("phase_4",)  # builds an SAE before the reader's eyes
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:work|root|home|Users|tmp|var|opt|usr)/[\w.]")
SO_PRINTED = re.compile(r"^So: .*$", re.MULTILINE)
SO_WRITTEN = re.compile(r"(?:\A|\n\s*\n)\*\*So:\*\*")
HEADING = re.compile(r"^## (.+)$", re.MULTILINE)
LIMITS = "What was found, and what was not"
TOO_PRECISE = re.compile(r"(?<![\w.])-?\d+\.\d{5,}")
NETWORK = re.compile(r"""(?i)(?:src|href)\s*=\s*["']?(?:https?:)?//[^"'>]+\.(?:js|css)""")
DEFINITION = re.compile(r"^\s*(?:async )?(?:def|class) ", re.MULTILINE)
PACKAGES = ("torch", "transformer-lens", "sae-lens", "nbval")
CLAIM = (
    "Printed results of the notebooks are the same with 1 and 2 threads and on other instruction "
    f"sets, and at least {SENSITIVE_SHARE:.0%} of them and {SENSITIVE_VERDICTS:.0%} of the "
    "verdicts change on the random-weight twin"
)

# One line per condition: threads, then instruction sets. Torch's own kernels, oneDNN and MKL each
# choose theirs. Processors without AVX-512 have no fast bf16 either, and to emulate it is slow.
CONDITIONS = {
    "1 thread": {"OMP_NUM_THREADS": "1"},
    "2 threads": {"OMP_NUM_THREADS": "2"},
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_CBWR": "AVX2",
        "LENSLAB_COMPUTE": "float32",
    },
    "default": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_CBWR": "COMPATIBLE",
        "LENSLAB_COMPUTE": "float32",
    },
}


def policy(source: Path, built: Path) -> tuple[list[str], dict]:
    """What breaks the policy, a sentence each, and the numbers it was judged by."""
    if not built.exists():
        return [f"{built.name} does not exist: run `make notebooks`"], {}
    notebook = nbformat.read(built, as_version=4)
    cells = code_cells(notebook)
    outputs = [output for cell in cells for output in cell.outputs]
    short = [len(cell.source.strip().splitlines()) <= SHORT_LINES for cell in cells]
    figures = [output.data for output in outputs if PLOTLY_MIME in output.get("data", {})]
    facts = {
        "bytes": built.stat().st_size,
        "code_cells": len(cells),
        "printing": _share(bool(printed(cell)) for cell in cells),
        "within_12_lines": _share(short),
        "definitions": sum(len(DEFINITION.findall(cell.source)) for cell in cells),
        "figures": len(figures),
        "verdicts": sum(len(verdicts(printed(cell))) for cell in cells),
    }
    faults = []
    if not same_source(notebook, read_source(source)):
        faults.append("differs from its source: run `make notebooks`")
    if facts["bytes"] > LIMIT_BYTES:
        faults.append(f"{facts['bytes'] / 1e6:.2f} MB, more than {LIMIT_BYTES / 1e6}")
    if facts["printing"] < PRINT_SHARE:
        few = f"{facts['printing']:.0%} of the code cells print a result"
        faults.append(f"{few}, fewer than {PRINT_SHARE:.0%}")
    if facts["within_12_lines"] < SHORT_SHARE:
        few = f"{facts['within_12_lines']:.0%} of the code cells are within {SHORT_LINES} lines"
        faults.append(f"{few}, fewer than {SHORT_SHARE:.0%}")
    if facts["definitions"] > 1 and not source.stem.startswith(MAY_DEFINE):
        faults.append(f"{facts['definitions']} definitions: helpers live in the package")
    if any(output.output_type == "error" for output in outputs):
        faults.append("a cell ends in an error")
    if [cell.execution_count for cell in cells] != list(range(1, len(cells) + 1)):
        faults.append("not executed from top to bottom")
    if missing := sum("image/png" not in data for data in figures):
        faults.append(f"{missing} figures have no PNG beside them: `make notebooks` with Chromium")
    faults += _section_faults(notebook)
    faults += _cell_faults(notebook)
    return faults, facts


def verdicts(text: str) -> list[str]:
    """The lines of a cell's printed text that say what was found."""
    return SO_PRINTED.findall(text)


def sections(notebook: NotebookNode) -> Iterator[tuple[str, list[NotebookNode]]]:
    """(heading, cells) of each part of a notebook, its beginning under ''. A heading inside a cell
    splits it."""
    heading, cells = "", []
    for cell in notebook.cells:
        parts = HEADING.split(cell.source) if cell.cell_type == "markdown" else [cell]
        for i, part in enumerate(parts):
            if i % 2:
                yield heading, cells
                heading, cells = part.strip(), []
            else:
                kept = NotebookNode(cell_type="markdown", source=part) if len(parts) > 1 else cell
                cells.append(kept)
    yield heading, cells


def _section_faults(notebook: NotebookNode) -> Iterator[str]:
    """Sections without a verdict, and what is wrong with the one on limits."""
    headings = []
    for heading, cells in sections(notebook):
        headings.append(heading)
        number = re.match(r"\d+", heading)
        code = [cell for cell in cells if cell.cell_type == "code"]
        if not code or number is None or int(number.group()) == 1:
            continue
        written = [c.source for c in cells if c.cell_type == "markdown"]
        if not any(map(SO_WRITTEN.search, written)) and not any(verdicts(printed(c)) for c in code):
            yield f"section {heading!r} says no **So:** in words or in print"
    if headings.count(LIMITS) != 1 or headings[-1] != LIMITS:
        yield f"must end in one section '## {LIMITS}'"


def figure_faults(figure: dict) -> Iterator[str]:
    """What is wrong with a figure (`data`, `layout`) of plotly's."""
    layout = figure.get("layout", {})
    traces = figure.get("data", [])
    flat = [trace for trace in traces if not trace.get("type", "").endswith("3d")]
    axes = {axis + trace.get(f"{axis}axis", axis)[1:] for trace in flat for axis in "xy"}
    for scene in {trace.get("scene", "scene") for trace in traces if trace not in flat}:
        for axis in "xyz":
            title = layout.get(scene, {}).get(f"{axis}axis", {}).get("title") or {}
            if not (title if isinstance(title, str) else title.get("text") or "").strip():
                yield f"a {axis} axis without a name"
    for axis in sorted(axes if any({"y", "z"} & set(trace) for trace in traces) else ()):
        options = layout.get(f"{axis[0]}axis{axis[1:]}", {})
        title = options.get("title") or {}
        text = title if isinstance(title, str) else title.get("text") or ""
        shown = axis in ("x", "y") or options.get("showticklabels", True)
        if shown and not text.strip():
            yield f"a {axis} axis without a name"
    drawn = (t.get("z", t.get("y", t.get("link", {}).get("value"))) for t in traces)
    if not any(map(_points, drawn)):
        yield "nothing in it"


def _points(values: list | dict | None) -> int:
    """How many finite numbers plotly's JSON holds: lists, or bytes in base 64."""
    if isinstance(values, dict):
        values = np.frombuffer(base64.b64decode(values["bdata"]), dtype=values["dtype"])
    flat = np.ravel(np.array([] if values is None else values, dtype=object))
    return sum(isinstance(value, int | float | np.number) and np.isfinite(value) for value in flat)


def _share(of_cells: Iterable[bool]) -> float:
    """Of the code cells, rounded; 0 where there are none."""
    of_cells = list(of_cells)
    return round(sum(of_cells) / max(len(of_cells), 1), 3)


def _cell_faults(notebook: NotebookNode) -> list[str]:
    faults, number, before = [], 0, None
    for cell in notebook.cells:
        if cell.cell_type == "code":
            number += 1
            faults += [f"code cell {number} {fault}" for fault in _faults_of(cell, before)]
        before = cell
    return faults


def _faults_of(cell: NotebookNode, before: NotebookNode | None) -> Iterator[str]:
    """What is wrong with a code cell, given the cell above it."""
    text = printed(cell)
    html = "\n".join(output.get("data", {}).get("text/html", "") for output in cell.outputs)
    if before is None or before.cell_type != "markdown" or not _says_something(before.source):
        yield "has no sentence of purpose above it"
    if found := TOO_PRECISE.search(text):
        yield f"prints {found.group()}: round what is compared"
    if (length := len(text.splitlines())) > LONGEST_OUTPUT:
        yield f"prints {length} lines: a result is short"
    if found := MACHINE_PATH.search("\n".join((cell.source, text, html))):
        yield f"names a path of a machine ({found.group()}...)"
    if NETWORK.search(html.replace("\\", "")):
        yield "loads something from the network"
    figures = [o.data[PLOTLY_MIME] for o in cell.outputs if PLOTLY_MIME in o.get("data", {})]
    yield from (f"draws a figure with {fault}" for f in figures for fault in figure_faults(f))
    shown = cell.source.rstrip().endswith(".show()") or "watch=live_curves(" in cell.source
    if figures and not shown:
        yield "draws a figure that a plain script would not: end it in `.show()`"


def _says_something(markdown: str) -> bool:
    """True for a sentence; a heading alone is none."""
    prose = [line for line in markdown.splitlines() if line.strip() and not line.startswith("#")]
    return any("." in line or line.rstrip(" *_)`").endswith((":", "?", "!")) for line in prose)


def texts_under(
    source: Path, folder: Path, condition: dict[str, str], label: str
) -> tuple[list[str], list[int]]:
    """What each code cell prints when executed under a condition, and the numbers of the cells that
    failed."""
    notebook = read_source(source)
    with tempfile.TemporaryDirectory() as outputs:
        environment = {**REFERENCE, **condition, "LENSLAB_OUTPUTS": outputs, "LENSLAB_PNG": ""}
        show = progress(f"{source.stem}, {label}")
        run = execute(notebook, source.stem, folder, environment, on_cell=show, keep_going=True)
    if run.error:
        raise RuntimeError(f"{source.stem} under {label}: cell {run.cell}: {run.error}")
    return [printed(cell) for cell in code_cells(notebook)], list(run.errors)


def committed_texts(built: Path) -> list[str]:
    return [printed(cell) for cell in code_cells(nbformat.read(built, as_version=4))]


def stability(source: Path, folder: Path) -> dict:
    """Under each condition, the code cells (from 1) that print something else than the committed
    file."""
    committed, result = committed_texts(folder / f"{source.stem}.ipynb"), {}
    for label, condition in CONDITIONS.items():
        texts, errors = texts_under(source, folder, condition, label)
        pairs = dict(enumerate(zip(committed, texts, strict=True), 1))
        differ = [n for n, (one, other) in pairs.items() if one != other]
        result[label] = {"differ": differ, "errors": errors}
        for n in differ:
            one, other = pairs[n]
            print(f"  cell {n} committed:\n{one}\n  under {label}:\n{other}", file=sys.stderr)
    return result


def sensitivity(source: Path, folder: Path) -> dict:
    """How many of the compared cells, and of the printed verdicts, are something else on the
    random-weight twin.

    A cell that fails on the twin is counted apart, not as changed: it would say that something
    broke, not that a number moved.
    """
    committed = committed_texts(folder / f"{source.stem}.ipynb")
    texts, errors = texts_under(source, folder, {"LENSLAB_MODEL_TWIN": "1"}, "random twin")
    compared = [n for n, text in enumerate(committed, 1) if text]
    changed = [n for n in compared if n not in errors and texts[n - 1] != committed[n - 1]]
    return {
        "compared": len(compared),
        "changed": len(changed),
        "share": _share(n in changed for n in compared),
        "unchanged": [n for n in compared if n not in changed and n not in errors],
        "errors": errors,
        "verdicts": changed_verdicts(committed, texts, errors),
    }


def changed_verdicts(committed: list[str], texts: list[str], errors: list[int]) -> dict:
    """How many verdicts the cells' committed texts hold, how many are something else in `texts`,
    and those that are not. In the cells `errors`, from 1, none has changed."""
    same, n_verdicts = [], 0
    for number, (before, after) in enumerate(zip(committed, texts, strict=True), 1):
        others = verdicts(after)
        for i, verdict in enumerate(verdicts(before)):
            n_verdicts += 1
            if number in errors or verdict in others[i : i + 1]:
                same.append(verdict)
    changed = n_verdicts - len(same)
    share = round(changed / max(n_verdicts, 1), 3)
    return {"printed": n_verdicts, "changed": changed, "share": share, "unchanged": same}


def examine(source: Path, folder: Path, checks: list[str]) -> tuple[dict, list[str]]:
    """What the checks measured of one notebook, and what they found wrong, a sentence each."""
    faults, facts = policy(source, folder / f"{source.stem}.ipynb")
    values = {"policy": facts}
    if not facts:  # not built: nothing to compare with
        return values, faults
    bad = faults if "policy" in checks else []
    if "stability" in checks:
        values["stability"] = stability(source, folder)
        for label, found in values["stability"].items():
            if found["differ"]:
                bad.append(f"cells {found['differ']} differ under {label}")
    if "sensitivity" in checks:
        found = values["sensitivity"] = sensitivity(source, folder)
        changed = f"{found['changed']} of {found['compared']} compared cells change"
        print(f"{source.stem}: {changed} on the random twin")
        if found["share"] < SENSITIVE_SHARE:
            bad.append(f"only {found['share']:.0%} of the cells change")
        said = found["verdicts"]
        print(f"{source.stem}: {said['changed']} of {said['printed']} verdicts change")
        if said["share"] < SENSITIVE_VERDICTS:
            bad.append(f"only {said['share']:.0%} of the verdicts change: {said['unchanged']}")
    return values, bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checks", nargs="+", choices=["policy", "stability", "sensitivity"])
    parser.add_argument("--notebooks", default="", help="names (default: all)")
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "notebooks")
    parser.add_argument("--record", type=Path, help="where the measurements are written")
    options = parser.parse_args()
    folder = options.folder.resolve()
    bad, values = [], {}
    for source in find_notebooks(folder, options.notebooks):
        name = source.stem
        values[name], faults = examine(source, folder, options.checks)
        bad += [f"{name}: {fault}" for fault in faults]
    if options.record and not options.notebooks:
        versions = {package: importlib.metadata.version(package) for package in PACKAGES}
        record = {"claim": CLAIM, "values": values, "holds": not bad}
        write_json(options.record, record | {"machine": machine_summary(), "versions": versions})
    fine = f"{' and '.join(options.checks)}: fine for {', '.join(values)}"
    print("\n".join(bad) or fine)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
