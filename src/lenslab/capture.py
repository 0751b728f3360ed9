"""From tokens to activations: run the model as far as needed and keep what was asked for.

How `harvest` works:
1. refuse what would give wrong numbers silently: a model in train mode, one with hooks left on it,
   a hook that does not exist, tokens of another tokenizer;
2. run the texts batch by batch, as many as fit the memory, the longest first, cut to the longest
   of each batch, and stop at the block boundary after which no hook lies;
3. put every value where its text belongs, zero at padding; NaN and Inf are refused by hook and
   text;
4. return everything in memory, or write the real tokens to an `ActivationStore`, shard by shard.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.exceptions import StopAtLayerException

from lenslab import runtime
from lenslab.files import only_writer
from lenslab.hooks import by_pair, by_token, check_hooks, check_unhooked, hook_names
from lenslab.models import check_eval, check_ids, model_name, text_config
from lenslab.store import ActivationStore, check_dtype
from lenslab.tokens import TokenBatch

MEMORY_SHARE = 0.5  # of the memory that is free: what `harvest` may fill
PASS_BYTES = 2 << 30  # of one forward pass of several texts; more would not be faster
COPIES = 4  # of a pass's largest value are alive at once (measured: attention scores, with a mask)


class BadActivations(ValueError):
    """NaN or Inf where a number should be; the message names the hook and the text."""


class TooLargeForMemory(ValueError):
    """What was asked for would fill the memory; the message says what would not."""


def harvest(  # noqa: PLR0913
    model: TransformerBridge,
    batch: TokenBatch,
    hooks: str | Sequence[str],
    *,
    batch_size: int = 16,
    dtype: torch.dtype = torch.float32,
    compute: str = "auto",
    store: ActivationStore | None = None,
    progress: bool = True,
    edited: bool = False,
    device: torch.device | str = "cpu",
) -> dict[str, Float[Tensor, "text ..."]] | ActivationStore:
    """Activations of a batch at some hooks, `{hook: [text, pos, ...]}`; zero at padding.

    Attention patterns and scores are `[text, head, query, key]`. Values that a module computes for
    all tokens in one row (routers of mixtures of experts) come back as `[text, pos, ...]`.

    Args:
        batch_size: texts per forward pass; fewer where their attention or logits would fill memory.
        dtype: of what is returned. A store has its own.
        compute: 'float32', 'bfloat16' (autocast; it changes residual streams by about 1 %) or
            'auto': float32 into memory, where results are compared by digits; into a store, what
            the store was opened with.
        store: write the real tokens there instead, resuming where an earlier run stopped; returns
            the store.
        edited: take the model as it is with the hooks that are on it (inside `model.hooks(...)` or
            `splice`); never into a store, which holds what the weights alone give.
        device: where what is returned lies; a store's lies on the disk.

    Raises UnknownHook, BadActivations, TooLargeForMemory, StoreMismatch, NotWritten, TypeError and
    ValueError (as `check_batch`; train mode; hooks left on the model; no hook asked for, or one
    whose values have no text axis; a `dtype` of integers or of 8 bits).
    """
    check_batch(model, batch)
    check_dtype(dtype)
    check_eval(model)
    if store is not None or not edited:
        check_unhooked(model)
    hooks = check_hooks(model, hooks)
    if compute == "auto":
        compute = "float32" if store is None else store.manifest["compute"]
    if compute not in ("float32", "bfloat16"):
        raise ValueError(f"compute is 'auto', 'float32' or 'bfloat16', not {compute!r}.")
    held = batch
    if store is not None:
        opening = dict(folder=store.folder, dtype=store.dtype, compute=compute)
        ActivationStore.open(model, batch, hooks, **opening)  # refuses what the store is not for
        dtype = store.dtype
        held = batch[: store.manifest["texts_per_shard"]]
    batch_size = texts_per_pass(model, held, hooks, dtype=dtype, limit=batch_size)
    options = dict(batch_size=batch_size, compute=compute, dtype=dtype)
    total = batch.n_real
    with runtime.progress_bar(total=total, unit="tok", desc="harvest", progress=progress) as bar:
        if store is None:
            kept = batch.attention
            return _run(model, batch, hooks, kept, bar=bar, device=device, **options)
        with only_writer(store.folder):
            missing = store.missing()
            bar.update(total - sum(store.manifest["rows"][shard] for shard in missing))
            for shard in missing:
                first = shard * store.manifest["texts_per_shard"]
                part = batch[first : first + store.manifest["texts_per_shard"]]
                values = _run(model, part, hooks, part.real, bar=bar, first=first, **options)
                vectors = {hook: value[part.real].flatten(1) for hook, value in values.items()}
                store.write(shard, part, vectors)
    return store


def _run(  # noqa: PLR0913
    model: TransformerBridge,
    batch: TokenBatch,
    hooks: tuple[str, ...],
    keep: Tensor,
    *,
    batch_size: int,
    dtype: torch.dtype,
    compute: str,
    bar: runtime.Bar,
    first: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Steps 2 and 3. Outside `keep` `[text, pos]` values are zero and may be NaN in the model.

    `first` is the number of the batch's first text, for what errors say.
    """
    inside = torch.device(model.cfg.device)
    width = batch.tokens.shape[1]
    lengths = batch.attention.sum(1)
    trim = all(by_token(model, hook) for hook in hooks)  # a pattern has no one span to cut to
    # Padding before a text, or farther from it than a sliding window, has no key to see; its masks
    # are -inf in bf16, and its NaN reaches the text: batches that hold such padding run in float32.
    window = getattr(text_config(model), "sliding_window", None) or float("inf")
    result: dict[str, Tensor] = {}
    caught: dict[str, Tensor] = {}

    def catch(name: str, value: Tensor, hook: Any) -> None:
        caught[name] = value.to(dtype, copy=True)  # later modules may write into what passes

    def stop(value: Tensor, hook: Any) -> None:
        raise StopAtLayerException(value)

    points = [(name, partial(catch, name)) for name in hooks]
    if last := _last_point(model, hooks):
        points.append((last, stop))  # hooks of one point run in the order they were added
    with model.hooks(fwd_hooks=points):
        # the longest first: too little memory shows at once
        for rows in lengths.argsort(descending=True, stable=True).split(batch_size):
            length = int(lengths[rows[0]]) if trim else width
            span = slice(length) if batch.pad_side == "right" else slice(width - length, None)
            attention = batch.attention[rows, span].to(inside)
            mask = {} if bool(attention.all()) else {"attention_mask": attention.long()}
            blind = mask and (length > window or not bool(attention[:, 0].all()))
            bf16 = compute == "bfloat16" and not blind
            autocast = torch.autocast(inside.type, dtype=torch.bfloat16, enabled=bf16)
            with torch.inference_mode(), autocast:
                tokens = batch.tokens[rows, span].to(inside)
                model(tokens, return_type=None, use_cache=False, **mask)
            for hook in hooks:
                value = _by_text(model, hook, caught.pop(hook).to(device), keep[rows, span])
                _check_finite(hook, value, rows + first)
                per_token = by_token(model, hook)
                if hook not in result:
                    shape = (width, *value.shape[2:]) if per_token else value.shape[1:]
                    result[hook] = torch.zeros(len(batch), *shape, dtype=dtype, device=device)
                result[hook][(rows, span) if per_token else rows] = value
            bar.update(int(batch.real[rows].sum()))
    return result


def _last_point(model: TransformerBridge, hooks: tuple[str, ...]) -> str | None:
    """The hook point at the block boundary after which nothing is needed; None when the whole run
    is.

    `hook_resid_pre` of block k is the input of block k, so that k itself need not run.
    """
    if "blocks.0.hook_in" not in hook_names(model):
        return None  # encoder-decoders name their blocks otherwise
    last = (0, "hook_in")  # of one block, "hook_in" sorts before "hook_out"
    for hook in hooks:
        if block := re.match(r"blocks\.(\d+)\.(.+)", hook):
            at_input = block[2] in ("hook_in", "hook_resid_pre")
            last = max(last, (int(block[1]), "hook_in" if at_input else "hook_out"))
        elif not re.match(r"(hook_)?(pos_)?embed|rotary", hook):
            return None
    return f"blocks.{last[0]}.{last[1]}"


def _by_text(model: TransformerBridge, hook: str, value: Tensor, keep: Tensor) -> Tensor:
    """A captured value as `[text, ...]`, zero at tokens outside `keep` `[text, pos]`."""
    texts, length = keep.shape
    if hook_names(model)[hook][0] == 2 and len(value) == texts * length:  # [text * pos, ...]
        value = value.unflatten(0, (texts, length))
    elif len(value) == 1:  # the same for all texts (positions)
        value = value.expand(texts, *value.shape[1:])
    if len(value) != texts:
        raise ValueError(f"{hook} cannot be told apart by text ({tuple(value.shape)}): give one.")
    # by name, not by shape: a pattern [text, head, ...] of as many heads as positions looks alike
    axes = (texts, length) if by_token(model, hook) else (texts, 1, length)  # [text, head, pos, _]
    if not bool(keep.all()) and value.shape[len(axes) - 1] == length:
        left_out = ~keep.view(*axes, *[1] * (value.ndim - len(axes)))
        value = value.masked_fill(left_out.to(value.device), 0)
    return value


def _check_finite(hook: str, value: Tensor, texts: Tensor) -> None:
    fine = value < torch.inf if hook.endswith("attn_scores") else value.isfinite()  # masked: -Inf
    bad = texts[~fine.flatten(1).all(1).cpu()]
    if len(bad):
        advice = "Check the weights, or run in float32 (float16 holds values up to 65,504)."
        raise BadActivations(f"NaN or Inf at {hook} of text {int(bad[0])}. {advice}")


def check_batch(model: TransformerBridge, batch: TokenBatch) -> None:
    """Raise unless a batch can be what this model reads: TypeError for what is no TokenBatch,
    ValueError for ids outside the vocabulary, another tokenizer's, and texts beyond the context."""
    if not isinstance(batch, TokenBatch):
        kind = type(batch).__name__
        raise TypeError(f"After the model comes a TokenBatch, not {kind}: tokenize(model, texts).")
    check_ids(model, batch.tokens)
    name, ids = model_name(model), batch.tokens.unique().tolist()
    tokenizers = {id(each): each for each in (batch.tokenizer, model.tokenizer) if each is not None}
    if len({tuple(each.convert_ids_to_tokens(ids)) for each in tokenizers.values()}) > 1:
        raise ValueError(f"The batch was made with another tokenizer than {name}'s: tokenize.")
    longest = int(batch.attention.sum(1).max())
    if longest > model.cfg.n_ctx:
        raise ValueError(f"A text of {longest} tokens exceeds {name}'s context {model.cfg.n_ctx}.")


def texts_per_pass(
    model: TransformerBridge,
    batch: TokenBatch,
    hooks: Sequence[str] = (),
    *,
    dtype: torch.dtype = torch.float32,
    limit: int = 16,
) -> int:
    """How many texts of a batch one forward pass takes: `limit`, or fewer where memory is short.

    Counted are what is kept of the whole batch at `hooks` as `dtype`, and, of each text, its values
    at `hooks` and the largest on the way (attention scores grow with the square of the positions,
    logits with the vocabulary). Without hooks, the run goes to its end. Raises TooLargeForMemory
    where not even one text fits.
    """
    texts, length = batch.tokens.shape
    numbers = {}  # at each hook, of one text
    for hook, shape in hook_names(model).items():  # shapes are of two tokens
        power = 2 if by_pair(hook) else 1
        numbers[hook] = torch.Size(shape).numel() * length**power // 2**power
    kept = sum(numbers[hook] for hook in hooks)
    held, free = texts * kept * dtype.itemsize, free_memory()
    if held > MEMORY_SHARE * free:
        message = f"{held / 1e9:.1f} GB asked for, {free / 1e9:.1f} GB free: take fewer texts, or "
        advice = "store=ActivationStore.open(model, batch, hooks, texts_per_shard=...)."
        raise TooLargeForMemory(message + advice)
    stops = hooks and _last_point(model, tuple(hooks))
    passed = [n for hook, n in numbers.items() if not (stops and "unembed" in hook)]
    need = (COPIES * max(passed) + 2 * kept) * torch.float32.itemsize
    room = MEMORY_SHARE * free - held
    if str(model.cfg.device).startswith("cuda"):
        room = free = free_memory(model.cfg.device)
    if need > room:
        told = f"One text of {length:,} tokens takes {need / 1e9:.1f} GB, {free / 1e9:.1f} GB free"
        raise TooLargeForMemory(f"{told}: cut texts into shorter windows (pack(..., length=1024)).")
    return min(limit, max(1, int(min(room, PASS_BYTES) // need)))


def free_memory(gpu: torch.device | str | None = None) -> int:
    """Bytes that may still be taken, within the container's limit; no end where unknown."""
    if gpu is not None:  # what PyTorch holds back for itself is free, too
        reserved = torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu)
        return torch.cuda.mem_get_info(gpu)[0] + reserved
    free = [1 << 62]
    with suppress(OSError):
        available = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
        free.append(int(available[1]) * 1024)
    with suppress(OSError, ValueError):  # no such file, or "max"
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        free.append(limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    return min(free)
