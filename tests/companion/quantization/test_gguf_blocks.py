import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtune_companion.quantization.gguf_blocks import GGUF_BLOCKS, GGUFTensor, dequantize_gguf

KINDS = list(GGUF_BLOCKS)
BITS = {"Q4_0": 4.5, "Q4_1": 5.0, "Q8_0": 8.5, "Q4_K": 4.5, "Q6_K": 6.5625}
ONE = (0x00, 0x3C)  # 1.0 in float16, low byte first
TWO = (0x00, 0x40)


def random_blocks(kind, shape=(3, 2), seed=0):
    """Random bytes with finite scales: the exponent of every float16 is below 31."""
    size = GGUF_BLOCKS[kind][1]
    raw = torch.randint(0, 256, (*shape, size), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    for high in {"Q4_0": (1,), "Q4_1": (1, 3), "Q8_0": (1,), "Q4_K": (1, 3), "Q6_K": (209,)}[kind]:
        raw[..., high] &= 0xBF
    return raw.flatten(-2)


def block(kind, places):
    """One block of zeros but for ``{position: bytes}``."""
    raw = torch.zeros(GGUF_BLOCKS[kind][1], dtype=torch.uint8)
    for position, values in places.items():
        raw[position : position + len(values)] = torch.tensor(values, dtype=torch.uint8)
    return raw


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_bits(kind):
    weights, size = GGUF_BLOCKS[kind]
    raw = random_blocks(kind, (3, 2))
    tensor = GGUFTensor(raw, kind)
    assert dequantize_gguf(raw, kind).shape == tensor.shape == (3, 2 * weights)
    assert tensor.nbytes == 6 * size
    assert tensor.bits_per_weight == BITS[kind]
    assert torch.equal(tensor.dequantize(), dequantize_gguf(raw, kind))
    assert tensor.dequantize(torch.bfloat16).dtype == torch.bfloat16
    assert GGUFTensor(raw, kind, torch.float64).dequantize().dtype == torch.float64


@settings(deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 9999))
def test_every_block_is_decoded_alone_and_lies_on_few_levels(kind, seed):
    weights, size = GGUF_BLOCKS[kind]
    raw = random_blocks(kind, (1, 4), seed)
    whole = dequantize_gguf(raw, kind).view(4, weights)
    alone = torch.stack([dequantize_gguf(one, kind) for one in raw.view(4, size)])
    assert torch.equal(whole, alone)
    assert torch.isfinite(whole).all()
    share = {"Q4_K": 32, "Q6_K": 16}.get(kind, 32)  # weights that share a scale
    levels = {"Q8_0": 256, "Q6_K": 64}.get(kind, 16)
    assert all(group.unique().numel() <= levels for group in whole.reshape(-1, share))


@settings(deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 9999))
def test_scales_scale(kind, seed):
    """Twice the float16 scale (and minimum) is twice the weight, exactly."""
    raw = random_blocks(kind, (2, 1), seed)
    doubled = raw.clone()
    for low in {"Q4_0": (0,), "Q4_1": (0, 2), "Q8_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,)}[kind]:
        raw[..., low : low + 2] = torch.tensor(ONE, dtype=torch.uint8)
        doubled[..., low : low + 2] = torch.tensor(TWO, dtype=torch.uint8)
    assert torch.equal(dequantize_gguf(doubled, kind), 2 * dequantize_gguf(raw, kind))


def test_small_blocks_by_hand():
    low_then_high = dequantize_gguf(block("Q4_1", {0: (*ONE, *TWO), 4: (0xA3, 0x05)}), "Q4_1")
    assert low_then_high[[0, 1, 2, 16, 17]].tolist() == [5.0, 7.0, 2.0, 12.0, 2.0]
    assert dequantize_gguf(block("Q4_0", {0: ONE, 17: (0x0F,)}), "Q4_0")[[15, 31]].tolist() == [7.0, -8.0]
    assert dequantize_gguf(block("Q8_0", {0: TWO, 2: (127, 128)}), "Q8_0")[:3].tolist() == [
        254.0,
        -256.0,
        0.0,
    ]


@pytest.mark.parametrize("which", range(8))
def test_q4_k_scales_take_six_bits_each(which):
    """Sub-block ``which`` has step 45 and minimum 22; its neighbors have none."""
    step, minimum = 0b101101, 0b010110
    packed = [0] * 12
    if which < 4:
        packed[which], packed[4 + which] = step, minimum
    else:
        packed[which - 4], packed[which] = step >> 4 << 6, minimum >> 4 << 6
        packed[4 + which] = step & 15 | (minimum & 15) << 4
    raw = block("Q4_K", {0: (*ONE, *TWO), 4: packed, 16: [0x11] * 128})  # every code is 1
    groups = dequantize_gguf(raw, "Q4_K").view(8, 32)
    assert (groups[which] == step - 2 * minimum).all()
    assert not groups[[i for i in range(8) if i != which]].any()


@pytest.mark.parametrize("place", [0, 31, 32, 64, 100, 127, 128, 255])
def test_q6_k_code_is_four_bits_here_and_two_there(place):
    """Weight ``place`` has code 63, the others 32, which stands for zero."""
    raw = block("Q6_K", {128: [0xAA] * 64, 192: [3] * 16, 208: ONE})
    half, inside = divmod(place, 128)
    raw[64 * half + inside % 64] |= 15 << 4 * (inside // 64)
    raw[128 + 32 * half + inside % 32] |= 3 << 2 * (inside // 32)
    weights = dequantize_gguf(raw, "Q6_K")
    assert weights[place] == 3 * 31
    assert weights.count_nonzero() == 1


@pytest.mark.parametrize("kind", KINDS)
def test_views_are_read_as_they_look(kind):
    raw = random_blocks(kind, (4, 3))
    expected = dequantize_gguf(raw, kind)
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), raw.flatten()])[1:].view_as(raw)  # odd address
    assert torch.equal(dequantize_gguf(shifted, kind), expected)
    assert torch.equal(dequantize_gguf(raw.T.contiguous().T, kind), expected)
    assert dequantize_gguf(raw[:0], kind).shape == (0, expected.shape[1])


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_is_named(kind):
    raw = random_blocks(kind)
    with pytest.raises(ValueError, match="'Q3_X'"):
        dequantize_gguf(raw, "Q3_X")
    with pytest.raises(TypeError, match="int32"):
        dequantize_gguf(raw.int(), kind)
    with pytest.raises(ValueError, match=str(GGUF_BLOCKS[kind][1])):
        dequantize_gguf(raw[:, :-1], kind)
    with pytest.raises(ValueError, match=r"\(\)"):
        dequantize_gguf(raw[0, 0], kind)
