"""GGUF blocks against the ``gguf`` package: the same bits, for random bytes, for real weights, for the model's file."""

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize

from qtune_companion.models import _wheel_file
from qtune_companion.quantization.gguf_blocks import GGUF_BLOCKS, dequantize_gguf

HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q8_0": (0,),
    "Q4_K": (0, 2),
    "Q6_K": (208,),
}  # where float16 numbers lie


def same_bits(raw, kind):
    theirs = dequantize(raw, gguf.GGMLQuantizationType[kind])
    ours = dequantize_gguf(torch.tensor(raw), kind).numpy()
    return ours.shape == theirs.shape and np.array_equal(ours.view(np.int32), theirs.view(np.int32))


@pytest.mark.parametrize("kind", GGUF_BLOCKS)
def test_block_sizes(kind):
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] == GGUF_BLOCKS[kind]


@pytest.mark.parametrize("kind", GGUF_BLOCKS)
def test_random_bytes(kind):
    """Any byte at all, and any finite float16 as a scale: zeros of both signs, subnormals, 65,504."""
    draw = np.random.default_rng(0)
    raw = draw.integers(0, 256, (64, 16, GGUF_BLOCKS[kind][1]), dtype=np.uint8)
    for at in HALVES[kind]:
        finite = draw.integers(0, 31 * 1024, raw.shape[:2], dtype=np.uint16)
        finite.flat[:6] = 0, 1, 1023, 1024, 31 * 1024 - 1, 0
        signed = finite | draw.integers(0, 2, raw.shape[:2], dtype=np.uint16) << np.uint16(15)
        raw[..., at : at + 2] = signed[..., None].view(np.uint8)
    assert same_bits(raw.reshape(64, -1), kind)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_quantized_weights(kind, scale, generator):
    weights = torch.randn(8, 256, generator=generator) * scale
    packed = quantize(weights.numpy(), gguf.GGMLQuantizationType[kind])
    assert same_bits(packed, kind)
    step = weights.reshape(-1, 32).abs().amax(1) / (100 if kind == "Q8_0" else 4)
    assert (
        (dequantize_gguf(torch.tensor(packed), kind) - weights).reshape(-1, 32).abs() <= step[:, None]
    ).all()


def test_every_quantized_tensor_of_the_model():
    tensors = [
        t
        for t in gguf.GGUFReader(str(_wheel_file("smollm2-135m"))).tensors
        if t.tensor_type.name in GGUF_BLOCKS
    ]
    assert {t.tensor_type.name for t in tensors} == {"Q4_1", "Q8_0"}
    for tensor in tensors:
        assert same_bits(tensor.data[:512], tensor.tensor_type.name), tensor.name
