"""What a figure leaves in a notebook and on disk, with and without Chromium."""

import base64

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
import pytest

from lenslab.show import images


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setattr(images, "_png_failed", False)
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
    monkeypatch.setattr(images, "_in_kernel", lambda: True)
    for _ in range(2):
        bundle = images.FigureRenderer().to_mimebundle(go.Figure(go.Bar(y=[1, 2])).to_dict())
        assert set(bundle) == {images.PLOTLY_MIME}
    assert capsys.readouterr().err.count("No PNG") == 1


def test_with_a_picture_both_kinds_are_in_the_bundle(monkeypatch):
    monkeypatch.setenv("LENSLAB_PNG", "1")
    monkeypatch.setattr(images, "_in_kernel", lambda: True)
    monkeypatch.setattr(images, "render_png", lambda figure: b"picture")
    bundle = images.FigureRenderer().to_mimebundle(go.Figure(go.Bar(y=[1, 2])).to_dict())
    assert base64.b64decode(bundle["image/png"]) == b"picture"
    assert bundle[images.PLOTLY_MIME]["data"][0]["type"] == "bar"


def test_a_plain_script_prints_no_figure(capsys):
    assert images.FigureRenderer().to_mimebundle({"data": [], "layout": {}}) == {}


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


@pytest.mark.parametrize("name", ["", "../escape", "a/b", ".hidden", "a b"])
def test_a_result_cannot_be_written_elsewhere(name):
    with pytest.raises(ValueError, match="cannot name"):
        images.save_figure(go.Figure(), name)
