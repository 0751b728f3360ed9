"""Highlighted tokens: one scale, only what counts, everything escaped, readable, small."""

import re

import numpy as np
import pytest
import torch

from lenslab.show.tokens import (
    HUES,
    STEPS,
    Strip,
    feature_strips,
    highlight,
    highlight_batch,
    visible,
)
from lenslab.tokens import tokenize


def strip(strings, values, counted=None, label="") -> Strip:
    """A strip from lists; every token counts unless told otherwise."""
    counted = np.ones(len(values)) if counted is None else np.array(counted)
    return Strip(strings, np.array(values), counted.astype(bool), label=label)


def body(*strips: Strip, **options) -> str:
    return highlight(strips, **options).body


def colours(body: str) -> dict[str, str]:
    """Token -> its class ('' where it has no colour), of a highlighted body's tokens alone."""
    inside = "".join(re.findall(r'<div class="t">(.*?)</div>', body, re.DOTALL))
    found = re.findall(r'<(mark|u|span|i)(?: class="(\w+)")?(?: title="[^"]*")?>([^<]*)</', inside)
    return {text: kind for _, kind, text in found}


def test_one_scale_for_all_texts_so_a_weak_text_looks_weak():
    """W4.14: with a scale per text both would have the full colour."""
    shown = body(strip(["strong"], [12.0]), strip(["weak"], [1.0]))
    assert colours(shown) == {"strong": "p12", "weak": "p1"}
    assert "12.000" in shown and "for all 2 texts" in shown


def test_what_does_not_count_is_grey_and_has_no_part_in_scale_and_maximum():
    """W4.14: the printed maximum was that of BOS."""
    values = [99.0, 2.0, 1.0, np.nan, 50.0]
    shown = body(strip(["<s>", "a", "b", "", ""], values, counted=[0, 1, 1, 0, 0]))
    found = colours(shown)
    assert found["&lt;s&gt;"] == "x" and found["a"] == "p12" and found["b"] == "p6"
    assert "max 2.000" in shown and "99.0" not in shown and "50.0" not in shown
    assert "+2 pad" in shown and "not counted" in shown


def test_steps_are_those_of_the_scale_and_none_at_zero():
    shown = body(strip([f"t{i}" for i in range(5)], [0.0, 1.0, 2.0, 2.01, 24.0]))
    assert colours(shown) == {"t0": "", "t1": "p1", "t2": "p1", "t3": "p2", "t4": "p12"}


def test_where_styles_are_dropped_the_stronger_half_is_marked_and_the_weaker_underlined():
    shown = body(strip(["strong", "weak", "none"], [7.0, 6.0, 0.0]), scale=12)
    inside = re.findall(r"<(\w+)[^>]*>(strong|weak|none)</", shown)
    assert inside == [("mark", "strong"), ("u", "weak"), ("span", "none")]


def test_negative_values_have_their_own_hue_and_a_legend_on_both_sides():
    shown = body(strip(["up", "down"], [1.0, -4.0]))
    assert colours(shown) == {"up": "p3", "down": "n12"}
    assert "−4.000" in shown and "max -4.000" in shown


def test_tooltips_hold_three_decimals():
    assert 'title="1.235"' in body(strip(["a"], [1.2346]))


def test_nothing_in_a_text_becomes_markup():
    evil = "<script>alert('x')</script>\"&"
    shown = body(strip([evil], [1.0], label=evil), title=evil)
    assert "<script" not in shown
    assert shown.count("&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;&quot;&amp;") == 3


@pytest.mark.parametrize(
    ("token", "shown", "hint"),
    [
        ("\n  x", "↵\n  x", ""),
        ("\r\n", "↵\n", ""),
        ("\ta", "→a", ""),
        (" the", " the", ""),
        ("<0xE2><0x82>", "▯", "bytes E2 82"),
        ("a\ufffd\ufffd", "a▯", ""),
        ("", "▯", ""),
        ("\x07", "␇", "U+0007"),
        ("\u202eabc", "▯abc", "U+202E"),
        ("\ud83d", "?", ""),
        ("👩\u200d🔬", "👩\u200d🔬", ""),
    ],
)
def test_what_cannot_be_seen_is_shown(token, shown, hint):
    assert visible(token) == (shown, hint)


def test_a_batch_uses_its_mask_and_the_scale_of_all_its_texts(model):
    batch = tokenize(model, ["A cat sat", "2 + 2", "Paris"])
    values = torch.zeros(batch.tokens.shape, dtype=torch.bfloat16)
    values[:, 0] = 100.0  # BOS
    values[0, 1], values[1, 1] = 8.0, 2.0
    shown = highlight_batch(batch, values, rows=[1], labels=["sum"]).body
    assert "max 2.000" in shown and "8.000" in shown and "100.0" not in shown
    assert "<b>sum</b>" in shown
    with pytest.raises(ValueError, match="the batch"):
        highlight_batch(batch, values[:2])


def test_left_padding_is_told_from_text(model):
    batch = tokenize(model, ["A cat sat on the mat.", "2"], pad_side="left")
    shown = highlight_batch(batch, batch.real.float()).body
    padding = int((~batch.attention).sum())
    assert padding and f"+{padding} pad" in shown and shown.count("max 1.000") == 2


def test_several_features_on_one_text_each_with_its_own_scale(model):
    batch = tokenize(model, ["2 + 2"])
    values = torch.zeros(3, batch.tokens.shape[1])
    values[:, 0] = 99.0  # BOS
    values[0, 1], values[1, 2] = 1.0, 50.0
    shown = feature_strips(batch, 0, values, ["one", "two", "three"]).body
    assert "max 1.000" in shown and "max 50.000" in shown and "99.0" not in shown
    tokens = "".join(re.findall(r'<div class="t">(.*?)</div>', shown, re.DOTALL))
    assert tokens.count("p12") == 2 and shown.count("not active") == 1
    with pytest.raises(ValueError):
        feature_strips(batch, 0, values, ["one"])


def test_long_texts_and_many_texts_are_cut_and_the_cut_is_named():
    values = [float(i == 150) for i in range(300)]
    shown = body(strip([str(i) for i in range(300)], values))
    assert "90 tokens …" in shown and "… 89 tokens" in shown
    assert ">150<" in shown and ">89<" not in shown
    many = body(*[strip(["a"], [float(i)]) for i in range(30)], max_texts=5)
    assert len(re.findall('<div class="r">', many)) == 5 and "25 of 30 texts left out" in many
    assert "29.000" in many  # the scale is that of all, shown or not


def test_an_inactive_feature_says_so():
    shown = body(strip(["a", "b"], [0.0, 0.0]))
    assert "Not active" in shown and "not active" in shown


def test_values_above_a_given_scale_are_named():
    shown = body(strip(["a", "b"], [1.0, 5.0]), scale=2.0)
    assert colours(shown) == {"a": "p6", "b": "p12"} and "1 tokens are above the scale" in shown


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="2 tokens"):
        strip(["a", "b"], [1.0])
    with pytest.raises(ValueError, match="marks"):
        strip(["a"], [1.0], counted=[1, 0])
    with pytest.raises(ValueError, match="NaN or Inf"):
        strip(["a"], [np.nan])


def test_a_view_shows_itself_and_saves_as_a_page(tmp_path, monkeypatch):
    monkeypatch.setenv("LENSLAB_OUTPUTS", str(tmp_path))
    view = highlight([strip(["a"], [1.0])], title="A <title>")
    assert view._repr_html_() == str(view) and "<style>" in str(view) and "<script" not in str(view)
    file = view.save("first")
    text = file.read_text(encoding="utf-8")
    assert file == tmp_path / "results" / "first.html" and str(view) in text
    assert "<title>A &lt;title&gt;</title>" in text
    # as plain objects look: the comparison of notebooks knows that this says nothing
    assert re.fullmatch(r"<[\w.]+ object[^>]*>", repr(view))


def luminance(colour) -> float:
    parts = [
        c / 255 / 12.92 if c / 255 <= 0.03928 else ((c / 255 + 0.055) / 1.055) ** 2.4
        for c in colour
    ]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


@pytest.mark.parametrize(
    ("ground", "ink"),
    [
        ((255, 255, 255), (0, 0, 0)),
        ((255, 255, 255), (51, 51, 51)),
        ((17, 17, 17), (255, 255, 255)),
        ((30, 30, 30), (204, 204, 204)),
    ],
)
def test_text_on_every_colour_keeps_its_contrast_in_light_and_dark(ground, ink):
    """WCAG AA: 4.5 for text."""
    for colour, most in HUES.values():
        for step in range(1, STEPS + 1):
            strength = most * step / STEPS
            mixed = [c * strength + g * (1 - strength) for c, g in zip(colour, ground, strict=True)]
            light, dark = sorted((luminance(mixed), luminance(ink)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (colour, step)
