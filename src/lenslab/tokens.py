"""Texts become tokens, and which of them count is settled once: `TokenBatch.real`.

`tokenize` gives one row per text; `pack` joins documents and cuts them into windows; `generate`
continues texts. All go through the same steps:
1. encode without special tokens, and refuse texts from which no token comes;
2. put BOS in front of every row if the model has one (`bos_ids`), and of each token keep the text
   that it is from (-1: of none);
3. pad on one side. `real` and `attention` come from lengths, never from the ids of BOS or padding.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformer_lens.model_bridge import TransformerBridge
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lenslab.files import as_bytes, content_key
from lenslab.metrics import as_mask
from lenslab.models import check_eval
from lenslab.runtime import derive_generator, progress_bar

CHUNK = 1000  # texts tokenised at a time
WINDOW = 1024  # tokens at most, where nothing is said: memory grows with the square of a window
BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
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
    # booleans, or 0 and 1: False at BOS, padding, and EOS between packed documents
    real: Shaped[Tensor, "text pos"]
    attention: Shaped[Tensor, "text pos"]  # likewise: False only at padding (BOS attends)
    texts: tuple[str, ...]  # what was tokenised; of packed windows, what they decode to
    pad_side: str = "right"
    tokenizer: Any = field(default=None, repr=False)
    document: Int[Tensor, "text pos"] | None = None  # of each token its text; -1 where not real

    def __post_init__(self) -> None:
        shape = (len(self.texts), self.tokens.shape[1])
        if not shape == self.tokens.shape == self.real.shape == self.attention.shape:
            raise ValueError("Tokens and masks are [text, pos], with one row for each text.")
        for name in ("real", "attention"):  # integers would select rows 0 and 1
            object.__setattr__(self, name, as_mask(getattr(self, name)))
        if bool((self.real & ~self.attention).any()):
            raise ValueError("A token cannot be real and padding: `real` lies within `attention`.")
        aligned = self.attention.int().sort(1, descending=self.pad_side == "right").values
        if not torch.equal(aligned.bool(), self.attention):  # `harvest` would cut the texts
            raise ValueError(f"Padding stands elsewhere than at the {self.pad_side}, `pad_side`.")
        if not len(self) or not bool(self.real.any(1).all()):
            empty = (~self.real.any(1)).nonzero().flatten().tolist()
            raise NoRealToken(f"Nothing but BOS and padding in text {empty[:5]}: leave it out.")

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, rows: slice | Sequence | Shaped[Any, " rows"]) -> TokenBatch:
        """The batch of some texts, by slice, by indices, or by a mask with one bool per text;
        padding and `document` are kept."""
        index = np.arange(len(self))[rows].tolist()  # as NumPy reads lists, arrays and tensors
        return replace(
            self,
            tokens=self.tokens[index],
            real=self.real[index],
            attention=self.attention[index],
            texts=tuple(self.texts[i] for i in index),
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
        return content_key(list(self.tokens.shape), *map(as_bytes, tensors))

    def strings(self, row: int) -> list[str]:
        """One readable string per position, '' at padding; bytes that are no whole character as
        `<0xE2><0x82>`."""
        cells = zip(self.tokens[row].tolist(), self.attention[row].tolist(), strict=True)
        return [token_string(self.tokenizer, token) if attends else "" for token, attends in cells]


def tokenize(
    model: TransformerBridge,
    texts: str | Iterable,
    *,
    bos: bool | None = None,
    max_length: int | None = None,
    truncate: bool = False,
    pad_side: str = "right",
) -> TokenBatch:
    """Texts -> TokenBatch, with BOS in front of each where the model has one (`bos_ids`); elsewhere
    position 0 is a real token.

    A text that already begins with the BOS string does not get a second one. Other special tokens
    that a text spells out (`<start_of_turn>`) are read as such and count as real: they were asked
    for.

    Args:
        texts: one text, or several in order; a column of a table, not the table.
        bos: False leaves it out, and what the texts spell out stays real; True refuses a tokenizer
            that has none.
        max_length: in tokens, BOS included; default the model's context.
        truncate: cut longer texts, with a warning that says how many; otherwise they are refused.
        pad_side: 'right' or 'left'.

    Raises NoRealToken, TextTooLong, TypeError (what is no text), ValueError (no texts; half a
    character in one; a length beyond the context; no BOS).
    """
    texts, start = _inputs(model, texts, bos)
    rows = _encode(model.tokenizer, texts, start)
    length = _checked_length(model, model.cfg.n_ctx if max_length is None else max_length, 2)
    room = length - len(start)
    beyond = [len(row) - room for row in rows if len(row) > room]
    if beyond and not truncate:
        longest = max(range(len(rows)), key=lambda i: len(rows[i]))
        told = f"{len(beyond)} of {len(texts)} texts exceed {length} tokens; text {longest} by most"
        raise TextTooLong(f"{told}. truncate=True cuts them, pack() spreads them over windows.")
    if beyond:
        cut = f"Cut {len(beyond)} of {len(texts)} texts to {length} tokens"
        warnings.warn(f"{cut}; {sum(beyond)} tokens left out.", stacklevel=2)
    return _padded(model.tokenizer, [row[:room] for row in rows], texts, pad_side, start)


def pack(
    model: TransformerBridge,
    texts: str | Iterable,
    *,
    bos: bool | None = None,
    length: int | None = None,
) -> TokenBatch:
    """Documents joined by EOS and cut into windows that start with BOS: text for training and
    evaluation.

    `length` is that of a window, BOS included (default the context, at most 1,024). A document may
    go on in the next window; `document` of the result says of every token which one it is from.
    Nothing is dropped: the last window may be shorter, padded on the right. Documents that give no
    token are refused, as in `tokenize`; `bos` and what is raised are as there.
    """
    texts, start = _inputs(model, texts, bos)
    tokenizer, eos = model.tokenizer, model.tokenizer.eos_token_id
    length = min(model.cfg.n_ctx, WINDOW) if length is None else length
    room = _checked_length(model, length, 2 + len(start)) - len(start)  # an EOS is never alone
    end = _from_text(-1, start if eos is None else [eos])
    pieces = [piece for row in _encode(tokenizer, texts, start) for piece in (end, row)]
    windows = torch.cat(pieces[1:]).split(room)  # no end before the first document
    decoded = tokenizer.batch_decode([window[:, 0].tolist() for window in windows])
    return _padded(tokenizer, windows, tuple(decoded), "right", start)


def generate(
    model: TransformerBridge,
    prompt: str | Iterable,
    *,
    bos: bool | None = None,
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
) -> str | list[str]:
    """Continue a prompt; greedy at temperature 0, else sampled from a generator seeded by `seed`.

    Returns prompt and continuation, one string per prompt. The model reads the tokens of
    `tokenize`; `bos` is as there. Raises ValueError when the prompt and the new tokens do not fit
    the context; NoRealToken for an empty prompt; ValueError for a temperature that is none, a model
    in train mode or with NaN or Inf in its logits.
    """
    prompts, start = _inputs(model, prompt, bos)
    check_eval(model)
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"A temperature is 0 (greedy) or above and finite, not {temperature}.")
    rows = [[*start, *row[:, 0].tolist()] for row in _encode(model.tokenizer, prompts, start)]
    longest, context = max(map(len, rows)), model.cfg.n_ctx
    if longest + max_new_tokens > context:
        raise ValueError(f"{longest} tokens and {max_new_tokens} new exceed the context {context}.")
    options = dict(max_new_tokens=max_new_tokens, verbose=False, return_type="str")
    options |= dict(do_sample=temperature > 0, temperature=temperature or 1.0)
    finite = model.hooks(fwd_hooks=[("unembed.hook_out", _check_logits)])
    with torch.random.fork_rng(devices=[]), torch.inference_mode(), finite:
        torch.manual_seed(derive_generator(seed, "generate").initial_seed())
        texts = [model.generate(torch.tensor([row]), **options) for row in rows]
    return texts[0] if isinstance(prompt, str) else texts


def _check_logits(logits: Float[Tensor, "text pos d_vocab"], hook: Any) -> None:
    if not bool(logits[:, -1].isfinite().all()):  # the largest of NaN would be token 0
        raise ValueError("NaN or Inf in the logits: check the weights, or load them in float32.")


def bos_ids(tokenizer: Any, bos: bool | None = None) -> list[int]:
    """The token every row begins with, as a list of one or none (`if bos_id:` would miss id 0).

    It is the tokenizer's own BOS, which may be its EOS (GPT-2); a tokenizer without one (Qwen) was
    trained without, and its end of turn is no beginning. `bos` is as in `tokenize`.
    """
    own = tokenizer.bos_token_id
    if own == tokenizer.eos_token_id and not tokenizer.init_kwargs.get("bos_token"):
        own = None  # TransformerLens had put EOS where the tokenizer's files have none
    if bos and own is None:
        raise ValueError("This tokenizer has no BOS: leave out bos=True.")
    return [] if own is None or bos is False else [own]


def _checked_length(model: TransformerBridge, length: int, least: int) -> int:
    context = model.cfg.n_ctx
    if not least <= length <= context:
        raise ValueError(f"length {length} is not within {least} and the model's context {context}")
    return length


def _inputs(model: Any, texts: Any, bos: bool | None) -> tuple[tuple[str, ...], list[int]]:
    """One text or several, in order, and what each begins with. Raises TypeError for what would be
    read as something else."""
    if not isinstance(model, TransformerBridge):
        raise TypeError(f"First load_model(name), then the texts: {type(model).__name__} given.")
    if isinstance(texts, Mapping | Set) or hasattr(texts, "columns"):
        raise TypeError(f"A {type(texts).__name__} is no list of texts: give its column of texts.")
    texts = (texts,) if isinstance(texts, str) else tuple(texts)
    if wrong := [i for i, text in enumerate(texts) if not isinstance(text, str)]:
        kind = type(texts[wrong[0]]).__name__
        raise TypeError(f"Text {wrong[0]} is no string but {kind} ({len(wrong)} such).")
    return texts, bos_ids(model.tokenizer, bos)


def _from_text(text: int, ids: list[int]) -> Int[Tensor, "token 2"]:
    """(id, text that it is from) of each token; int32: lists of ids take nine times the memory."""
    return torch.tensor([ids, [text] * len(ids)], dtype=torch.int32).T


def _encode(tokenizer: Any, texts: tuple[str, ...], start: list[int]) -> list[Int[Tensor, "_ 2"]]:
    """Each text without the `start` that it will get. Raises NoRealToken, ValueError."""
    if not texts:
        raise ValueError("There are no texts: the list is empty.")
    if broken := [i for i, text in enumerate(texts) if SURROGATE.search(text)]:
        raise ValueError(f"Text {broken[0]} is not valid Unicode (half a surrogate pair).")
    bos, rows = tokenizer.bos_token if start else "", []
    with progress_bar(total=len(texts), unit="text", desc="tokenize") as bar:
        for first in range(0, len(texts), CHUNK):
            chunk = [text.removeprefix(bos) for text in texts[first : first + CHUNK]]
            # not verbose: `tokenize` says itself when a text is too long
            ids = tokenizer(chunk, add_special_tokens=False, verbose=False).input_ids
            rows += [_from_text(i, row) for i, row in enumerate(ids, first)]
            bar.update(len(chunk))
    if empty := [i for i, row in enumerate(rows) if not len(row)]:
        raise NoRealToken(f"Text {empty[0]} has no token ({len(empty)} such): leave it out.")
    return rows


def _padded(
    tokenizer: Any,
    rows: Sequence[Int[Tensor, "_ 2"]],
    texts: tuple[str, ...],
    pad_side: str,
    start: list[int],
) -> TokenBatch:
    """Rows of (id, text that it is from) -> a batch with `start` before each, padded on one
    side."""
    bos = _from_text(-1, start)
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
    """One token as readable text: spaces kept, bytes that are no whole character as `<0xE2>`, an id
    that the tokenizer has no piece for (padded vocabularies) as `<id 50300>`."""
    piece = tokenizer.convert_ids_to_tokens(token)
    if piece is None:
        return f"<id {token}>"
    if token in tokenizer.all_special_ids:
        return piece
    if "▁" in piece:  # SentencePiece; decoding one piece alone would lose its space
        return piece.replace("▁", " ")
    text = tokenizer.decode([token])
    if "\ufffd" not in text:
        return text
    if BYTE_PIECE.fullmatch(piece):  # SentencePiece names its bytes itself
        return piece
    raw = [_BYTES.get(character) for character in piece]
    return piece if None in raw else "".join(f"<0x{byte:02X}>" for byte in raw)
