"""Number formats against PyTorch's own dtypes: every code, and encodings of random and awkward values."""

import math

import pytest
import torch

from qtune_companion.quantization.formats import BF16, FP8_E4M3, FP8_E5M2, FP16, FP32, INT8, MXFP4, TF32

PAIRS = [
    (BF16, torch.bfloat16, torch.uint16),
    (FP16, torch.float16, torch.uint16),
    (FP8_E4M3, torch.float8_e4m3fn, torch.uint8),
    (FP8_E5M2, torch.float8_e5m2, torch.uint8),
]


def awkward(fmt, generator):
    """Float32: every value, every midpoint and its neighbors, randoms of all magnitudes, both signs."""
    table = fmt.decode(torch.arange(fmt.max_code + 1)).double()
    # the midpoint above the largest value is where overflow begins
    middles = torch.cat([(table[:-1] + table[1:]) / 2, (3 * table[-1:] - table[-2:-1]) / 2]).float()
    near = [torch.nextafter(middles, torch.full_like(middles, end)) for end in (0.0, math.inf)]
    bits = torch.randint(0, 0x7F800000, (20_000,), generator=generator, dtype=torch.int32)
    normal = torch.randn(20_000, generator=generator)
    odd = torch.tensor(
        [0.0, 2.0**-149, 2.0**-127, 2.0**-126, 3.4e38, torch.finfo(torch.float32).max, math.inf]
    )
    x = torch.cat([table.float(), middles, *near, bits.view(torch.float32), normal, odd])
    return torch.cat([x, -x])


@pytest.mark.parametrize(("fmt", "dtype", "store"), PAIRS, ids=lambda v: getattr(v, "name", ""))
def test_every_code_decodes_alike(fmt, dtype, store):
    codes = torch.arange(2**fmt.bits)
    theirs = codes.to(store).view(dtype).float()
    ours = fmt.decode(codes)
    assert torch.equal(ours.isnan(), theirs.isnan())
    bits = [v[~theirs.isnan()].view(torch.int32) for v in (ours, theirs)]
    assert torch.equal(*bits)  # signed zeros and infinities included


@pytest.mark.parametrize(("fmt", "dtype", "store"), PAIRS, ids=lambda v: getattr(v, "name", ""))
def test_every_encoding_is_the_same_bits(fmt, dtype, store, generator):
    x = awkward(fmt, generator)
    theirs = x.to(dtype).view(store).long()
    # since 2.12 PyTorch saturates when it casts to e4m3; before, and in the other formats, it overflows
    saturates = fmt is FP8_E4M3 and torch.tensor(1e6).to(dtype).item() == 448
    assert torch.equal(fmt.encode(x, saturate=saturates).long(), theirs)
    nan = torch.tensor([math.nan, -math.nan])
    assert nan.to(dtype).isnan().all()
    assert fmt.decode(fmt.encode(nan)).isnan().all()


def test_fp32_is_the_identity(generator):
    bits = torch.randint(-(2**31), 2**31, (50_000,), generator=generator).int()
    x = bits.view(torch.float32)
    x = torch.cat([x[~x.isnan()], torch.tensor([0.0, -0.0, math.inf, -math.inf, 2.0**-149])])
    assert torch.equal(FP32.encode(x), x.view(torch.int32).long() & 0xFFFFFFFF)
    assert torch.equal(FP32.decode(FP32.encode(x)).view(torch.int32), x.view(torch.int32))


def test_tf32_is_fp32_without_its_last_13_bits(generator):
    codes = torch.cat([torch.arange(2**12), torch.randint(0, 2**19, (50_000,), generator=generator)])
    theirs = (codes << 13).int().view(torch.float32)
    ours = TF32.decode(codes)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours[~ours.isnan()].view(torch.int32), theirs[~ours.isnan()].view(torch.int32))


def test_int8_is_twos_complement(generator):
    codes = torch.arange(256)
    assert torch.equal(INT8.decode(codes), codes.to(torch.uint8).view(torch.int8).float())
    x = torch.cat([torch.randn(10_000, generator=generator) * 60, torch.arange(-300, 300) / 2.0])
    theirs = x.round().clamp(-128, 127).to(torch.int8).view(torch.uint8)
    assert torch.equal(INT8.encode(x), theirs)


def test_e8m0_scales_decode_alike():
    import dataclasses

    codes = torch.arange(256).to(torch.uint8)
    ours = dataclasses.replace(MXFP4, scales=codes).block_scales()
    theirs = codes.view(torch.float8_e8m0fnu).float()
    assert torch.equal(ours[:255], theirs[:255])
    assert ours[255].isnan()
    assert theirs[255].isnan()
