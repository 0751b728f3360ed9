"""The README runs as it is written, and its numbers are those of the results."""

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
import torch
import transformers
import yaml
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
from transformer_lens.tools.model_registry.api import get_registry_stats

from lenslab.files import REPOSITORY
from lenslab.sae.registry import is_safe, releases
from lenslab.texts import load_probes

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
RESULTS = REPOSITORY / "benchmarks" / "results"
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
PAGES = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md", "data/README.md"]


@pytest.fixture
def tables():
    """scripts/readme_tables.py as a module of its own, so that a test may change its constants."""
    file = REPOSITORY / "scripts" / "readme_tables.py"
    spec = importlib.util.spec_from_file_location("readme_tables", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda text: text.splitlines()[0])
def test_every_snippet_runs_offline(snippet, tmp_path):
    """W1.9: a README whose own calls fail. The network is refused, and every attempt is written
    down."""
    log = tmp_path / "attempts"
    own = load_probes("categories").groupby("category").head(12)  # the table a reader brings along
    own[["text", "category"]].to_csv(tmp_path / "mine.csv", index=False)
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY / "scripts" / "offline"),
        "LENSLAB_NETWORK_LOG": str(log),
        "PLOTLY_RENDERER": "json",  # else a figure opens a browser, where there is one
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


def test_the_readme_is_short():
    assert len(README.splitlines()) < 310


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """To files as seen from the page, and to headings of the file that is linked."""
    file = REPOSITORY / page
    text = file.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        place, _, anchor = target.partition("#")
        linked = file.parent / place if place else file
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", linked.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings]
            assert anchor in slugs, target


def test_what_is_said_of_neighbours_is_counted_in_the_installed_versions():
    saes = [sae for release in releases().values() for sae in release["saes"]]
    models = {release["model"] for release in releases().values()}
    safe = sum(len(release["saes"]) for name, release in releases().items() if is_safe(name))
    pages = sum(bool(sae.get("neuronpedia")) for sae in saes)
    assert f"loads those {safe:,} of SAELens's" in README
    assert f"{len(saes):,}, of {len(models)} models" in README
    assert f"**pages** for {pages:,} of" in README
    assert f"**{len(SUPPORTED_ARCHITECTURES)} architectures**" in README
    assert f"verified {get_registry_stats()['total_verified']:,} models" in README
    for package in ("sae-lens", "transformer-lens"):
        version = ".".join(importlib.metadata.version(package).split(".")[:2])
        assert re.search(rf"\[{package.replace('-', '')}\]\(\S+\) {version} ", README, re.I)


def test_how_to_cite_names_the_version_of_the_package():
    cited = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "version"} <= set(cited)
    project = (REPOSITORY / "pyproject.toml").read_text()
    assert f'version = "{cited["version"]}"' in project


def test_tables_and_picture_come_from_the_results():
    """W4.2, W4.6: numbers in a README that no committed result shows."""
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "scripts" / "readme_tables.py"), "--check"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_the_glossary_defines_what_the_notebooks_talk_about():
    glossary = (REPOSITORY / "GLOSSARY.md").read_text(encoding="utf-8")
    terms = re.findall(r"^\| ([a-zA-Z0-9 ,-]+?) \|", glossary, flags=re.MULTILINE)
    assert len(terms) >= 34 and terms[1:] == sorted(terms[1:], key=str.lower)
    words = ("hook point", "residual stream", "L0", "FVU", "padding", "superposition")
    for term in (*words, "expert", "router", "load", "path", "ICS", "specialisation"):
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


def test_the_routing_benchmark_was_measured_and_says_what_it_claims():
    result = json.loads((RESULTS / "routing.json").read_text())
    same = [ratio for peer, ratio in result["ratios"].items() if "eager attention" in peer]
    assert len(same) == 3 and min(same) >= 0.8 and not result["left_out"]
    one, four = (result["statistics"][f"statistics of {n} million"] for n in (1, 4))
    assert one["seconds"] < 20 and one["peak_mb"] < 2000
    assert four["seconds"] < 4.4 * one["seconds"] and four["peak_mb"] < 4.4 * one["peak_mb"]


def test_the_notebooks_fit_a_small_machine():
    runs = json.loads((RESULTS / "notebook_runs.json").read_text())["notebooks"]
    assert all(run["seconds"] <= 180 and run["peak_mb"] <= 4000 for run in runs)


def test_comparing_what_the_notebooks_print_means_something():
    """Stable over threads and instruction sets, and sensitive to the model: as `make
    check-notebooks` measured it."""
    result = json.loads((RESULTS / "notebooks.json").read_text())
    assert result["holds"] and set(result["values"]) == {file.stem for file in NOTEBOOKS}


def notebook(*cells) -> list[dict]:
    """Cells of a notebook: a string is markdown, a list what a code cell printed, line by line, a
    dict what it displayed."""
    made = []
    for cell in cells:
        if isinstance(cell, str):
            made.append({"cell_type": "markdown", "source": cell})
        else:
            shown = {"output_type": "display_data", "data": cell}
            if isinstance(cell, list):
                shown = {"output_type": "stream", "text": [f"{line}\n" for line in cell]}
            made.append({"cell_type": "code", "source": "", "outputs": [shown]})
    return made


def test_the_finding_is_what_the_section_on_its_question_says(tables, monkeypatch):
    """All of it, printed or displayed; not what another section says."""
    cells = notebook(
        "# Phase 2",
        ["So: another finding"],
        "### 7. Does it take an SAE?\n\nWhat labels can do.",
        ["logistic regression .99"],
        "Read it like this.",
        ["So: no, .99 without an SAE"],
        {"text/plain": "So: .96 with one", "text/markdown": "**So:** .96 with one"},
        "## 8. Next",
        ["So: after it"],
    )
    monkeypatch.setattr(tables, "notebook_cells", lambda name: cells)
    quoted = "> So: no, .99 without an SAE\n>\n> So: .96 with one"
    assert tables.finding() == quoted
    page = "a\n<!-- finding -->\nold\n<!-- end of finding -->\nb"
    filled = tables.filled(page, {"finding": tables.finding})
    assert filled == page.replace("old", quoted)


def test_a_notebook_without_a_finding_is_not_passed_over(tables, monkeypatch):
    cells = notebook("## Does it take an SAE?", ["a table"])
    monkeypatch.setattr(tables, "notebook_cells", lambda name: cells)
    with pytest.raises(ValueError, match="FINDING"):
        tables.finding()


def test_a_figure_is_the_png_beside_the_one_of_that_title(tables, monkeypatch):
    def figure(title, png):
        plotly = {"layout": {"title": {"text": title}}}
        return {"application/vnd.plotly.v1+json": plotly, "image/png": png}

    cells = notebook(
        "## 2. Shared?", ["So: half"], figure("Other", "b3RoZXI="), figure("Shared", "dGhpcw==")
    )
    monkeypatch.setattr(tables, "notebook_cells", lambda name: cells)
    monkeypatch.setattr(tables, "FIGURES", [("phase_0", "Shared", "Shared?", "phase_0_shared")])
    assert tables.figure_png("phase_0", "Shared") == b"this"
    picture = "![Shared, drawn by phase_0](assets/phase_0_shared.png)"
    assert tables.figures_lines() == f"> So: half\n\n{picture}"
    with pytest.raises(ValueError, match="no figure 'Missing' with a PNG"):
        tables.figure_png("phase_0", "Missing")
    monkeypatch.setattr(tables, "FIGURES", [("phase_0", "Shared", "Elsewhere", "a")])
    with pytest.raises(ValueError, match="no finding in 'Elsewhere'"):
        tables.figures_lines()


def test_above_one_is_better_in_every_row_of_the_benchmarks(tables, tmp_path, monkeypatch):
    """Ours over the peer for a rate or a score; the peer over ours for an error; no ratio of
    thousands."""
    rate = {"claim": "fast", "ours": 200, "unit": "tokens/s", "ratios": {"a": 2.0, "b": 23872}}
    error = {"claim": "good", "ours": {"x": 0.5}, "unit": "FVU", "ratios": {"a": 0.5, "b": None}}
    score = error | {"unit": "MCC", "more_is_better": True, "ratios": {"a": 1.25}}
    for name, result in (("rate", rate), ("score", score), ("wrong", error)):
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    rows = tables.benchmarks_table().splitlines()[2:]
    assert [row.split(" | ")[3:] for row in rows] == [
        ["more", "a 2.00, b about 10^4 |"],
        ["more", "a 1.25 |"],
        ["less", "a 2.00 |"],
    ]


def test_the_sizes_are_those_of_the_models(tables):
    """Counted on classes of transformers without memory for the weights."""
    smollm2 = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30)
    smollm2 |= dict(num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)
    gemma = dict(vocab_size=262144, hidden_size=1152, intermediate_size=6912, num_hidden_layers=26)
    gemma |= dict(num_attention_heads=4, num_key_value_heads=1, head_dim=256)
    card = json.loads((REPOSITORY / "data/models/pocket-gpt/card.json").read_text())
    counted = {"pocket-gpt": card["parameters"]}
    for name, config in {
        "GPT-2 small": transformers.GPT2Config(),
        "SmolLM2-135M": transformers.LlamaConfig(**smollm2),
        "Gemma 3 1B": transformers.Gemma3TextConfig(**gemma),
        "OLMoE 7B": transformers.OlmoeConfig(intermediate_size=1024),
    }.items():
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        counted[name] = sum(parameter.numel() for parameter in model.parameters())
    assert counted == tables.PARAMETERS
    assert "| GPT-2 small | 124 million | 498 MB | 249 MB | 996 MB |" in tables.memory_table()


def test_the_readme_names_every_family_that_is_refused(tables):
    table = (REPOSITORY / "data" / "README.md").read_text(encoding="utf-8")
    refused = re.findall(r"^\| (\w+) \| refused", table, re.MULTILINE)
    assert refused and all(family in tables.families_sentence() for family in refused)
    assert f"{len(refused)} are refused" in tables.families_sentence()
    assert "<!-- architectures -->" not in README
