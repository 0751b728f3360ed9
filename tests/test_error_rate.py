"""The measure of the method: few errors where nothing is there, most of what is planted is found,
and `make run FULL=1` asks for it."""

import json
import sys
from importlib import import_module

import pandas as pd
import pytest
from test_specialists import noisy, table

from lenslab.files import REPOSITORY, data_path
from lenslab.texts import label_texts


@pytest.fixture(scope="module")
def measure():
    """`error_rate_and_power` of the script of that name."""
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    yield import_module("error_rate_and_power").error_rate_and_power
    sys.path.remove(str(REPOSITORY / "benchmarks"))


def test_the_procedure_keeps_its_error_rate_and_finds_what_is_planted(measure):
    labels = label_texts(table(n=60, kinds=tuple("abcde")))
    values = noisy(labels, 300, good=1)  # what the real labels say is shuffled away
    found = measure(values, labels, n_shuffles=200, n=300, seed=1)
    print(found.to_frame())
    assert found.error_rate.estimate <= 0.07 and found.power.estimate >= 0.8
    assert found.specialist_error is None and found.to_frame()["holds"].tolist() == [True, True]


def test_hardly_anything_planted_is_hardly_found(measure):
    labels = label_texts(table(n=20))
    values = noisy(labels)
    weak = measure(values, labels, planted_auroc=0.55, n_shuffles=20, n=200)
    strong = measure(values, labels, planted_auroc=0.97, n_shuffles=20, n=200)
    assert weak.power.estimate < 0.5 < strong.power.estimate


def test_error_and_power_of_specialists_with_controls(measure):
    labels = label_texts(table(n=40))
    values, nothing = noisy(labels), {"n": noisy(labels, seed=3)}
    found = measure(values, labels, controls=nothing, planted_auroc=0.97, n_shuffles=15, n=200)
    assert found.specialist_power.estimate > 0.5 and len(found.to_frame()) == 4
    assert found.specialist_error.estimate <= found.error_rate.estimate
    assert found.specialist_power.estimate <= found.power.estimate
    rival = measure(values, labels, controls=nothing | {"m": values}, n_shuffles=5, n=200)
    assert rival.specialist_error.estimate == 0


@pytest.mark.parametrize("succeeds", [True, False])
def test_full_measures_before_the_notebooks_and_says_where_it_fails(
    tmp_path, monkeypatch, capsys, succeeds
):
    sys.path.insert(0, str(REPOSITORY / "scripts"))
    run_notebooks = import_module("run_notebooks")
    sys.path.remove(str(REPOSITORY / "scripts"))
    script, asked = tmp_path / "long.py", tmp_path / "asked"
    script.write_text(
        "import os, pathlib, sys\n"
        f"pathlib.Path({str(asked)!r}).write_text(os.environ['LENSLAB_MODEL'])\n"
        f"sys.exit({0 if succeeds else 1})\n"
    )
    when = []
    monkeypatch.setattr(run_notebooks, "LONG", script)
    monkeypatch.setattr(run_notebooks, "run_all", lambda *given: when.append(asked.exists()) or [])
    monkeypatch.setattr(sys, "argv", ["run_notebooks.py", "--full", "--model", "pocket-moe"])
    assert run_notebooks.main() == (0 if succeeds else 1)
    assert when == [True] and asked.read_text() == "pocket-moe"
    assert ("long.py FAILED" in capsys.readouterr().out) is not succeeds


def test_what_ships_holds_what_the_definition_asks_for():
    file = data_path("results", "phase_2_error_rate_and_power.json")
    saved = json.loads(file.read_text(encoding="utf-8"))
    table = pd.DataFrame(saved["config"]["table"]).set_index("measure")
    assert table["holds"].all() and saved["values"]["n_shuffles"] == 1000
