"""Affine quantization against torchao's primitives: the same scales, zero points, codes and values."""

import pytest
import torch
from torchao.quantization.quant_primitives import (
    MappingType,
)
from torchao.quantization.quant_primitives import choose_qparams_affine as their_choose
from torchao.quantization.quant_primitives import dequantize_affine as their_dequantize
from torchao.quantization.quant_primitives import quantize_affine as their_quantize

from qtune_companion.quantization.affine import choose_qparams, dequantize_affine, quantize_affine


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("block", [(1, 32), (1, -1), (-1, -1), (8, 16)])
def test_same_bits(symmetric, bits, block, generator):
    for scale in (1e-3, 1.0, 100.0):
        w = torch.randn(32, 64, generator=generator) * scale
        ours = choose_qparams(w, bits, block, symmetric)
        low, high = ours.code_range
        kind = MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC
        dtype = torch.int8 if symmetric else torch.uint8
        s, z = their_choose(w, kind, ours.block_size, dtype, low, high, scale_dtype=torch.float32,
                            zero_point_dtype=torch.int32)  # fmt: skip
        assert torch.equal(ours.scale.view(-1), s.view(-1))
        assert torch.equal(ours.zero_point.view(-1), z.view(-1))
        codes = quantize_affine(w, ours)
        theirs = their_quantize(w, ours.block_size, s, z, dtype, low, high)
        assert torch.equal(codes, theirs)
        values = their_dequantize(theirs, ours.block_size, s, z, dtype, low, high, output_dtype=torch.float32)
        assert torch.equal(dequantize_affine(codes, ours), values)
