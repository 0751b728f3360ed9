"""Run the notebooks, in order, into `outputs/`: `make run`.

1. With `--full` the long results that ship with the project are computed again
   (`benchmarks/error_rate_and_power.py`); for another model than the bundled one they are kept in
   this machine's cache.
2. Each notebook is executed from its source, on the model named by `--model` (default: the bundled
   one).
3. Its executed copy goes to `outputs/notebooks/`; figures, tables and records it saves, to
   `outputs/results/`.
4. After every notebook `outputs/index.html` is written anew, so an interrupted run keeps what it
   did.
5. A failing notebook does not stop the others; the summary names its cell, and the exit status is
   1.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

from build_site import write_index
from notebook_execution import (
    OFFLINE,
    Execution,
    execute,
    find_notebooks,
    progress,
    read_source,
    write_notebook,
)

from lenslab.files import FETCHED, REPOSITORY, NotAModel, outputs_path, write_json
from lenslab.smollm2 import smollm2_folder

LONG = REPOSITORY / "benchmarks" / "error_rate_and_power.py"


def resolve_model(model: str, caller: str | None = None) -> str:
    """A folder as an absolute path, from the working directory or the caller's (`make -C`), or in
    the cache for what is fetched (here, where it shows); else the name itself."""
    if not model:
        return ""
    if FETCHED.get(model, model) in FETCHED.values():
        return str(smollm2_folder())
    for base in (os.getcwd(), caller):
        if base and Path(base, model).expanduser().is_dir():
            return str(Path(base, model).expanduser().resolve())
    return model


def is_local(model: str) -> bool:
    """True where running needs no network: nothing named, a bundled model, or a folder."""
    return not model or Path(model).is_dir() or (REPOSITORY / "data" / "models" / model).is_dir()


def environment_for(model: str, outputs: Path) -> dict[str, str]:
    """What the notebooks' kernels get; offline unless the model has to come from the hub."""
    environment = {
        "LENSLAB_OUTPUTS": str(outputs),
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if model:
        environment["LENSLAB_MODEL"] = model
    return environment | (OFFLINE if is_local(model) else {})


def describe(run: Execution) -> str:
    """One line of the summary."""
    memory = f", {run.peak_mb / 1000:.1f} GB" if run.peak_mb else ""
    head = f"  {run.name}: {run.done}/{run.cells} cells, {run.seconds:.0f} s{memory}"
    return head if run.passed else f"{head}\n    FAILED in code cell {run.cell}: {run.error}"


def run_all(
    sources: list[Path], folder: Path, outputs: Path, environment: dict[str, str]
) -> list[Execution]:
    """Execute every source; copies, `run.json` and the index are written after each.
    KeyboardInterrupt passes."""
    runs: list[Execution] = []
    for source in sources:
        notebook = read_source(source)
        show = progress(f"[{len(runs) + 1}/{len(sources)}] {source.stem}")
        try:
            runs.append(execute(notebook, source.stem, folder, environment, on_cell=show))
        finally:  # also when interrupted: the cells so far have their outputs
            write_notebook(notebook, outputs / "notebooks" / f"{source.stem}.ipynb")
            write_json(outputs / "run.json", [run.to_dict() for run in runs])
            write_index(outputs)
    return runs


def compute_long(environment: dict[str, str]) -> bool:
    """Compute the long results, with progress; whether that went well."""
    loud = {name: value for name, value in environment.items() if name != "TQDM_DISABLE"}
    return subprocess.run([sys.executable, LONG], env=os.environ | loud).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default="", help="bundled name, smollm2, Hugging Face folder, name on the hub"
    )
    parser.add_argument("--notebooks", default="", help="names, separated by spaces (default: all)")
    parser.add_argument(
        "--full", action="store_true", help="recompute the long results that ship with the project"
    )
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "notebooks")
    options = parser.parse_args()
    try:
        sources = find_notebooks(options.folder, options.notebooks)
        model = resolve_model(options.model, os.environ.get("LENSLAB_CALLER"))
    except (OSError, NotAModel) as error:
        print(error, file=sys.stderr)
        return 2
    outputs = outputs_path().resolve()
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # `kill` and `timeout` end it as Ctrl-C does
    environment = environment_for(model, outputs)
    try:
        measured = not options.full or compute_long(environment)
        runs = run_all(sources, options.folder.resolve(), outputs, environment)
    except KeyboardInterrupt:
        print(f"\nInterrupted. What was done is in {outputs}", file=sys.stderr)
        return 130
    print(f"\n{sum(run.passed for run in runs)} of {len(runs)} notebooks ran whole:")
    print("\n".join(describe(run) for run in runs))
    print(f"Open {outputs / 'index.html'}")
    if not measured:
        print(f"{LONG.name} FAILED: its error is above the notebooks")
    return 0 if measured and all(run.passed for run in runs) else 1


if __name__ == "__main__":
    sys.exit(main())
