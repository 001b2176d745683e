import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtune_companion.quantization.affine import (
    AffineGrid,
    choose_qparams,
    dequantize_affine,
    fake_quantize,
    quantize_affine,
)

shapes = st.tuples(st.integers(1, 9), st.integers(1, 70))
bits = st.integers(2, 8)


def weight(shape, seed, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


@settings(deadline=None)
@given(shapes, bits, st.booleans(), st.sampled_from([-1, 1, 7, 32]), st.integers(0, 99))
def test_error_is_at_most_half_a_step(shape, bits, symmetric, block, seed):
    w = weight(shape, seed)
    params = choose_qparams(w, bits, (1, block), symmetric)
    error = (dequantize_affine(quantize_affine(w, params), params) - w).abs()
    columns = params.block_size[1]
    step = params.scale.repeat_interleave(columns, 1)[:, : shape[1]]
    if symmetric:  # the top code of a signed grid is half a step short of the range
        assert (error <= step * 0.5 * (1 + 1e-4)).all()
    else:
        zero_rounding = 0.5  # the zero point is rounded too, and may push an end out by half a step
        assert (error <= step * (0.5 + zero_rounding) * (1 + 1e-4)).all()


@settings(deadline=None)
@given(shapes, bits, st.booleans(), st.integers(0, 99))
def test_rounding_is_idempotent_and_encoding_agrees(shape, bits, symmetric, seed):
    w = weight(shape, seed)
    grid = AffineGrid(bits, (1, 16), symmetric).fit(w)
    once = grid.round(w)
    assert torch.equal(grid.round(once), once)
    assert torch.equal(grid.encode(w).dequantize(), once)


@settings(deadline=None)
@given(bits, st.integers(0, 99))
def test_codes_grow_with_the_value(bits, seed):
    w = weight((1, 50), seed).sort().values
    codes = quantize_affine(w, choose_qparams(w, bits, (1, -1)))
    assert (codes.int().diff() >= 0).all()


def test_zero_is_exact():
    w = torch.tensor([[0.0, 3.0, -1.0, 0.0]])
    for symmetric in (True, False):
        assert (AffineGrid(4, (1, -1), symmetric).round(w)[w == 0] == 0).all()


@pytest.mark.parametrize(
    ("block", "shape"), [((1, 32), (3, 50)), ((2, 3), (5, 7)), ((-1, -1), (4, 4)), ((9, 9), (4, 4))]
)
def test_one_scale_a_block_even_where_it_does_not_divide(block, shape):
    w = weight(shape, 0)
    scale = choose_qparams(w, 8, block).scale
    expected = tuple(1 if b == -1 else -(-n // min(b, n)) for n, b in zip(shape, block, strict=True))
    assert scale.shape == expected


@pytest.mark.parametrize(("bits", "expected"), [(8, 8.0), (4, 4.0), (2, 2.0)])
def test_stored_bits_count_scales(bits, expected):
    q = AffineGrid(bits, (1, 32), symmetric=True).encode(weight((64, 64), 0))
    assert q.bits_per_weight == expected + 32 / 32  # a float32 scale for 32 weights
    assert AffineGrid(bits, (1, 32)).encode(weight((64, 64), 0)).bits_per_weight == expected + 40 / 32


def test_straight_through_gradient_stops_at_the_clamp():
    x = torch.tensor([[-5.0, 0.2, 0.9]], requires_grad=True)
    params = choose_qparams(torch.tensor([[-1.0, 0.0, 1.0]]), 4, (1, -1), symmetric=True)
    fake_quantize(x, params).sum().backward()
    assert x.grad.tolist() == [[0.0, 1.0, 1.0]]


def test_gives_the_inputs_dtype_and_takes_strides():
    w = weight((8, 6), 1).t()
    assert torch.equal(AffineGrid(4, (1, -1)).round(w), AffineGrid(4, (1, -1)).round(w.contiguous()))
    assert AffineGrid(8, (1, -1)).encode(w.bfloat16()).dequantize().dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("x", "bits", "block", "error", "words"),
    [
        (torch.ones(2, 2), 1, (1, -1), ValueError, "got 1"),
        (torch.ones(2, 2), 9, (1, -1), ValueError, "got 9"),
        (torch.ones(2, 2), 4, (1,), ValueError, "needs 2"),
        (torch.ones(2, 2), 4, (0, 1), ValueError, "got 0"),
        (torch.ones(0, 2), 4, (1, 1), ValueError, "empty"),
        (torch.tensor([[1.0, float("nan")]]), 4, (1, 1), ValueError, "NaN"),
        (torch.tensor([[1.0, float("inf")]]), 4, (1, 1), ValueError, "infinity"),
        (torch.ones(2, 2, dtype=torch.int32), 4, (1, 1), TypeError, "int32"),
    ],
)
def test_bad_input_is_named(x, bits, block, error, words):
    with pytest.raises(error, match=words):
        choose_qparams(x, bits, block)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "block"), [(8, -1), (4, 32)])
def test_half_precision_weights_are_rounded_as_well_as_float32(dtype, bits, block):
    w = (torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    grid = AffineGrid(bits, (1, block))
    same = grid.encode(w).dequantize(torch.float32) - grid.encode(w.float()).dequantize()
    assert not same.any()
    assert grid.round(w).dtype == dtype
    assert torch.isfinite(AffineGrid(4, (1, -1)).round(torch.tensor([[-4e4, 4e4, 1.0]], dtype=dtype))).all()


def test_a_range_that_overflows_is_refused():
    with pytest.raises(ValueError, match="range overflows"):
        AffineGrid(4, (1, -1)).round(torch.tensor([[-3e38, 3e38]]))


def test_blocks_of_zeros_stay_zero():
    for symmetric in (False, True):
        grid = AffineGrid(4, (1, 2), symmetric)
        assert torch.equal(grid.round(torch.tensor([[0.0, 0.0, 1.0, 1.0]]))[:, :2], torch.zeros(1, 2))


def test_the_gradient_passes_by_the_scales():
    w = torch.randn(2, 8, requires_grad=True)
    upstream = torch.arange(16.0).view(2, 8)
    fake_quantize(w, choose_qparams(w, 4, (1, -1))).backward(upstream)
    assert torch.equal(w.grad, upstream)
    assert not AffineGrid(4, (1, -1)).encode(w).scale.requires_grad
