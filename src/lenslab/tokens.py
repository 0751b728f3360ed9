"""Texts become tokens, and which of them count is settled once: `TokenBatch.real`.

`tokenize` gives one row per text; `pack` joins documents and cuts them into windows. Both go
through the same three steps:
1. encode without special tokens, and refuse texts from which no token comes;
2. put BOS in front of every row, and of each token keep the text that it is from (-1: of none);
3. pad on one side. `real` and `attention` come from lengths, never from the ids of BOS or padding.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformer_lens.model_bridge import TransformerBridge
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lenslab.files import content_key
from lenslab.runtime import progress_bar

CHUNK = 1000  # texts tokenised at a time
WINDOW = 1024  # of `pack` at most: attention costs the square of it, and contexts grow to a million
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, often of a string that was cut


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
    documents. BOS may have id 0 and padding may be the id of BOS or EOS.
    """

    tokens: Int[Tensor, "text pos"]
    real: Bool[Tensor, "text pos"]  # False at BOS, padding, and EOS between packed documents
    attention: Bool[Tensor, "text pos"]  # False only at padding (BOS attends)
    texts: tuple[str, ...]  # what was tokenised; of packed windows, what they decode to
    pad_side: str = "right"
    tokenizer: Any = field(default=None, repr=False)
    document: Int[Tensor, "text pos"] | None = None  # of each token its text; -1 where not real

    def __post_init__(self) -> None:
        if bool((self.real & ~self.attention).any()):
            raise ValueError("A token cannot be real and padding: `real` lies within `attention`.")
        if not len(self) or not bool(self.real.any(1).all()):
            empty = (~self.real.any(1)).nonzero().flatten().tolist()
            raise NoRealToken(f"Nothing but BOS and padding in text {empty[:5]}: leave it out.")

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, rows: slice | Sequence[int]) -> TokenBatch:
        """The batch of some texts, by slice or by a list of indices; padding and `document` are
        kept."""
        index = torch.arange(len(self))[rows if isinstance(rows, slice) else list(rows)]
        return replace(
            self,
            tokens=self.tokens[index],
            real=self.real[index],
            attention=self.attention[index],
            texts=tuple(self.texts[i] for i in index.tolist()),
            document=None if self.document is None else self.document[index],
        )

    @property
    def n_real(self) -> int:
        """Number of real tokens."""
        return int(self.real.sum())

    @cached_property
    def key(self) -> str:
        """Content key of the tokens and masks: what caches of activations are keyed by, whatever
        `document` says."""
        tensors = (self.tokens.long(), self.real, self.attention)
        raw = [tensor.cpu().contiguous().numpy().tobytes() for tensor in tensors]
        return content_key(list(self.tokens.shape), *raw)

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

    Raises NoRealToken, TextTooLong, ValueError (no texts; half a character in one; a length beyond
    the context).
    """
    if pad_side not in ("left", "right"):
        raise ValueError(f"pad_side is 'left' or 'right', not {pad_side!r}.")
    texts = (texts,) if isinstance(texts, str) else tuple(texts)
    rows = _encode(model.tokenizer, texts)
    length = _checked_length(model, max_length)
    room = length - len(bos_ids(model.tokenizer))
    beyond = [len(row) - room for row in rows if len(row) > room]
    if beyond and not truncate:
        longest = max(range(len(rows)), key=lambda i: len(rows[i]))
        raise TextTooLong(
            f"{len(beyond)} of {len(texts)} texts exceed {length} tokens; text {longest} by most. "
            "Pass truncate=True to cut them, or use pack() to spread them over windows."
        )
    if beyond:
        cut = f"Cut {len(beyond)} of {len(texts)} texts to {length} tokens"
        warnings.warn(f"{cut}; {sum(beyond)} tokens left out.", stacklevel=2)
    return _padded(model.tokenizer, [row[:room] for row in rows], texts, pad_side)


def pack(
    model: TransformerBridge, texts: str | Sequence[str], *, length: int | None = None
) -> TokenBatch:
    """Documents joined by EOS and cut into windows that start with BOS: text for training and
    evaluation.

    `length` is that of a window, BOS included (default the context, 1,024 at most). A document may
    go on in the next window; `document` of the result says of every token which one it is from.
    Nothing is dropped: the last window may be shorter, padded on the right. Documents that give no
    token are refused, as in `tokenize`. Raises as `tokenize`.
    """
    tokenizer, eos = model.tokenizer, model.tokenizer.eos_token_id
    if length is None:
        length = min(WINDOW, model.cfg.n_ctx)
    room = _checked_length(model, length) - len(bos_ids(tokenizer))
    end = bos_ids(tokenizer) if eos is None else [eos]
    texts = (texts,) if isinstance(texts, str) else tuple(texts)
    pieces = [piece for row in _encode(tokenizer, texts) for piece in (_from_text(-1, end), row)]
    windows = torch.cat(pieces[1:]).split(room)  # no end before the first document
    decoded = tokenizer.batch_decode([window[:, 0].tolist() for window in windows])
    return _padded(tokenizer, windows, tuple(decoded), "right")


def bos_ids(tokenizer: Any) -> list[int]:
    """The token every row begins with, as a list of one or none (`if bos_id:` would miss id 0)."""
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return [i for i in ids if i is not None][:1]


def _checked_length(model: TransformerBridge, length: int | None) -> int:
    context = model.cfg.n_ctx
    if length is not None and not 2 <= length <= context:
        raise ValueError(f"A length of {length} is not within 2 and the model's context {context}.")
    return length or context


def _from_text(text: int, ids: list[int]) -> Int[Tensor, "token 2"]:
    """(id, text that it is from) of each token; int32: lists of ids take nine times the memory."""
    return torch.tensor([ids, [text] * len(ids)], dtype=torch.int32).T


def _encode(tokenizer: Any, texts: tuple[str, ...]) -> list[Int[Tensor, "_ 2"]]:
    """Each text without BOS. Raises NoRealToken, ValueError."""
    if not texts:
        raise ValueError("There are no texts: the list is empty.")
    if broken := [i for i, text in enumerate(texts) if SURROGATE.search(text)]:
        raise ValueError(f"Text {broken[0]} is not valid Unicode (half a surrogate pair).")
    bos, rows = tokenizer.bos_token or "", []
    with progress_bar(total=len(texts), unit="text", desc="tokenize") as bar:
        for start in range(0, len(texts), CHUNK):
            chunk = [text.removeprefix(bos) for text in texts[start : start + CHUNK]]
            # not verbose: `tokenize` says itself when a text is too long
            ids = tokenizer(chunk, add_special_tokens=False, verbose=False).input_ids
            rows += [_from_text(i, row) for i, row in enumerate(ids, start)]
            bar.update(len(chunk))
    if empty := [i for i, row in enumerate(rows) if not len(row)]:
        raise NoRealToken(f"Text {empty[0]} has no token ({len(empty)} such): leave it out.")
    return rows


def _padded(
    tokenizer: Any, rows: Sequence[Int[Tensor, "_ 2"]], texts: tuple[str, ...], pad_side: str
) -> TokenBatch:
    """Rows of (id, text that it is from) without BOS -> a batch with BOS, padded on one side."""
    bos = _from_text(-1, bos_ids(tokenizer))
    rows = [torch.cat([bos, row]) for row in rows]
    both = pad_sequence(rows, batch_first=True, padding_value=-1, padding_side=pad_side)
    tokens, document = both.long().movedim(-1, 0).contiguous()  # each [text, pos]
    attention = tokens >= 0
    tokens[~attention] = tokenizer.pad_token_id or 0
    return TokenBatch(
        tokens=tokens,
        real=document >= 0,
        attention=attention,
        texts=texts,
        pad_side=pad_side,
        tokenizer=tokenizer,
        document=document,
    )


_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}  # of GPT-2's pieces


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
