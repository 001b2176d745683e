import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtune_companion.quantization.packing import pack_bits, unpack_bits


@settings(deadline=None)
@given(st.sampled_from([2, 3, 4]), st.integers(0, 300), st.integers(0, 99))
def test_packing_is_a_bijection(bits, count, seed):
    codes = torch.randint(2**bits, (count,), generator=torch.Generator().manual_seed(seed))
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == -(-count * bits // 8)
    assert torch.equal(unpack_bits(packed, bits, count).long(), codes)


def test_layout_is_little_endian():
    assert pack_bits(torch.tensor([1, 2, 3, 4, 5, 6, 7, 0]), 3).tolist() == [
        0b11010001,
        0b01011000,
        0b00011111,
    ]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="got 5"):
        pack_bits(torch.tensor([1]), 5)
    with pytest.raises(ValueError, match="code 9 does not fit in 3 bits"):
        pack_bits(torch.tensor([1, 9]), 3)
    with pytest.raises(TypeError, match="float32"):
        pack_bits(torch.tensor([1.0]), 4)
    with pytest.raises(ValueError, match="cannot hold 3 codes"):
        unpack_bits(torch.zeros(1, dtype=torch.uint8), 4, 3)
    with pytest.raises(TypeError, match="int64"):
        unpack_bits(torch.zeros(1, dtype=torch.long), 4, 1)
