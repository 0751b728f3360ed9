"""From text to activations: tokenize into a TokenBatch, run the model as far as needed, keep what
was asked for.

How `harvest` works:
1. refuse what would give wrong numbers silently: a model in train mode, a hook that does not exist;
2. run the model no further than the hooks need (`lenslab.capture`), longest texts first, batch by
   batch;
3. put every value where its text belongs, zero at padding; NaN and Inf are refused by hook and
   text;
4. return everything in memory, or write the real tokens to an `ActivationStore`, shard by shard.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.exceptions import StopAtLayerException
from transformer_lens.model_bridge.generalized_components.joint_qkv_attention import (
    JointQKVAttentionBridge,
)
from transformer_lens.model_bridge.generalized_components.normalization import NormalizationBridge

from lenslab import runtime
from lenslab.hooks import by_token, check_hooks, hook_names
from lenslab.models import check_eval
from lenslab.store import ActivationStore
from lenslab.tokens import TokenBatch


class BadActivations(ValueError):
    """NaN or Inf where a number should be; the message names the hook and the text."""


class Runner:
    """Runs a model over batches with hooks at a few points, and not further than they need."""

    def __init__(
        self,
        model: TransformerBridge,
        hooks: tuple[str, ...],
        batch_size: int,
        precision: torch.dtype,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size is at least 1, not {batch_size}.")
        self.model, self.hooks, self.batch_size, self.precision = (
            model,
            hooks,
            batch_size,
            precision,
        )
        self.first_text = 0  # of the batch within what errors should count from
        self.trim = all(
            by_token(model, hook) for hook in hooks
        )  # an attention pattern has no one span to cut to
        # Padding farther from a text than a sliding window has no key to see; its masks are -inf in
        # bf16, and its NaN
        # reaches the text: batches that hold such padding run in float32.
        config = getattr(model, "original_model", model).config
        self.window = getattr(config, "sliding_window", None) or float("inf")

    def run(
        self,
        batch: Any,
        keep: Tensor,
        dtype: torch.dtype,
        take: Callable[[Tensor, slice, dict[str, Tensor]], None],
    ) -> None:
        """Hand (rows `[b]`, span of positions, {hook: `[b, span, ...]`}) to `take`, until every
        text was run.

        Values outside `keep` `[text, pos]` come back as zero and are not looked at for NaN and Inf.
        A callback and no generator: a generator would leave its caller in inference mode between
        two batches.
        """
        model, caught = self.model, {}
        device = torch.device(model.cfg.device)
        lengths = batch.attention.sum(1)
        order = lengths.argsort(
            descending=True, stable=True
        )  # longest first: too little memory shows at once
        options = (
            {"use_cache": False} if hasattr(model, "original_model") else {}
        )  # no keys and values to keep

        def catch(name: str) -> Callable:
            def hook_function(value: Tensor, hook: Any) -> None:
                caught[name] = value.to(
                    dtype, copy=True
                )  # a copy: later modules may write into what passes here

            return hook_function

        def stop(value: Tensor, hook: Any) -> None:
            raise StopAtLayerException(value)

        points = [(name, catch(name)) for name in self.hooks]
        if (last := _last_point(model, self.hooks)) is not None:
            points.append(
                (last, stop)
            )  # after the others: hooks of one point run in the order they were added
        with torch.inference_mode(), model.hooks(fwd_hooks=points), fast_kernels(model):
            for rows in order.split(self.batch_size):
                longest = int(lengths[rows[0]]) if self.trim else batch.tokens.shape[1]
                span = (
                    slice(0, longest)
                    if batch.pad_side == "right"
                    else slice(batch.tokens.shape[1] - longest, None)
                )
                tokens, attention = (
                    batch.tokens[rows, span].to(device),
                    batch.attention[rows, span].to(device),
                )
                mask = {} if bool(attention.all()) else {"attention_mask": attention.long()}
                caught.clear()
                bf16 = self.precision == torch.bfloat16 and not (mask and longest > self.window)
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
                    model(tokens, return_type=None, **mask, **options)
                if missing := [name for name in self.hooks if name not in caught]:
                    raise ValueError(
                        f"{missing[0]} did not fire in this run, though it did in the first look."
                    )
                take(
                    rows,
                    span,
                    {n: self._place(n, caught[n], keep[rows, span], rows) for n in self.hooks},
                )

    def _place(self, name: str, value: Tensor, keep: Tensor, rows: Tensor) -> Tensor:
        """A captured value as `[text, ...]` on the CPU, zero where not kept, checked."""
        texts, length = keep.shape
        if (
            hook_names(self.model)[name][0] == 2 and value.shape[0] == texts * length
        ):  # [text * pos, ...]
            value = value.unflatten(0, (texts, length))
        elif value.shape[0] == 1 and texts > 1:  # the same for all texts (positions)
            value = value.expand(texts, *value.shape[1:])
        if value.shape[0] != texts:
            raise ValueError(
                f"{name} gives values of shape {tuple(value.shape)} for {texts} texts of {length} tokens: they cannot "
                "be told apart by text. Harvest one text at a time, or use another hook."
            )
        value = value.cpu()
        # by name, not by shape alone: a pattern [text, head, ...] of as many heads as positions
        # looks the same
        if by_token(self.model, name) and value.shape[:2] == keep.shape and not bool(keep.all()):
            value = value.masked_fill(~keep.view(texts, length, *[1] * (value.ndim - 2)), 0)
        if not name.endswith("attn_scores") and not bool(value.sum(dtype=torch.float32).isfinite()):
            self._diagnose(name, value, rows)
        return value

    def _diagnose(self, name: str, value: Tensor, rows: Tensor) -> None:
        bad = (~value.isfinite()).flatten(1).any(1)  # a sum can also overflow although no value did
        if not bool(bad.any()):
            return
        half = value.dtype == torch.float16
        raise BadActivations(
            f"NaN or Inf at {name} of text {int(rows[bad.nonzero()[0, 0]]) + self.first_text}. "
            + (
                "Values above 65,504 do not fit float16: try torch.bfloat16 or torch.float32."
                if half
                else ""
            )
            + ("" if half else "Check the weights, or run with compute='float32'.")
        )

    def real_vectors(self, batch: Any, dtype: torch.dtype, first_text: int) -> dict[str, Tensor]:
        """{hook: `[token, d]`} of the real tokens, in order of text and position; heads side by
        side."""
        self.first_text = first_text
        first = batch.real.flatten().cumsum(0).view_as(batch.real) - 1  # where each real token goes
        result: dict[str, Tensor] = {}

        def take(rows: Tensor, span: slice, values: dict[str, Tensor]) -> None:
            real = batch.real[rows, span]
            for hook, value in values.items():
                vectors = value[real].flatten(1)
                if hook not in result:
                    with torch.inference_mode(False):
                        result[hook] = torch.empty(batch.n_real, vectors.shape[1], dtype=dtype)
                result[hook][first[rows, span][real]] = vectors

        self.run(batch, batch.real, dtype, take)
        return result


def _last_point(model: TransformerBridge, hooks: tuple[str, ...]) -> str | None:
    """The hook point at the block boundary after which nothing is needed; None when the whole run
    is.

    `hook_resid_pre` of block k is the input of block k, so that k itself need not run.
    """
    if "blocks.0.hook_in" not in hook_names(model):
        return None  # encoder-decoders name their blocks otherwise
    last = (0, False)  # (block, whether its output is needed); False: stop at its input
    for hook in hooks:
        if block := re.match(r"blocks\.(\d+)\.(.+)", hook):
            last = max(last, (int(block[1]), block[2] not in ("hook_in", "hook_resid_pre")))
        elif not re.match(r"(hook_)?(pos_)?embed|rotary", hook):
            return None
    return f"blocks.{last[0]}.{'hook_out' if last[1] else 'hook_in'}"


@contextmanager
def fast_kernels(model: TransformerBridge) -> Iterator[None]:
    """Fused kernels where TransformerBridge computes step by step only so that hooks can look in.

    LayerNorm runs as torch's own unless `hook_scale` or `hook_normalized` has a hook; GPT-2's
    attention as `scaled_dot_product_attention` unless `hook_attn_scores` or `hook_pattern` has one.
    Values agree to rounding (tested at every hook); a float32 run on a CPU takes about an eighth
    less. What does not fit exactly is left.
    """
    swapped: list[tuple[Any, str]] = []

    def swap(module: Any, name: str, function: Callable) -> None:
        vars(module)[name] = function
        swapped.append((module, name))

    def hooked(module: Any, *points: str) -> bool:
        return any(getattr(module, p).fwd_hooks or getattr(module, p).bwd_hooks for p in points)

    try:
        for module in [] if model.compatibility_mode else model.modules():
            kind = type(module)
            if getattr(kind, "_python_norm_forward", 0) is NormalizationBridge._python_norm_forward:
                original = module.original_component
                if isinstance(original, torch.nn.LayerNorm) and not hooked(
                    module, "hook_scale", "hook_normalized"
                ):
                    swap(module, "_python_norm_forward", original.forward)
            if (
                getattr(kind, "_reconstruct_attention", 0)
                is JointQKVAttentionBridge._reconstruct_attention
            ):
                unseen = not hooked(module, "hook_attn_scores", "hook_pattern")
                if unseen and _plain_attention(module):
                    swap(module, "_reconstruct_attention", partial(_fused_attention, module))
        yield
    finally:
        for module, name in swapped:
            del vars(module)[name]


def _plain_attention(attention: Any) -> bool:
    cfg = attention.config
    special = (
        "scale_attn_by_inverse_layer_idx",
        "use_attn_result",
        "use_split_qkv_input",
        "use_attn_in",
    )
    same = getattr(cfg, "n_key_value_heads", None) in (None, cfg.n_heads)
    return (
        same
        and not getattr(attention, "_reorder_and_upcast_attn", False)
        and not any(map(vars(cfg).get, special))
    )


def _fused_attention(
    attention: Any, q: Tensor, k: Tensor, v: Tensor, **options: Any
) -> tuple[Tensor, None]:
    """As `JointQKVAttentionBridge._reconstruct_attention`, which writes out scores and pattern."""
    mask = options.get("attention_mask")
    if (
        mask is None or mask.ndim != 4 or not mask.is_floating_point()
    ):  # then it adds a causal mask of its own
        return type(attention)._reconstruct_attention(attention, q, k, v, **options)
    heads = attention.config.n_heads
    q, k, v, texts, length, width = attention._reshape_qkv_to_heads(q, k, v, heads, heads)
    z = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask.to(q.dtype), scale=width**-0.5
    )
    return attention._apply_output_projection(
        attention._reshape_attn_output(z, texts, length, heads, width)
    ), None


MEMORY_SHARE = 0.5  # of the memory that is free: what `harvest` may fill without a store


class TooLargeForMemory(ValueError):
    """What was asked for would fill the memory; an `ActivationStore` takes it."""


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

    Attention patterns and scores are `[text, head, query, key]`. Values that a module computes for
    all tokens in one row (routers of mixtures of experts) come back as `[text, pos, ...]`.

    Args: batch_size: texts per forward pass. dtype: of what is returned. A store has its own.
        compute: 'float32', 'bfloat16' (autocast) or 'auto': float32 into memory, where results are
        compared by
            digits; into a store, which training reads, bfloat16 where this machine computes it
            fast. bfloat16 changes residual streams by about 1 %.
        store: write the real tokens there instead, resuming where an earlier run stopped; returns
            the store.

    Raises UnknownHook, BadActivations, TooLargeForMemory, ValueError (train mode, a hook whose
    values have no text axis, a store made for something else).
    """
    hooks = (hooks,) if isinstance(hooks, str) else tuple(dict.fromkeys(hooks))
    if not hooks:
        raise ValueError("No hook given. hook_table(model) lists them.")
    check_eval(model)
    check_hooks(model, hooks)
    if store is not None:
        precision = _precision(compute, store.compute)
        runner = Runner(model, hooks, batch_size, precision)
        with runtime.progress_bar(
            total=batch.n_real, unit="tok", desc="harvest", progress=progress
        ) as bar:
            store.fill(
                model,
                batch,
                hooks,
                str(precision).removeprefix("torch."),
                runner.real_vectors,
                bar.update,
            )
        return store
    _check_memory(model, batch, hooks, dtype)
    result: dict[str, Tensor] = {}

    def take(rows: Tensor, span: slice, values: dict[str, Tensor]) -> None:
        for hook, value in values.items():
            per_token = by_token(model, hook)
            if (
                hook not in result
            ):  # a batch is cut to its longest text, so its own length is not the result's
                shape = (batch.tokens.shape[1], *value.shape[2:]) if per_token else value.shape[1:]
                with torch.inference_mode(
                    False
                ):  # tensors made in inference mode can never be trained on
                    result[hook] = torch.zeros(len(batch), *shape, dtype=dtype)
            result[hook][(rows, span) if per_token else rows] = value
        bar.update(int(batch.real[rows].sum()))

    with runtime.progress_bar(
        total=batch.n_real, unit="tok", desc="harvest", progress=progress
    ) as bar:
        Runner(model, hooks, batch_size, _precision(compute, "float32")).run(
            batch, batch.attention, dtype, take
        )
    return result


def _precision(compute: str, already: str | None = None) -> torch.dtype:
    """The dtype to compute in; a store that was begun in one precision is continued in it."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if compute == "auto":
        return known[already] if already else runtime.compute_dtype()
    if compute not in known:
        raise ValueError(f"compute is 'auto', 'float32' or 'bfloat16', not {compute!r}.")
    return known[compute]


def _check_memory(
    model: TransformerBridge, batch: TokenBatch, hooks: tuple[str, ...], dtype: torch.dtype
) -> None:
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
    """Bytes that may still be taken: the kernel's estimate within the container's limit; 4 GB where
    unknown."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(
            int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")
        )
    except (OSError, StopIteration):
        return 4 << 30
    with suppress(OSError, ValueError):  # no such file, or "max"
        limit, used = (
            int(Path(f"/sys/fs/cgroup/memory.{k}").read_text(encoding="ascii"))
            for k in ("max", "current")
        )
        free = min(free, max(0, limit - used))
    return free
