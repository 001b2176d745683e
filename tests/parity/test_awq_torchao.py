"""AWQ's scales against torchao's observer, on torchao's own int4 grid and on ours, which round alike."""

import pytest
import torch
from torchao.prototype.awq.core import AWQObserver
from torchao.quantization import IntxWeightOnlyConfig, PerGroup
from torchao.quantization.quant_primitives import MappingType

from qtune_companion.quantization.affine import AffineGrid
from qtune_companion.quantization.awq import awq_scales


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_same_scales(symmetric, bits, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(48, 128, generator=generator) * 0.05
    inputs = torch.randn(3, 40, 128, generator=generator) * torch.rand(128, generator=generator).exp()
    inputs[..., [5, 90]] *= 12
    kind = MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC
    config = IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), PerGroup(32), mapping_type=kind)
    observer = AWQObserver(weight, None, config, 20)
    observer(inputs[:2], None)
    observer.inputs.append(inputs[2:])
    observer.inputs = [x.flatten(0, 1) for x in observer.inputs]
    theirs = observer.calculate_qparams()
    ours = awq_scales(weight, inputs.flatten(0, 1), AffineGrid(bits, (1, 32), symmetric), 20)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    assert ours.max() > 1.2  # not merely ones, both
