"""Reports and live curves: what is stored, printed and said, with and without a browser."""

import time

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TEXTS
from test_sae_pretrained import tiny_sae

from lenslab.features.activations import encode_features
from lenslab.runtime import derive_generator
from lenslab.sae.train import TensorSource, TrainingConfig, build_sae, train
from lenslab.show import images, plots, report
from lenslab.show.feature_plots import strength_bars
from lenslab.show.tokens import View
from lenslab.tokens import tokenize

EVIL = "</script><b>bold</b> \U0001f600 \u0645\u0631\u062d\u0628\u0627 $x$ " + "W" * 400
CONFIG = TrainingConfig(40, batch=4, log_every=1)  # ten steps, four vectors each


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setattr(images, "_browser", False)  # no PNGs
    monkeypatch.setenv("LENSLAB_OUTPUTS", str(tmp_path))


def row(step: int) -> dict[str, float | int]:
    return {"step": step, "vectors": 4 * step, "fvu": 1 / step, "l0": 4.0, "dead": step}


@pytest.fixture
def shown(monkeypatch):
    """What a kernel would be sent, in order: figures, and None where the output is cleared."""
    sent = []
    monkeypatch.setattr(images, "in_kernel", lambda: True)
    monkeypatch.delenv("LENSLAB_PNG", raising=False)
    monkeypatch.setattr(report, "clear_output", lambda wait: sent.append(None))
    monkeypatch.setattr(report.go.Figure, "show", lambda figure: sent.append(figure))
    return sent


def test_live_curves_are_drawn_now_and_then_and_at_the_end(shown):
    watch = report.live_curves(CONFIG)
    for step in range(1, 11):
        watch("a", row(step))
        watch("b", row(step))
    assert shown[::2] == [None, None]  # each picture takes the place of the one before
    first, last = shown[1::2]  # all else came too fast
    assert [len(trace.x) for trace in last.data] == [10] * 6 and len(first.data) == 3


def test_live_curves_of_a_training_that_goes_on_have_every_row_once(shown, monkeypatch):
    monkeypatch.setattr(report, "EVERY", 0.0)
    watch = report.live_curves(CONFIG)
    for step in (1, 2, 3, 1, 2, 3, 4):
        watch("a", row(step))
    assert list(shown[-1].data[0].x) == [4, 8, 12, 16]


def test_a_notebook_that_is_built_keeps_the_last_curves_alone(shown, monkeypatch):
    monkeypatch.setenv("LENSLAB_PNG", "1")
    watch = report.live_curves(CONFIG)
    for step in range(1, 11):
        watch("a", row(step))
    assert len(shown) == 1 and len(shown[0].data[0].x) == 10


def test_outside_a_kernel_curves_are_shown_once_at_the_end(monkeypatch):
    figures = []
    monkeypatch.setattr(report.go.Figure, "show", lambda figure: figures.append(figure))
    watch = report.live_curves(CONFIG)
    for step in range(1, 11):
        watch("a", row(step))
    assert len(figures) == 1 and len(figures[0].data[0].x) == 10


def test_curves_of_several_that_were_finished_before_are_shown_once(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(report.go.Figure, "show", lambda figure: figures.append(figure))
    source = TensorSource(torch.randn(100, 8, generator=derive_generator(0, "x")))
    for _ in "ab":
        saes = {name: build_sae("topk", 8, 16, k=2) for name in "abc"}
        watch = report.live_curves(CONFIG)
        train(saes, source, CONFIG, folder=tmp_path, progress=False, watch=watch)
    assert [len(figure.data) for figure in figures] == [9, 9]


def test_whoever_watches_changes_no_history(tmp_path):
    def watch(name, row):
        row["name"] = row.pop("fvu")

    source = TensorSource(torch.randn(100, 8, generator=derive_generator(0, "x")))
    for _ in "ab":
        saes = {"a": build_sae("topk", 8, 16, k=2)}
        result = train(saes, source, CONFIG, folder=tmp_path, progress=False, watch=watch)["a"]
        assert "fvu" in result.history and "name" not in result.history


def sections(model) -> dict:
    fa = encode_features(model, tiny_sae(model), tokenize(model, TEXTS), progress=False)
    feature = int(np.argmax(fa.pool("max").max(axis=0).toarray()))
    history = pd.DataFrame([row(step) for step in range(1, 11)])
    wide = plots.lines({EVIL: [1, 2]}, title="t", x_title="x", y_title="y").update_layout(
        width=1200
    )
    return {
        "Training": [EVIL, report.training_curves({"a": history})],
        EVIL: [pd.DataFrame({EVIL: [EVIL]}, index=[EVIL]), wide, View("<b>kept</b>")],
        "Feature": report.feature_page(model, tiny_sae(model), fa, feature),
    }


def test_a_report_without_a_browser_is_a_page_and_says_so(model, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(images, "find_browser", lambda: None)
    old = tmp_path / "results" / "r.pdf"
    old.parent.mkdir()
    old.write_text("of an earlier report")
    file = report.save_report("r", EVIL, sections(model))
    assert file == tmp_path / "results" / "r.html" and not old.exists()
    said = capsys.readouterr().err
    assert said.count("No PDF") == 1 and "Chromium" in said and "free some space" not in said
    text = file.read_text(encoding="utf-8")
    assert "<b>bold" not in text.replace("<b>kept</b>", "") and "&lt;b&gt;bold" in text
    assert text.count("</script>") == text.count("<script")
    assert '"width":1200' not in text and "http" not in text.replace("http-equiv", "")
    assert "Strongest texts" in text and "promoted" in text


def test_a_report_is_printed_a_section_a_page(model, monkeypatch):
    if images.find_browser() is None:
        pytest.skip("no Chromium: install it (apt install chromium) to run the browser tests")
    file = report.save_report("r", EVIL, sections(model))
    data = file.read_bytes()
    assert file.name == "r.pdf" and data.startswith(b"%PDF")
    assert data.count(b"/Type /Page\n") >= 3


def test_a_browser_that_hangs_costs_the_pdf_and_no_more(monkeypatch, tmp_path, capsys):
    script = tmp_path / "chromium"
    script.write_text("#!/bin/sh\nexec sleep 600\n")
    script.chmod(0o755)
    monkeypatch.setenv("BROWSER_PATH", str(script))
    monkeypatch.setattr(images, "SECONDS", 0.2)
    started = time.monotonic()
    file = report.save_report("r", "Title", {"One": ["text"]})
    assert file.suffix == ".html" and time.monotonic() - started < 10
    assert capsys.readouterr().err.count("No PDF") == 1


def test_a_browser_that_prints_nothing_is_no_pdf(monkeypatch, tmp_path, capsys):
    script = tmp_path / "chromium"
    script.write_text("#!/bin/sh\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("BROWSER_PATH", str(script))
    assert report.save_report("r", "Title", {"One": ["text"]}).suffix == ".html"
    assert "No PDF" in capsys.readouterr().err


def test_what_webgl_draws_is_printed_as_a_picture(monkeypatch):
    monkeypatch.setattr(images, "find_browser", lambda: None)
    monkeypatch.setattr(images, "render_png", lambda figure: b"picture")
    solid = strength_bars({"SAE": np.eye(2)}, "ab", title="t")
    flat = plots.lines({"a": [1]}, title="t", x_title="x", y_title="y")
    text = report.save_report("r", "Title", {"One": [solid, flat]}).read_text()
    assert text.count("<img") == 1 and text.count("plotly-graph-div") == 1
