"""Muon in float32: momentum, then the nearest orthogonal matrix by Newton-Schulz.

`torch.optim.Muon` orthogonalises in bf16, which a CPU without bf16 instructions emulates slowly, and it
sees GPT-2's fused query-key-value matrix as one. This is the same algorithm, in the precision of the
machine, with fused matrices split into square blocks. Source of the coefficients: Jordan et al. 2024.
"""

from __future__ import annotations

import torch

from lenslab.runtime import compute_dtype

A, B, C = 3.4445, -4.7750, 2.0315


def orthogonalise(matrix: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """[rows, columns] -> about U V^T of its singular value decomposition."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.mT if tall else matrix).to(compute_dtype())
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = A * x + (B * gram + C * gram @ gram) @ x
    return (x.mT if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
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
                rows, columns = update.shape  # Conv1D: [d_in, d_out]
                blocks = columns // rows if columns == 3 * rows else 1
                parts = [orthogonalise(part) for part in update.chunk(blocks, dim=1)]
                update = torch.cat(parts, dim=1) if blocks > 1 else parts[0]
                scale = max(1.0, parts[0].shape[1] / parts[0].shape[0]) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * scale)
