"""What single experts do: what each adds to a layer's output, and its neurons.

Hugging Face keeps the experts of a layer in one module, whose output is their sum. So the module is
given the same inputs again, with one rank's experts and weights at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lenslab.moe.routing import Model, NoRouting, passes, sparse_layers
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
    value = _of_experts(model, batch, layer, stack, _ranks)
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

    return _of_experts(model, batch, layer, stack, neurons)


def _of_experts(
    model: Model, batch: TokenBatch, layer: int, stack: str, compute: Callable[..., Tensor]
) -> Tensor:
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
