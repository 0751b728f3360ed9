"""From text to activations: tokenize into a TokenBatch, run the model as far as needed, keep what was asked for.

How `harvest` works:
1. refuse what would give wrong numbers silently: a model in train mode, a hook that does not exist;
2. run the model no further than the hooks need (`lenslab.forward`), longest texts first, batch by batch;
3. put every value where its text belongs, zero at padding; NaN and Inf are refused by hook and text;
4. return everything in memory, or write the real tokens to an `ActivationStore`, shard by shard.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lenslab import runtime
from lenslab.forward import Runner, by_token
from lenslab.models import check_eval, check_hooks, hook_names
from lenslab.paths import content_key
from lenslab.store import ActivationStore

CHUNK = 1000  # texts tokenised at a time
MEMORY_SHARE = 0.5  # of the memory that is free: what `harvest` may fill without a store


class NoRealToken(ValueError):
    """A text (or all texts) from which no token comes; there is nothing to measure at BOS and padding."""


class TextTooLong(ValueError):
    """A text longer than the model's context, and nobody said `truncate=True`."""


class TooLargeForMemory(ValueError):
    """What was asked for would fill the memory; an `ActivationStore` takes it."""


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Texts as tokens, and which of them count. Everything downstream obeys `real`; nobody compares ids with pad.

    A row is `BOS token ... token` with padding on one side, or, from `pack`, a window of joined documents.
    `real` and `attention` come from lengths, so BOS may have id 0 and padding may be the id of BOS or EOS.
    """

    tokens: Int[Tensor, "text pos"]
    real: Bool[Tensor, "text pos"]  # False at BOS, padding, and EOS between packed documents
    attention: Bool[Tensor, "text pos"]  # False only at padding (BOS attends)
    texts: tuple[str, ...]  # what was tokenised; of packed windows, what they decode to
    pad_side: str = "right"
    tokenizer: Any = field(default=None, repr=False)
    document: Int[Tensor, "text pos"] | None = None  # which of the texts given a token is from; -1 where not real

    def __post_init__(self) -> None:
        shapes = {self.tokens.shape, self.real.shape, self.attention.shape}
        if len(shapes) != 1 or len(self.texts) != len(self.tokens):
            raise ValueError(f"tokens, real, attention and texts differ in size: {shapes}, {len(self.texts)} texts.")
        if self.pad_side not in ("left", "right"):
            raise ValueError(f"pad_side is 'left' or 'right', not {self.pad_side!r}.")
        if bool((self.real & ~self.attention).any()):
            raise ValueError("A token cannot be real and padding: `real` must lie within `attention`.")
        if self.document is not None and not torch.equal(self.document >= 0, self.real):
            raise ValueError("`document` has the place of `real` and says a text for each real token, -1 elsewhere.")
        if (empty := (~self.real.any(1)).nonzero().flatten().tolist()) or not len(self.tokens):
            raise NoRealToken(f"Nothing but BOS and padding in text {empty[:5] or '(there is none)'}: leave it out.")

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, rows: slice | Sequence[int]) -> TokenBatch:
        """The batch of some texts, by slice or by a list of indices; padding and `document` are kept."""
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
        """Content key of the tokens and masks: what caches of activations are keyed by, whatever `document` says."""
        parts = (self.tokens.long(), self.real, self.attention)
        return content_key(list(self.tokens.shape), *(p.cpu().contiguous().numpy().tobytes() for p in parts))

    def strings(self, row: int) -> list[str]:
        """One readable string per position, '' at padding; bytes that are no whole character as `<0xE2><0x82>`."""
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

    BOS is the tokenizer's own, else its EOS (as GPT-2 does), else none: then position 0 is a real token.
    A text that already begins with the BOS string does not get a second one. Other special tokens that a text
    spells out (`<start_of_turn>`) are read as such and count as real: they were asked for.

    Args:
        max_length: in tokens, BOS included; default the model's context.
        truncate: cut longer texts, with a warning that says how many; otherwise they are refused.

    Raises NoRealToken, TextTooLong, ValueError (no texts; text that is not valid Unicode), TypeError (no string).
    """
    texts = (texts,) if isinstance(texts, str) else tuple(texts)
    if not texts:
        raise ValueError("There are no texts: the list is empty.")
    limit, bos = _limit(model, max_length, least=2), _bos(model.tokenizer)
    rows = _encode(model.tokenizer, texts)
    if empty := [i for i, row in enumerate(rows) if not row]:
        raise NoRealToken(f"Text {empty[0]} ({texts[empty[0]]!r}) has no token ({len(empty)} such): leave it out.")
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
        warnings.warn(f"Cut {len(long)} of {len(texts)} texts to {limit} tokens; {lost} tokens left out.", stacklevel=2)
    cut = [torch.tensor(row[:room]) for row in rows]
    return _pad(model.tokenizer, bos, [(row, torch.full_like(row, i)) for i, row in enumerate(cut)], texts, pad_side)


def pack(model: TransformerBridge, texts: str | Sequence[str], *, length: int | None = None) -> TokenBatch:
    """Documents joined by EOS and cut into windows that start with BOS: text for training and evaluation.

    `length` is that of a window, BOS included (default the context). A document may go on in the next window;
    `document` of the result says of every token which one it is from. Nothing is dropped: the last window may be
    shorter, padded on the right. Documents that give no token are refused, as in `tokenize`. Raises as `tokenize`.
    """
    texts = (texts,) if isinstance(texts, str) else tuple(texts)
    limit, bos = _limit(model, length, least=3), _bos(model.tokenizer)
    eos = model.tokenizer.eos_token_id
    end = bos if eos is None else [eos]
    stream: list[Tensor] = []  # int32: a Python list of ids would take nine times the memory
    with runtime.progress_bar(total=len(texts), unit="text", desc="tokenize") as bar:
        for start in range(0, len(texts), CHUNK):
            for i, row in enumerate(_encode(model.tokenizer, texts[start : start + CHUNK], start), start):
                if not row:
                    raise NoRealToken(f"Text {i} ({texts[i]!r}) has no token: leave it out.")
                stream += [torch.tensor(end if i else [], dtype=torch.int32), torch.tensor(row, dtype=torch.int32)]
            bar.update(min(CHUNK, len(texts) - start))
    if not stream:
        raise ValueError("There are no texts: the list is empty.")
    pieces = enumerate(stream)  # a separator, a document, a separator, ...
    document = torch.cat([torch.full(piece.shape, k // 2 if k % 2 else -1, dtype=torch.int32) for k, piece in pieces])
    windows = list(zip(torch.cat(stream).split(limit - len(bos)), document.split(limit - len(bos)), strict=True))
    decoded = tuple(model.tokenizer.batch_decode([ids.tolist() for ids, _ in windows]))
    return _pad(model.tokenizer, bos, windows, decoded, "right")


def harvest(
    model: TransformerBridge,
    batch: TokenBatch,
    hooks: str | Sequence[str],
    *,
    batch_size: int = 16,
    dtype: torch.dtype = torch.float32,
    compute: str = "auto",
    store: ActivationStore | None = None,
    progress: bool = True,
) -> dict[str, Float[Tensor, "text ..."]] | ActivationStore:
    """Activations of a batch at some hooks, `{hook: [text, pos, ...]}` on the CPU; zero at padding.

    Attention patterns and scores are `[text, head, query, key]`. Values that a module computes for all tokens in
    one row (routers of mixtures of experts) come back as `[text, pos, ...]`.

    Args:
        batch_size: texts per forward pass.
        dtype: of what is returned. A store has its own.
        compute: 'float32', 'bfloat16' (autocast) or 'auto': float32 into memory, where results are compared by
            digits; into a store, which training reads, bfloat16 where this machine computes it fast. bfloat16
            changes residual streams by about 1 %.
        store: write the real tokens there instead, resuming where an earlier run stopped; returns the store.

    Raises UnknownHook, BadActivations, TooLargeForMemory, ValueError (train mode, a hook whose values have no
    text axis, a store made for something else).
    """
    hooks = (hooks,) if isinstance(hooks, str) else tuple(dict.fromkeys(hooks))
    if not hooks:
        raise ValueError("No hook given. hook_table(model) lists them.")
    check_eval(model)
    check_hooks(model, hooks)
    if store is not None:
        precision = _precision(compute, store.compute)
        runner = Runner(model, hooks, batch_size, precision)
        with runtime.progress_bar(total=batch.n_real, unit="tok", desc="harvest", progress=progress) as bar:
            store.fill(model, batch, hooks, str(precision).removeprefix("torch."), runner.real_vectors, bar.update)
        return store
    _check_memory(model, batch, hooks, dtype)
    result: dict[str, Tensor] = {}

    def take(rows: Tensor, span: slice, values: dict[str, Tensor]) -> None:
        for hook, value in values.items():
            per_token = by_token(model, hook)
            if hook not in result:  # a batch is cut to its longest text, so its own length is not the result's
                shape = (batch.tokens.shape[1], *value.shape[2:]) if per_token else value.shape[1:]
                with torch.inference_mode(False):  # tensors made in inference mode can never be trained on
                    result[hook] = torch.zeros(len(batch), *shape, dtype=dtype)
            result[hook][(rows, span) if per_token else rows] = value
        bar.update(int(batch.real[rows].sum()))

    with runtime.progress_bar(total=batch.n_real, unit="tok", desc="harvest", progress=progress) as bar:
        Runner(model, hooks, batch_size, _precision(compute, "float32")).run(batch, batch.attention, dtype, take)
    return result


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
        raise ValueError(f"A length of {asked} tokens is not within {least} and the model's context of {context}.")
    return asked


def _encode(tokenizer: Any, texts: tuple[str, ...], first: int = 0) -> list[list[int]]:
    """Ids of texts without BOS; `first` is the number of the first text, for what the errors say."""
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
    tokenizer: Any, bos: list[int], rows: list[tuple[Tensor, Tensor]], texts: tuple[str, ...], pad_side: str
) -> TokenBatch:
    """Rows of (ids, document or -1) without BOS -> a batch with BOS, padded on one side."""
    lengths = [len(bos) + len(ids) for ids, _ in rows]
    width, pad = max(lengths), tokenizer.pad_token_id
    tokens = torch.full((len(rows), width), 0 if pad is None else pad)
    document, attention = torch.full((len(rows), width), -1), torch.zeros(len(rows), width, dtype=torch.bool)
    for i, ((ids, source), length) in enumerate(zip(rows, lengths, strict=True)):
        begin = 0 if pad_side == "right" else width - length
        first = begin + len(bos)
        tokens[i, begin:first] = torch.tensor(bos, dtype=torch.long)
        tokens[i, first : begin + length], document[i, first : begin + length] = ids.long(), source.long()
        attention[i, begin : begin + length] = True
    return TokenBatch(tokens, document >= 0, attention, texts, pad_side, tokenizer, document)


def _precision(compute: str, already: str | None = None) -> torch.dtype:
    """The dtype to compute in; a store that was begun in one precision is continued in it."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if compute == "auto":
        return known[already] if already else runtime.compute_dtype()
    if compute not in known:
        raise ValueError(f"compute is 'auto', 'float32' or 'bfloat16', not {compute!r}.")
    return known[compute]


def _check_memory(model: TransformerBridge, batch: TokenBatch, hooks: tuple[str, ...], dtype: torch.dtype) -> None:
    texts, length = batch.tokens.shape
    need = 0
    for hook in hooks:
        size = torch.Size(hook_names(model)[hook]).numel()
        per_text = size / 2 * length if by_token(model, hook) else size / 4 * length**2
        need += int(texts * per_text * dtype.itemsize)
    free = _free_memory()
    if need > MEMORY_SHARE * free:
        raise TooLargeForMemory(
            f"{texts} texts of {length} tokens at {len(hooks)} hooks take {need / 1e9:.1f} GB; {free / 1e9:.1f} GB are "
            "free. Pass store=ActivationStore.open(model, batch, hooks), or fewer texts, or dtype=torch.float16."
        )


def _free_memory() -> int:
    """Bytes that may still be taken: the kernel's estimate within the container's limit; 4 GB where unknown."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 4 << 30
    with suppress(OSError, ValueError):  # no such file, or "max"
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{k}").read_text(encoding="ascii")) for k in ("max", "current"))
        free = min(free, max(0, limit - used))
    return free
