import copy

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qtune_companion.quantization.affine import AffineGrid
from qtune_companion.quantization.codebook import FP4, NF4, CodebookGrid
from qtune_companion.quantization.formats import MXFP4, MXFP8, NVFP4
from qtune_companion.quantization.gptq import gptq

GRIDS = {
    "affine": AffineGrid(3, (1, 32)),
    "symmetric rows": AffineGrid(4, (1, -1), symmetric=True),
    "whole": AffineGrid(4, (-1, -1)),
    "tiles": AffineGrid(3, (4, 16)),
    "8 bits": AffineGrid(8, (1, 64)),
    "uneven tiles": AffineGrid(3, (3, 16)),
    "nf4": CodebookGrid(NF4, 64),
    "fp4": CodebookGrid(FP4, 64),
    "nf4-dq": CodebookGrid(NF4, 64, double_quant=True),
    "mxfp4": MXFP4,
    "mxfp8": MXFP8,
    "nvfp4": NVFP4,
}


def layer(rows=8, columns=192, tokens=400, seed=0, dtype=torch.float32):
    """A weight, and inputs of which each is mostly a mixture of a few hidden ones."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 12, generator=generator) @ torch.randn(12, columns, generator=generator)
    x = (x + torch.randn(tokens, columns, generator=generator)) * torch.linspace(0.5, 3, columns)
    weight = torch.randn(rows, columns, generator=generator)
    return weight.to(dtype), (x.double().T @ x.double() / tokens).to(dtype)


def error(rounded, weight, hessian):
    off = (rounded.dequantize() - weight).double()
    return ((off @ hessian.double()) * off).sum().item()


def brain_surgeon(weight, hessian, grid, damp, order, static, size):
    """The same by the book: one weight at a time, the others corrected by the whole inverse, then eliminated."""
    w, n = weight.clone(), weight.shape[1]
    inverse = torch.linalg.inv(hessian + damp * hessian.diagonal().mean() * torch.eye(n, dtype=w.dtype))
    done, seen = torch.zeros(n, dtype=torch.bool), weight.clone()
    fitted = grid.fit(weight)
    for i, j in enumerate(order):
        if not static and i % size == 0:
            seen[:, j : j + size] = w[:, j : j + size]
            fitted = grid.fit(seen)
        now = w.clone()
        now[:, done] = seen[:, done]
        rounded = fitted.round(now)[:, j]
        step = (w[:, j] - rounded)[:, None] / inverse[j, j] * inverse[j]
        w = torch.where(done, w, w - step)
        w[:, j] = rounded
        done[j] = True
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return w


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("size", [16, 48, 300, -1])
def test_the_same_as_one_weight_at_a_time(act_order, static, size):
    weight, hessian = layer(4, 300, dtype=torch.float64)
    grid = AffineGrid(3, (1, size))
    order = hessian.diagonal().argsort(descending=True) if act_order else torch.arange(300)
    slow = brain_surgeon(weight, hessian, grid, 0.01, order.tolist(), static or act_order, size % 301)
    fast = gptq(weight, hessian, grid, act_order=act_order, static_groups=static).dequantize()
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("options", [{}, {"static_groups": True}, {"act_order": True}], ids=str)
def test_beats_rounding_and_stays_on_the_grid(name, options):
    weight, hessian = layer()
    grid = GRIDS[name]
    found = gptq(weight, hessian, grid, **options)
    assert error(found, weight, hessian) < 0.7 * error(grid.encode(weight), weight, hessian)
    assert tuple(found.shape) == tuple(weight.shape)
    assert found.bits_per_weight == grid.encode(weight).bits_per_weight
    if options or name == "nvfp4":
        on_it = grid.fit(weight).round(found.dequantize())
        torch.testing.assert_close(on_it, found.dequantize(), rtol=1e-6, atol=0)


class Stranger:
    """A grid of which nothing is known but the protocol."""

    def __init__(self, inner, block_size):
        self.inner, self.block_size = inner, block_size

    def fit(self, weight):
        return Stranger(self.inner.fit(weight), self.block_size)

    def round(self, weight):
        return self.inner.round(weight)

    def encode(self, weight):
        return self.inner.encode(weight)


WHOLE = ("nvfp4", "nf4-dq")  # what their scales are depends on the whole tensor


@pytest.mark.parametrize("name", [name for name in GRIDS if name not in WHOLE])
@pytest.mark.parametrize("static", [False, True])
def test_a_stranger_gives_the_same(name, static):
    weight, hessian = layer()
    stranger = Stranger(GRIDS[name], GRIDS[name].block_size)
    ours = gptq(weight, hessian, GRIDS[name], static_groups=static).dequantize()
    theirs = gptq(weight, hessian, stranger, static_groups=static).dequantize()
    assert torch.equal(ours, theirs)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999), st.integers(1, 40), st.integers(2, 4))
def test_unrelated_inputs_leave_rounding_to_nearest(seed, columns, bits):
    weight, hessian = layer(3, columns, seed=seed)
    grid = AffineGrid(bits, (1, 8))
    for options in ({}, {"act_order": True}):
        found = gptq(weight, torch.diag(hessian.diagonal()), grid, **options)
        assert torch.equal(found.dequantize(), grid.round(weight))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999), st.floats(1e-6, 1e6))
@example(202, 479764.25)  # once in a while a damping added in float32 shows
def test_rows_are_independent_and_the_hessians_scale_does_not_matter(seed, scale):
    weight, hessian = layer(4, 40, seed=seed, dtype=torch.float64)
    grid = AffineGrid(3, (1, 8))
    whole = gptq(weight, hessian, grid).dequantize()
    parts = [gptq(part, scale * hessian, grid).dequantize() for part in weight.split([1, 3])]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-9)


def test_the_error_is_the_sum_of_the_columns_own():
    weight, hessian = layer(dtype=torch.float64)
    found = gptq(weight, hessian, AffineGrid(4, (1, 64)), damp=0.0)
    u = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    e = torch.linalg.solve_triangular(
        u, weight - found.dequantize(), upper=True, left=False
    )  # W - W_hat = E U
    assert error(found, weight, hessian) == pytest.approx(e.square().sum().item(), rel=1e-9)


def test_dead_channels_are_rounded_and_disturb_nobody():
    weight, hessian = layer(8, 64)
    dead = torch.tensor([0, 5, 63])
    hessian[dead], hessian[:, dead] = 0, 0
    grid = AffineGrid(4, (1, -1))
    found = gptq(weight, hessian, grid, static_groups=True, damp=0.0).dequantize()
    assert torch.equal(found[:, dead], grid.round(weight)[:, dead])
    alive = torch.tensor([j for j in range(64) if j not in dead])
    weight_alive = torch.cat([weight[:, alive], weight], 1)  # the same scales for a layer without them
    padded = torch.block_diag(hessian[alive][:, alive], torch.eye(64))
    without = gptq(weight_alive, padded, grid, static_groups=True, damp=0.0).dequantize()[:, :61]
    assert torch.equal(found[:, alive], without)


def test_much_damping_means_no_correction():
    weight, hessian = layer()
    grid = AffineGrid(3, (1, 32))
    found = [gptq(weight, hessian, grid, damp, static_groups=True) for damp in (0.01, 3.0, 1e9)]
    little, much, endless = (error(q, weight, hessian) for q in found)
    assert little < 0.8 * much
    assert much < 0.95 * endless
    assert torch.equal(found[-1].dequantize(), grid.round(weight))


def test_few_tokens_need_damping():
    weight, _ = layer(4, 32)
    x = torch.randn(10, 32, generator=torch.Generator().manual_seed(0))
    hessian = x.T @ x / 10
    hessian[3] = hessian[:, 3] = hessian[2]  # and two equal inputs
    hessian[3, 3] = hessian[3, 2]
    grid = AffineGrid(4, (1, 8))
    with pytest.raises(ValueError, match=r"not positive definite with damp=0.*raise damp"):
        gptq(weight, hessian, grid, damp=0.0)
    assert error(gptq(weight, hessian, grid), weight, hessian) < error(grid.encode(weight), weight, hessian)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999), st.integers(0, 30), st.integers(0, 30), st.booleans())
def test_an_input_that_others_determine_is_never_taken_for_news(seed, first, second, act_order):
    weight, _ = layer(4, 32, seed=seed)
    x = torch.randn(100, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[:, 31] = x[:, first] + x[:, second]
    hessian, grid = x.T @ x / 100, AffineGrid(4, (1, 8))
    with pytest.raises(ValueError, match="because some inputs determine another: raise damp"):
        gptq(weight, hessian, grid, damp=0.0, act_order=act_order)
    found = gptq(weight, hessian, grid, act_order=act_order)  # these inputs have little else in common
    assert error(found, weight, hessian) < 2 * error(grid.encode(weight), weight, hessian)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_other_memory_and_inputs_left_alone(dtype):
    weight, hessian = layer(8, 64)
    grid = AffineGrid(4, (1, 32))
    turned = weight.to(dtype).T.contiguous().T
    kept, kept_hessian = turned.clone(), copy.deepcopy(hessian)
    found = gptq(turned.requires_grad_(), hessian, grid).dequantize()
    same = gptq(turned.detach().to(found.dtype), hessian, grid).dequantize()
    assert torch.equal(found, same)
    assert torch.equal(turned, kept)
    assert torch.equal(hessian, kept_hessian)


def test_double_quantized_scales_only_change_the_end():
    weight, hessian = layer(64, 192)
    plain, double = (gptq(weight, hessian, CodebookGrid(NF4, 64, double_quant=d)) for d in (False, True))
    assert torch.equal(plain.packed, double.packed)
    assert double.bits_per_weight < plain.bits_per_weight


def test_bad_input_is_named():
    weight, hessian = layer(4, 64)
    grid, nan = AffineGrid(4, (1, 32)), float("nan")
    spoiled, lopsided, negative = hessian.clone(), hessian.clone(), hessian.clone()
    spoiled[1, 1], lopsided[0, 1], negative[0, 0] = nan, 1e3, -1.0
    for w, h, message in (
        (weight, hessian[:32, :32], r"\(32, 32\) does not fit .*\(4, 64\)"),
        (weight[0], hessian, r"does not fit"),
        (weight[:0], hessian, r"does not fit"),
        (weight * nan, hessian, "weight holds NaN"),
        (weight, spoiled, "Hessian holds NaN"),
        (weight, hessian * float("inf"), "Hessian holds NaN"),
        (weight, lopsided, "must be symmetric"),
        (weight, negative, "negative diagonal"),
        (weight, 0 * hessian, "no calibration token reached this layer"),
        (weight, -hessian, "negative diagonal"),
    ):
        with pytest.raises(ValueError, match=message):
            gptq(w, h, grid)
    with pytest.raises(TypeError, match="floating point, got torch.int64"):
        gptq(weight.long(), hessian, grid)
    for damp in (-0.1, nan):
        with pytest.raises(ValueError, match="damp must be 0 or more"):
            gptq(weight, hessian, grid, damp)
    with pytest.raises(ValueError, match="block_size must be positive, got 0"):
        gptq(weight, hessian, CodebookGrid(NF4, 0))
    for size in (48, 128):
        with pytest.raises(ValueError, match=f"blocks of {size} do not divide 64"):
            gptq(weight, hessian, CodebookGrid(NF4, size))
