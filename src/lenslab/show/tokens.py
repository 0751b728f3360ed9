"""Activations on the text itself: every token coloured by how strongly a feature is active there.

1. One colour scale per feature over all texts given, its largest activation, in a legend with
   numbers: a weak text looks weak. Tokens that do not count (BOS, padding) have no part in it and
   are shown grey.
2. Each activation becomes one of twelve steps; a step is a CSS class, so that a thousand tokens
   stay small.
3. What a token holds is escaped; newlines, tabs, lone bytes and control characters become visible
   signs.
4. Colours are thin layers over the notebook's own ground, so that text keeps its contrast in light
   and dark. Where a page drops styles (GitHub, an untrusted notebook), strong tokens stay marked
   and weak ones underlined.
5. What is not shown is named: a line says how much.

No scripts, nothing loaded: the HTML works in notebooks, in saved pages and in mails.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lenslab.show.images import save_page
from lenslab.show.plots import Labels, Number, Values, numbers
from lenslab.tokens import TokenBatch

STEPS = 12  # of intensity
# Strengths up to these keep text readable on white and on black (contrast at least 4.5, tested)
HUES = {"p": ((200, 80, 45), 0.62), "n": ((64, 128, 186), 0.6)}  # above zero, below
WINDOW = 60  # tokens on either side of the strongest

PLACEHOLDER = "▯"
BYTES = re.compile(r"(?:<0x[0-9A-Fa-f]{2}>)+")
BIDI = [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]  # would reorder the page around them
SIGNS = {code: chr(0x2400 + code) for code in range(32)}
SIGNS |= dict.fromkeys([*range(0x7F, 0xA0), *BIDI], PLACEHOLDER)
SIGNS |= {ord("\n"): "↵\n", ord("\t"): "→"}


@dataclass(frozen=True, repr=False)
class View:
    """A piece of self-contained HTML: shows itself in notebooks, is its HTML as a string, saves as
    a page."""

    body: str
    title: str = ""

    def _repr_html_(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return f'<div class="lenslab-view"><style>{STYLE}</style>{self.body}</div>'

    # as plain objects look: notebooks' comparison knows that this says nothing
    def __repr__(self) -> str:
        return "<lenslab.show.tokens.View object>"

    def save(self, name: str | Path) -> Path:
        """Write it as a page and return its path: with or without `.html`, in `outputs/results/`,
        or where the folder of `name` says. Raises as `save_page`."""
        return save_page(name, self.title, str(self))


@dataclass(frozen=True)
class Strip:
    """One text as it is shown: its tokens, a number for each, and which of them count."""

    strings: Sequence[str]  # '' is padding
    values: np.ndarray  # [token]
    counted: np.ndarray  # [token], bool
    label: str = ""

    def __post_init__(self) -> None:
        if not (len(self.strings),) == self.values.shape == self.counted.shape:
            sizes = f"{list(self.values.shape)} values and {list(self.counted.shape)} marks"
            raise ValueError(f"A text of {len(self.strings)} tokens has {sizes}.")
        if not np.isfinite(self.values[self.counted]).all():
            raise ValueError("NaN or Inf at a token that counts: such an activation has no colour.")

    @property
    def strength(self) -> np.ndarray:
        """Absolute activation `[token]`, zero where a token does not count."""
        return np.where(self.counted, np.abs(self.values), 0)

    @property
    def best(self) -> float:
        """The activation of largest size among the tokens that count."""
        return float(self.values[self.strength.argmax()]) if self.strength.any() else 0.0

    def render(self, scale: float, centre: int | None = None) -> str:
        """As HTML: label and maximum, then the tokens, at most `WINDOW` on either side of the
        centre, by default the strongest."""
        written = [i for i, string in enumerate(self.strings) if string] or [0]
        begin = written[0]
        end = written[-1] + 1
        if centre is None:
            centre = self.strength.argmax() if self.best else begin
        first = max(centre - WINDOW, begin)
        last = min(centre + WINDOW + 1, end)
        tokens = [self._token(i, scale) for i in range(first, last)]
        if first > begin:
            tokens.insert(0, f'<i class="x">{first - begin} tokens …</i>')
        if last < end:
            tokens.append(f'<i class="x">… {end - last} tokens</i>')
        if padding := sum(not string for string in self.strings):
            tokens.append(f' <i class="x" title="padding, not counted">+{padding} pad</i>')
        name = f"<b>{html.escape(self.label)}</b> " if self.label else ""
        most = f"max {self.best:.3f}" if self.best else "not active"
        head = f'<div class="h">{name}{coloured(most, self.best, scale)}</div>'
        return f'<div class="r">{head}<div class="t">{"".join(tokens)}</div></div>'

    def _token(self, i: int, scale: float) -> str:
        content, hint = visible(self.strings[i])
        content = html.escape(content)
        if not self.counted[i]:
            return f'<i class="x" title="not counted">{content}</i>'
        title = f"{self.values[i]:.3f}" + (f" · {hint}" if hint else "")
        return coloured(content, float(self.values[i]), scale, title)


def highlight(
    strips: Sequence[Strip], *, scale: Number | None = None, title: str = "", max_texts: int = 20
) -> View:
    """Texts under each other, each token coloured by its activation, all on one scale, with its
    legend.

    Args:
        scale: what has the full colour; default the largest absolute value over all texts given,
            shown or not.
        max_texts: shown, in the given order.
    """
    full = float(scale or max(abs(strip.best) for strip in strips))
    rows = [strip.render(full) for strip in strips[:max_texts]]
    notes = []
    if len(rows) < len(strips):
        notes.append(f"{len(strips) - len(rows)} of {len(strips)} texts left out")
    if above := sum(int((strip.strength > full * (1 + 1e-6)).sum()) for strip in strips):
        notes.append(f"{above} tokens are above the scale and have its last colour")
    rows += [f'<p class="k">{note}</p>' for note in notes]
    signed = any((strip.values[strip.counted] < 0).any() for strip in strips)
    legend = _legend(full, signed, len(strips))
    return View(f'{heading(title)}<div class="lt">{legend}{"".join(rows)}</div>', title)


def highlight_batch(
    batch: TokenBatch,
    values: Values,
    *,
    rows: Labels | None = None,
    labels: Labels | None = None,
    scale: Number | None = None,
    **options: Any,
) -> View:
    """Texts of a batch on the scale of the whole batch; `values [text, pos]`. BOS and padding do
    not count.

    `rows` chooses texts and their order, `labels` are those of the chosen rows; `options` those of
    `highlight`. Raises as `highlight`, and ValueError for values of another shape than the batch.
    """
    values = numbers(values)
    if values.shape != tuple(batch.tokens.shape):
        raise ValueError(f"values are {list(values.shape)}, the batch {list(batch.tokens.shape)}.")
    rows = [int(row) for row in (range(len(batch)) if rows is None else rows)]
    labels = [""] * len(rows) if labels is None else labels
    # the scale of all, however few are shown
    scale = scale or np.abs(values[batch.real.cpu()]).max(initial=0)
    return highlight(_strips(batch, rows, values[rows], labels), scale=scale, **options)


def feature_strips(
    batch: TokenBatch, row: int, values: Values, names: Labels, *, title: str = ""
) -> View:
    """One text of a batch once for every feature, `values [feature, pos]`, each on its own scale:
    its largest absolute value, which stands in front of it. Raises as `highlight`."""
    strips = _strips(batch, [row] * len(values), values, names)
    # every strip shows the same tokens, or they could not be compared
    centre = int(np.max([strip.strength for strip in strips], axis=0).argmax())
    rows = [strip.render(abs(strip.best), centre) for strip in strips]
    note = '<p class="k">Every line has its own scale, up to its maximum. Grey: not counted.</p>'
    return View(f'{heading(title)}<div class="lt one">{note}{"".join(rows)}</div>', title)


def _strips(batch: TokenBatch, rows: Labels, values: Values, labels: Labels) -> list[Strip]:
    """A strip for each of the rows, with values `[row, pos]` and a label of its own."""
    real = batch.real.cpu().numpy()
    return [
        Strip(batch.strings(row), numbers(value), real[row], label=str(label))
        for row, value, label in zip(rows, values, labels, strict=True)
    ]


def _legend(full: float, signed: bool, n: int) -> str:
    if not full:
        return '<p class="k">Not active at any token that counts. Grey: not counted.</p>'
    steps = [s * full / STEPS for s in range(-STEPS if signed else 1, STEPS + 1) if s]
    marks = "".join(coloured("&nbsp;&nbsp;", v, full, title=f"up to {v:.3f}") for v in steps)
    low = f"−{full:.3f}" if signed else "0"
    over = f" for all {n} texts" if n > 1 else ""
    scale = f'<span class="b">{low} {marks} {full:.3f}</span> one scale{over}.'
    return f'<p class="k">{scale} <i class="x">grey, italic</i>: not counted.</p>'


def visible(token: str) -> tuple[str, str]:
    """A token as it is shown, and a hint for what cannot be: `'<0xE2>'` -> `('▯', 'bytes E2')`. Not
    escaped."""
    hints = [f"bytes {' '.join(re.findall('0x(..)', run))}" for run in BYTES.findall(token)]
    text = BYTES.sub(PLACEHOLDER, token).encode("utf-8", "replace").decode("utf-8")
    text = re.sub("\ufffd+", PLACEHOLDER, text).replace("\r\n", "\n")
    hints += [f"U+{ord(c):04X}" for c in text if ord(c) in SIGNS and c not in "\n\t"]
    return text.translate(SIGNS) or PLACEHOLDER, ", ".join(hints)


def coloured(content: str, value: float, scale: float, title: str = "") -> str:
    """HTML with the colour that a value has on a scale; `content` is HTML already."""
    attribute = f' title="{html.escape(title)}"' if title else ""
    step = min(math.ceil(abs(value) / scale * STEPS), STEPS) if scale else 0
    if not step:
        return f"<span{attribute}>{content}</span>"
    # `mark` and `u` show without any style; with it they differ only in colour
    tag = "mark" if 2 * step > STEPS else "u"
    return f'<{tag} class="{"n" if value < 0 else "p"}{step}"{attribute}>{content}</{tag}>'


def heading(title: str) -> str:
    """A title as HTML, escaped; nothing for none."""
    return f'<div class="lh"><b>{html.escape(title)}</b></div>' if title else ""


STYLE = """
.lenslab-view{font-size:13px;line-height:1.45;max-width:1000px}
.lenslab-view .lh{font-size:15px;margin:.4em 0}
.lenslab-view .k{margin:.3em 0;font-size:12px}
.lt .b{white-space:nowrap}.lt .b mark,.lt .b u{border-radius:0}
.lt .r{display:flex;gap:.8em;padding:.2em 0 .2em .6em;margin:.3em 0}
.lt .r{border-left:3px solid rgba(99,99,99,.3)}
.lt .h{flex:0 0 9.5em;font-size:12px;overflow-wrap:anywhere}.lt .h b{display:block}
.lt .t{flex:1;min-width:0;font-family:ui-monospace,Menlo,Consolas,monospace;line-height:1.6}
.lt .t{white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:plaintext}
.lt.one .t{white-space:normal}
.lt mark,.lt u{background:none;color:inherit;text-decoration:none;border-radius:2px}
.lenslab-view td,.lenslab-view th{text-align:left;padding:.1em 1.2em .1em 0}
.lt .x{opacity:.72;unicode-bidi:isolate}
""".replace("\n", "")
# twelve steps of both hues over whatever ground the notebook has
for hue, ((red, green, blue), most) in HUES.items():
    for step in range(1, STEPS + 1):
        alpha = 0.06 + (most - 0.06) * step / STEPS
        STYLE += f".lt .{hue}{step}{{background:rgba({red},{green},{blue},{alpha:.2f})}}"
