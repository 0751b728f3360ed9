"""The README runs as it is written, and its numbers are those of the results."""

import json
import os
import re
import subprocess
import sys

import pytest

from lenslab.files import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
RESULTS = REPOSITORY / "benchmarks" / "results"
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda text: text.splitlines()[0])
def test_every_snippet_runs_offline(snippet, tmp_path):
    """W1.9: a README whose own calls fail. The network is refused, and every attempt is written
    down."""
    log = tmp_path / "attempts"
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY / "scripts" / "offline"),
        "LENSLAB_NETWORK_LOG": str(log),
    }
    done = subprocess.run(
        [sys.executable, "-c", snippet],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() and not log.exists()


def test_there_are_snippets_to_run():
    assert len(SNIPPETS) >= 2


def test_tables_and_picture_come_from_the_results():
    """W4.2, W4.6: numbers in a README that no committed result shows."""
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "scripts" / "readme_tables.py"), "--check"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_the_glossary_defines_what_the_notebooks_talk_about():
    terms = re.findall(
        r"^\| ([a-zA-Z0-9 ,-]+?) \|", README.split("## Glossary")[1], flags=re.MULTILINE
    )
    assert len(terms) >= 27
    for term in ("hook point", "residual stream", "L0", "FVU", "padding", "superposition"):
        assert any(term in entry for entry in terms), term


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_harvest_benchmark_was_measured_and_says_what_it_claims(precision):
    result = json.loads((RESULTS / f"harvest_{precision}.json").read_text())
    assert {"claim", "ours", "peers", "ratios", "unit", "machine", "versions"} <= set(result)
    assert (
        set(result["ratios"]) == set(result["peers"]) >= {"saelens", "hugging-face"}
        and not result["left_out"]
    )
    assert result["ratios"]["saelens"] > 1 and result["ratios"]["hugging-face"] >= 0.9


def test_the_statistics_of_phase_2_were_measured_and_take_seconds():
    result = json.loads((RESULTS / "feature_statistics.json").read_text())
    assert result["seconds"]["all"] < 10 and len(result["rounds"]["lenslab"]) >= 5
    assert min(result["ratios"].values()) > 1 and not result["left_out"]


def test_the_notebooks_fit_a_small_machine():
    runs = json.loads((RESULTS / "notebook_runs.json").read_text())["notebooks"]
    assert all(run["seconds"] <= 180 and run["peak_mb"] <= 4000 for run in runs)


def test_comparing_what_the_notebooks_print_means_something():
    """Stable over threads and instruction sets, and sensitive to the model: as `make
    check-notebooks` measured it."""
    result = json.loads((RESULTS / "notebooks.json").read_text())
    assert result["holds"] and set(result["values"]) == {file.stem for file in NOTEBOOKS}
