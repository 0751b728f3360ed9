"""Load a language model and look at what it is made of: the one place that builds TransformerLens
models.

`load_model` returns TransformerLens's own `TransformerBridge`, never a wrapper; hook names are
those of HookedTransformer (`blocks.3.hook_resid_post`). The weights are left as they were trained:
nothing is folded or centred, because an SAE may have been trained on either and says so itself (see
`lenslab.sae.inputs`).
"""

from __future__ import annotations

import hashlib
import json
import weakref
from types import SimpleNamespace

import pandas as pd
import torch
from torch import nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import PretrainedConfig, PreTrainedModel

from lenslab.files import NotAModel as NotAModel
from lenslab.files import as_bytes
from lenslab.loading import buffer_hashes, model_name, module_settings
from lenslab.loading import check_ids as check_ids
from lenslab.loading import load_model as load_model
from lenslab.loading import random_twin as random_twin
from lenslab.opening import build, text_config

_KEYS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # model -> (state, {dtype: key})
# What a config says that changes no number; and the three configs, bundled models', whose keys were
# written before configs were part of keys: their shapes of weights are no other config's here
SILENT = ("transformers_version", "architectures", "dtype", "use_cache", "_name_or_path")
SILENT += ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")
UNMARKED = ("52477a1d", "29a9eaab", "9348025a")


def weights_key(model: TransformerBridge, dtype: torch.dtype | None = None) -> str:
    """16 hexadecimal digits of the SHA-256 of all weights and their types: what an SAE was made
    for. With `dtype`, the key that the model would have with its weights cast to it.

    Computed once per state of the weights (0.05 s for pocket-gpt, seconds for a billion
    parameters).
    """
    weights = sorted(model.original_model.named_parameters())
    state = [_state(parameter) for _, parameter in weights]
    if model not in _KEYS or _KEYS[model][0] != state:
        _KEYS[model] = state, {}
    keys = _KEYS[model][1]
    if dtype not in keys:
        digest = hashlib.sha256()
        for name, parameter in weights:
            values = parameter.detach().to(dtype=dtype)
            digest.update(f"{name}{tuple(values.shape)}{values.dtype}".encode())
            digest.update(as_bytes(values))
        keys[dtype] = digest.hexdigest()[:16]
    return keys[dtype]


def model_key(model: TransformerBridge) -> str:
    """The key of what a model computes, which caches of activations are keyed by: `weights_key`,
    and 8 digits of the config where it is not a bundled model's, of buffers that files hold or that
    were changed since, and of modules that were exchanged or set otherwise since."""
    config = text_config(model).to_diff_dict()
    told = {name: value for name, value in config.items() if name not in SILENT}
    # a bridge that somebody made himself has no list of what was built: all of it counts
    told |= dict(buffer_hashes(model).items() - getattr(model, "built_buffers", {}).items())
    told |= dict(module_settings(model).items() - getattr(model, "built_modules", {}).items())
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:8]
    return weights_key(model) + ("" if digest in UNMARKED else f"-{digest}")


def _state(parameter: torch.Tensor) -> tuple:
    """What changes with a parameter, edits through `.data` included, which leave its version: type
    and sums over rows and over columns, a fraction of the time of a hash."""
    value = parameter.detach()
    sums = [value.sum(axis) for axis in range(min(value.ndim, 2))] if value.ndim > 1 else [value]
    return parameter.dtype, *(hash(s.float().cpu().numpy().tobytes()) for s in sums)


def check_decoder_only(model: TransformerBridge) -> None:
    """Raise ValueError for an encoder-decoder: TransformerLens would give its decoder the text that
    the encoder reads, one token late."""
    if model.original_model.config.is_encoder_decoder:
        advice = "read its hooks with model.run_with_cache(tokens, decoder_input=...)."
        raise ValueError(f"{model_name(model)} is an encoder-decoder, not a decoder only: {advice}")


def check_eval(model: TransformerBridge) -> None:
    """Raise ValueError for a model in train mode, where dropout would change what it computes, a
    little and at random, and as `check_decoder_only`."""
    check_decoder_only(model)
    if model.training:
        raise ValueError(f"{model_name(model)} is in train mode (dropout): call model.eval().")


def parameter_table(model: TransformerBridge, layer: int | None = None) -> pd.DataFrame:
    """Parameters (name, shape, count, trainable) of the model or of one block; tied weights appear
    once.

    Read from the architecture: the bridge holds fused query-key-value matrices twice, whole and
    split.
    """
    loaded = dict(model.original_model.named_parameters())
    trainable = {n.replace("._original_component", ""): p.requires_grad for n, p in loaded.items()}
    rows = [
        (name, tuple(parameter.shape), parameter.numel(), trainable.get(name, True))
        for name, parameter in _plain(model).named_parameters()
        if layer is None or f".{layer}." in name
    ]
    return pd.DataFrame(rows, columns=["parameter", "shape", "count", "trainable"])


def _plain(model: TransformerBridge) -> PreTrainedModel:
    """The Hugging Face model without bridge and without weights: names, shapes and modules."""
    with torch.device("meta"):
        return build(model.original_model.config)


EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_k")
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "activation")


def _told(config: PretrainedConfig, names: tuple[str, ...]):
    """What a config says under the first of several names that families use."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if value not in (None, 0)), None)


class ModelSummary(SimpleNamespace):
    """What a model is, in numbers: the fields that `summarize` reads. Counts are of parameters,
    `context` is in tokens; None where the architecture has no such thing."""

    def to_frame(self) -> pd.DataFrame:
        """One column, named as the model."""
        return pd.DataFrame({self.name: {k: v for k, v in vars(self).items() if k != "name"}})


def summarize(model: TransformerBridge) -> ModelSummary:
    """Architecture summary, read from the loaded model and its config, not from defaults of
    TransformerLens."""
    cfg, config, table = model.cfg, text_config(model), parameter_table(model)
    count, plain = table["count"], _plain(model)
    modules = dict(plain.named_modules())
    embeddings = [f"{name}.weight" for name, m in modules.items() if isinstance(m, nn.Embedding)]
    activations = [type(m).__name__ for m in modules.values() if "LU" in type(m).__name__.upper()]
    return ModelSummary(
        name=model_name(model),
        architecture=type(model.original_model).__name__,
        layers=cfg.n_layers,
        d_model=cfg.d_model,
        heads=cfg.n_heads,
        key_value_heads=cfg.n_key_value_heads or cfg.n_heads,
        d_head=cfg.d_head,
        d_mlp=getattr(config, "d_ff", cfg.d_mlp),
        experts=_told(config, EXPERTS),
        experts_per_token=_told(config, EXPERTS_PER_TOKEN),
        vocabulary=cfg.d_vocab,
        context=cfg.n_ctx,
        normalization=str(cfg.normalization_type),
        activation=str(_told(config, ACTIVATIONS) or next(iter(activations), cfg.act_fn)),
        positions=str(cfg.positional_embedding_type),
        tied_embeddings=bool(model.original_model.config.tie_word_embeddings),
        parameters=int(count.sum()),
        trainable_parameters=int(count[table["trainable"]].sum()),
        embedding_parameters=int(count[table["parameter"].isin(embeddings)].sum()),
        block_parameters=int(count[table["parameter"].str.contains(r"\.\d+\.")].sum()),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
    )
