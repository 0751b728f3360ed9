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
5. What does not fit is left out, and a line says how much.

No scripts, nothing loaded: the HTML works in notebooks, in saved pages and in mails.
"""

from __future__ import annotations

import html
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lenslab.files import atomic_write
from lenslab.show.images import result_file
from lenslab.show.index import page
from lenslab.show.plots import Labels, Number
from lenslab.tokens import TokenBatch

STEPS = 12  # of intensity


LIMIT_KB = 400  # of one view; a notebook has 1.5 MB for all its outputs


PLACEHOLDER = "▯"


FEW = 8  # tokens that are not worth cutting off: the note would take their place


# Strengths up to these keep text readable on white and on black (contrast at least 4.5, tested)
HUES = {"p": ((200, 80, 45), 0.62), "n": ((64, 128, 186), 0.6), "o": ((128, 128, 128), 0.55)}


BYTES = re.compile(r"(?:<0x[0-9A-Fa-f]{2}>)+")


BIDI = {
    *map(chr, range(0x202A, 0x202F)),
    *map(chr, range(0x2066, 0x206A)),
}  # would reorder the page around them


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

    def __repr__(
        self,
    ) -> str:  # as plain objects look: notebooks' comparison knows that this says nothing
        return "<lenslab.show.tokens.View object>"

    def save(self, name: str) -> Path:
        """Write `outputs/results/NAME.html`; returns its path. ValueError for a name that is no
        plain file name."""
        file = result_file(name, ".html")
        with atomic_write(file) as temporary:
            temporary.write_text(
                page(self.title or name.replace("_", " "), str(self)), encoding="utf-8"
            )
        return file


def highlight(
    strings: Sequence[str] | Sequence[Sequence[str]],
    values: Any,
    *,
    counted: Any = None,
    ids: Any = None,
    labels: Labels | None = None,
    target: str | None = None,
    scale: Number | None = None,
    title: str = "",
    max_texts: int = 20,
    window: int = 100,
    breaks: bool = True,
) -> View:
    """One text, or several, with each token coloured by a feature's activation, all on one scale.

    Args: strings: token strings of one text, or of each text; `TokenBatch.strings` gives them (''
        is padding). values: the activations, of the same lengths. counted: which tokens count; the
        others are grey and have no part in scale and maxima. Default all that
            have a string: say so where there is a BOS.
        ids: token ids for the tooltips.
        labels: what each text is, shown in front of it, e.g. its category.
        target: texts with another label are coloured grey instead of the accent colour.
        scale: what has the full colour; default the largest absolute value over all texts given,
            shown or not.
        max_texts: shown, in the given order.
        window: tokens shown on either side of a text's strongest.
        breaks: go on in a new line where the text does.

    Raises ValueError for texts, values, `counted`, `ids` or `labels` that differ in number, for NaN
    or Inf at a token that counts, and for a scale that is not positive.
    """
    if not len(strings):
        raise ValueError("There are no texts to show.")
    single = all(isinstance(item, str) for item in strings)
    texts = [strings] if single else list(strings)
    rows = [_numbers(row) for row in ([values] if single else values)]
    masks = [np.array([bool(s) for s in text]) for text in texts]
    if counted is not None:
        masks = [_numbers(row).astype(bool) for row in ([counted] if single else counted)]
    numbers = (
        [None] * len(texts)
        if ids is None
        else [_numbers(row).astype(int) for row in ([ids] if single else ids)]
    )
    names = [""] * len(texts) if labels is None else [str(label) for label in labels]
    _check(texts, rows, masks, numbers, names)
    full = _scale(rows, masks, scale)
    signed = any(bool((row[mask] < 0).any()) for row, mask in zip(rows, masks, strict=True))
    parts, size = [], 0
    for i, text in enumerate(texts[:max_texts]):
        hue = "o" if target is not None and names[i] != target else "p"
        body = _row(
            text,
            rows[i],
            masks[i],
            numbers[i],
            full,
            hue,
            names[i],
            window,
            breaks,
            names[i] == target,
        )
        size += len(body.encode("utf-8", "replace"))
        if parts and size > LIMIT_KB * 1000:
            break
        parts.append(body)
    left_out = len(texts) - len(parts)
    over = sum(
        int((np.abs(row[mask]) > full * (1 + 1e-6)).sum())
        for row, mask in zip(rows, masks, strict=True)
    )
    notes = [f"{left_out} of {len(texts)} texts left out"] if left_out else []
    notes += [f"{over} tokens are above the scale and have its last colour"] if over else []
    legend = _legend(full, signed, len(texts), target)
    return View(
        f'{_heading(title)}<div class="lt">{legend}{"".join(parts)}{_notes(notes)}</div>', title
    )


def highlight_batch(
    batch: TokenBatch,
    values: Any,
    *,
    rows: Labels | None = None,
    scale: Number | None = None,
    **options: Any,
) -> View:
    """Texts of a batch on the scale of the whole batch; `values [text, pos]`. BOS and padding do
    not count.

    `rows` chooses texts and their order; `options` are those of `highlight`, `labels` being those
    of the chosen rows. Raises as `highlight`, and ValueError for values of another shape than the
    batch.
    """
    values = _numbers(values)
    if values.shape != tuple(batch.tokens.shape):
        raise ValueError(
            f"values are {list(values.shape)}, the batch is {list(batch.tokens.shape)} [text, pos]."
        )
    real = batch.real.cpu().numpy()
    rows = list(range(len(batch))) if rows is None else [int(row) for row in rows]
    extra = {"scale": scale}
    if scale is None and len(rows) < len(batch):  # the scale of all, however few are shown
        extra["scale"] = float(np.abs(values[real]).max()) or None
    options = {**options, **extra}
    tokens = batch.tokens.cpu().numpy()
    strings = [batch.strings(row) for row in rows]
    return highlight(strings, values[rows], counted=real[rows], ids=tokens[rows], **options)


def feature_strips(
    strings: Sequence[str],
    values: Any,
    names: Labels,
    *,
    counted: Any = None,
    ids: Any = None,
    scales: Any = None,
    title: str = "",
    window: int = 100,
) -> View:
    """One text once for every feature, each on its own scale, which is named in front of it.

    Args: strings: tokens of the text. values: `[feature, token]`. names: what to call each feature.
        counted, ids: as in `highlight`, for the one text. scales: what has the full colour for each
        feature; default its largest absolute value in this text.

    Raises as `highlight`.
    """
    names = list(names)
    rows = [_numbers(row) for row in values]
    texts = [list(strings)] * len(rows)
    mask = (
        np.array([bool(s) for s in strings]) if counted is None else _numbers(counted).astype(bool)
    )
    number = None if ids is None else _numbers(ids).astype(int)
    _check(texts, rows, [mask] * len(rows), [number] * len(rows), names)
    if scales is not None and len(scales) != len(rows):
        raise ValueError(f"{len(scales)} scales for {len(rows)} features.")
    # every strip shows the same tokens, or they could not be compared
    strongest = (
        np.max([np.abs(np.where(mask, row, 0)) for row in rows], axis=0) if rows else np.zeros(0)
    )
    parts = []
    for i, row in enumerate(rows):
        full = _scale([row], [mask], None if scales is None else float(scales[i]))
        head = f"{names[i]}\n0 to {full:.3f}" if full else f"{names[i]}\nnot active"
        parts.append(
            _row(strings, row, mask, number, full, "p", head, window, False, False, strongest)
        )
    note = '<p class="k">Every line has its own scale, named in front of it. Grey: not counted.</p>'
    return View(f'{_heading(title)}<div class="lt">{note}{"".join(parts)}</div>', title)


def token_strip(
    strings: Sequence[str], values: Any, *, counted: Any = None, n: int = 12, digits: int = 1
) -> str:
    """The active tokens of a text as plain text, in order, for printing: `« =» 25.4  «^» 34.4`.

    Of more than `n` active tokens the strongest are kept; the end says how many were left out.
    """
    row = _numbers(values)
    mask = (
        np.array([bool(s) for s in strings]) if counted is None else _numbers(counted).astype(bool)
    )
    _check([list(strings)], [row], [mask], [None], [""])
    active = np.flatnonzero(mask & (row != 0))
    kept = sorted(active[np.argsort(-np.abs(row[active]), kind="stable")][:n])
    shown = "  ".join(f"«{visible(strings[i], breaks=False)[0]}» {row[i]:.{digits}f}" for i in kept)
    rest = len(active) - len(kept)
    return (shown or "not active") + (f"  and {rest} weaker" if rest else "")


def visible(token: str, *, breaks: bool = True) -> tuple[str, str]:
    """A token as it is shown, and a hint for what cannot be: `'<0xE2>'` -> `('▯', 'bytes E2')`. Not
    escaped."""
    hints = [f"bytes {' '.join(re.findall('..', found.replace('<0x', '').replace('>', '')))}" for found in
             BYTES.findall(token)]  # fmt: skip
    text = BYTES.sub(PLACEHOLDER, token).encode("utf-8", "replace").decode("utf-8")
    text = re.sub("\ufffd+", PLACEHOLDER, text).replace("\r\n", "\n")
    shown = []
    for character in text:
        if character == "\n":
            shown.append("↵\n" if breaks else "↵")
        elif character == "\t":
            shown.append("→")
        elif character in BIDI or unicodedata.category(character) == "Cc":
            hints.append(f"U+{ord(character):04X}")
            shown.append(chr(0x2400 + ord(character)) if ord(character) < 32 else PLACEHOLDER)
        else:
            shown.append(character)
    return "".join(shown) or PLACEHOLDER, ", ".join(hints)


def swatch(value: float, scale: float) -> str:
    """A number, to three decimals, with the colour that it has on a scale; as HTML."""
    return _tagged(f"{value:.3f}", value, scale, "p", "")


def _tagged(content: str, value: float, scale: float, hue: str, title: str) -> str:
    attribute = f' title="{html.escape(title)}"' if title else ""
    step = min(math.ceil(abs(value) / scale * STEPS), STEPS) if scale and value else 0
    if not step:
        return f"<span{attribute}>{content}</span>"
    # `mark` and `u` show without any style; with it they differ only in colour
    tag = "mark" if 2 * step > STEPS else "u"
    return f'<{tag} class="{"n" if value < 0 else hue}{step}"{attribute}>{content}</{tag}>'


def _row(
    strings: Sequence[str], row: np.ndarray, mask: np.ndarray, ids: np.ndarray | None, full: float, hue: str,
    label: str, window: int, breaks: bool, is_target: bool, strength: np.ndarray | None = None,
) -> str:  # fmt: skip
    """One text: what it is and its maximum, then its tokens around the strongest."""
    strength = np.where(mask, np.abs(row), 0) if strength is None else strength
    end = max((i + 1 for i, string in enumerate(strings) if string), default=0)
    begin = min((i for i, string in enumerate(strings) if string), default=0)
    centre = int(strength.argmax()) if len(strength) and strength.any() else begin
    first, last = max(centre - window, begin), min(centre + window + 1, end)
    first = begin if first - begin <= FEW else first
    last = end if end - last <= FEW else last
    tokens = [f'<i class="x">{first - begin} tokens …</i>'] if first > begin else []
    for i in range(first, last):
        content, hint = visible(strings[i], breaks=breaks)
        identity = f" · id {ids[i]}" if ids is not None else ""
        if not mask[i]:
            tokens.append(f'<i class="x" title="not counted{identity}">{html.escape(content)}</i>')
            continue
        title = f"{row[i]:.3f}{identity}{f' · {hint}' if hint else ''}"
        tokens.append(_tagged(html.escape(content), float(row[i]), full, hue, title))
    tokens += [f'<i class="x">… {end - last} tokens</i>'] if last < end else []
    padding = sum(1 for string in strings if not string)
    tokens += (
        [f' <i class="x" title="{padding} × padding, not counted">+{padding} pad</i>']
        if padding
        else []
    )
    counted = row[mask]
    best = float(counted[np.abs(counted).argmax()]) if len(counted) else 0.0
    name, *rest = label.split("\n")
    head = f'<b class="{"g" if is_target else "c"}">{html.escape(name)}</b> ' if name else ""
    head += (
        html.escape(rest[0])
        if rest
        else _tagged(f"max {best:.3f}" if best else "not active", best, full, hue, "")
    )
    kind = "r z" if is_target else "r"
    return f'<div class="{kind}"><div class="h">{head}</div><div class="t">{"".join(tokens)}</div></div>'


def _legend(full: float, signed: bool, n: int, target: str | None) -> str:
    if not full:
        return '<p class="k">Not active at any token that counts. Grey: not counted.</p>'
    steps = [s * full / STEPS for s in range(-STEPS if signed else 1, STEPS + 1)]
    marks = "".join(
        _tagged("&nbsp;&nbsp;", value, full, "p", f"up to {value:.3f}") for value in steps if value
    )
    low = f"−{full:.3f}" if signed else "0"
    other = f" Texts other than {html.escape(target)} in grey tones." if target is not None else ""
    over = f" for all {n} texts" if n > 1 else ""
    return (
        f'<p class="k"><span class="b">{low} {marks} {full:.3f}</span> one scale{over}. '
        f'<i class="x">grey, italic</i>: not counted.{other}</p>'
    )


def _heading(title: str) -> str:
    return f'<div class="lh"><b>{html.escape(title)}</b></div>' if title else ""


def _notes(notes: list[str]) -> str:
    return f'<p class="k">{html.escape("; ".join(notes))}.</p>' if notes else ""


def _numbers(values: Any) -> np.ndarray:
    """Lists, arrays, and tensors of any device and precision as an array."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).numpy()
    return np.asarray(values)


def _scale(rows: list[np.ndarray], masks: list[np.ndarray], asked: Number | None) -> float:
    if asked is not None:
        if not 0 < asked < math.inf:
            raise ValueError(f"A scale ends at a positive number, not at {asked}.")
        return float(asked)
    return max(
        (
            float(np.abs(row[mask]).max())
            for row, mask in zip(rows, masks, strict=True)
            if mask.any()
        ),
        default=0,
    )


def _check(texts: list, rows: list, masks: list, ids: list, names: list) -> None:
    for what, given in (("values", rows), ("counted", masks), ("ids", ids), ("labels", names)):
        if len(given) != len(texts):
            raise ValueError(f"{len(given)} rows of {what} for {len(texts)} texts.")
    for i, (text, row, mask, number) in enumerate(zip(texts, rows, masks, ids, strict=True)):
        lengths = [len(part) for part in (row, mask, number) if part is not None]
        if any(length != len(text) for length in lengths):
            raise ValueError(
                f"Text {i} has {len(text)} tokens, but its values, mask or ids number {lengths}."
            )
        if not np.isfinite(row[mask]).all():
            raise ValueError(
                f"Text {i} has NaN or Inf at a token that counts: such an activation has no colour."
            )


def _style() -> str:
    """The one stylesheet: twelve steps of three hues over whatever ground the notebook has."""
    rules = [
        ".lenslab-view{font-size:13px;line-height:1.45;max-width:1000px}",
        ".lenslab-view .lh{font-size:15px;margin:.4em 0}",
        ".lenslab-view .k{margin:.3em 0;font-size:12px}",
        ".lt .b{white-space:nowrap}.lt .b mark,.lt .b u{border-radius:0}",
        ".lt .r{display:flex;gap:.8em;padding:.2em 0 .2em .6em;margin:.3em 0;border-left:3px solid rgba(99,99,99,.3)}",
        ".lt .z{border-left-color:rgb(200,80,45)}",
        ".lt .h{flex:0 0 9.5em;font-size:12px;overflow-wrap:anywhere}.lt .h b{display:block}",
        ".lt .t{flex:1;min-width:0;font-family:ui-monospace,Menlo,Consolas,monospace;line-height:1.6;"
        "white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:plaintext}",
        ".lt mark,.lt u{background:none;color:inherit;text-decoration:none;border-radius:2px}",
        ".lt table{margin:.3em 0}.lt td,.lt th{text-align:left;padding:.1em 1.2em .1em 0}",
        ".lt .x{opacity:.72;unicode-bidi:isolate}",
    ]
    for hue, ((red, green, blue), most) in HUES.items():
        for step in range(1, STEPS + 1):
            strength = 0.06 + (most - 0.06) * step / STEPS
            rules.append(
                f".lt .{hue}{step}{{background:rgba({red},{green},{blue},{strength:.2f})}}"
            )
    return "".join(rules)


STYLE = _style()
