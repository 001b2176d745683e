"""The model's own GGUF file: our packing and affine formula against the ``gguf`` package, bit for bit.

A Q4_1 block holds 32 weights: a float16 scale, a float16 minimum, and 16 bytes of codes, of which the low
halves are the first sixteen weights and the high halves the rest.
"""

import gguf
import pytest
import torch
from gguf.quants import dequantize, quantize
from safetensors import safe_open

from qtune_companion.models import _wheel_file, model_folder
from qtune_companion.quantization.affine import AffineParams, dequantize_affine
from qtune_companion.quantization.packing import pack_bits, unpack_bits

BLOCK = 32


def decode_q4_1(blocks):
    """Rows of Q4_1 blocks, uint8 (rows, blocks * 20), to float32 (rows, blocks * 32), by our own parts."""
    raw = torch.tensor(blocks).view(blocks.shape[0], -1, 20)
    scale, minimum = raw[..., :4].contiguous().view(torch.float16).float().unbind(-1)  # (rows, blocks)
    codes = unpack_bits(raw[..., 4:].contiguous(), 4, raw[..., 4:].numel() * 2)
    codes = codes.view(*raw.shape[:2], 16, 2).transpose(-1, -2)  # low halves, then high halves
    params = AffineParams(scale, torch.zeros_like(scale, dtype=torch.int32), 4, (1, BLOCK), symmetric=False)
    steps = dequantize_affine(codes.reshape(len(raw), -1), params)
    return steps + minimum.repeat_interleave(BLOCK, -1)


@pytest.fixture(scope="module")
def reader():
    return gguf.GGUFReader(str(_wheel_file("smollm2-135m")))


def test_every_q4_1_tensor_of_the_model_decodes_to_the_same_bits(reader):
    kind = gguf.GGMLQuantizationType.Q4_1
    tensors = [t for t in reader.tensors if t.tensor_type == kind]
    assert len(tensors) > 100
    for tensor in tensors:
        ours = decode_q4_1(tensor.data)
        assert torch.equal(ours, torch.tensor(dequantize(tensor.data, kind))), tensor.name


def test_random_weights_decode_to_the_same_bits_and_pack_back(generator):
    kind = gguf.GGMLQuantizationType.Q4_1
    for scale in (1e-3, 1.0, 100.0):
        packed = quantize((torch.randn(8, 256, generator=generator) * scale).numpy(), kind)
        assert torch.equal(decode_q4_1(packed), torch.tensor(dequantize(packed, kind)))
        halves = torch.tensor(packed).view(8, -1, 20)[..., 4:].contiguous()
        codes = unpack_bits(halves, 4, halves.numel() * 2)
        assert torch.equal(pack_bits(codes, 4), halves.flatten())


def test_the_cached_model_holds_the_values_of_the_file(reader):
    names = {"blk.3.ffn_down.weight": "model.layers.3.mlp.down_proj.weight",
             "blk.29.attn_v.weight": "model.layers.29.self_attn.v_proj.weight",
             "token_embd.weight": "model.embed_tokens.weight"}  # fmt: skip
    tensors = {t.name: t for t in reader.tensors}
    with safe_open(f"{model_folder('smollm2-135m')}/model.safetensors", "pt") as cached:
        for theirs, ours in names.items():
            tensor = tensors[theirs]
            assert torch.equal(
                cached.get_tensor(ours), torch.tensor(dequantize(tensor.data, tensor.tensor_type))
            )
