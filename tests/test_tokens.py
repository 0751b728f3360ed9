"""Highlighted tokens: one scale, only what counts, everything escaped, readable, small."""

import re

import numpy as np
import pytest
import torch

from lenslab.show import tokens
from lenslab.show.tokens import (
    HUES,
    STEPS,
    feature_strips,
    highlight,
    highlight_batch,
    token_strip,
    visible,
)
from lenslab.tokens import tokenize


def colours(body: str) -> dict[str, str]:
    """Token -> its class ('' where it has no colour), of a highlighted body's tokens alone."""
    inside = "".join(re.findall(r'<div class="t">(.*?)</div>', body, re.DOTALL))
    found = re.findall(r'<(mark|u|span|i)(?: class="(\w+)")?(?: title="[^"]*")?>([^<]*)</', inside)
    return {text: kind for _, kind, text in found}


def test_one_scale_for_all_texts_so_a_weak_text_looks_weak():
    """W4.14: with a scale per text both would have the full colour."""
    body = highlight([["strong"], ["weak"]], [[12.0], [1.0]]).body
    assert colours(body) == {"strong": "p12", "weak": "p1"}
    assert "0 " in body and "12.000" in body and "for all 2 texts" in body


def test_what_does_not_count_is_grey_and_has_no_part_in_scale_and_maximum():
    """W4.14: the printed maximum was that of BOS."""
    body = highlight(
        [["<s>", "a", "b", "", ""]], [[99.0, 2.0, 1.0, 50.0, 50.0]], counted=[[0, 1, 1, 0, 0]]
    ).body
    found = colours(body)
    assert found["&lt;s&gt;"] == "x" and found["a"] == "p12" and found["b"] == "p6"
    assert "max 2.000" in body and "99.0" not in body and "50.0" not in body
    assert "+2 pad" in body and "not counted" in body


def test_padding_does_not_count_even_where_nobody_says_so():
    assert "max 2.000" in highlight(["a", ""], [2.0, 9.0]).body


def test_steps_are_those_of_the_scale_and_none_at_zero():
    body = highlight([f"t{i}" for i in range(5)], [0.0, 1.0, 2.0, 2.01, 24.0]).body
    assert colours(body) == {"t0": "", "t1": "p1", "t2": "p1", "t3": "p2", "t4": "p12"}


def test_negative_values_have_their_own_hue_and_a_legend_on_both_sides():
    body = highlight(["up", "down"], [1.0, -4.0]).body
    assert colours(body) == {"up": "p3", "down": "n12"}
    assert "−4.000" in body and "max -4.000" in body


def test_tooltips_hold_three_decimals_and_the_id():
    assert 'title="1.235 · id 17"' in highlight(["a"], [1.2346], ids=[17]).body


def test_nothing_in_a_text_becomes_markup():
    evil = "<script>alert('x')</script>\"&"
    body = highlight([[evil]], [[1.0]], labels=[evil], title=evil, target=evil).body
    assert "<script" not in body
    assert body.count("&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;&quot;&amp;") == 4


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


def test_a_page_stays_on_one_line_when_told():
    assert "↵</" in highlight(["a\n"], [1.0], breaks=False).body
    assert "↵\n</" in highlight(["a\n"], [1.0]).body


def test_a_batch_uses_its_mask_and_the_scale_of_all_its_texts(model):
    batch = tokenize(model, ["A cat sat", "2 + 2", "Paris"])
    values = torch.zeros(batch.tokens.shape)
    values[:, 0] = 100.0  # BOS
    values[0, 1], values[1, 1] = 8.0, 2.0
    body = highlight_batch(batch, values, rows=[1], labels=["sum"]).body
    assert "max 2.000" in body and "8.000" in body and "100.0" not in body and "<b" in body
    assert f"id {int(batch.tokens[1, 1])}" in body
    with pytest.raises(ValueError, match="the batch is"):
        highlight_batch(batch, values[:2])


def test_left_padding_is_told_from_text(model):
    batch = tokenize(model, ["A cat sat on the mat.", "2"], pad_side="left")
    values = batch.real.float()
    body = highlight_batch(batch, values).body
    padding = int((~batch.attention).sum())
    assert padding and f"+{padding} pad" in body and body.count("max 1.000") == 2


def test_tensors_of_any_precision_are_taken():
    assert "max 2.000" in highlight(["a"], torch.tensor([2.0], dtype=torch.bfloat16)).body


def test_several_features_on_one_text_each_with_its_own_scale():
    body = feature_strips(
        ["<s>", "a", "b"], [[9, 1.0, 0], [9, 0, 50.0]], ["one", "two"], counted=[0, 1, 1]
    ).body
    assert "0 to 1.000" in body and "0 to 50.000" in body and "9.000" not in body
    assert body.count("p12") == 2
    with pytest.raises(ValueError, match="1 scales for 2 features"):
        feature_strips(["a"], [[1.0], [2.0]], ["one", "two"], scales=[1.0])


def test_the_target_category_is_told_from_the_others():
    body = highlight([["a"], ["b"]], [[1.0], [1.0]], labels=["math", "web"], target="math").body
    assert colours(body) == {"a": "p12", "b": "o12"}
    assert body.count('class="r z"') == 1 and "grey tones" in body


def test_long_texts_and_many_texts_are_cut_and_the_cut_is_named():
    body = highlight(
        [str(i) for i in range(300)], [float(i == 150) for i in range(300)], window=20
    ).body
    assert (
        "130 tokens …" in body
        and "… 129 tokens" in body
        and ">150<" in body
        and ">129<" not in body
    )
    many = highlight([["a"]] * 30, [[float(i)] for i in range(30)], max_texts=5).body
    assert many.count("<mark") + many.count("<u") and "25 of 30 texts left out" in many
    assert "29.000" in many  # the scale is that of all, shown or not


def test_a_view_stays_within_its_size(monkeypatch):
    monkeypatch.setattr(tokens, "LIMIT_KB", 2)
    body = highlight([["token"] * 20] * 10, [[1.0] * 20] * 10).body
    assert len(body) < 6000 and "of 10 texts left out" in body


def test_an_inactive_feature_says_so():
    body = highlight(["a", "b"], [0.0, 0.0]).body
    assert "Not active" in body and "not active" in body


def test_values_above_a_given_scale_are_named():
    body = highlight(["a", "b"], [1.0, 5.0], scale=2.0).body
    assert colours(body) == {"a": "p6", "b": "p12"} and "1 tokens are above the scale" in body


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(strings=[], values=[]), "no texts"),
        (dict(strings=["a", "b"], values=[1.0]), "Text 0 has 2 tokens"),
        (dict(strings=[["a"]], values=[[1.0], [2.0]]), "2 rows of values for 1 texts"),
        (dict(strings=["a"], values=[np.nan]), "NaN or Inf"),
        (dict(strings=["a"], values=[1.0], scale=0.0), "positive"),
        (dict(strings=[["a"]], values=[[1.0]], labels=["x", "y"]), "labels"),
        (dict(strings=["a"], values=[1.0], counted=[1, 0]), "mask"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        highlight(**options)


def test_nan_where_it_does_not_count_is_no_matter():
    assert "max 1.000" in highlight(["<s>", "a"], [np.nan, 1.0], counted=[0, 1]).body


def test_the_printed_strip_names_the_strongest_in_order_of_the_text():
    strip = token_strip(
        ["<s>", " =", "x", " ^", "\n"], [99, 25.44, 0, 34.4, 10.2], counted=[0, 1, 1, 1, 1], n=2
    )
    assert strip == "« =» 25.4  «^» 34.4  and 1 weaker".replace("«^»", "« ^»")
    assert token_strip(["a"], [0.0]) == "not active"


def test_a_view_shows_itself_and_saves_as_a_page(tmp_path, monkeypatch):
    monkeypatch.setenv("LENSLAB_OUTPUTS", str(tmp_path))
    view = highlight(["a"], [1.0], title="A <title>")
    assert view._repr_html_() == str(view) and "<style>" in str(view) and "<script" not in str(view)
    file = view.save("first")
    text = file.read_text(encoding="utf-8")
    assert (
        file == tmp_path / "results" / "first.html"
        and "<title>A &lt;title&gt;</title>" in text
        and str(view) in text
    )
    with pytest.raises(ValueError, match="cannot name"):
        view.save("../elsewhere")


def test_a_view_says_nothing_where_notebooks_are_compared():
    assert re.fullmatch(r"<[\w.]+ object[^>]*>", repr(highlight(["a"], [1.0])))


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
