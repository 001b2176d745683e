"""Affine quantization against PyTorch's ``quantized_decomposed`` operators and torchao's int8 linear layer.

Where the rules agree, bits are demanded. Per token, PyTorch's asymmetric rule chooses the zero point from the
end with the smaller error, and its symmetric one divides by 127 where ours divides by 127.5.
"""

import pytest
import torch
import torch.ao.quantization.fx._decomposed
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

from qtune_companion.quantization.affine import choose_qparams, dequantize_affine, quantize_affine

ops = torch.ops.quantized_decomposed
EPS = torch.finfo(torch.float32).eps
SCALES = [1e-3, 1.0, 100.0]
SHAPES = [(32, 64), (7, 33), (1, 1)]


def weight(shape, scale, generator):
    return torch.randn(shape, generator=generator) * scale


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_per_tensor(bits, shape, scale, generator):
    w, top = weight(shape, scale, generator), 2**bits - 1
    ours = choose_qparams(w, bits, (-1, -1))
    s, z = ops.choose_qparams(w, 0, top, EPS, torch.uint8)
    assert ours.scale.double().item() == s.item()
    assert ours.zero_point.item() == z.item()
    codes = quantize_affine(w, ours)
    assert torch.equal(codes, ops.quantize_per_tensor(w, s.item(), z.item(), 0, top, torch.uint8))
    values = ops.dequantize_per_tensor(codes, s.item(), z.item(), 0, top, torch.uint8)
    assert torch.equal(dequantize_affine(codes, ours), values)


@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_per_tensor(bits, generator):
    w, low, high = weight((32, 64), 1.0, generator), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    ours = choose_qparams(w, bits, (-1, -1), symmetric=True)
    s, z = ops.choose_qparams_symmetric(w, low, high, EPS, torch.int8)
    assert ours.scale.double().item() == s.item()
    assert z.item() == 0


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_per_channel_same_bits(bits, symmetric, shape, scale, generator):
    w = weight(shape, scale, generator)
    ours = choose_qparams(w, bits, (1, -1), symmetric)
    dtype = torch.int8 if symmetric else torch.uint8
    args = (ours.scale.flatten(), ours.zero_point.flatten(), 0, *ours.code_range, dtype)
    codes = quantize_affine(w, ours)
    assert torch.equal(codes, ops.quantize_per_channel(w, *args))
    assert torch.equal(dequantize_affine(codes, ours), ops.dequantize_per_channel(codes, *args))


def test_groups_same_bits(generator):
    w = weight((16, 96), 1.0, generator)
    ours = choose_qparams(w, 4, (1, 32))
    theirs = ops.quantize_per_channel_group(w, ours.scale, ours.zero_point, 0, 15, torch.uint8, 32)
    assert torch.equal(quantize_affine(w, ours), theirs)


@pytest.mark.parametrize("scale", SCALES)
def test_per_token(scale, generator):
    x = weight((50, 64), scale, generator)
    ours = choose_qparams(x, 8, (1, -1))
    s, z = ops.choose_qparams_per_token_asymmetric(x, torch.int8)  # codes from -128: ours less 128
    assert torch.equal(ours.scale.double(), s)
    assert ((z + 128) - ours.zero_point).abs().max() <= 1
    args = (ours.scale, ours.zero_point - 128, -128, 127, torch.int8)
    theirs = ops.quantize_per_token(x, *args).int() + 128
    codes = quantize_affine(x, ours)
    assert (theirs - codes.int()).abs().max() <= 1  # it rounds after adding the zero point, we before
    assert (theirs != codes.int()).float().mean() < 0.01
    values = ops.dequantize_per_token((codes.int() - 128).to(torch.int8), *args, torch.float32)
    assert torch.equal(dequantize_affine(codes, ours), values)


def test_per_token_symmetric_rules_differ_by_half_a_code(generator):
    x = weight((50, 64), 1.0, generator)
    theirs, _ = ops.choose_qparams_per_token(x, torch.int8)
    torch.testing.assert_close(theirs * 127, choose_qparams(x, 8, (1, -1), symmetric=True).scale * 127.5)


@pytest.mark.parametrize("shape", [(32, 64), (48, 160)])
def test_torchao_int8_linear_same_bits(shape, generator):
    """Per-token int8 activations times per-channel int8 weights, accumulated in int32."""
    w, x = weight(shape, 0.1, generator), weight((20, shape[1]), 1.0, generator)
    layer = torch.nn.Linear(shape[1], shape[0], bias=False)
    layer.weight.data = w.clone()
    quantize_(layer, Int8DynamicActivationInt8WeightConfig())
    pw, px = choose_qparams(w, 8, (1, -1), symmetric=True), choose_qparams(x, 8, (1, -1), symmetric=True)
    cw, cx = quantize_affine(w, pw), quantize_affine(x, px)
    assert torch.equal(layer.weight.qdata, cw)
    assert torch.equal(layer.weight.scale, pw.scale)
    sums = torch._int_mm(cx, cw.t().contiguous())
    assert torch.equal(sums, cx.int() @ cw.int().t())
    torch.testing.assert_close(layer(x), sums * px.scale * pw.scale.t(), rtol=1e-6, atol=0)
