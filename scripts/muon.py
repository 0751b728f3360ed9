"""Muon in float32: momentum, then the nearest orthogonal matrix by Newton-Schulz.

`torch.optim.Muon` orthogonalises in bf16, which a CPU without bf16 instructions emulates slowly,
sees a fused matrix as one and refuses experts, whose matrices lie one behind another in a tensor of
three axes. This is the same algorithm, in the precision of the machine, with fused matrices split
and each expert's on its own. Source of
the coefficients: Jordan et al. 2024.
"""

from __future__ import annotations

import torch

from lenslab.runtime import compute_dtype

A, B, C = 3.4445, -4.7750, 2.0315


def orthogonalise(matrix: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """[..., rows, columns] -> about U V^T of each matrix's singular value decomposition."""
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = (matrix.mT if tall else matrix).to(compute_dtype())
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = A * x + (B * gram + C * gram @ gram) @ x
    return (x.mT if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Groups hold GPT-2's `[d_in, d_out]` matrices, query, key and value side by side, or, with
    `linear=True`, `[..., d_out, d_in]` matrices, of which `fused` (the gate and up projections of
    an expert) lie one under another.
    """

    def __init__(self, parameters, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(parameters, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                buffer = state.setdefault("momentum", torch.zeros_like(parameter))
                buffer.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(buffer, group["momentum"])
                if group.get("linear"):
                    parts = update.unflatten(
                        -2, (group.get("fused", 1), -1)
                    )  # [..., fused, d_out, d_in]
                    d_out, d_in = parts.shape[-2:]
                    update = orthogonalise(parts).flatten(-3, -2)
                else:
                    d_in, columns = update.shape
                    blocks = columns // d_in if columns == 3 * d_in else 1
                    parts = [orthogonalise(part) for part in update.chunk(blocks, dim=1)]
                    d_out, update = columns // blocks, torch.cat(parts, dim=1)
                scale = max(1.0, d_out / d_in) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * scale)
