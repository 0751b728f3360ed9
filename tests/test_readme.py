"""The README runs as it is written, and its numbers are those of the results."""

import json
import os
import re
import subprocess
import sys

import pytest

from lenslab.paths import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
RESULTS = sorted((REPOSITORY / "benchmarks" / "results").glob("*.json"))


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda text: text.splitlines()[0])
def test_every_snippet_runs_offline(snippet, tmp_path):
    """W1.9: a README whose own calls fail. The network is refused, and every attempt is written down."""
    log = tmp_path / "attempts"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "scripts" / "offline"), "LENSLAB_NETWORK_LOG": str(log)}
    done = subprocess.run(
        [sys.executable, "-c", snippet], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() and not log.exists()


def test_there_are_snippets_to_run():
    assert len(SNIPPETS) >= 2


def test_tables_and_picture_come_from_the_results():
    """W4.2, W4.6: numbers in a README that no committed result shows."""
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "scripts" / "readme_tables.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_glossary_defines_what_the_notebooks_talk_about():
    terms = re.findall(r"^\| ([a-zA-Z0-9 ,-]+?) \|", README.split("## Glossary")[1], flags=re.MULTILINE)
    assert len(terms) >= 27
    for term in ("hook point", "residual stream", "L0", "FVU", "padding", "superposition"):
        assert any(term in entry for entry in terms), term


@pytest.mark.parametrize("file", [f for f in RESULTS if f.stem == "harvest"], ids=lambda f: f.stem)
def test_a_benchmark_says_what_it_claims_and_where_it_was_measured(file):
    result = json.loads(file.read_text())
    assert {"claim", "ours", "peers", "ratios", "unit", "machine", "versions"} <= set(result)
    assert set(result["ratios"]) == set(result["peers"])
    assert result["machine"]["cores"] >= 1
