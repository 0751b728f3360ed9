"""TODO"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lenslab import runtime
from lenslab.files import content_key

CHUNK = 1000  # texts tokenised at a time


class NoRealToken(ValueError):
    """A text (or all texts) from which no token comes; there is nothing to measure at BOS and
    padding."""


class TextTooLong(ValueError):
    """A text longer than the model's context, and nobody said `truncate=True`."""


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Texts as tokens, and which of them count. Everything downstream obeys `real`; nobody compares
    ids with pad.

    A row is `BOS token ... token` with padding on one side, or, from `pack`, a window of joined
    documents. `real` and `attention` come from lengths, so BOS may have id 0 and padding may be the
    id of BOS or EOS.
    """

    tokens: Int[Tensor, "text pos"]
    real: Bool[Tensor, "text pos"]  # False at BOS, padding, and EOS between packed documents
    attention: Bool[Tensor, "text pos"]  # False only at padding (BOS attends)
    texts: tuple[str, ...]  # what was tokenised; of packed windows, what they decode to
    pad_side: str = "right"
    tokenizer: Any = field(default=None, repr=False)
    document: Int[Tensor, "text pos"] | None = (
        None  # which of the texts given a token is from; -1 where not real
    )

    def __post_init__(self) -> None:
        shapes = {self.tokens.shape, self.real.shape, self.attention.shape}
        if len(shapes) != 1 or len(self.texts) != len(self.tokens):
            raise ValueError(
                f"tokens, real, attention and texts differ in size: {shapes}, {len(self.texts)} texts."
            )
        if self.pad_side not in ("left", "right"):
            raise ValueError(f"pad_side is 'left' or 'right', not {self.pad_side!r}.")
        if bool((self.real & ~self.attention).any()):
            raise ValueError(
                "A token cannot be real and padding: `real` must lie within `attention`."
            )
        if self.document is not None and not torch.equal(self.document >= 0, self.real):
            raise ValueError(
                "`document` has the place of `real` and says a text for each real token, -1 elsewhere."
            )
        if (empty := (~self.real.any(1)).nonzero().flatten().tolist()) or not len(self.tokens):
            raise NoRealToken(
                f"Nothing but BOS and padding in text {empty[:5] or '(there is none)'}: leave it out."
            )

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, rows: slice | Sequence[int]) -> TokenBatch:
        """The batch of some texts, by slice or by a list of indices; padding and `document` are
        kept."""
        texts = self.texts[rows] if isinstance(rows, slice) else tuple(self.texts[i] for i in rows)
        where = rows if isinstance(rows, slice) else torch.as_tensor(rows, dtype=torch.long)
        tensors = (self.tokens[where], self.real[where], self.attention[where])
        document = None if self.document is None else self.document[where]
        return TokenBatch(*tensors, texts, self.pad_side, self.tokenizer, document)

    @property
    def n_real(self) -> int:
        """Number of real tokens."""
        return int(self.real.sum())

    @cached_property
    def key(self) -> str:
        """Content key of the tokens and masks: what caches of activations are keyed by, whatever
        `document` says."""
        parts = (self.tokens.long(), self.real, self.attention)
        return content_key(
            list(self.tokens.shape), *(p.cpu().contiguous().numpy().tobytes() for p in parts)
        )

    def strings(self, row: int) -> list[str]:
        """One readable string per position, '' at padding; bytes that are no whole character as
        `<0xE2><0x82>`."""
        cells = zip(self.tokens[row].tolist(), self.attention[row].tolist(), strict=True)
        return [token_string(self.tokenizer, token) if attends else "" for token, attends in cells]


def tokenize(
    model: TransformerBridge,
    texts: str | Sequence[str],
    *,
    max_length: int | None = None,
    truncate: bool = False,
    pad_side: str = "right",
) -> TokenBatch:
    """Texts -> TokenBatch, with BOS put in front of each.

    BOS is the tokenizer's own, else its EOS (as GPT-2 does), else none: then position 0 is a real
    token. A text that already begins with the BOS string does not get a second one. Other special
    tokens that a text spells out (`<start_of_turn>`) are read as such and count as real: they were
    asked for.

    Args:
        max_length: in tokens, BOS included; default the model's context.
        truncate: cut longer texts, with a warning that says how many; otherwise they are refused.

    Raises NoRealToken, TextTooLong, ValueError (no texts; text that is not valid Unicode),
    TypeError (no string).
    """
    texts = (texts,) if isinstance(texts, str) else tuple(texts)
    if not texts:
        raise ValueError("There are no texts: the list is empty.")
    limit, bos = _limit(model, max_length, least=2), _bos(model.tokenizer)
    rows = _encode(model.tokenizer, texts)
    if empty := [i for i, row in enumerate(rows) if not row]:
        raise NoRealToken(
            f"Text {empty[0]} ({texts[empty[0]]!r}) has no token ({len(empty)} such): leave it out."
        )
    room = limit - len(bos)
    long = [i for i, row in enumerate(rows) if len(row) > room]
    if long and not truncate:
        i = max(long, key=lambda i: len(rows[i]))
        raise TextTooLong(
            f"{len(long)} of {len(texts)} texts exceed {limit} tokens; the longest, text {i}, has "
            f"{len(rows[i]) + len(bos)}. Pass truncate=True to cut them, or use pack() to spread them over windows."
        )
    if long:
        lost = sum(len(rows[i]) - room for i in long)
        warnings.warn(
            f"Cut {len(long)} of {len(texts)} texts to {limit} tokens; {lost} tokens left out.",
            stacklevel=2,
        )
    cut = [torch.tensor(row[:room]) for row in rows]
    return _pad(
        model.tokenizer,
        bos,
        [(row, torch.full_like(row, i)) for i, row in enumerate(cut)],
        texts,
        pad_side,
    )


def pack(
    model: TransformerBridge, texts: str | Sequence[str], *, length: int | None = None
) -> TokenBatch:
    """Documents joined by EOS and cut into windows that start with BOS: text for training and
    evaluation.

    `length` is that of a window, BOS included (default the context). A document may go on in the
    next window; `document` of the result says of every token which one it is from. Nothing is
    dropped: the last window may be shorter, padded on the right. Documents that give no token are
    refused, as in `tokenize`. Raises as `tokenize`.
    """
    texts = (texts,) if isinstance(texts, str) else tuple(texts)
    limit, bos = _limit(model, length, least=3), _bos(model.tokenizer)
    eos = model.tokenizer.eos_token_id
    end = bos if eos is None else [eos]
    stream: list[Tensor] = []  # int32: a Python list of ids would take nine times the memory
    with runtime.progress_bar(total=len(texts), unit="text", desc="tokenize") as bar:
        for start in range(0, len(texts), CHUNK):
            for i, row in enumerate(
                _encode(model.tokenizer, texts[start : start + CHUNK], start), start
            ):
                if not row:
                    raise NoRealToken(f"Text {i} ({texts[i]!r}) has no token: leave it out.")
                stream += [
                    torch.tensor(end if i else [], dtype=torch.int32),
                    torch.tensor(row, dtype=torch.int32),
                ]
            bar.update(min(CHUNK, len(texts) - start))
    if not stream:
        raise ValueError("There are no texts: the list is empty.")
    pieces = enumerate(stream)  # a separator, a document, a separator, ...
    document = torch.cat(
        [torch.full(piece.shape, k // 2 if k % 2 else -1, dtype=torch.int32) for k, piece in pieces]
    )
    windows = list(
        zip(
            torch.cat(stream).split(limit - len(bos)), document.split(limit - len(bos)), strict=True
        )
    )
    decoded = tuple(model.tokenizer.batch_decode([ids.tolist() for ids, _ in windows]))
    return _pad(model.tokenizer, bos, windows, decoded, "right")


def token_string(tokenizer: Any, token: int) -> str:
    """One token as readable text: spaces kept, bytes that are no whole character as `<0xE2>`."""
    piece = tokenizer.convert_ids_to_tokens(token)
    if piece is None or token in tokenizer.all_special_ids:
        return str(piece)
    if "▁" in piece:  # SentencePiece; decoding one piece alone would lose its space
        return piece.replace("▁", " ")
    text = tokenizer.decode([token])
    if "\ufffd" not in text:
        return text
    raw = [_BYTES.get(character) for character in piece]
    return piece if None in raw else "".join(f"<0x{byte:02X}>" for byte in raw)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte -> the byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


_BYTES = _byte_alphabet()


def _bos(tokenizer: Any) -> list[int]:
    """The token every row begins with, as a list of one or none (`if bos_id:` would miss id 0)."""
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return [i for i in ids if i is not None][:1]


def _limit(model: TransformerBridge, asked: int | None, least: int) -> int:
    context = model.cfg.n_ctx
    if asked is None:
        return context
    if not least <= asked <= context:
        raise ValueError(
            f"A length of {asked} tokens is not within {least} and the model's context of {context}."
        )
    return asked


def _encode(tokenizer: Any, texts: tuple[str, ...], first: int = 0) -> list[list[int]]:
    """Ids of texts without BOS; `first` is the number of the first text, for what the errors
    say."""
    for i, text in enumerate(texts, first):
        if not isinstance(text, str):
            raise TypeError(f"Text {i} is a {type(text).__name__}, not a string.")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"Text {i} is not valid Unicode at character {error.start} (half a surrogate pair, often from a cut "
                "string). Mend it with text.encode('utf-8', 'replace').decode()."
            ) from None
    start = tokenizer.bos_token or ""
    return tokenizer(
        [text.removeprefix(start) for text in texts],
        add_special_tokens=False,
        return_attention_mask=False,
        verbose=False,  # we say ourselves when a text is too long
    ).input_ids


def _pad(
    tokenizer: Any,
    bos: list[int],
    rows: list[tuple[Tensor, Tensor]],
    texts: tuple[str, ...],
    pad_side: str,
) -> TokenBatch:
    """Rows of (ids, document or -1) without BOS -> a batch with BOS, padded on one side."""
    lengths = [len(bos) + len(ids) for ids, _ in rows]
    width, pad = max(lengths), tokenizer.pad_token_id
    tokens = torch.full((len(rows), width), 0 if pad is None else pad)
    document, attention = (
        torch.full((len(rows), width), -1),
        torch.zeros(len(rows), width, dtype=torch.bool),
    )
    for i, ((ids, source), length) in enumerate(zip(rows, lengths, strict=True)):
        begin = 0 if pad_side == "right" else width - length
        first = begin + len(bos)
        tokens[i, begin:first] = torch.tensor(bos, dtype=torch.long)
        tokens[i, first : begin + length], document[i, first : begin + length] = (
            ids.long(),
            source.long(),
        )
        attention[i, begin : begin + length] = True
    return TokenBatch(tokens, document >= 0, attention, texts, pad_side, tokenizer, document)
