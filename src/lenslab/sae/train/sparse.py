"""Products with few active latents: what a sparse autoencoder does, without the zeros.

A code is a compressed sparse row matrix `[batch, d_sae]`: `rows` says where each vector's active
latents begin, `latents` which they are. Only three products are needed, and their gradients are of
the same three kinds:
1. `at_active`: x . W[:, latent] at the active places only (forward of the encoder, gradient of the
   code);
2. `sum_rows`: code @ W (the decoder), and
3. `sum_vectors`: code^T @ x (gradients of both weights).
The encoder's full product is still needed to know which latents are active; it is done once, in
bf16 where that is fast, without gradients; `largest` searches its result. Everything else here is
float32. With 32 of 4,096 latents active the three products together cost as much as that one.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

DENSE = ("cuda",)  # devices where full products are faster than sparse ones
GROUP = 8  # latents, far from each other, whose largest value stands for them at first
CHUNK = 1 << 15  # active latents whose vectors are gathered at a time where there is no MKL
# without it torch has no sparse products on the CPU (ARM): see `_plain`
HAS_MKL = torch.backends.mkl.is_available()

warnings.filterwarnings("ignore", message="Sparse (CSR tensor support|invariant checks)")

Values = Float[Tensor, " active"]


@dataclass(frozen=True)
class Code:
    """Which latents are active for each vector of a batch."""

    rows: Int[Tensor, " rows"]  # batch + 1: where each vector's latents begin
    latents: Int[Tensor, " active"]
    width: int  # d_sae

    def matrix(self, values: Values) -> Tensor:
        """The sparse matrix `[batch, d_sae]` with these values."""
        shape = (len(self.rows) - 1, self.width)
        return torch.sparse_csr_tensor(self.rows, self.latents, values, shape)

    def part(self, keep: Bool[Tensor, " active"]) -> Code:
        """The code of some of its active latents."""
        before = torch.cat([self.rows.new_zeros(1), keep.cumsum(0)])
        return Code(before[self.rows], self.latents[keep], self.width)

    @cached_property
    def owners(self) -> Int[Tensor, " active"]:
        """The vector that each active latent belongs to."""
        return torch.repeat_interleave(self.rows.diff(), output_size=len(self.latents))

    def dense(self, values: Float[Tensor, " active"]) -> Float[Tensor, "batch d_sae"]:
        """The matrix with its zeros: a GPU multiplies it faster than a sparse one."""
        full = values.new_zeros(len(self.rows) - 1, self.width)
        full[self.owners, self.latents] = values
        return full

    @cached_property
    def transposed(self) -> tuple[Code, Int[Tensor, " active"]]:
        """(which vectors each latent is active for, where each of those places is in this code):
        made once for both gradients, because torch's product with a transposed sparse matrix takes
        more than twice as long."""
        short = torch.int16 if self.width < 1 << 15 else torch.int32  # sorted faster
        order = self.latents.to(short).sort(stable=True).indices
        counts = torch.bincount(self.latents, minlength=self.width)
        rows = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return Code(rows, self.owners[order], len(self.rows) - 1), order

    def at_active(self, x: Float[Tensor, "batch d"], weight: Float[Tensor, "d d_sae"]) -> Tensor:
        """x @ weight at the active places: [active]."""
        if x.device.type in DENSE:
            return (x @ weight)[self.owners, self.latents]
        if _plain(x):
            chunks = zip(self.owners.split(CHUNK), self.latents.split(CHUNK), strict=True)
            return torch.cat([(x[owner] * weight.T[latent]).sum(1) for owner, latent in chunks])
        empty = self.matrix(x.new_zeros(len(self.latents)))
        return torch.sparse.sampled_addmm(empty, x, weight, beta=0).values()

    def sum_rows(self, values: Values, weight: Float[Tensor, "d_sae d"]) -> Tensor:
        """code @ weight, with these values: [batch, d]."""
        if weight.device.type in DENSE:
            return self.dense(values) @ weight
        if _plain(weight):
            bag = torch.nn.functional.embedding_bag
            return bag(self.latents, weight, self.rows[:-1], mode="sum", per_sample_weights=values)
        return self.matrix(values) @ weight

    def sum_vectors(self, values: Values, x: Float[Tensor, "batch d"]) -> Tensor:
        """code^T @ x, with these values: [d_sae, d]."""
        if x.device.type in DENSE:
            return self.dense(values).T @ x
        transposed, order = self.transposed
        return transposed.sum_rows(values[order], x)


def code_of_topk(latents: Int[Tensor, "batch k"], d_sae: int) -> Code:
    """The same number of latents for every vector."""
    n, k = latents.shape
    return Code(torch.arange(0, n * k + 1, k, device=latents.device), latents.flatten(), d_sae)


def code_of_places(places: Int[Tensor, " active"], n: int, d_sae: int) -> Code:
    """The places of a flattened `[n, d_sae]`, in rising order."""
    rows = torch.searchsorted(places, torch.arange(0, n * d_sae + 1, d_sae, device=places.device))
    return Code(rows, places % d_sae, d_sae)


def _plain(x: Tensor) -> bool:
    return not HAS_MKL and x.device.type == "cpu"


def largest(pre: Float[Tensor, "batch d_sae"], k: int) -> Int[Tensor, "batch k"]:
    """The k latents with the largest values of each vector, in no order; negative ones, which relu
    takes away, in place of positive ones only where there are too few.

    They lie in the k groups of latents whose own largest are the largest: two short searches
    instead of a long one.
    """
    n, d_sae = pre.shape
    integers = as_integers(pre)
    long = d_sae % GROUP or 2 * GROUP * k > d_sae or pre.itemsize > 4
    if long or pre.device.type != "cpu":
        return integers.topk(k, dim=1, sorted=False).indices
    tops = places_of_largest(integers.view(n, GROUP, d_sae // GROUP).amax(1), k)
    members = torch.arange(0, d_sae, d_sae // GROUP, device=pre.device)
    candidates = (tops[:, None] + members[:, None]).flatten(1)  # [batch, GROUP * k]
    return candidates.gather(1, places_of_largest(integers.gather(1, candidates), k))


def places_of_largest(integers: Int[Tensor, "row column"], k: int) -> Int[Tensor, "row k"]:
    """Where each row's k largest are, in no order, of equal ones the last. Integers that hold value
    and place: numpy parts them with vector instructions, which torch's topk does not use."""
    n = integers.shape[1]
    bits, wide = 32, torch.int64
    if integers.itemsize == 2 and n <= 1 << 16:
        bits, wide = 16, torch.int32
    held = integers.to(wide).mul_(1 << bits).add_(torch.arange(n, dtype=wide)).numpy()
    held.partition(n - k, axis=1)
    return torch.from_numpy(held[:, n - k :] & ((1 << bits) - 1)).long()


def positive_places(pre: Float[Tensor, "batch d_sae"], above: float = 0.0) -> Int[Tensor, " place"]:
    """Places of the flattened matrix that hold more than `above`, which is not negative, in rising
    order."""
    return as_integers(torch.threshold(pre, above, 0.0)).flatten().nonzero().flatten()


def as_integers(values: Tensor) -> Tensor:
    """The same bits: positive ones keep their order above all negative ones, and torch counts and
    compares them many times faster."""
    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.itemsize])


def widened(matrix: Float[Tensor, "row d"], column: Tensor | float, dtype: torch.dtype) -> Tensor:
    """The matrix with one more column, then zeros to a width that products like: in the product
    with another such matrix the two columns meet, which adds a bias for less than a pass over the
    result."""
    n, d = matrix.shape
    wider = torch.zeros(n, d + 8, dtype=dtype, device=matrix.device)
    wider[:, :d] = matrix
    wider[:, d] = column
    return wider


class Encode(torch.autograd.Function):
    """Pre-activations at the active latents; gradients for the weights, and for the bias that x was
    shifted by.

    `x` itself gets no gradient: it is data. That saves the largest product of the backward pass.
    """

    @staticmethod
    def forward(ctx, x, shift, weight, bias, code):  # shift: [d_in], subtracted from x; or None
        x = x if shift is None else x - shift
        ctx.save_for_backward(x, weight)
        ctx.code = code
        ctx.shifted = shift is not None
        return code.at_active(x, weight) + bias[code.latents]

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        bias = grad.new_zeros(ctx.code.width).index_add_(0, ctx.code.latents, grad)
        shift = -(weight @ bias) if ctx.shifted else None
        return None, shift, ctx.code.sum_vectors(grad, x).T, bias, None


class Decode(torch.autograd.Function):
    """The sum of the active latents' decoder rows, times their values."""

    @staticmethod
    def forward(ctx, values, weight, code):
        ctx.save_for_backward(values, weight)
        ctx.code = code
        return code.sum_rows(values, weight)

    @staticmethod
    def backward(ctx, grad):
        values, weight = ctx.saved_tensors
        grad = grad.contiguous()
        return ctx.code.at_active(grad, weight.T), ctx.code.sum_vectors(values, grad), None
