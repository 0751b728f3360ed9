"""Sparse products equal the dense ones, forwards and backwards, with and without MKL, however empty
the code is."""

import pytest
import torch

from lenslab.runtime import derive_generator
from lenslab.sae.train import sparse
from lenslab.sae.train.sparse import (
    Code,
    Decode,
    Encode,
    code_of_places,
    code_of_topk,
    largest,
    positive_places,
)

BATCH, WIDTH, LATENTS = 7, 5, 11


def drawn(*shape):
    return torch.randn(*shape, generator=derive_generator(3, f"sparse {shape}"))


def code_of_mask(mask):
    return code_of_places(mask.flatten().nonzero().flatten(), *mask.shape)


def mask_with(kind):
    mask = torch.rand(BATCH, LATENTS, generator=derive_generator(0, "mask")) < 0.4
    mask[2] = False  # a vector without any latent, in all of them
    mask[:, 4] = False  # and a latent that never fires
    return mask if kind == "some" else torch.zeros_like(mask)


@pytest.fixture(params=["mkl", "plain", "full"])
def products(request, monkeypatch):
    """All ways to compute, the GPU's on the CPU too; a chunk of 3 cuts through the vectors."""
    if request.param == "mkl" and not sparse.HAS_MKL:
        pytest.skip("this torch has no sparse products")
    monkeypatch.setattr(sparse, "HAS_MKL", request.param == "mkl")
    monkeypatch.setattr(sparse, "DENSE", ["cpu"] if request.param == "full" else [])
    monkeypatch.setattr(sparse, "CHUNK", 3)


def weights(tied, dtype):
    """Leaves in the layout that an SAE has them: W_enc is stored transposed, and the decoder may be
    its transpose."""
    W_enc = drawn(LATENTS, WIDTH).T.to(dtype).clone().requires_grad_()
    W_dec = None if tied else drawn(LATENTS, WIDTH).to(dtype).requires_grad_()
    biases = [drawn(LATENTS).to(dtype).requires_grad_(), drawn(WIDTH).to(dtype).requires_grad_()]
    return (
        [W_enc, *([] if tied else [W_dec]), *biases],
        W_enc,
        (W_enc.T if tied else W_dec),
        *biases,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["some", "none"])
def test_outputs_and_gradients_equal_those_of_dense_products(products, kind, tied, dtype):
    mask, x, target = (
        mask_with(kind),
        drawn(BATCH, WIDTH).to(dtype),
        drawn(BATCH, WIDTH).flip(0).to(dtype),
    )
    leaves, W_enc, W_dec, b_enc, b_dec = weights(tied, dtype)
    dense = torch.relu((x - b_dec) @ W_enc + b_enc) * mask
    x_hat = dense @ W_dec + b_dec
    ((x_hat - target).square().sum() + dense.sum()).backward()
    expected, leaves[0].grad = [leaf.grad for leaf in leaves], None
    for leaf in leaves:
        leaf.grad = None

    code = code_of_mask(mask)
    values = torch.relu(Encode.apply(x, b_dec, W_enc, b_enc, code))
    guess = Decode.apply(values, W_dec, code) + b_dec
    ((guess - target).square().sum() + values.sum()).backward()
    tolerance = (
        dict(atol=1e-5, rtol=1e-5) if dtype is torch.float32 else dict(atol=1e-12, rtol=1e-12)
    )
    assert torch.allclose(values, dense[mask], **tolerance) and torch.allclose(
        guess, x_hat, **tolerance
    )
    for leaf, wanted in zip(leaves, expected, strict=True):
        found = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        assert torch.allclose(found, wanted, **tolerance), f"gradient of {tuple(leaf.shape)}"
    if kind == "some":
        assert all(float(leaf.grad.abs().max()) > 0.1 for leaf in leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("d_sae", "k"), [(256, 16), (256, 3), (256, 17), (250, 3), (24, 1), (5, 5)]
)
def test_the_largest_are_those_of_one_long_search_where_positive(d_sae, k, dtype):
    """Vectors with nearly all, half, few and none of their values positive; with a group full of
    large ones."""
    pre = torch.stack(
        [
            torch.randn(d_sae, generator=derive_generator(i, "pre")) + shift
            for i, shift in enumerate((3.0, 0.0, -1.5, -9.0, 0.0))
        ]
    )
    pre[4, :: max(1, d_sae // 8)] += 10
    pre = pre.to(dtype)
    found = largest(pre, k)
    assert all(len(set(row)) == k for row in found.tolist())
    wanted = torch.relu(pre.topk(k, dim=1).values)
    assert torch.equal(torch.relu(pre.gather(1, found)).sort(dim=1, descending=True).values, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [9, 300, (1 << 16) + 5])
def test_places_of_the_largest_hold_however_many_columns(n, dtype):
    values = torch.randn(2, n, generator=derive_generator(n, "columns")).abs().to(dtype)
    found = sparse.places_of_largest(sparse.as_integers(values), 3)
    assert torch.equal(values.gather(1, found).sort(1).values, values.topk(3).values.flip(1))


def test_without_a_shift_the_input_is_read_as_it_is(products):
    x, code = drawn(BATCH, WIDTH), code_of_mask(mask_with("some"))
    weight, bias = drawn(WIDTH, LATENTS).requires_grad_(), drawn(LATENTS).requires_grad_()
    values = Encode.apply(x, None, weight, bias, code)
    assert torch.allclose(values, (x @ weight + bias)[mask_with("some")], atol=1e-5)
    values.sum().backward()
    assert torch.allclose(weight.grad, x.T @ mask_with("some").float(), atol=1e-5)


def test_a_code_of_a_topk_keeps_its_order_and_values(products):
    pre = drawn(BATCH, LATENTS)
    top = pre.topk(3, dim=1, sorted=False)
    code = code_of_topk(top.indices, LATENTS)
    assert code.rows.tolist() == [0, 3, 6, 9, 12, 15, 18, 21]
    assert torch.equal(
        code.matrix(top.values.flatten()).to_dense(), torch.zeros_like(pre).scatter(1, *top[::-1])
    )
    x, weight = drawn(BATCH, WIDTH), drawn(WIDTH, LATENTS)
    assert torch.allclose(
        code.at_active(x, weight), (x @ weight).gather(1, top.indices).flatten(), atol=1e-5
    )


def test_a_mask_becomes_a_code_by_hand():
    code = code_of_mask(
        torch.tensor([[True, False, True], [False, False, False], [False, True, True]])
    )
    assert (code.rows.tolist(), code.latents.tolist(), code.width) == (
        [0, 2, 2, 4],
        [0, 2, 1, 2],
        3,
    )
    assert code.owners.tolist() == [0, 0, 2, 2]


def test_the_transposed_code_is_that_of_the_transposed_matrix():
    mask, values = mask_with("some"), drawn(BATCH, LATENTS)
    code, wanted = code_of_mask(mask), code_of_mask(mask.T)
    transposed, order = code.transposed
    assert torch.equal(transposed.rows, wanted.rows) and torch.equal(
        transposed.latents, wanted.latents
    )
    assert torch.equal(values[mask][order], values.T[mask.T]) and transposed.width == BATCH
    assert code.transposed is code.transposed  # made once


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("above", [0.0, 0.5, 9.0])
def test_places_above_a_value_by_another_way(above, dtype):
    pre = drawn(BATCH, LATENTS).to(dtype)
    pre[0, 0], pre[0, 1] = -0.0, 0.5
    assert torch.equal(positive_places(pre, above), (pre > above).flatten().nonzero().flatten())


def test_part_of_a_code_is_the_code_of_the_part():
    mask = mask_with("some")
    code, first = code_of_mask(mask), torch.arange(LATENTS) < 5
    part, expected = code.part(first[code.latents]), code_of_mask(mask & first)
    assert torch.equal(part.rows, expected.rows) and torch.equal(part.latents, expected.latents)
    nothing = code.part(code.latents < 0)
    assert nothing.rows.tolist() == [0] * (BATCH + 1) and not len(nothing.latents)
    assert torch.equal(
        Decode.apply(torch.empty(0), drawn(LATENTS, WIDTH), nothing), torch.zeros(BATCH, WIDTH)
    )


def test_the_sparse_products_are_those_that_run_where_there_is_mkl(monkeypatch):
    """Else the tests above would compare the plain products with themselves."""
    if not sparse.HAS_MKL:
        pytest.skip("this torch has no sparse products")
    called = []
    kept = Code.matrix
    monkeypatch.setattr(Code, "matrix", lambda self, values: called.append(1) or kept(self, values))
    code_of_mask(mask_with("some")).at_active(drawn(BATCH, WIDTH), drawn(WIDTH, LATENTS))
    assert called
    monkeypatch.setattr(sparse, "HAS_MKL", False)
    called.clear()
    code_of_mask(mask_with("some")).at_active(drawn(BATCH, WIDTH), drawn(WIDTH, LATENTS))
    assert not called
