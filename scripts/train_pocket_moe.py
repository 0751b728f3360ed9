"""Train a mixture of experts on the corpus and with the tokenizer of pocket-gpt.

`pocket-moe`: OLMoE architecture, 6 layers, d_model 192, 16 experts of width 96, two per token (7.8
million parameters). `pocket-switch`: 8 experts, one per token, weighted by its probability: Switch
routing. (Normalised over one expert the weight would be 1 whatever the router says, and the router
would learn nothing.)

1. The loop, its checkpoints and its decay are those of pocket_training.py.
2. Tokens are sorted by expert, so that each expert is one small matrix product (`sorted_experts`);
   the same numbers as Hugging Face's loop over experts, half as long again per second.
3. The router computes in float32 even where the rest is bf16: a rounded logit sends a token
   elsewhere.
4. An auxiliary loss keeps the experts' loads alike, one for each layer, as in Switch: pooled over
   layers, as Hugging Face's own is, an overload in one layer hides behind another's.
5. At about twenty steps of geometric spacing the routing of fixed texts is recorded:
   `routing.parquet` beside the model, one row per token, layer and slot.

Matrices, each expert's on its own, are trained with Muon, everything else, routers too, with AdamW.

    python scripts/train_pocket_moe.py --corpus FOLDER --tokens 25e6
    python scripts/train_pocket_moe.py --kind pocket-switch --corpus FOLDER --tokens 25e6
    python scripts/train_pocket_moe.py --corpus FOLDER --smoke        # a toy in about two minutes
"""

from __future__ import annotations

import functools
import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pocket_corpus as corpus
import torch
from muon import Muon
from pocket_card import expert_choices, routers
from pocket_training import Optimizers, Recipe, chunked_unembedding, parser, train
from torch.nn.functional import linear
from transformers import OlmoeConfig, OlmoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

from lenslab.files import atomic_write, data_path

ADAM_LR, MUON_LR, BALANCE = 3e-3, 0.02, 0.01
# a step of Adam moves all logits of a token alike: at 3e-3 by a third, and the load swings with it
ROUTER_LR = 3e-4
KINDS = {
    "pocket-moe": dict(num_experts=16, num_experts_per_tok=2),
    "pocket-switch": dict(num_experts=8, num_experts_per_tok=1),
}


def sorted_experts(
    experts: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """What `OlmoeExperts` computes: hidden `[token, d]`, chosen and weights `[token, slot]` ->
    `[token, d]`.

    Rows are gathered by expert once, so that the rest is one product per expert on rows that lie
    together, and what is between the products is done for all experts at once. Whole weights are
    cast, not slices of them, and `unbind` and `split` have gradients that are put together once;
    slices would each make a tensor of full size.
    """
    dtype = (
        torch.get_autocast_dtype(hidden.device.type)
        if torch.is_autocast_enabled(hidden.device.type)
        else None
    )
    dtype = dtype or hidden.dtype
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    counts = flat.bincount(minlength=experts.num_experts).tolist()
    rows = hidden.to(dtype)[order // chosen.shape[1]].split(counts)
    matrices = experts.gate_up_proj.to(dtype).unbind(0)
    gate, up = torch.cat([linear(r, m) for r, m in zip(rows, matrices, strict=True)]).chunk(
        2, dim=-1
    )
    inner = (experts.act_fn(gate) * up * weights.flatten()[order].to(dtype)[:, None]).split(counts)
    matrices = experts.down_proj.to(dtype).unbind(0)
    result = torch.cat([linear(r, m) for r, m in zip(inner, matrices, strict=True)])
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return result[back].unflatten(0, chosen.shape).sum(1).to(hidden.dtype)


ALL_EXPERTS_FUNCTIONS.register("lenslab_sorted", sorted_experts)


def _route_in_float32(router: Any, hidden: torch.Tensor) -> Any:
    with torch.autocast(hidden.device.type, enabled=False):
        return type(router).forward(router, hidden.float())


def build_model(vocabulary: int, smoke: bool, kind: str = "pocket-moe") -> OlmoeForCausalLM:
    small = dict(num_hidden_layers=2, hidden_size=64, intermediate_size=32, num_attention_heads=4)
    whole = dict(num_hidden_layers=6, hidden_size=192, intermediate_size=96, num_attention_heads=8)
    config = OlmoeConfig(
        vocab_size=vocabulary,
        max_position_embeddings=corpus.CONTEXT,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=True,
        norm_topk_prob=False,
        router_aux_loss_coef=BALANCE,
        **(small if smoke else whole),
        **KINDS[kind],
    )
    torch.manual_seed(0)
    model = OlmoeForCausalLM(config)
    model.set_attn_implementation("eager")  # at 256 positions faster on a CPU than the fused kernel
    model.set_experts_implementation("lenslab_sorted")
    for router in routers(model):
        router.forward = types.MethodType(_route_in_float32, router)
    return model


def build_optimizers(model: OlmoeForCausalLM) -> Optimizers:
    groups: dict[str, list] = {"gate_up_proj": [], "down_proj": [], "router": [], "rest": []}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3:  # [expert, d_out, d_in]
            kind = name.rsplit(".", 1)[-1]
        elif "self_attn" in name and parameter.ndim == 2:
            kind = "down_proj"
        else:
            kind = "router" if ".mlp.gate." in name else "rest"
        groups[kind].append(parameter)
    matrices = [
        {"params": groups["gate_up_proj"], "linear": True, "fused": 2},
        {"params": groups["down_proj"], "linear": True},
    ]
    adam = functools.partial(torch.optim.AdamW, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return [
        (Muon(matrices, lr=MUON_LR, weight_decay=0.01), MUON_LR),
        (adam(groups["rest"], lr=ADAM_LR), ADAM_LR),
        (adam(groups["router"], lr=ROUTER_LR), ROUTER_LR),
    ]


def backward(model: OlmoeForCausalLM, batch: torch.Tensor) -> dict[str, float]:
    """Gradients of the mean next-token loss plus 0.01 times each layer's balance loss; returns both
    in the mean.

    The balance loss is that of Switch, experts times the summed product of load and mean
    probability: the slots per token where loads are even, up to the number of experts where all
    goes to one.
    """
    config = model.config
    output = model.model(batch[:, :-1], use_cache=False, output_router_logits=True)
    per_layer = [
        load_balancing_loss_func((logits,), config.num_experts, config.num_experts_per_tok)
        for logits in output.router_logits
    ]
    balance = torch.stack(per_layer)
    hidden = output.last_hidden_state.flatten(0, 1)
    loss, gradient = chunked_unembedding(model, hidden, batch[:, 1:].flatten())
    torch.autograd.backward([hidden, balance.sum() * config.router_aux_loss_coef], [gradient, None])
    return {"loss": loss, "balance": balance.mean().item()}


def probe_texts() -> list[str]:
    lines = data_path("probes", "first_look.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines if line]


def record_routing(model: Any, tokenizer: Any, step: int, tokens: int, work: Path) -> None:
    """The experts and weights of every token of the probe texts, BOS included, as one file of
    `work/records`."""
    parts = []
    for number, text in enumerate(probe_texts()):
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids][
            : corpus.CONTEXT
        ]
        device = next(model.parameters()).device
        experts, weights = (
            t[:, 0].cpu() for t in expert_choices(model, torch.tensor([ids], device=device))
        )
        layer, position, slot = (index.flatten() for index in np.indices(experts.shape))
        columns = {
            "step": np.full(len(layer), step, np.int32),
            "tokens": np.full(len(layer), tokens, np.int64),
            "text": np.full(len(layer), number, np.int16),
            "position": position.astype(np.int16),
            "token_id": np.array(ids, np.int32)[position],
            "layer": layer.astype(np.int8),
            "slot": slot.astype(np.int8),
            "expert": experts.flatten().numpy().astype(np.int16),
            "weight": weights.flatten().float().numpy().round(3),
        }
        parts.append(pd.DataFrame(columns))
    with atomic_write(work / "records" / f"step-{step:08d}.parquet") as temporary:
        pd.concat(parts, ignore_index=True).to_parquet(temporary, compression="zstd", index=False)


def collect_routing(work: Path, folder: Path, last: int) -> None:
    """Steps up to `last` in one file beside the model: texts are those of
    data/probes/first_look.jsonl, in order."""
    files = sorted((work / "records").glob("step-*.parquet"))
    frames = [pd.read_parquet(file) for file in files if int(file.stem.split("-")[1]) <= last]
    with atomic_write(folder / "routing.parquet") as temporary:
        pd.concat(frames, ignore_index=True).to_parquet(temporary, compression="zstd", index=False)


def restore_routing(folder: Path, work: Path) -> None:
    """What `collect_routing` put beside a model, as files of `work/records` again: the series goes
    on from there."""
    for step, rows in pd.read_parquet(folder / "routing.parquet").groupby("step"):
        with atomic_write(work / "records" / f"step-{step:08d}.parquet") as temporary:
            rows.to_parquet(temporary, compression="zstd", index=False)


def recipe(kind: str, tokenizer: Path) -> Recipe:
    build = functools.partial(build_model, kind=kind)
    records = dict(record=record_routing, collect=collect_routing, restore=restore_routing)
    return Recipe(kind, build, build_optimizers, backward, tokenizer=tokenizer, **records)


def main() -> None:
    options = parser(__doc__, "KIND")
    options.add_argument("--kind", choices=sorted(KINDS), default="pocket-moe")
    options.add_argument(
        "--tokenizer", type=Path, default=data_path("models", "pocket-gpt"), help="a model's folder"
    )
    arguments = options.parse_args()
    train(recipe(arguments.kind, arguments.tokenizer), arguments)


if __name__ == "__main__":
    main()
