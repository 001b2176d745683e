"""Block formats against torchao's MX and NVFP4 code: the same codes, scales and values."""

import math

import pytest
import torch
from test_formats_torch import awkward
from torchao.prototype.mx_formats.kernels import f4_unpacked_to_f32, f32_to_f4_unpacked
from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

from qtune_companion.quantization.formats import FP4_E2M1, MXFP4, MXFP8, MXFP8_E5M2, NVFP4

MX = [
    (MXFP4, torch.float4_e2m1fn_x2),
    (MXFP8, torch.float8_e4m3fn),
    (MXFP8_E5M2, torch.float8_e5m2),
]


def weights(generator):
    """Float32 (32, 256): normal, outliers, many magnitudes, zero blocks, negative zeros, ties, near-overflow."""
    w = torch.randn(32, 256, generator=generator)
    w[1] *= 10.0 ** torch.randint(-30, 30, (256,), generator=generator)
    w[2, ::50] *= 1000
    w[3] = 0
    w[4] = -0.0
    w[5] = torch.arange(256) / 8 - 16  # ties, and blocks that reach 7/8 of a power of two
    w[6] = 3e38 * w[6].sign()
    w[7] *= 1e-30
    w[8] = torch.arange(256).float().exp2().clamp(max=3e38) / 2.0**100
    w[9:12] = torch.exp(4 * w[9:12])
    return w


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("grid", "element"), MX, ids=lambda v: getattr(v, "name", ""))
def test_mx_same_bits(grid, element, dtype, generator):
    w = weights(generator).to(dtype)
    scales, codes = to_mx(w, element, 32)
    ours = grid.encode(w)
    assert torch.equal(ours.grid.scales, scales.view(torch.uint8))
    assert torch.equal(ours.packed, codes.view(torch.uint8))
    theirs = to_dtype(codes, scales, element, 32, torch.float32)
    assert torch.equal(ours.dequantize(torch.float32), theirs)


@pytest.mark.parametrize(("grid", "element"), MX, ids=lambda v: getattr(v, "name", ""))
def test_mx_differs_only_where_torchao_divides_by_the_wrong_scale(grid, element):
    # scale code 0 means 2**-127; torchao divides by 2**-126 and multiplies by 2**-127, so such blocks lose half
    w = torch.full((1, 32), 2.0**-126)
    scales, codes = to_mx(w, element, 32)
    theirs = to_dtype(codes, scales, element, 32, torch.float32)
    assert torch.equal(grid.round(w), w)
    assert grid.encode(w).grid.scales.item() == scales.view(torch.uint8).item() == 0
    assert torch.equal(theirs, w / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nvfp4_same_bits(dtype, generator):
    for size in (1e-20, 1.0, 1e20):
        w = weights(generator)
        w = w[w.abs().amax(1) < 1e6] * size  # the tensor's scale follows its largest value
        assert len(w) > 20
        w = w.to(dtype)
        theirs = NVFP4Tensor.to_nvfp4(w, per_tensor_scale=per_tensor_amax_to_scale(w.abs().amax()))
        ours = NVFP4.encode(w)
        assert torch.equal(ours.grid.tensor_scale, theirs.per_tensor_scale)
        assert torch.equal(ours.grid.scales, theirs.scale.view(torch.uint8))
        assert torch.equal(ours.packed, theirs.qdata)
        assert torch.equal(ours.dequantize(), theirs.dequantize())


def test_nvfp4_same_bits_near_ties(generator):
    # midpoints times the scales that torchao chose: the last bit of its reciprocal decides where they go
    w = torch.randn(512, 64, generator=generator)
    grid = NVFP4.fit(w)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).repeat(2)
    w = (ties * (grid.tensor_scale * grid.block_scales())[..., None]).flatten(-2)
    ours = NVFP4.encode(w)
    theirs = NVFP4Tensor.to_nvfp4(w, per_tensor_scale=per_tensor_amax_to_scale(w.abs().amax()))
    assert torch.equal(ours.packed, theirs.qdata)
    assert torch.equal(ours.dequantize(), theirs.dequantize())


def test_fp4_elements_same_bits(generator):
    x = awkward(FP4_E2M1, generator)
    assert torch.equal(FP4_E2M1.encode(x), f32_to_f4_unpacked(x))
    codes = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(FP4_E2M1.decode(codes).view(torch.int32), f4_unpacked_to_f32(codes).view(torch.int32))
    # where torchao's answer to NaN is a number, ours is an error
    assert f32_to_f4_unpacked(torch.tensor([math.nan])).item() < 16
    with pytest.raises(ValueError, match="NaN"):
        FP4_E2M1.encode(torch.tensor([math.nan]))
