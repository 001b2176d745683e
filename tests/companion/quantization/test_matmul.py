"""The fused products of ``AffineTensor``: as the decoded weight's, for every shape the kernels take or refuse."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtune_companion.quantization.affine import AffineGrid

FUSED = {
    "int4": AffineGrid(4, (1, 32)),
    "int4, blocks of 64": AffineGrid(4, (1, 64)),
    "int4, symmetric": AffineGrid(4, (1, 128), symmetric=True),
    "int8": AffineGrid(8, (1, -1), symmetric=True),
}


def weight(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.1


def distance(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 33])
@pytest.mark.parametrize("kind", FUSED)
def test_the_kernels_product_is_the_decoded_weights(kind, rows):
    w = FUSED[kind].encode(weight((48, 256)))
    assert w._kernel is not None
    x = weight((rows, 256), 1).bfloat16()
    y = w.matmul(x)
    assert y.dtype == torch.bfloat16
    # scale, zero and result are each rounded to 8 bits: 2^-9 at most, and about half of it on average
    assert distance(y, x.float() @ w.dequantize().T) < 0.006


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 5).map(lambda n: 8 * n),
    st.integers(1, 9).map(lambda n: 8 * n),
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([32, 64, -1]),
    st.booleans(),
    st.integers(0, 3),
)
def test_any_shape_bits_and_block(n_out, n_in, bits, block, symmetric, rows):
    w = AffineGrid(bits, (1, block), symmetric).encode(weight((n_out, n_in)))
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 0.02)):
        x = weight((rows, 2, n_in), 1).to(dtype)
        y = w.matmul(x)
        assert y.shape == (rows, 2, n_out)
        assert y.dtype == dtype
        if rows:
            assert distance(y, x.float() @ w.dequantize().T) < tolerance


@pytest.mark.parametrize("kind", FUSED)
def test_takes_strides_and_addresses_that_the_kernels_refuse(kind):
    w = FUSED[kind].encode(weight((16, 128)))
    flat = weight((1 + 3 * 128,), 1).bfloat16()
    odd = flat[1:].view(3, 128)  # two bytes past an aligned address: the int8 kernel's loads would crash
    assert torch.equal(w.matmul(odd), w.matmul(odd.clone()))
    turned = weight((128, 3), 2).bfloat16().T
    assert torch.equal(w.matmul(turned), w.matmul(turned.contiguous()))


def test_a_copy_goes_without_the_kernels_layout():
    w = FUSED["int4"].encode(weight((16, 64)))
    x = weight((1, 64), 1).bfloat16()
    y = w.matmul(x)
    for other in (copy.deepcopy(w), pickle.loads(pickle.dumps(w))):
        assert "_kernel" not in vars(other)
        assert torch.equal(other.matmul(x), y)


def test_full_precision_never_meets_a_bf16_kernel():
    w = FUSED["int8"].encode(weight((16, 64)))
    x = weight((1, 64), 1)
    assert torch.equal(w.matmul(x), torch.nn.functional.linear(x, w.dequantize()))
    assert "_kernel" not in vars(w)
