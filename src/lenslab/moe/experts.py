"""What single experts do: what each adds to a layer's output, its neurons, and what it is for.

Hugging Face keeps the experts of a layer in one module, whose output is their sum. So the module is
given the same inputs again, with one rank's experts and weights at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import scipy.stats
import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from lenslab.moe import statistics
from lenslab.moe.routing import Model, NoRouting, Routing, passes, sparse_layers
from lenslab.moe.statistics import Array, Labels, Table, counts_of, grid, random
from lenslab.tokens import TokenBatch


def expert_contributions(
    model: Model, batch: TokenBatch, layer: int, stack: str = ""
) -> Float[Tensor, "token rank d_model"]:
    """What the expert of each rank adds at a layer, its weight included; rows and ranks as
    `capture_routing` gives them. The sum is what the routed experts add together (shared experts,
    which read every token, are not among them); zero where the expert was full.

    Raises as `capture_routing`; NoRouting for a layer without a router, and for experts that do not
    write into the residual stream.
    """
    value = _computed(model, batch, layer, stack, _ranks)
    if value.shape[2] != model.cfg.d_model:
        raise NoRouting(f"Experts write {value.shape[2]} latent numbers, not {model.cfg.d_model}.")
    return value


def expert_neurons(
    model: Model, batch: TokenBatch, layer: int, expert: int, stack: str = ""
) -> Float[Tensor, "token neuron"]:
    """One expert's neurons, what its last matrix reads, in the rows of `capture_routing`; zero at
    tokens that were not sent to it.

    Raises as `expert_contributions`; ValueError for an expert that is not there.
    """

    def neurons(experts: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if not 0 <= expert < experts.num_experts:
            raise ValueError(f"Expert {expert} is out of range: 0 to {experts.num_experts - 1}.")
        sent = (ids == expert).any(1) if ids.ndim == 2 else ids[:, 0, expert] > 0
        return _neurons(experts, expert, hidden) * sent[:, None]

    return _computed(model, batch, layer, stack, neurons)


def _computed(model: Model, batch: TokenBatch, layer: int, stack: str, compute: Callable) -> Tensor:
    """`compute` of the experts' module and of what it is given at real tokens: hidden [token, d],
    ids and weights [token, rank]; of Switch a mask [token, 1, expert] in the place of ids."""
    layers, values, order = sparse_layers(model, stack), [], []
    if layer not in layers:
        raise NoRouting(f"Layer {layer} has no router; {list(layers)} have one.")
    experts = layers[layer].experts
    for rows, places, caught in passes(model, batch, {"experts": experts}, stack):
        given = (value[places] for value in caught["experts"][0])
        with torch.inference_mode():
            values.append(compute(experts, *given).float().cpu())
        order.append(rows)
    return torch.cat(values)[torch.cat(order).argsort()]


def _ranks(experts: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """[token, rank, d] of what the experts write."""
    ranked = [(ids, weights)]
    if ids.shape == weights.shape:
        order = weights.argsort(dim=-1, descending=True, stable=True).split(1, 1)
        ranked = [(ids.gather(1, rank), weights.gather(1, rank)) for rank in order]
    return torch.stack([experts.forward(hidden, *pair) for pair in ranked], 1)


def _neurons(experts: nn.Module, expert: int, x: Tensor) -> Tensor:
    """What an expert's last matrix reads, of inputs `[token, d]`."""
    if isinstance(experts, nn.ModuleDict):  # Switch
        dense = experts[f"expert_{expert}"]
        return dense.act(dense.wi(x))
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    weight = getattr(experts, name)[expert]
    x = x @ (weight if experts.is_transposed else weight.T)
    if experts.has_bias:
        x = x + getattr(experts, f"{name}_bias")[expert]
    return experts._apply_gate(x) if experts.has_gate else experts.act_fn(x)


def random_routers(
    inputs: Float[Array, "token d"], loads: Num[Array, " e"], k: int, rng: np.random.Generator
) -> Iterator[Int[Array, "token 1 rank"]]:
    """The ids of `DRAWS` random linear routers on the same inputs: normal weights, logits of spread
    1, and biases tuned until each expert has the slots of `loads`, but for about .1 %."""
    x, target = torch.as_tensor(inputs - inputs.mean(0)), torch.as_tensor(loads).float() + 1
    for _ in range(statistics.DRAWS):
        logits = x @ torch.as_tensor(rng.standard_normal((x.shape[1], len(loads)), np.float32))
        logits /= logits.std(0)
        bias = torch.zeros(len(loads))
        for step in range(14):  # the first ones on a quarter of the tokens: nearly as good, faster
            some = logits[:: 4 if step < 8 else 1]
            ids = (some + bias).topk(k).indices
            slots = torch.bincount(ids.flatten(), minlength=len(loads)) + 1
            ratio = target * (len(some) / len(logits)) / slots
            bias += (0.6 if step < 10 else 0.3) * ratio.log()
        yield ids[:, None].numpy()


def specialisation(routing: Routing, labels: Mapping[str, Labels], seed: int = 0) -> Table:
    """What an expert's slots say of a label (kind of text, token), in bits: the divergence
    (Kullback-Leibler) of their labels from all labels. Rows: `labels` (which), `layer`, `expert`;
    expert -1 is the layer's mean over slots, the mutual information.

    Chance: `random_routers` on what the routers read, on the same tokens: whatever few tokens add,
    they have too. Takes time in proportion to tokens: some thousands do. ValueError without
    `inputs`.
    """
    if routing.inputs is None:
        raise ValueError("Capture with inputs=True: random routers read what the routers read.")
    for label in labels.values():
        statistics.check_labels(routing, label)
    blocks, e, results = statistics.blocks_of(routing), routing.n_experts, []
    codes = [np.unique(label, return_inverse=True)[1] for label in labels.values()]
    for index in range(len(routing.layers)):
        ids, rng = routing.ids[:, [index]], random(seed, f"random routers {index}")
        loads = counts_of(ids, 0 * blocks, e).ravel()
        draws = list(random_routers(routing.inputs[:, index], loads, ids.shape[2], rng))
        for code in codes:
            n = int(code.max()) + 1
            own = counts_of(ids, blocks * n + code, e, n * int(blocks.max() + 1)).reshape(-1, n, e)
            null = (counts_of(drawn, code, e)[:, 0] for drawn in draws)
            for counts in (own.sum(0, keepdims=True), null, statistics.resampled(own, seed)):
                results.append(np.stack([*map(_told, counts)]))
    rows = grid(layer=routing.layers, labels=list(labels), expert=[*range(e), -1])
    return statistics.measured(rows, *(np.concatenate(results[i::3], 1) for i in range(3)))


def _told(counts: Array) -> Array:
    """[expert, and all] bits of counts [label, expert]."""
    slots = counts.sum(0)
    bits = np.nan_to_num(scipy.stats.entropy(counts, counts.sum(1, keepdims=True), base=2))
    return np.r_[bits, (bits * slots).sum() / slots.sum()]
