"""Pages open in a real browser, from disk, without a network: plots are drawn and nothing goes
wrong."""

import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import plotly.graph_objects as go
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from lenslab.files import REPOSITORY
from lenslab.show import feature_plots, images, plots
from lenslab.show.images import (
    PLOTLY_MIME,
    figure_element,
    figure_json,
    find_browser,
    save_figure,
    write_plotly_js,
)
from lenslab.show.tokens import Strip, highlight

sys.path.insert(0, str(REPOSITORY / "scripts"))

from build_site import first_sentence, write_index

EVIL = "<script>document.title='owned'</script>"


def open_page(file: Path, profile: Path) -> tuple[str, list[str]]:
    """The page's DOM after its scripts ran, and what its console said."""
    browser = find_browser()
    if browser is None:
        pytest.skip("no Chromium: install it (apt install chromium) to run the browser tests")
    sandbox = ["--no-sandbox"] if os.name == "posix" and os.geteuid() == 0 else []
    options = [
        "--headless",
        *sandbox,
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={profile}",
    ]
    options += ["--host-resolver-rules=MAP * ~NOTFOUND", "--proxy-server=127.0.0.1:9"]
    options += [
        "--enable-logging=stderr",
        "--log-level=0",
        "--virtual-time-budget=20000",
        "--dump-dom",
        file.as_uri(),
    ]
    run = subprocess.run(
        [browser, *options], capture_output=True, text=True, timeout=240, errors="replace"
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout, re.findall(r"CONSOLE[^\]]*\] (.*)", run.stderr)


def figure(title: str = "Waves") -> dict:
    return figure_json(go.Figure(go.Scatter(y=[1.0, 3.0, 2.0]), layout={"title": {"text": title}}))


@pytest.fixture
def outputs(tmp_path, monkeypatch) -> Path:
    """Outputs of a run as `make run` leaves them: a notebook with a figure, a table, text and an
    error."""
    folder = tmp_path / "outputs"
    monkeypatch.setenv("LENSLAB_OUTPUTS", str(folder))
    monkeypatch.setattr(images, "_browser", False)  # no PNGs here
    cells = [
        new_markdown_cell("# Phase 0: a sample <of> pages\n\nIt draws. And more."),
        new_code_cell("draw()", outputs=[new_output("display_data", {PLOTLY_MIME: figure()})]),
        new_markdown_cell("The table of *squares*: small."),
        new_code_cell(
            "frame",
            outputs=[
                new_output("stream", name="stdout", text=EVIL),
                new_output(
                    "execute_result",
                    {"text/html": "<table><tr><td>4</td></tr></table>", "text/plain": "4"},
                ),
            ],
        ),
        new_code_cell(
            "oops",
            outputs=[
                new_output("error", ename="E", evalue=EVIL, traceback=[f"\x1b[31m{EVIL}\x1b[0m"])
            ],
        ),
    ]
    (folder / "notebooks").mkdir(parents=True)
    nbformat.write(new_notebook(cells=cells), folder / "notebooks" / "phase_0_sample.ipynb")
    run = {
        "name": "phase_0_sample",
        "cells": 3,
        "done": 2,
        "seconds": 1.0,
        "peak_mb": 300,
        "cell": 3,
        "error": f"E: {EVIL}",
    }
    (folder / "run.json").write_text(json.dumps([run]))
    save_figure(go.Figure(go.Bar(y=[1, 2])), "bars")
    (folder / "results" / "numbers.csv").write_text("n\n1\n")
    write_index(folder)
    return folder


def test_the_index_links_every_figure_table_and_file_and_each_link_leads_somewhere(outputs):
    index = (outputs / "index.html").read_text()
    links = dict(re.findall(r'<a href="([^"]+)">([^<]*)</a>', index))
    assert links["notebooks/phase_0_sample.html#output-1-0"] == "Waves"
    assert links["notebooks/phase_0_sample.html#output-3-1"] == "The table of squares"
    assert {"results/bars.html", "results/numbers.csv"} <= set(links)
    assert "results/plotly.min.js" not in links
    for href in links:
        file, _, anchor = href.partition("#")
        assert (outputs / file).exists(), href
        assert not anchor or f'id="{anchor}"' in (outputs / file).read_text()


def test_the_index_says_how_a_run_ended_and_escapes_it(outputs):
    index = (outputs / "index.html").read_text()
    assert "2 of 3 cells in 1 s, 0.3 GB" in index
    assert "code cell 3: E: &lt;script&gt;" in index
    assert "<script" not in index


@pytest.mark.browser
def test_a_notebooks_page_draws_its_plot_offline_and_runs_no_printed_script(outputs, tmp_path):
    dom, console = open_page(outputs / "notebooks" / "phase_0_sample.html", tmp_path / "profile")
    assert not console
    assert dom.count('class="main-svg"') >= 1
    assert "<title>Phase 0: a sample &lt;of&gt; pages</title>" in dom
    assert "&lt;script&gt;document.title" in dom


@pytest.mark.browser
def test_a_saved_figure_draws_offline(outputs, tmp_path):
    dom, console = open_page(outputs / "results" / "bars.html", tmp_path / "profile")
    assert not console
    assert 'class="main-svg"' in dom


@pytest.mark.browser
def test_highlighted_tokens_are_coloured_offline_and_no_text_becomes_a_script(outputs, tmp_path):
    evil = ["<s>", EVIL, f'"><img src=x onerror="{EVIL[8:-9]}">', " calm", ""]
    values, counted = np.array([9, 2.0, 1.0, 0.0, 0]), np.array([False, True, True, True, False])
    view = highlight([Strip(evil, values, counted, label=EVIL)], title=EVIL)
    page = view.save("tokens")
    # a script of this test's own says which colours the browser uses
    ask = "getComputedStyle(document.querySelector('.t .p12')).backgroundColor"
    page.write_text(page.read_text() + f"<script>document.body.dataset.colour = {ask}</script>")
    dom, console = open_page(page, tmp_path / "profile")
    assert not console
    assert "<title>&lt;script&gt;document.title='owned'&lt;/script&gt;</title>" in dom
    assert 'data-colour="rgba(200, 80, 45, 0.62)"' in dom
    assert dom.count("<script") == 1 and "<img" not in dom and dom.count("<mark") >= 1


@pytest.mark.browser
def test_every_figure_of_features_draws_and_labels_stay_text(tmp_path):
    values, names, kinds = (
        np.arange(12.0).reshape(4, 3),
        [7, "<b>bold", "$x$"],
        ["a", "b", "a", EVIL],
    )
    titles = {"title": "t", "x_title": "x", "y_title": "y"}
    intervals = {"SAE": ([1.0], [0.5], [1.5]), "null": ([0.2], None, None)}
    figures = [
        feature_plots.text_feature_heatmap(values, names, kinds),
        feature_plots.category_feature_heatmap(values, [*kinds[:3], "d"], names),
        feature_plots.coactivation_heatmap(np.eye(3), names),
        feature_plots.firing_density({"SAE": [0.0, 0.01], "random": [0.2]}),
        plots.intervals(intervals, ["a"], reference=0.5, **titles),
        plots.scatter([1, 2, 3], [3, 2, 1], marked=[1, 0, 0], diagonal=True, **titles),
        plots.lines({"a": [1, 100]}, log_y=True, reference=2, **titles),
        plots.lines({}, **titles),
        plots.bars({"a": [1, 2]}, **titles),
        plots.attention_map({"one": np.eye(2), "two": np.eye(2)}, ["a", "a"], title="t"),
    ]
    write_plotly_js(tmp_path)
    elements = "\n".join(
        figure_element(figure_json(figure), f"f{i}") for i, figure in enumerate(figures)
    )
    page = tmp_path / "figures.html"
    page.write_text(
        f'<meta charset="utf-8"><script src="plotly.min.js"></script>{elements}', encoding="utf-8"
    )
    dom, console = open_page(page, tmp_path / "profile")
    assert not console
    drawn = dom.split('id="f')[1:]
    assert len(drawn) >= len(figures) and all(f'id="f{i}"' in dom for i in range(len(figures)))
    assert dom.count('class="main-svg"') >= len(figures)
    assert "&lt;b&gt;bold" in dom and ">$x$" in dom and "<title>owned</title>" not in dom


@pytest.mark.browser
def test_the_index_opens_offline(outputs, tmp_path):
    dom, console = open_page(outputs / "index.html", tmp_path / "profile")
    assert not console
    assert "phase_0_sample.html" in dom


@pytest.mark.browser
def test_the_browser_test_can_fail(tmp_path):
    page = tmp_path / "broken.html"
    page.write_text(
        '<html><script src="missing.js"></script><script>Plotly.newPlot("a")</script></html>'
    )
    dom, console = open_page(page, tmp_path / "profile")
    assert any("Plotly is not defined" in line for line in console)
    assert "main-svg" not in dom


@pytest.mark.browser
def test_the_readmes_picture_is_as_high_as_its_page_or_the_limit(tmp_path):
    from readme_tables import screenshot

    page = tmp_path / "page.html"
    page.write_text('<style>body{margin:0}</style><div style="height:150px">text</div>')
    if find_browser() is None:
        pytest.skip("no Chromium: install it (apt install chromium) to run the browser tests")
    for limit, height in ((400, 150), (100, 100)):
        picture = asyncio.run(screenshot(page, 300, limit))
        size = [int.from_bytes(picture[at : at + 4], "big") for at in (16, 20)]
        assert size == [600, 2 * height]  # twice as fine


@pytest.mark.browser
def test_chromium_draws_a_png_of_a_figure(monkeypatch):
    if find_browser() is None:
        pytest.skip("no Chromium: install it (apt install chromium) to run the browser tests")
    monkeypatch.setattr(images, "_browser", None)
    picture = images.render_png(
        go.Figure(go.Scatter(y=[1, 2]), layout={"width": 300, "height": 200})
    )
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(picture[16:20], "big"), int.from_bytes(picture[20:24], "big")) == (
        300,
        200,
    )


@pytest.mark.parametrize(
    ("markdown", "sentence"),
    [
        (
            "## 3. Which tokens count?\nTexts become one batch. `real` marks.",
            "Texts become one batch",
        ),
        ("First part.\n\n**Control**: the MLP left out.", "Control"),
        ("A [link](https://example.org) and _more_", "A link and more"),
        ("# Only a heading", "untitled"),
    ],
)
def test_the_sentence_above_a_cell_names_what_it_shows(markdown, sentence):
    assert first_sentence(markdown) == sentence
