"""Fused 4-bit products against torchao's: the same codes, scales and kernel give the same bits."""

import pytest
import torch
from torchao.prototype.quantization.int4 import int4_opaque_tensor as torchao

from qtune_companion.quantization.affine import AffineGrid


@pytest.mark.parametrize(
    ("block", "shape"), [(32, (16, 128)), (64, (192, 576)), (128, (576, 1536)), (32, (576, 1536))]
)
def test_same_operands_same_bits(block, shape, generator):
    w = torch.randn(shape, generator=generator).bfloat16()
    theirs = torchao.Int4OpaqueTensor.from_hp(w, [1, block])
    ours = AffineGrid(4, (1, block)).encode(w.float())
    x = torch.randn(3, shape[1], generator=generator).bfloat16()
    y = torch.nn.functional.linear(x, theirs)
    dense = x.float() @ w.float().T
    for product in (y, ours.matmul(x)):  # two rules for the grid: equally far from the dense result
        assert ((product.float() - dense).norm() / dense.norm()).item() < 0.15
    # now our grid in their container
    zero = ours.scale.bfloat16() * (8 - ours.zero_point.to(torch.int16))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(ours._unpack().int(), 1)
    pairs = torch.stack([ours.scale.bfloat16(), zero], -1).transpose(0, 1).contiguous()
    ours_in_theirs = torchao.Int4OpaqueTensor(packed, pairs, [1, block], torch.Size(shape))
    assert torch.equal(torch.nn.functional.linear(x, ours_in_theirs), ours.matmul(x))
