"""Read, execute and judge the notebooks: what `build`, `run` and `check_notebooks.py` share.

A notebook's source is `notebooks/interactive/NAME.py` (`# %%` cells); `notebooks/NAME.ipynb` is
built from it. Execution runs in a kernel of this very interpreter, cell by cell, so that progress
shows and an interrupted run keeps what it did. Numbers are compared as text: what a cell prints,
and the text of its last line.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import jupytext
import nbformat
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat import NotebookNode

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "WANDB_MODE": "disabled",
}
# What the committed outputs are made under, and what nbval compares them under
# (notebooks/conftest.py).
REFERENCE = OFFLINE | {
    "OMP_NUM_THREADS": "2",
    "PYTHONHASHSEED": "0",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
ANSI = re.compile(r"\x1b\[[0-9;]*m")
WIDGET_MIME = "application/vnd.jupyter.widget-view+json"


@dataclass(frozen=True)
class Execution:
    """What became of one notebook. `cell` is the number of the failing cell among the code cells,
    from 1."""

    name: str
    cells: int
    done: int
    seconds: float
    peak_mb: int | None  # of the kernel, where the system tells (Linux)
    cell: int | None = None
    error: str | None = None
    errors: tuple[int, ...] = ()  # failing cells when told to keep going

    @property
    def passed(self) -> bool:
        return self.error is None and self.done == self.cells

    def to_dict(self) -> dict:
        return asdict(self)


def natural(path: Path) -> list:
    """Sort key that puts phase_10 after phase_9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.stem)]


def find_notebooks(folder: Path, names: str = "") -> list[Path]:
    """The sources below `folder/interactive`, in order, or those named (separated by spaces or
    commas).

    Raises FileNotFoundError for a name that does not exist, with those that do.
    """
    sources = sorted((folder / "interactive").glob("*.py"), key=natural)
    known = {source.stem: source for source in sources}
    wanted = [
        Path(name).name.removesuffix(".ipynb").removesuffix(".py")
        for name in re.split(r"[\s,]+", names)
        if name
    ]
    unknown = [name for name in wanted if name not in known]
    if unknown or not known:
        raise FileNotFoundError(
            f"No notebook {', '.join(unknown) or 'at all'}; there are: "
            f"{', '.join(known) or 'none'}."
        )
    return [known[name] for name in dict.fromkeys(wanted)] or sources


def read_source(source: Path) -> NotebookNode:
    """A notebook without outputs from its `.py`, the same bytes every time (cell ids are
    numbers)."""
    notebook = jupytext.read(source, fmt="py:percent")
    notebook.metadata = NotebookNode(
        kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"},
        language_info={"name": "python", "file_extension": ".py", "mimetype": "text/x-python"},
    )
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:03d}"
        cell.metadata = NotebookNode({k: v for k, v in cell.metadata.items() if k == "tags"})
    return notebook


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def same_source(one: NotebookNode, other: NotebookNode) -> bool:
    """True where both hold the same cells: kind and text, in order."""
    return [(c.cell_type, c.source) for c in one.cells] == [
        (c.cell_type, c.source) for c in other.cells
    ]


def without_widgets(outputs: list) -> list:
    """Outputs less progress bars and other widgets: whether a bar shows depends on how fast the
    machine is."""
    return [output for output in outputs if WIDGET_MIME not in output.get("data", {})]


def printed(cell: NotebookNode) -> str:
    """What nbval compares of a code cell: printed text and the text of displayed values.

    A value that is only a picture or a widget (`<IPython.core.display.HTML object>`) says nothing.
    """
    parts = []
    for output in without_widgets(cell.get("outputs", [])):
        if output.output_type == "stream" and output.name == "stdout":
            parts.append(output.text)
        elif output.output_type in {"execute_result", "display_data"}:
            text = output.data.get("text/plain", "")
            parts.append("" if re.fullmatch(r"<[\w.]+ object[^>]*>", text.strip()) else text)
    return "\n".join(part for part in parts if part.strip()).strip()


def _kernel_manager() -> AsyncKernelManager:
    """A kernel of this interpreter: whichever `python3` kernel a user has registered elsewhere does
    not matter."""
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    manager = AsyncKernelManager(kernel_name="python3")
    metadata = {"supported_encryption": "curve"}  # or the kernel warns that it talks in plain text
    manager._kernel_spec = KernelSpec(
        argv=argv, display_name="Python 3", language="python", metadata=metadata
    )
    with suppress(Exception):  # a ZeroMQ built without encryption: then it warns
        manager.transport_encryption = "auto"
    return manager


def _peak_memory(manager: AsyncKernelManager) -> int | None:
    with suppress(OSError, AttributeError, ValueError):
        status = Path(f"/proc/{manager.provisioner.pid}/status").read_text(
            encoding="ascii", errors="replace"
        )
        return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) // 1024
    return None


def _cause_of_death(manager: AsyncKernelManager) -> str:
    """The signal or exit status a kernel ended with; SIGKILL is what running out of memory looks
    like."""
    code = getattr(getattr(manager.provisioner, "process", None), "returncode", None)
    if code is None:
        return "no exit status"
    with suppress(ValueError):
        return signal.Signals(-code).name
    return f"exit status {code}"


def execute(
    notebook: NotebookNode,
    name: str,
    folder: Path,
    environment: Mapping[str, str],
    *,
    on_cell: Callable[[int, int, float], None] = lambda done, cells, seconds: None,
    keep_going: bool = False,
) -> Execution:
    """Execute a notebook in place, in `folder`, with `environment` added to this process's own.

    Stops at the first failing cell unless `keep_going`. `on_cell(done, cells, seconds)` is called
    before every cell and at the end. KeyboardInterrupt passes through; the outputs so far are in
    the notebook by then.
    """
    cells = code_cells(notebook)
    for cell in cells:
        cell.outputs, cell.execution_count = [], None
    manager = _kernel_manager()
    client = NotebookClient(
        notebook,
        km=manager,
        timeout=None,
        resources={"metadata": {"path": str(folder)}},
        allow_errors=keep_going,
        coalesce_streams=True,
        record_timing=False,
        store_widget_state=False,
    )
    client.reset_execution_trackers()
    start, done, failed, error, errors = time.monotonic(), 0, None, None, []
    peak = None
    try:
        with client.setup_kernel(env={**os.environ, **environment}, cleanup_kc=True):
            for index, cell in enumerate(notebook.cells):
                if cell.cell_type != "code":
                    continue
                on_cell(done, len(cells), time.monotonic() - start)
                try:
                    client.execute_cell(cell, index, execution_count=done + 1)
                    if any(output.output_type == "error" for output in cell.outputs):
                        errors.append(done + 1)
                except CellExecutionError as problem:
                    failed, error = done + 1, f"{problem.ename}: {ANSI.sub('', problem.evalue)}"
                except DeadKernelError:
                    failed, error = done + 1, f"the kernel died ({_cause_of_death(manager)})"
                if error:
                    break
                done += 1
            peak = _peak_memory(manager)
    finally:
        on_cell(done, len(cells), time.monotonic() - start)
    seconds = round(time.monotonic() - start, 1)
    return Execution(name, len(cells), done, seconds, peak, failed, error, tuple(errors))


def write_notebook(notebook: NotebookNode, path: Path) -> None:
    """Write a notebook atomically, its outputs without what changes from run to run."""
    from lenslab.files import atomic_write

    notebook = nbformat.from_dict(notebook)
    notebook.metadata["language_info"] = {
        "name": "python",
        "file_extension": ".py",
        "mimetype": "text/x-python",
    }
    with atomic_write(path) as temporary:
        nbformat.write(notebook, temporary)


def progress(name: str) -> Callable[[int, int, float], None]:
    """A line per notebook: rewritten in a terminal; elsewhere one line now and then."""
    last = [-30.0]

    def show(done: int, cells: int, seconds: float) -> None:
        line = f"{name}: {done}/{cells} cells, {seconds:.0f} s"
        if sys.stdout.isatty():
            print(f"\r\033[K{line}", end="" if done < cells else "\n", flush=True)
        elif seconds - last[0] >= 30 or done == cells:
            last[0] = seconds
            print(line, flush=True)

    return show
