"""Hadamard matrices against scipy (Sylvester's, the same bits) and torchao's transform for SpinQuant."""

import pytest
import torch
from scipy.linalg import hadamard as their_hadamard
from torchao.prototype.spinquant.hadamard_utils import matmul_hadU_slow

from qtune_companion.quantization.rotation import HadamardTransform, hadamard


@pytest.mark.parametrize("k", range(11))
def test_powers_of_two_are_the_same_bits(k):
    assert torch.equal(hadamard(2**k), torch.tensor(their_hadamard(2**k)).float())


@pytest.mark.parametrize("n", [2, 64, 512])
def test_same_transform_as_torchao(n, generator):
    x = torch.randn(5, n, generator=generator)
    assert torch.allclose(HadamardTransform(n)(x), matmul_hadU_slow(x, None, 1), atol=1e-5)
