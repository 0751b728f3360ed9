"""What a figure leaves in a notebook and on disk, with and without Chromium."""

import base64
import os
import signal
import time
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
import pytest

from lenslab.show import images
from lenslab.show.tokens import View


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setattr(images, "_browser", None)
    monkeypatch.setenv("LENSLAB_OUTPUTS", str(tmp_path))
    monkeypatch.delenv("LENSLAB_PNG", raising=False)


def decode(array: dict) -> np.ndarray:
    return np.frombuffer(base64.b64decode(array["bdata"]), dtype=array["dtype"])


def test_float_arrays_are_halved_and_keep_six_digits_and_gaps():
    values = np.array([1 / 3, 1e-30, -2.5e7, np.nan, np.inf])
    y = images.figure_json(go.Figure(go.Scatter(y=values)))["data"][0]["y"]
    assert y["dtype"] == "f4"
    np.testing.assert_allclose(decode(y), values, rtol=1e-6)


def test_values_beyond_single_precision_are_kept():
    values = np.array([1e300, 1.0])
    y = images.figure_json(go.Figure(go.Scatter(y=values)))["data"][0]["y"]
    np.testing.assert_array_equal(decode(y), values)


def test_integers_text_and_structure_are_kept():
    value = {
        "a": [1, True, None, "0.123456789", 0.123456789],
        "b": {"dtype": "i4", "bdata": "AAAA"},
    }
    assert images.compact(value) == {"a": [1, True, None, "0.123456789", 0.123457], "b": value["b"]}


def test_without_chromium_a_figure_is_plotlys_own_data_and_says_so_once(monkeypatch, capsys):
    monkeypatch.setenv("LENSLAB_PNG", "1")
    monkeypatch.setattr(images, "find_browser", lambda: None)
    monkeypatch.setattr(images, "in_kernel", lambda: True)
    for _ in range(2):
        bundle = images.FigureRenderer().to_mimebundle(go.Figure(go.Bar(y=[1, 2])).to_dict())
        assert set(bundle) == {images.PLOTLY_MIME}
    assert capsys.readouterr().err.count("No PNG") == 1


def test_with_a_picture_both_kinds_are_in_the_bundle(monkeypatch):
    monkeypatch.setenv("LENSLAB_PNG", "1")
    monkeypatch.setattr(images, "in_kernel", lambda: True)
    monkeypatch.setattr(images, "render_png", lambda figure: b"picture")
    bundle = images.FigureRenderer().to_mimebundle(go.Figure(go.Bar(y=[1, 2])).to_dict())
    assert base64.b64decode(bundle["image/png"]) == b"picture"
    assert bundle[images.PLOTLY_MIME]["data"][0]["type"] == "bar"


def test_a_plain_script_writes_its_figures_and_prints_where(tmp_path, monkeypatch, capsys):
    """As in `python phase_1_loading.py`: no kernel runs here either."""
    monkeypatch.setattr(pio.renderers, "default", "json")
    images.set_up_figures()
    go.Figure(go.Bar(y=[1, 2]), {"title": {"text": "Head 3.0: <b>&lt;s&gt;</b>"}}).show()
    go.Figure(go.Bar(y=[1, 2])).show()
    files = [tmp_path / "results" / name for name in ("head_3_0_s.html", "figure.html")]
    assert capsys.readouterr().out.split() == list(map(str, files))
    assert all("Plotly.newPlot" in file.read_text() for file in files)


def test_a_renderer_chosen_by_the_user_stays(monkeypatch):
    monkeypatch.setattr(pio.renderers, "default", "json")
    monkeypatch.setenv("PLOTLY_RENDERER", "json")
    images.set_up_figures()
    assert pio.renderers.default == "json"
    monkeypatch.delenv("PLOTLY_RENDERER")
    images.set_up_figures()
    assert pio.renderers.default == "lenslab"


def test_a_saved_figure_is_a_page_that_loads_only_the_library_beside_it(tmp_path):
    file = images.save_figure(
        go.Figure(go.Bar(y=[1, 2]), layout={"title": {"text": "<b>A</b></script>"}}), "bars"
    )
    text = file.read_text()
    assert file == tmp_path / "results" / "bars.html"
    assert (file.parent / "plotly.min.js").stat().st_size > 1_000_000
    assert 'src="plotly.min.js"' in text
    assert "http" not in text
    assert text.count("</script>") == 2  # the library and the figure; the title closes nothing
    assert "<title>A</title>" in text


@pytest.mark.parametrize("name", ["v", "v.html", Path("v.html")])
def test_a_name_with_or_without_its_suffix_is_the_same_page(name, tmp_path):
    assert View("<b>1</b>").save(name) == tmp_path / "results" / "v.html"
    assert [file.name for file in (tmp_path / "results").iterdir()] == ["v.html"]


@pytest.mark.parametrize("name", ["mine/v", "mine/v.html", "./v.html"])
def test_a_name_with_a_folder_goes_there(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = View("<b>1</b>").save(name)
    assert file.resolve() == (tmp_path / name).with_suffix(".html") and file.is_file()
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("name", ["", ".html", "folder/"])
def test_a_page_needs_a_name(name):
    with pytest.raises(ValueError, match="cannot name"):
        images.save_page(name, "", "")


BROWSERS = {
    "dies at once": "exit 1",
    "dies and leaves a child": "sleep 600 &\nexit 1",
    "hangs": "exec sleep 600",
    "hangs with a child and will not be ended": "trap '' TERM INT HUP\nsleep 600 &\nsleep 600",
}


@pytest.mark.parametrize("kind", BROWSERS)
def test_a_browser_that_dies_or_hangs_costs_a_picture_and_no_more(
    kind, monkeypatch, tmp_path, capfd
):
    script = tmp_path / "chromium"
    script.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/group\n{BROWSERS[kind]}\n")
    script.chmod(0o755)
    monkeypatch.setenv("BROWSER_PATH", str(script))
    monkeypatch.setattr(images, "SECONDS", 2)
    started = time.monotonic()
    assert images.render_png(go.Figure()) is None and images.render_png(go.Figure()) is None
    assert time.monotonic() - started < 10
    assert capfd.readouterr().err.count("No PNG") == 1
    group = int((tmp_path / "group").read_text())
    for _ in range(50):
        if not _members(group):
            break
        time.sleep(0.1)
    assert not _members(group)  # nobody is left behind


def _members(group: int) -> list[str]:
    """Processes of a group that still run."""
    stats = [_stat(file) for file in Path("/proc").glob("[0-9]*/stat")]
    return [stat for stat in stats if stat and int(stat[2]) == group and stat[0] != "Z"]


def _stat(file: Path) -> list[str]:
    """(state, parent, group, ...) of a process."""
    try:
        return file.read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):  # it is gone, or just going
        return []


def test_a_browser_stopped_after_a_picture_is_given_up(monkeypatch):
    if images.find_browser() is None:
        pytest.skip("no Chromium: install it (apt install chromium) to run the browser tests")
    assert images.render_png(go.Figure(go.Bar(y=[1, 2]))).startswith(b"\x89PNG")
    process = images._browser.kaleido.subprocess
    os.killpg(process.pid, signal.SIGSTOP)
    monkeypatch.setattr(images, "SECONDS", 2)
    assert images.render_png(go.Figure(go.Bar(y=[1, 2]))) is None
    assert process.wait(timeout=10) is not None and images._browser is False
