"""Run a model no further than some hooks need, and catch what passes there.

1. group the texts into batches, longest together, and cut each batch to its own longest text;
2. hook the requested points and no other, and stop at the end of the last block that is needed;
3. run under inference mode, in bfloat16 where asked, with fused kernels wherever no hook looks inside;
4. give each value its text axis back, zero at padding, refused when it holds NaN or Inf.

Stopping is our own hook at a block's boundary: with TransformerBridge's `stop_at_layer=k` the name
`blocks.k.hook_resid_pre` (the input of k) is no longer caught, here it is, and block k does not run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.exceptions import StopAtLayerException
from transformer_lens.model_bridge.generalized_components.joint_qkv_attention import JointQKVAttentionBridge
from transformer_lens.model_bridge.generalized_components.normalization import NormalizationBridge

from lenslab.models import hook_names


class BadActivations(ValueError):
    """NaN or Inf where a number should be; the message names the hook and the text."""


def by_token(model: TransformerBridge, hook: str) -> bool:
    """Whether a hook's values are `[text, pos, ...]` or `[text * pos, ...]`, with one axis of positions only."""
    shape = hook_names(model)[hook]  # of one text of two tokens
    square = "attn_scores" in hook or "pattern" in hook  # [text, head, query, key]; there may be two heads
    return not square and (shape[0] == 2 or shape[:2] == (1, 2))


def vector_width(model: TransformerBridge, hook: str) -> int:
    """Length of a hook's vector per token, heads side by side. Raises ValueError where it has none."""
    shape = hook_names(model)[hook]
    own = shape[1:] if shape[0] == 2 else shape[2:]
    if not by_token(model, hook) or not own:
        raise ValueError(f"{hook} has no vector per token (shape {shape} for two tokens): it cannot be stored.")
    return torch.Size(own).numel()


class Runner:
    """Runs a model over batches with hooks at a few points, and not further than they need."""

    def __init__(self, model: TransformerBridge, hooks: tuple[str, ...], batch_size: int, precision: torch.dtype):
        if batch_size < 1:
            raise ValueError(f"batch_size is at least 1, not {batch_size}.")
        self.model, self.hooks, self.batch_size, self.precision = model, hooks, batch_size, precision
        self.first_text = 0  # of the batch within what errors should count from
        self.trim = all(by_token(model, hook) for hook in hooks)  # an attention pattern has no one span to cut to
        # Padding farther from a text than a sliding window has no key to see; its masks are -inf in bf16, and its NaN
        # reaches the text: batches that hold such padding run in float32.
        config = getattr(model, "original_model", model).config
        self.window = getattr(config, "sliding_window", None) or float("inf")

    def run(
        self, batch: Any, keep: Tensor, dtype: torch.dtype, take: Callable[[Tensor, slice, dict[str, Tensor]], None]
    ) -> None:
        """Hand (rows `[b]`, span of positions, {hook: `[b, span, ...]`}) to `take`, until every text was run.

        Values outside `keep` `[text, pos]` come back as zero and are not looked at for NaN and Inf.
        A callback and no generator: a generator would leave its caller in inference mode between two batches.
        """
        model, caught = self.model, {}
        device = torch.device(model.cfg.device)
        lengths = batch.attention.sum(1)
        order = lengths.argsort(descending=True, stable=True)  # longest first: too little memory shows at once
        options = {"use_cache": False} if hasattr(model, "original_model") else {}  # no keys and values to keep

        def catch(name: str) -> Callable:
            def hook_function(value: Tensor, hook: Any) -> None:
                caught[name] = value.to(dtype, copy=True)  # a copy: later modules may write into what passes here

            return hook_function

        def stop(value: Tensor, hook: Any) -> None:
            raise StopAtLayerException(value)

        points = [(name, catch(name)) for name in self.hooks]
        if (last := _last_point(model, self.hooks)) is not None:
            points.append((last, stop))  # after the others: hooks of one point run in the order they were added
        with torch.inference_mode(), model.hooks(fwd_hooks=points), fast_kernels(model):
            for rows in order.split(self.batch_size):
                longest = int(lengths[rows[0]]) if self.trim else batch.tokens.shape[1]
                span = slice(0, longest) if batch.pad_side == "right" else slice(batch.tokens.shape[1] - longest, None)
                tokens, attention = batch.tokens[rows, span].to(device), batch.attention[rows, span].to(device)
                mask = {} if bool(attention.all()) else {"attention_mask": attention.long()}
                caught.clear()
                bf16 = self.precision == torch.bfloat16 and not (mask and longest > self.window)
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
                    model(tokens, return_type=None, **mask, **options)
                if missing := [name for name in self.hooks if name not in caught]:
                    raise ValueError(f"{missing[0]} did not fire in this run, though it did in the first look.")
                take(rows, span, {n: self._place(n, caught[n], keep[rows, span], rows) for n in self.hooks})

    def _place(self, name: str, value: Tensor, keep: Tensor, rows: Tensor) -> Tensor:
        """A captured value as `[text, ...]` on the CPU, zero where not kept, checked."""
        texts, length = keep.shape
        if hook_names(self.model)[name][0] == 2 and value.shape[0] == texts * length:  # [text * pos, ...]
            value = value.unflatten(0, (texts, length))
        elif value.shape[0] == 1 and texts > 1:  # the same for all texts (positions)
            value = value.expand(texts, *value.shape[1:])
        if value.shape[0] != texts:
            raise ValueError(
                f"{name} gives values of shape {tuple(value.shape)} for {texts} texts of {length} tokens: they cannot "
                "be told apart by text. Harvest one text at a time, or use another hook."
            )
        value = value.cpu()
        # by name, not by shape alone: a pattern [text, head, ...] of as many heads as positions looks the same
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
            + ("Values above 65,504 do not fit float16: try torch.bfloat16 or torch.float32." if half else "")
            + ("" if half else "Check the weights, or run with compute='float32'.")
        )

    def real_vectors(self, batch: Any, dtype: torch.dtype, first_text: int) -> dict[str, Tensor]:
        """{hook: `[token, d]`} of the real tokens, in order of text and position; heads side by side."""
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
    """The hook point at the block boundary after which nothing is needed; None when the whole run is.

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

    LayerNorm runs as torch's own unless `hook_scale` or `hook_normalized` has a hook; GPT-2's attention as
    `scaled_dot_product_attention` unless `hook_attn_scores` or `hook_pattern` has one. Values agree to rounding
    (tested at every hook); a float32 run on a CPU takes about an eighth less. What does not fit exactly is left.
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
                if isinstance(original, torch.nn.LayerNorm) and not hooked(module, "hook_scale", "hook_normalized"):
                    swap(module, "_python_norm_forward", original.forward)
            if getattr(kind, "_reconstruct_attention", 0) is JointQKVAttentionBridge._reconstruct_attention:
                unseen = not hooked(module, "hook_attn_scores", "hook_pattern")
                if unseen and _plain_attention(module):
                    swap(module, "_reconstruct_attention", partial(_fused_attention, module))
        yield
    finally:
        for module, name in swapped:
            del vars(module)[name]


def _plain_attention(attention: Any) -> bool:
    cfg = attention.config
    special = ("scale_attn_by_inverse_layer_idx", "use_attn_result", "use_split_qkv_input", "use_attn_in")
    same = getattr(cfg, "n_key_value_heads", None) in (None, cfg.n_heads)
    return same and not getattr(attention, "_reorder_and_upcast_attn", False) and not any(map(vars(cfg).get, special))


def _fused_attention(attention: Any, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, None]:
    """As `JointQKVAttentionBridge._reconstruct_attention`, which writes out scores and pattern."""
    mask = options.get("attention_mask")
    if mask is None or mask.ndim != 4 or not mask.is_floating_point():  # then it adds a causal mask of its own
        return type(attention)._reconstruct_attention(attention, q, k, v, **options)
    heads = attention.config.n_heads
    q, k, v, texts, length, width = attention._reshape_qkv_to_heads(q, k, v, heads, heads)
    z = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype), scale=width**-0.5)
    return attention._apply_output_projection(attention._reshape_attn_output(z, texts, length, heads, width)), None
