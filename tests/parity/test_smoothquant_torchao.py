"""SmoothQuant's scales against torchao's observer; its additive epsilon allows 1e-5."""

import pytest
import torch
from torchao.prototype.smoothquant.core import SmoothQuantObserver

from qtune_companion.quantization.smoothquant import smooth_scales


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.8, 1.0])
def test_same_scales(alpha, generator):
    weight = torch.randn(24, 16, generator=generator)
    inputs = torch.randn(3, 7, 16, generator=generator)
    inputs[..., 5] *= 50
    observer = SmoothQuantObserver(weight, alpha)
    observer(inputs[:2])
    observer(inputs[2:])
    theirs = observer.calculate_qparams()[0]
    ours = smooth_scales(weight, inputs.abs().amax((0, 1)), alpha)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
