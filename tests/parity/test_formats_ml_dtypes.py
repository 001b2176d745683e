"""Number formats against ml_dtypes (the types of JAX and TensorFlow): all bits, NaN's included."""

import ml_dtypes
import numpy as np
import pytest
import torch
from test_formats_torch import awkward

from qtune_companion.quantization.formats import (
    BF16,
    FP4_E2M1,
    FP8_E4M3,
    FP8_E5M2,
    FP16,
    INT4,
    TERNARY,
    FloatFormat,
)

PAIRS = [
    (FP16, np.float16),
    (BF16, ml_dtypes.bfloat16),
    (FP8_E4M3, ml_dtypes.float8_e4m3fn),
    (FP8_E5M2, ml_dtypes.float8_e5m2),
    (FP4_E2M1, ml_dtypes.float4_e2m1fn),
    # and splits that the companion gives no name to
    (FloatFormat("fp8_e4m3_ieee", 4, 3, 7), ml_dtypes.float8_e4m3),
    (FloatFormat("fp8_e3m4", 3, 4, 3), ml_dtypes.float8_e3m4),
    (FloatFormat("fp6_e2m3", 2, 3, 1, "none"), ml_dtypes.float6_e2m3fn),
    (FloatFormat("fp6_e3m2", 3, 2, 3, "none"), ml_dtypes.float6_e3m2fn),
]


def store(fmt):
    return np.uint8 if fmt.bits <= 8 else np.uint16


@pytest.mark.parametrize(("fmt", "dtype"), PAIRS, ids=lambda v: getattr(v, "name", ""))
def test_every_code_decodes_alike(fmt, dtype):
    codes = np.arange(2**fmt.bits)
    theirs = codes.astype(store(fmt)).view(dtype).astype(np.float32)
    ours = fmt.decode(torch.from_numpy(codes)).numpy()
    number = ~np.isnan(theirs)
    assert np.array_equal(np.isnan(ours), ~number)
    assert np.array_equal(ours[number].view(np.int32), theirs[number].view(np.int32))


@pytest.mark.parametrize(("fmt", "dtype"), PAIRS, ids=lambda v: getattr(v, "name", ""))
def test_every_encoding_is_the_same_bits(fmt, dtype, generator):
    x = awkward(fmt, generator)
    if fmt.specials != "none":
        x = torch.cat(
            [x, torch.tensor([0x7FC00000, -0x400000], dtype=torch.int32).view(torch.float32)]
        )  # ±NaN
    with np.errstate(over="ignore"):
        theirs = x.numpy().astype(dtype).view(store(fmt))
    assert np.array_equal(fmt.encode(x).numpy(), theirs)


@pytest.mark.parametrize(("fmt", "dtype"), [(INT4, ml_dtypes.int4), (TERNARY, ml_dtypes.int2)])
def test_small_integers_are_the_same_twos_complement(fmt, dtype):
    values = np.arange(fmt.low, fmt.high + 1)
    theirs = values.astype(dtype).view(np.uint8) & (2**fmt.bits - 1)
    assert np.array_equal(fmt.encode(torch.from_numpy(values)).numpy(), theirs)
    assert np.array_equal(fmt.decode(torch.from_numpy(theirs)).numpy(), values)
