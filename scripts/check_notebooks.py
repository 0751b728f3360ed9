"""Do the notebooks keep to the policy, and does comparing their printed text mean anything?

- `policy`: what can be read off the files (also a test): built from their source, executed, short,
  small, printing.
- `stability`: executed with 1 and 2 threads and on other instruction sets, every compared cell
  prints the same.
- `sensitivity`: executed on the random-weight twin, at least 40 % of the compared cells print
  something else; else the comparison would pass whatever the model does.

The last two execute everything several times (`make check-notebooks`, minutes) and write what they
measured to `benchmarks/results/notebooks.json`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import nbformat
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
MAY_DEFINE = ("phase_4",)  # builds an SAE before the reader's eyes
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:work|root|home|Users|tmp|var|opt|usr)/[\w.]")
TOO_PRECISE = re.compile(r"(?<![\w.])-?\d+\.\d{5,}")
NETWORK = re.compile(r"""(?i)(?:src|href)\s*=\s*["']?(?:https?:)?//[^"'>]+\.(?:js|css)""")
DEFINITION = re.compile(r"^\s*(?:async )?(?:def|class) ", re.MULTILINE)
PACKAGES = ("torch", "transformer-lens", "sae-lens", "nbval")
CLAIM = (
    "Printed results of the notebooks are the same with 1 and 2 threads and on other instruction "
    f"sets, and at least {SENSITIVE_SHARE:.0%} of them change on the random-weight twin"
)

# One line per condition: threads, then instruction sets. Torch's own kernels, oneDNN and MKL each
# choose theirs.
CONDITIONS = {
    "1 thread": {"OMP_NUM_THREADS": "1"},
    "2 threads": {"OMP_NUM_THREADS": "2"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"},
    "default": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_CBWR": "COMPATIBLE",
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
    faults += _cell_faults(notebook)
    return faults, facts


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
    """How many of the compared cells print something else on the random-weight twin.

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
    }


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
