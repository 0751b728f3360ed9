"""Build the notebooks from their sources and execute them: `make notebooks`.

1. Each `notebooks/interactive/NAME.py` becomes `notebooks/NAME.ipynb` (jupytext), cells as they
   stand.
2. It is executed on the bundled model, offline, with two threads, and PNGs beside the figures
   (needs Chromium).
3. What went to stderr is shown here and left out of the file: warnings name paths of the machine.
4. Seconds and memory of each go to `benchmarks/results/notebook_runs.json`, for the README's table.

A notebook that fails is not written: the last good one stays.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from notebook_execution import (
    REFERENCE,
    code_cells,
    execute,
    find_notebooks,
    progress,
    read_source,
    without_widgets,
    write_notebook,
)

from lenslab.files import REPOSITORY, write_json
from lenslab.show.images import PLOTLY_MIME, find_browser

LIMIT_MB = 1.5


def take_stderr(notebook) -> str:
    """Remove stderr and progress bars from a notebook's outputs; returns what stderr was."""
    taken = []
    for cell in code_cells(notebook):
        kept = []
        for output in without_widgets(cell.outputs):
            stderr = output.output_type == "stream" and output.name == "stderr"
            (taken if stderr else kept).append(output)
        cell.outputs = kept
    return "".join(output.text for output in taken)


def figures_without_png(notebook) -> int:
    """Number of plotly figures that GitHub would not show."""
    data = [output.get("data", {}) for cell in code_cells(notebook) for output in cell.outputs]
    return sum(PLOTLY_MIME in item and "image/png" not in item for item in data)


def build(source: Path, folder: Path, outputs: Path) -> dict | None:
    """Build and execute one notebook into `folder`; its run as a dictionary, or None where it
    failed."""
    notebook = read_source(source)
    environment = {**REFERENCE, "LENSLAB_PNG": "1", "LENSLAB_OUTPUTS": str(outputs)}
    run = execute(notebook, source.stem, folder, environment, on_cell=progress(source.stem))
    stderr = take_stderr(notebook)
    if stderr.strip():
        print(
            f"{source.stem} wrote to stderr (left out of the notebook):\n{stderr.strip()}",
            file=sys.stderr,
        )
    if not run.passed:
        print(
            f"{source.stem} not written: code cell {run.cell} failed: {run.error}", file=sys.stderr
        )
        return None
    target = folder / f"{source.stem}.ipynb"
    write_notebook(notebook, target)
    size = target.stat().st_size / 1e6
    print(
        f"{source.stem}: {run.seconds} s, {size:.2f} MB, {figures_without_png(notebook)} figures "
        "without a PNG"
    )
    if size > LIMIT_MB:
        print(
            f"{source.stem} is larger than {LIMIT_MB} MB: make its figures smaller", file=sys.stderr
        )
    return run.to_dict()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="notebooks to build (default: all)")
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "notebooks")
    parser.add_argument("--record", type=Path, help="where seconds and memory are written")
    options = parser.parse_args()
    if find_browser() is None:
        print(
            "No Chromium found: the figures get no PNG, and GitHub will not show them.",
            file=sys.stderr,
        )
    with (
        tempfile.TemporaryDirectory() as outputs
    ):  # what a build saves is not what a user's run saved
        sources = find_notebooks(options.folder, " ".join(options.names))
        runs = [build(source, options.folder, Path(outputs)) for source in sources]
    if options.record and all(runs) and not options.names:
        from lenslab.runtime import machine_summary

        rows = [{key: run[key] for key in ("name", "cells", "seconds", "peak_mb")} for run in runs]
        claim = "Seconds and peak memory of each notebook on the bundled model, PNGs included"
        write_json(
            options.record, {"claim": claim, "notebooks": rows, "machine": machine_summary()}
        )
    return 0 if all(runs) else 1


if __name__ == "__main__":
    sys.exit(main())
