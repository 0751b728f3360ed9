"""The notebooks keep to the policy, and what builds, runs and compares them does what it says."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_output

from lenslab.files import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "scripts"))

from check_notebooks import changed_verdicts, figure_faults, policy, verdicts
from notebook_execution import (
    code_cells,
    execute,
    find_notebooks,
    printed,
    read_source,
    write_notebook,
)
from run_notebooks import describe, environment_for, resolve_model, run_all

FOLDER = REPOSITORY / "notebooks"
SOURCES = sorted((FOLDER / "interactive").glob("*.py"))
SAMPLE = """# %% [markdown]
# # A sample
# It counts.

# %%
total = 1 + 1
print(total)

# %% [markdown]
# The value of a last line counts as printed.

# %%
{code}

# %% [markdown]
# ## 2. A second section
# It has a verdict.

# %%
print("So: the sum is", total)

# %% [markdown]
# ## What was found, and what was not
# Sums are found.
"""


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_the_notebook_keeps_to_the_policy(source):
    faults, facts = policy(source, FOLDER / f"{source.stem}.ipynb")
    assert not faults
    assert facts["code_cells"] > 0


@pytest.fixture
def sample(tmp_path):
    """A folder with one notebook, executed in no kernel: outputs are put there by hand."""
    (tmp_path / "interactive").mkdir()
    source = tmp_path / "interactive" / "phase_0_sample.py"
    source.write_text(SAMPLE.format(code="total"))
    notebook = read_source(source)
    first, second, third = code_cells(notebook)
    first.outputs = [new_output("stream", name="stdout", text="2\n")]
    second.outputs = [new_output("execute_result", {"text/plain": "2"}, execution_count=2)]
    third.outputs = [new_output("stream", name="stdout", text="So: the sum is 2\n")]
    for count, cell in enumerate((first, second, third), 1):
        cell.execution_count = count
    write_notebook(notebook, tmp_path / "phase_0_sample.ipynb")
    return tmp_path


def faults_after(folder: Path, change) -> str:
    """The policy's complaints after a change to the built notebook."""
    built = folder / "phase_0_sample.ipynb"
    notebook = nbformat.read(built, as_version=4)
    change(notebook, code_cells(notebook))
    write_notebook(notebook, built)
    return "; ".join(policy(folder / "interactive" / "phase_0_sample.py", built)[0])


def test_a_notebook_as_built_has_no_faults(sample):
    assert faults_after(sample, lambda notebook, cells: None) == ""


PLOT = {"application/vnd.plotly.v1+json": {"data": []}}
BREAKS = {
    "section '2. A second section' says no **So:**": lambda nb, cells: cells[2].update(outputs=[]),
    "must end in one section": lambda nb, cells: nb.cells[-1].update(source="It ends. Here."),
    "with nothing in it": lambda nb, cells: cells[0].outputs.append(
        new_output("display_data", PLOT)
    ),
    "end it in `.show()`": lambda nb, cells: cells[0].outputs.append(
        new_output("display_data", PLOT)
    ),
    "differs from its source": lambda nb, cells: cells[0].update(source="total = 3"),
    "print a result": lambda nb, cells: [cell.update(outputs=[]) for cell in cells],
    "within 12 lines": lambda nb, cells: cells[0].update(source="a = 1\n" * 13),
    "definitions": lambda nb, cells: cells[0].update(source="def f(): pass\ndef g(): pass"),
    "ends in an error": lambda nb, cells: cells[0].outputs.append(
        new_output("error", ename="E", evalue="", traceback=[])
    ),
    "not executed from top": lambda nb, cells: cells[0].update(execution_count=7),
    "no PNG": lambda nb, cells: cells[0].outputs.append(new_output("display_data", PLOT)),
    "no sentence of purpose": lambda nb, cells: nb.cells[2].update(source="## Heading"),
    "round what is compared": lambda nb, cells: cells[0].outputs[0].update(text="0.123456"),
    "a result is short": lambda nb, cells: cells[0].outputs[0].update(text="x\n" * 50),
    "path of a machine": lambda nb, cells: cells[0].outputs[0].update(text="/" + "home/somebody"),
    "MB, more than": lambda nb, cells: cells[0].outputs[0].update(text="x" * 1_600_000),
    "from the network": lambda nb, cells: cells[0].outputs.append(
        new_output(
            "display_data", {"text/html": '<script src="https://cdn.example.org/a.js"></script>'}
        )
    ),
}


@pytest.mark.parametrize("complaint", BREAKS)
def test_the_policy_notices(sample, complaint):
    assert complaint in faults_after(sample, BREAKS[complaint])


def test_live_curves_show_themselves(sample):
    def draw(notebook, cells):
        cells[0].source = "train(saes, source, config, watch=live_curves(config))"
        BREAKS["end it in `.show()`"](notebook, cells)

    assert "with nothing in it" in (found := faults_after(sample, draw))
    assert "end it in `.show()`" not in found


def markdown(text: str):
    return nbformat.v4.new_markdown_cell(text)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda nb: nb.cells.insert(6, markdown("**So:** sums are right.")), ""),
        (lambda nb: nb.cells[4].update(source="## 2. A\nIt is.\n\n**So:** sums are right."), ""),
        (lambda nb: nb.cells[4].update(source="## 2. A\nIt is. **So:** not a paragraph."), "2. A"),
        (lambda nb: nb.cells.insert(4, markdown("**So:** of the section before.")), "2. A second"),
        (lambda nb: nb.cells[4].update(source="## 2. A\n**So:** b.\n## 3. C\nIt."), "3. C"),
        (lambda nb: nb.cells[4].update(source="## Not numbered\nIt is."), ""),
        (lambda nb: nb.cells[4].update(source="## 1. The first\nIt is."), ""),
        (lambda nb: nb.cells.insert(6, markdown("## 3. In words only\nIt is.")), "2. A second"),
    ],
)
def test_a_section_with_code_says_what_was_found(sample, change, fault):
    """The printed verdict is taken away, and put elsewhere or in words."""

    def changed(notebook, cells):
        cells[2].outputs = []
        change(notebook)

    said = [part for part in faults_after(sample, changed).split("; ") if "no **So:**" in part]
    assert len(said) == bool(fault) and all(fault in part for part in said)


@pytest.mark.parametrize("where", [0, 6, 7])
def test_limits_come_once_and_last(sample, where):
    limits = markdown("## What was found, and what was not\nMuch.")
    more = [limits] if where < 7 else [markdown("## 3. More\nMuch.")]
    assert "must end in one" in faults_after(
        sample, lambda nb, cells: nb.cells.__setitem__(slice(where, where), more)
    )


def test_a_verdict_is_a_line_that_begins_so():
    assert verdicts("So: a\nnot so: b\n So: c\nSo it is\nSo: d") == ["So: a", "So: d"]


NAMED = {"xaxis": {"title": {"text": "layer"}}, "yaxis": {"title": {"text": "norm"}}}
FLAT = {"type": "scatter", "y": [1, 2]}
GAPS = {"type": "scatter", "y": {"dtype": "f4", "bdata": "AADAfwAAgH8="}}  # NaN and Inf
BYTES = {"type": "scatter", "y": {"dtype": "f4", "bdata": "AADAfwAAgD8="}}  # NaN and 1
SECOND = {"type": "heatmap", "z": [[1]], "xaxis": "x2", "yaxis": "y2"}
SOLID = {"type": "scatter3d", "x": [1], "y": [1], "z": [1], "scene": "scene2"}
ROOM = {f"{axis}axis": {"title": {"text": "rank"}} for axis in "xyz"}
HIDDEN = {"xaxis2": {"title": {"text": "layer"}}, "yaxis2": {"showticklabels": False}}


@pytest.mark.parametrize(
    ("data", "layout", "faults"),
    [
        ([FLAT], NAMED, []),
        ([BYTES], NAMED, []),
        ([FLAT], NAMED | {"yaxis": {"title": {"text": " "}}}, ["a y axis without a name"]),
        ([FLAT], {"yaxis": {"title": "norm"}}, ["a x axis without a name"]),
        ([FLAT, SECOND], NAMED | HIDDEN, []),
        ([FLAT, SECOND], NAMED, ["a x2 axis without a name", "a y2 axis without a name"]),
        ([GAPS], NAMED, ["nothing in it"]),
        ([{"type": "sankey", "link": {"value": [2.0]}}], {}, []),
        ([{"type": "sankey", "link": {"value": []}}], {}, ["nothing in it"]),
        ([{"type": "heatmap", "x": [1], "y": [2], "z": [[None]]}], NAMED, ["nothing in it"]),
        ([SOLID], {"scene2": ROOM}, []),
        ([SOLID], {"scene": ROOM}, [f"a {axis} axis without a name" for axis in "xyz"]),
        ([], {}, ["nothing in it"]),
    ],
)
def test_figures_have_names_on_their_axes_and_something_in_them(data, layout, faults):
    assert list(figure_faults({"data": data, "layout": layout})) == faults


def test_verdicts_that_change_on_the_twin_are_counted():
    committed = ["So: a 1", "text\nSo: b 1\nSo: c 1", "no verdict", "So: d 1", "So: e 1"]
    twin = ["So: a 2", "text\nSo: b 1", "no verdict", "So: d 1", "So: e 2"]
    assert changed_verdicts(committed, twin, errors=[5]) == {
        "printed": 5,
        "changed": 2,
        "share": 0.4,
        "unchanged": ["So: b 1", "So: d 1", "So: e 1"],
    }
    assert changed_verdicts(["text"], ["other"], [])["share"] == 0


def test_a_missing_notebook_is_a_fault_with_its_remedy(sample):
    (sample / "phase_0_sample.ipynb").unlink()
    faults, _ = policy(
        sample / "interactive" / "phase_0_sample.py", sample / "phase_0_sample.ipynb"
    )
    assert "make notebooks" in faults[0]


def test_reading_a_source_twice_gives_the_same_bytes(sample):
    source = sample / "interactive" / "phase_0_sample.py"
    assert nbformat.writes(read_source(source)) == nbformat.writes(read_source(source))


def test_pictures_and_widgets_count_as_nothing_printed():
    cell = nbformat.v4.new_code_cell("x")
    cell.outputs = [
        new_output(
            "display_data",
            {"text/plain": "<IPython.core.display.HTML object>", "text/html": "<b>1</b>"},
        ),
        new_output("display_data", PLOT),
        new_output("stream", name="stderr", text="warning"),
    ]
    assert printed(cell) == ""


def test_notebooks_come_in_order_and_an_unknown_one_is_named(tmp_path):
    (tmp_path / "interactive").mkdir()
    for name in ("phase_10_b", "phase_2_a", "phase_1_c"):
        (tmp_path / "interactive" / f"{name}.py").write_text("# %%\n1\n")
    assert [f.stem for f in find_notebooks(tmp_path)] == ["phase_1_c", "phase_2_a", "phase_10_b"]
    assert [f.stem for f in find_notebooks(tmp_path, "phase_10_b, phase_1_c.ipynb")] == [
        "phase_10_b",
        "phase_1_c",
    ]
    with pytest.raises(
        FileNotFoundError, match=r"No notebook phase_9; there are: phase_1_c, phase_2_a, phase_10_b"
    ):
        find_notebooks(tmp_path, "phase_9")


def test_a_model_folder_is_found_from_where_the_caller_stands(tmp_path, monkeypatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "models")
    assert resolve_model("mine") == str(tmp_path / "models" / "mine")
    assert resolve_model("models/mine", str(tmp_path)) == str(tmp_path / "models" / "mine")
    assert resolve_model("gpt2") == "gpt2"


def test_a_model_from_the_package_index_is_a_folder_before_the_first_notebook(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("LENSLAB_CACHE", str(tmp_path))
    (tmp_path / "models" / "smollm2-135m-q4").mkdir(parents=True)
    folder = resolve_model("smollm2")
    assert folder == str(tmp_path / "models" / "smollm2-135m-q4") == resolve_model(folder)
    assert environment_for(folder, tmp_path)["HF_HUB_OFFLINE"] == "1"


def test_only_a_name_on_the_hub_may_use_the_network(tmp_path):
    assert environment_for("", tmp_path)["HF_HUB_OFFLINE"] == "1"
    assert environment_for(str(tmp_path), tmp_path)["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in environment_for("gpt2", tmp_path)


@pytest.mark.notebook
def test_a_failing_notebook_stops_neither_the_others_nor_the_index(tmp_path):
    (tmp_path / "interactive").mkdir()
    (tmp_path / "interactive" / "phase_1_bad.py").write_text(
        SAMPLE.format(code="raise ValueError('too <small>')")
    )
    (tmp_path / "interactive" / "phase_2_good.py").write_text(SAMPLE.format(code="total"))
    outputs = tmp_path / "outputs"
    runs = run_all(find_notebooks(tmp_path), tmp_path, outputs, {})
    assert [run.passed for run in runs] == [False, True]
    assert "FAILED in code cell 2: ValueError: too <small>" in describe(runs[0])
    bad = nbformat.read(outputs / "notebooks" / "phase_1_bad.ipynb", as_version=4)
    assert printed(code_cells(bad)[0]) == "2"
    index = (outputs / "index.html").read_text()
    assert "too &lt;small&gt;" in index
    assert "phase_2_good.html" in index


@pytest.mark.notebook
def test_a_kernel_that_dies_is_reported_with_its_signal(tmp_path):
    (tmp_path / "interactive").mkdir()
    code = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
    (tmp_path / "interactive" / "phase_1_dies.py").write_text(SAMPLE.format(code=code))
    run = run_all(find_notebooks(tmp_path), tmp_path, tmp_path / "outputs", {})[0]
    assert (run.passed, run.cell) == (False, 2)
    assert "the kernel died (SIGKILL)" in run.error


@pytest.mark.notebook
def test_an_interrupted_run_keeps_what_was_done(tmp_path, monkeypatch):
    (tmp_path / "interactive").mkdir()
    (tmp_path / "interactive" / "phase_1_long.py").write_text(SAMPLE.format(code="total"))

    def interrupted(*arguments, on_cell, **options):
        def stop_after_the_first(done, cells, seconds):
            if done == 1:
                raise KeyboardInterrupt

        return execute(*arguments, on_cell=stop_after_the_first, **options)

    monkeypatch.setattr("run_notebooks.execute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_all(find_notebooks(tmp_path), tmp_path, tmp_path / "outputs", {})
    kept = nbformat.read(tmp_path / "outputs" / "notebooks" / "phase_1_long.ipynb", as_version=4)
    assert [printed(cell) for cell in code_cells(kept)] == ["2", "", ""]
    assert "not finished in the last run" in (tmp_path / "outputs" / "index.html").read_text()


@pytest.mark.notebook
def test_nbval_compares_printed_text_only_and_refuses_the_network(tmp_path):
    """Five cells under the project's own nbval set-up: three must pass, two must fail."""
    folder = tmp_path / "notebooks"
    (folder / "interactive").mkdir(parents=True)
    shutil.copy(FOLDER / "conftest.py", folder)
    (tmp_path / "scripts").symlink_to(REPOSITORY / "scripts")
    cells = ["print(1)", "display({'text/html': '<b>new</b>'}, raw=True)", "print(2)"]
    cells.append(
        "import socket\ntry:\n    socket.getaddrinfo('example.org', 443)\nexcept OSError:\n    pass"
    )
    cells.append(
        "from tqdm.auto import tqdm\nbar = tqdm(range(2))"
    )  # a bar that a faster machine would not show
    source = folder / "interactive" / "phase_0_sample.py"
    source.write_text("\n".join(f"# %%\n{cell}\n" for cell in cells))
    notebook = read_source(source)
    for number, cell in enumerate(code_cells(notebook), 1):
        cell.execution_count = number
    code_cells(notebook)[0].outputs = [new_output("stream", name="stdout", text="1\n")]
    code_cells(notebook)[1].outputs = [new_output("display_data", {"text/html": "<b>old</b>"})]
    code_cells(notebook)[2].outputs = [new_output("stream", name="stdout", text="3\n")]
    built = folder / "phase_0_sample.ipynb"
    write_notebook(notebook, built)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--nbval",
        "--nbval-current-env",
        "-rA",
        "-p",
        "no:cacheprovider",
    ]
    run = subprocess.run(
        [*command, "--rootdir", str(tmp_path), str(built)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
    )
    lines = [
        line.split() for line in run.stdout.splitlines() if line.startswith(("PASSED ", "FAILED "))
    ]
    outcome = {f"Cell {words[2]}": words[0] for words in lines}
    assert outcome == {
        "Cell 0": "PASSED",
        "Cell 1": "PASSED",
        "Cell 2": "FAILED",
        "Cell 3": "FAILED",
        "Cell 4": "PASSED",
    }, run.stdout
    assert "tried to reach the network: example.org" in run.stdout


@pytest.mark.notebook
@pytest.mark.skipif(not SOURCES, reason="no notebooks yet")
def test_phase_1_runs_on_any_local_hugging_face_folder(shared, tmp_path):
    fixture = shared / "fixtures" / "tinystories-656k"
    if not fixture.is_dir():
        pytest.skip("the fixture model is not there")
    command = [
        sys.executable,
        str(REPOSITORY / "scripts" / "run_notebooks.py"),
        "--notebooks",
        "phase_1_loading",
    ]
    log = tmp_path / "attempts"
    environment = {
        **os.environ,
        "LENSLAB_OUTPUTS": str(tmp_path / "outputs"),
        "LENSLAB_NETWORK_LOG": str(log),
    }
    environment["PYTHONPATH"] = str(REPOSITORY / "scripts" / "offline")
    run = subprocess.run(
        [*command, "--model", os.path.relpath(fixture, tmp_path)],
        cwd=tmp_path,  # a relative folder, from somewhere else
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "1 of 1 notebooks ran whole" in run.stdout
    assert (
        'id="output-' in (tmp_path / "outputs" / "notebooks" / "phase_1_loading.html").read_text()
    )
    notebook = nbformat.read(
        tmp_path / "outputs" / "notebooks" / "phase_1_loading.ipynb", as_version=4
    )
    assert any("a small one trained" in printed(cell) for cell in code_cells(notebook)), (
        "it says so"
    )
    assert not log.exists(), "nothing reached for the network"
