"""NF4 against bitsandbytes on the CPU: the same bits, on 200 random shapes.

One path of the judge is stepped around. With AVX-512, bitsandbytes 0.50's native CPU decoder takes the scale of
the wrong block when a row's length is even but no multiple of the block (its own plain-PyTorch path does not).
There the codes and scales are still compared bit for bit, and the values with its plain path.
"""

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.backends.cpu import ops
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

from qtune_companion.quantization.codebook import FP4, NF4, CodebookGrid, dynamic_map, quantize_nf4


def samples():
    generator = torch.Generator().manual_seed(1897)
    for i in range(200):
        shape = torch.randint(1, 130, (2,), generator=generator).tolist()
        if i % 7 == 0:
            shape = [int(torch.randint(1, 3000, (1,), generator=generator))]
        scale = 10 ** (torch.rand(1, generator=generator) * 5 - 3)
        w = torch.randn(shape, generator=generator) * scale
        flat = w.view(-1)
        if i % 5 == 0:
            flat[: len(flat) // 2] = 0
        if i % 11 == 0:
            flat.zero_()
        if i % 13 == 0:
            flat[0] = 1e38 if i % 2 else -1e38
        if i % 17 == 0:
            flat.fill_(1e-38 if i % 2 else -1e-38)
        if i % 19 == 0:
            w = w[..., :1].reshape(-1)[:1]
        yield w


def judged_values(packed, state, shape):
    """bitsandbytes' own values, by its native path where that is right, else by its plain one."""
    if not getattr(ops, "_has_avx512", True) or shape[-1] % 64 == 0 or (len(shape) > 1 and shape[-1] % 2):
        return bnb.dequantize_4bit(packed, state).view(shape)
    scales = state.absmax
    if state.nested:
        scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    plain = getattr(_dequantize_4bit_compute, "__wrapped__", _dequantize_4bit_compute)
    return plain(packed.view(-1), scales, state.code, 64, [1, shape.numel()], torch.float32).view(shape)


def bits_of(x):
    """Bit patterns: 0.0 and -0.0 differ here."""
    return x.contiguous().view(torch.int32)


@pytest.mark.parametrize("double_quant", [False, True])
def test_same_bits_on_200_shapes(double_quant):
    seen = 0
    for w in samples():
        packed, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=double_quant)
        ours = quantize_nf4(w, double_quant=double_quant)
        assert torch.equal(packed.view(-1), ours.packed), w.shape
        if double_quant:
            assert torch.equal(state.absmax, ours.absmax.codes), w.shape
            assert torch.equal(state.state2.absmax, ours.absmax.absmax), w.shape
            assert torch.equal(state.offset, ours.absmax.offset), w.shape
        else:
            assert torch.equal(state.absmax, ours.absmax), w.shape
        assert torch.equal(bits_of(state.code), bits_of(NF4))
        judged = judged_values(packed, state, w.shape)
        assert torch.equal(bits_of(judged), bits_of(ours.dequantize())), w.shape
        seen += 1
    assert seen == 200


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_same_codes_from_half_precision(dtype, generator):
    w = torch.randn(48, 128, generator=generator).to(dtype)
    packed, state = bnb.quantize_4bit(w, quant_type="nf4")
    ours = quantize_nf4(w)
    assert torch.equal(packed.view(-1), ours.packed)
    assert torch.equal(bnb.dequantize_4bit(packed, state), ours.dequantize())


def test_fp4_same_bits(generator):
    w = torch.randn(64, 128, generator=generator)
    packed, state = bnb.quantize_4bit(w, quant_type="fp4")
    ours = CodebookGrid(FP4, 64).encode(w)
    assert torch.equal(packed.view(-1), ours.packed)
    assert torch.equal(bnb.dequantize_4bit(packed, state), ours.dequantize())


def test_same_dynamic_map():
    assert torch.equal(dynamic_map(), bnb.create_dynamic_map())
