"""Which hooks a model has, what the streams are called, and refusal of names that it has not.

TransformerBridge itself ignores unknown hook names silently, so everything that takes a name asks
`check_hooks` first.
"""

from __future__ import annotations

import difflib
import math
import weakref
from collections.abc import Iterable

import numpy as np
import pandas as pd
import torch
from transformer_lens.model_bridge import TransformerBridge

from lenslab.models import check_decoder_only, model_name

STREAMS = {  # stream -> hook below `blocks.LAYER.`
    "residual_pre": "hook_resid_pre",
    "attention": "hook_attn_out",
    "residual_mid": "hook_resid_mid",
    "mlp": "hook_mlp_out",
    "residual": "hook_resid_post",
}


OWN_HOOKS = ("torch.", "transformers.", "transformer_lens.model_bridge.")  # where they come from


class UnknownHook(ValueError):
    """A hook name that this model does not have."""


_HOOKS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def hook_names(model: TransformerBridge) -> dict[str, tuple[int, ...]]:
    """Every hook that fires in a forward pass, aliases included -> shape for an input `[text=1,
    pos=2]`.

    Found by running two tokens, and three (see `by_token`), so that what is listed is what can be
    captured; again where TransformerLens's switches (`set_use_attn_result`) were thrown since.
    """
    switches = {k: v for k, v in vars(model.cfg).items() if k.startswith(("use_", "ungroup"))}
    state = switches, model.compatibility_mode
    if model not in _HOOKS or _HOOKS[model][0] != state:
        _HOOKS[model] = state, _shapes(model, 2), _shapes(model, 3)
    return _HOOKS[model][1]


def _shapes(model: TransformerBridge, length: int) -> dict[str, tuple[int, ...]]:
    tokens = torch.zeros(1, length, dtype=torch.long, device=model.cfg.device)
    with torch.inference_mode():
        _, cache = model.run_with_cache(tokens)
    return {name: tuple(value.shape) for name, value in cache.items()}


def check_hooks(model: TransformerBridge, names: str | Iterable[str]) -> tuple[str, ...]:
    """One hook or several, each once. Raises UnknownHook, with the nearest names, where this model
    has one of them not; ValueError for none."""
    hooks = hook_names(model)
    names = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
    if not names:
        raise ValueError("No hook is asked for; hook_table(model) lists them.")
    for name in names:
        if name not in hooks:
            near = difflib.get_close_matches(name, hooks, n=3, cutoff=0.5)
            if "rout" in name or "expert" in name:  # TransformerLens calls the router a gate
                near = [hook for hook in hooks if hook.endswith("mlp.gate.hook_out")][:1] or near
            raise UnknownHook(
                f"{model_name(model)} has no hook {name!r}. Nearest: {', '.join(near) or 'none'}. "
                f"It has {model.cfg.n_layers} layers, from 0; hook_table(model) lists all hooks."
            )
    return names


def stream_hook(model: TransformerBridge, layer: int | np.integer, stream: str = "residual") -> str:
    """The hook of a stream at a layer: 'residual' (after the block), 'residual_pre' (before it),
    'residual_mid', 'attention' (what the attention adds) or 'mlp' (what the MLP adds).

    Raises UnknownHook for a layer outside 0 to n_layers - 1: a negative one is no layer from
    behind, because a typing slip would silently read another one; ValueError for an
    encoder-decoder, which has two of each.
    """
    check_decoder_only(model)
    return check_hooks(model, f"blocks.{layer}.{STREAMS[stream]}")[0]


def hook_table(model: TransformerBridge, layer: int | None = None) -> pd.DataFrame:
    """All hooks as a table (hook, shape), or those of one layer; shapes are for one text of two
    tokens."""
    prefix = "" if layer is None else f"blocks.{layer}."
    rows = [row for row in hook_names(model).items() if row[0].startswith(prefix)]
    return pd.DataFrame(rows, columns=["hook", "shape"])


def check_unhooked(model: torch.nn.Module) -> None:
    """Raise ValueError, naming the first, where forward hooks are left on a model or an SAE: what
    it gives is then not what its weights give. Its own, which the libraries put there, do not
    count."""
    for name, module in model.named_modules():
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        if not all(str(getattr(hook, "__module__", "")).startswith(OWN_HOOKS) for hook in hooks):
            where = name.replace("._original_component", "")
            off = "model.reset_hooks(including_permanent=True) or remove() of a PyTorch handle"
            raise ValueError(f"{where} has a hook and is not what its weights say. Off: {off}.")


def by_pair(hook: str) -> bool:
    """Whether a hook's values are `[text, head, query, key]`."""
    return "attn_scores" in hook or "pattern" in hook


def by_token(model: TransformerBridge, hook: str) -> bool:
    """Whether a hook's values are `[text, pos, ...]` or `[text * pos, ...]`, with one axis of
    positions only."""
    shape, longer = hook_names(model)[hook], _HOOKS[model][2][hook]  # of two and of three tokens
    # what grows with the tokens: an axis of two heads looks like one of two tokens
    grows = [axis for axis, size in enumerate(shape) if size != longer[axis]]
    return grows == [0] or (grows == [1] and shape[0] == 1)


def vector_width(model: TransformerBridge, hook: str) -> int:
    """Length of a hook's vector per token, heads side by side. Raises ValueError where it has
    none."""
    shape = hook_names(model)[hook]
    vector = shape[1:] if shape[0] == 2 else shape[2:]
    if not by_token(model, hook) or not vector:
        raise ValueError(f"{hook} {shape} has no vector per token: it cannot be stored.")
    return math.prod(vector)
