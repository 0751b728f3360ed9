"""What the residual, attention and MLP streams carry, the odd first position, and which heads look
where.

1. `stream_profile`: norms of each stream by layer at real tokens, and the first position beside
   them.
2. `context_similarity`: is a stream alike where one token occurs in two texts? Control: other
   tokens.
3. `head_scores`: attention to the previous token, to the same token one repeat earlier, and to the
   token after that one, on random sequences repeated once (Olsson et al. 2022); and, where texts
   are given, to the previous token there: some heads look back within words only.
4. `token_bits`: the model's loss on each text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lenslab.capture import harvest
from lenslab.hooks import check_hooks, stream_hook
from lenslab.metrics import next_token_nats
from lenslab.models import check_eval
from lenslab.runtime import derive_generator
from lenslab.tokens import TokenBatch, bos_ids

TOGETHER = 8  # layers of one pass through the model: one by one is slow, all at once fills memory


def stream_profile(model: TransformerBridge, batch: TokenBatch) -> pd.DataFrame:
    """Norms of the streams over the real tokens of `batch`, and what is odd about the first
    position: one row per layer.

    Columns: `residual`, `attention`, `mlp`, mean norms at real tokens; `first_position`, the
    residual stream's norm at each text's first attended place (BOS, where the tokenizer has one);
    `two_largest_first` and `two_largest_rest`, the share of its squared norm in its two largest
    dimensions there and at real tokens; `sum_error` and `sum_error_without_mlp`, how far before +
    attention + MLP, or before + attention, is from after, relative to after.
    """
    first = batch.attention.long().argmax(dim=1)  # [text]
    streams = ("residual_pre", "attention", "mlp", "residual")
    layers = range(model.cfg.n_layers)
    hooks = [[stream_hook(model, layer, stream) for stream in streams] for layer in layers]
    rows = []
    for layer in layers:
        if layer % TOGETHER == 0:
            together = chain.from_iterable(hooks[layer : layer + TOGETHER])
            values = harvest(model, batch, list(together), progress=False)
        before, attention, mlp, after = (values[h][batch.real] for h in hooks[layer])  # [token, d]
        start = values[hooks[layer][-1]][torch.arange(len(batch)), first]  # [text, d_model]
        total = before + attention + mlp
        row = {
            "residual": after.norm(dim=-1).mean(),
            "attention": attention.norm(dim=-1).mean(),
            "mlp": mlp.norm(dim=-1).mean(),
            "first_position": start.norm(dim=-1).mean(),
            "two_largest_first": _two_largest(start),
            "two_largest_rest": _two_largest(after),
            "sum_error": (total - after).norm() / after.norm(),
            "sum_error_without_mlp": (total - mlp - after).norm() / after.norm(),
        }
        rows.append({column: float(value) for column, value in row.items()})
    return pd.DataFrame(rows).rename_axis("layer")


def _two_largest(x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, ""]:
    squares = x.double().pow(2)
    return (squares.topk(2, dim=-1).values.sum(-1) / squares.sum(-1)).mean()


def context_similarity(model: TransformerBridge, batch: TokenBatch, layer: int) -> pd.DataFrame:
    """Mean cosine between pairs of real tokens in different texts: the same token, and other tokens
    as control. The mean over all real tokens is removed first: a few dimensions that are large
    everywhere would make any two tokens alike.

    1 means that the stream ignores context; the control's level, that the token does not matter to
    it. Each distinct token weighs the same, else the most frequent ones would be the answer.
    Columns `same token`, `other token`, `tokens` (distinct tokens that occur in at least two
    texts).

    Raises ValueError where no token occurs in two texts.
    """
    hooks = {s: stream_hook(model, layer, s) for s in ("attention", "mlp", "residual")}
    values = harvest(model, batch, list(hooks.values()), progress=False)
    ids, text = batch.tokens[batch.real], batch.real.nonzero()[:, 0]  # [token]
    apart = text[:, None] != text  # [token, token]
    same = (ids[:, None] == ids) & apart
    other = (ids[:, None] != ids) & apart
    repeated = ids[same.any(dim=1)].unique()
    if not len(repeated):
        raise ValueError("No token occurs in two texts: give more texts.")
    rows = {}
    for stream, hook in hooks.items():
        x = values[hook][batch.real].double()  # [token, d_model]
        unit = torch.nn.functional.normalize(x - x.mean(0), dim=-1)
        cosine = unit @ unit.T
        alike = [float(cosine[ids == i][same[ids == i]].mean()) for i in repeated]
        rows[stream] = {"same token": np.mean(alike), "other token": float(cosine[other].mean())}
    return pd.DataFrame(rows).T.assign(tokens=len(repeated))


def repeated_tokens(model: TransformerBridge, n: int, length: int) -> Int[Tensor, "text pos"]:
    """BOS, a random sequence of `length` tokens, and the same sequence again: `[n, 1 + 2 *
    length]`; as long as the context allows."""
    length = min(length, (model.cfg.n_ctx - 1) // 2)
    special = set(model.tokenizer.all_special_ids)
    named = min(model.cfg.d_vocab, len(model.tokenizer))  # an embedding may be padded
    allowed = torch.tensor([i for i in range(named) if i not in special])
    generator = derive_generator(0, "repeated tokens")
    once = allowed[torch.randint(len(allowed), (n, length), generator=generator)]
    bos = torch.tensor(bos_ids(model.tokenizer), dtype=torch.long).expand(n, -1)
    return torch.cat([bos, once, once], dim=1)


@dataclass(frozen=True)
class HeadScores:
    """Mean attention weight by head, each `[layer, head]`, at the second copy of repeated random
    sequences; the loss in nats on the first and on the second copy; and the weight on the previous
    token of text, None where none was given."""

    previous_token: Float[np.ndarray, "layer head"]
    duplicate_token: Float[np.ndarray, "layer head"]
    induction: Float[np.ndarray, "layer head"]
    first_position: Float[np.ndarray, "layer head"]
    loss_first: float
    loss_second: float
    previous_token_on_text: Float[np.ndarray, "layer head"] | None = None

    def best(self, kind: str) -> tuple[int, int, float]:
        """(layer, head, score) of the strongest head of a kind."""
        scores = getattr(self, kind)
        layer, head = np.unravel_index(int(scores.argmax()), scores.shape)
        return int(layer), int(head), float(scores[layer, head])


def head_scores(
    model: TransformerBridge, batch: TokenBatch | None = None, *, n: int = 16, length: int = 50
) -> HeadScores:
    """Where each head looks in random sequences repeated once; nothing but the repeat can be
    predicted there. With a `batch` also how much it looks at the previous token of its texts, from
    every real token whose previous place is not the first. A few texts will do: all their patterns
    are held at once.

    Raises ValueError for a model in train mode; UnknownHook where attention patterns cannot be
    read; as `harvest` for the batch; ValueError where all its texts are of one token.
    """
    check_eval(model)
    tokens = repeated_tokens(model, n, length)
    hooks = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.cfg.n_layers)]
    check_hooks(model, hooks)
    with torch.inference_mode():
        logits, cache = model.run_with_cache(tokens.to(model.cfg.device), names_filter=hooks)
    end = tokens.shape[1]
    length = end // 2  # of one copy
    query = torch.arange(end - length, end)  # the second copy
    keys = {
        "previous_token": query - 1,
        "duplicate_token": query - length,  # the same token, in the first copy
        "induction": query - length + 1,  # what followed it there
        "first_position": torch.zeros_like(query),
    }
    text = torch.arange(len(tokens))[:, None]
    scores = {kind: _mean_weights(cache, hooks, text, query, key) for kind, key in keys.items()}
    if batch is not None:
        patterns = harvest(model, batch, hooks, progress=False)
        first = batch.attention.long().argmax(dim=1)  # [text]
        inner = torch.arange(batch.tokens.shape[1]) > first[:, None] + 1  # [text, pos]
        text, query = (batch.real & inner).nonzero(as_tuple=True)  # [token]
        if not len(text):
            raise ValueError("No text is long enough for a previous token that is not the first.")
        scores["previous_token_on_text"] = _mean_weights(patterns, hooks, text, query, query - 1)
    targets = tokens[:, 1:].to(logits.device)
    nats = torch.nn.functional.cross_entropy(logits[:, :-1].float().mT, targets, reduction="none")
    return HeadScores(
        **scores,
        # the second copy's first token is announced by nothing: left out
        loss_first=float(nats[:, : length - 1].mean()),
        loss_second=float(nats[:, 1 - length :].mean()),
    )


def _mean_weights(
    patterns: Any, hooks: list[str], text: Tensor, query: Tensor, key: Tensor
) -> Float[np.ndarray, "layer head"]:
    """Mean over pairs of a query and a key of the weights `[text, head, query, key]` at each
    hook."""
    weights = [patterns[hook][text, :, query, key].flatten(0, -2) for hook in hooks]
    return torch.stack(weights).mean(dim=1).float().cpu().numpy()


def token_bits(
    model: TransformerBridge, batch: TokenBatch, *, shuffle: bool = False, seed: int = 0
) -> Float[np.ndarray, " text"]:
    """Mean loss of each text in bits per real token, each run alone and without padding.

    `shuffle` puts each text's real tokens in random order first: what is left is what their
    frequency tells. Raises ValueError for a model in train mode.
    """
    check_eval(model)
    bits, generator = [], derive_generator(seed, "order of tokens")
    for row in range(len(batch)):
        attended = batch.attention[row]
        tokens, real = batch.tokens[row][attended], batch.real[row][attended]  # [pos], copies
        if shuffle:
            tokens[real] = tokens[real][torch.randperm(int(real.sum()), generator=generator)]
        with torch.inference_mode():
            nats = next_token_nats(model(tokens[None]), tokens[None], real[None])
        bits.append(float(nats.mean()) / math.log(2))
    return np.array(bits)
