"""What the residual, attention and MLP streams carry, the odd first position, and which heads look
where.

1. `stream_profile`: norms of each stream by layer at real tokens, and the first position beside
   them.
2. `context_similarity`: is a stream alike where one token occurs in two texts? Control: other
   tokens.
3. `head_scores`: attention to the previous token, to the same token one repeat earlier, and to the
   token after that one, on random sequences repeated once (Olsson et al. 2022).
4. `token_bits`: the model's loss on each text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lenslab.capture import harvest
from lenslab.hooks import check_hooks, stream_hook
from lenslab.metrics import next_token_nats
from lenslab.models import check_eval, model_name
from lenslab.runtime import derive_generator
from lenslab.tokens import TokenBatch

STREAMS = ("residual_pre", "attention", "mlp", "residual")


@dataclass(frozen=True)
class StreamProfile:
    """By layer, each `[layer]`: mean norms at real tokens; the residual stream's norm at the first
    position; the share of its squared norm in its two largest dimensions there and at real tokens;
    and how far before + attention + MLP is from after, relative to after."""

    model: str
    residual: Float[np.ndarray, " layer"]
    attention: Float[np.ndarray, " layer"]
    mlp: Float[np.ndarray, " layer"]
    first_position: Float[np.ndarray, " layer"]
    two_largest_first: Float[np.ndarray, " layer"]
    two_largest_rest: Float[np.ndarray, " layer"]
    sum_error: Float[np.ndarray, " layer"]
    sum_error_without_mlp: Float[np.ndarray, " layer"]

    def to_frame(self) -> pd.DataFrame:
        columns = {k: v for k, v in vars(self).items() if k != "model"}
        return pd.DataFrame(columns).rename_axis("layer")


def _two_largest(x: Float[Tensor, "*batch d_model"]) -> float:
    squares = x.double().pow(2)
    return float((squares.topk(2, dim=-1).values.sum(-1) / squares.sum(-1)).mean())


def stream_profile(model: TransformerBridge, batch: TokenBatch) -> StreamProfile:
    """Norms of the streams by layer over the real tokens of `batch`, and what is odd about the
    first position.

    "First position" is each text's first attended place: BOS, where the tokenizer has one.
    """
    rows: dict[str, list[float]] = {
        name: [] for name in StreamProfile.__annotations__ if name != "model"
    }
    first = batch.attention.long().argmax(dim=1)
    for layer in range(model.cfg.n_layers):
        names = {s: stream_hook(model, layer, s) for s in STREAMS}
        found = harvest(model, batch, list(names.values()), progress=False)
        before, attention, mlp, after = (found[names[s]] for s in STREAMS)
        start, real = after[torch.arange(len(batch)), first], after[batch.real]
        full = (before + attention + mlp)[batch.real]
        rows["residual"].append(float(real.norm(dim=-1).mean()))
        rows["attention"].append(float(attention[batch.real].norm(dim=-1).mean()))
        rows["mlp"].append(float(mlp[batch.real].norm(dim=-1).mean()))
        rows["first_position"].append(float(start.norm(dim=-1).mean()))
        rows["two_largest_first"].append(_two_largest(start))
        rows["two_largest_rest"].append(_two_largest(real))
        rows["sum_error"].append(float((full - real).norm() / real.norm()))
        rows["sum_error_without_mlp"].append(
            float((full - mlp[batch.real] - real).norm() / real.norm())
        )
    return StreamProfile(model_name(model), **{k: np.array(v) for k, v in rows.items()})


def context_similarity(model: TransformerBridge, batch: TokenBatch, layer: int) -> pd.DataFrame:
    """Mean cosine between pairs of real tokens in different texts: the same token, and other tokens
    as control.

    1 means that the stream ignores context; the control's level, that the token does not matter to
    it. Each distinct token weighs the same, else the most frequent ones would be the answer.
    Columns `same token`, `other token`, `tokens` (distinct tokens that occur in at least two
    texts).

    Raises ValueError where no token occurs in two texts.
    """
    names = {s: stream_hook(model, layer, s) for s in ("attention", "mlp", "residual")}
    found = harvest(model, batch, list(names.values()), progress=False)
    ids = batch.tokens[batch.real]
    text = torch.arange(len(batch))[:, None].expand_as(batch.tokens)[batch.real]
    apart = text[:, None] != text[None]
    same, other = (ids[:, None] == ids[None]) & apart, (ids[:, None] != ids[None]) & apart
    repeated = same.any(dim=1)
    if not repeated.any():
        raise ValueError("No token occurs in two texts: give more texts.")
    kinds, rows = ids[repeated].unique(), {}
    for stream, name in names.items():
        unit = torch.nn.functional.normalize(found[name][batch.real].double(), dim=-1)
        cosine = unit @ unit.T
        per_kind = [cosine[ids == kind][same[ids == kind]].mean().item() for kind in kinds]
        rows[stream] = {
            "same token": float(np.mean(per_kind)),
            "other token": cosine[other].mean().item(),
        }
    return pd.DataFrame(rows).T.assign(tokens=len(kinds))


def repeated_tokens(
    model: TransformerBridge, n: int = 16, length: int = 50, seed: int = 0
) -> Int[Tensor, "text pos"]:
    """BOS, a random sequence of `length` tokens, and the same sequence again: `[n, 1 + 2 *
    length]`."""
    length = min(length, (model.cfg.n_ctx - 1) // 2)
    special = torch.tensor(sorted(model.tokenizer.all_special_ids))
    allowed = torch.arange(model.cfg.d_vocab)
    allowed = allowed[~torch.isin(allowed, special)]
    draw = torch.randint(
        len(allowed), (n, length), generator=derive_generator(seed, "repeated tokens")
    )
    tokenizer = model.tokenizer
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return torch.cat([torch.full((n, 1), bos), allowed[draw], allowed[draw]], dim=1)


@dataclass(frozen=True)
class HeadScores:
    """Mean attention weight by head, each `[layer, head]`, at the second copy of repeated random
    sequences; and the loss in nats on the first and on the second copy."""

    model: str
    previous_token: Float[np.ndarray, "layer head"]
    duplicate_token: Float[np.ndarray, "layer head"]
    induction: Float[np.ndarray, "layer head"]
    first_position: Float[np.ndarray, "layer head"]
    loss_first: float
    loss_second: float

    def best(self, kind: str) -> tuple[int, int, float]:
        """(layer, head, score) of the strongest head of a kind."""
        scores = getattr(self, kind)
        layer, head = np.unravel_index(int(scores.argmax()), scores.shape)
        return int(layer), int(head), float(scores[layer, head])


def head_scores(
    model: TransformerBridge, n: int = 16, length: int = 50, seed: int = 0
) -> HeadScores:
    """Where each head looks in random sequences repeated once; nothing but the repeat can be
    predicted there.

    Raises ValueError for a model in train mode; UnknownHook where attention patterns cannot be
    read.
    """
    check_eval(model)
    tokens = repeated_tokens(model, n, length, seed)
    length = (tokens.shape[1] - 1) // 2
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.cfg.n_layers)]
    check_hooks(model, names)
    with torch.inference_mode():
        logits, cache = model.run_with_cache(tokens.to(model.cfg.device), names_filter=names)
    query = torch.arange(1 + length, 2 * length + 1)
    offsets = {"previous_token": 1, "duplicate_token": length, "induction": length - 1}
    scores = {
        k: [cache[n][:, :, query, query - o].mean(dim=(0, 2)) for n in names]
        for k, o in offsets.items()
    }
    scores["first_position"] = [cache[n][:, :, query, 0].mean(dim=(0, 2)) for n in names]
    nats = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().mT, tokens[:, 1:].to(logits.device), reduction="none"
    )
    return HeadScores(
        model=model_name(model),
        **{kind: torch.stack(rows).float().cpu().numpy() for kind, rows in scores.items()},
        # position `length` predicts the second copy's first token, which nothing announces: left
        # out
        loss_first=float(nats[:, : length - 1].mean()),
        loss_second=float(nats[:, length + 1 :].mean()),
    )


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
        keep = batch.attention[row]
        tokens, real = batch.tokens[row][keep].clone(), batch.real[row][keep]
        if shuffle:
            tokens[real] = tokens[real][torch.randperm(int(real.sum()), generator=generator)]
        with torch.inference_mode():
            nats = next_token_nats(model(tokens[None]), tokens[None], real[None])
        bits.append(float(nats.mean()) / math.log(2))
    return np.array(bits)
