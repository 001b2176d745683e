import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtune_companion.finetuning.quantized_linear import QuantizedLinear
from qtune_companion.quantization import formats
from qtune_companion.quantization.formats import (
    BF16,
    FP4_E2M1,
    FP8_E4M3,
    FP8_E5M2,
    FP16,
    FP32,
    INT4,
    INT8,
    MXFP4,
    MXFP8,
    MXFP8_E5M2,
    NVFP4,
    TERNARY,
    TF32,
    BlockFormat,
    FloatFormat,
    IntFormat,
)

FLOATS = [FP32, TF32, BF16, FP16, FP8_E4M3, FP8_E5M2, FP4_E2M1]
BLOCKS = [MXFP4, MXFP8, MXFP8_E5M2, NVFP4]
any_split = st.builds(
    lambda e, m, shift, specials: FloatFormat("any", e, m, 2 ** (e - 1) - 1 + shift, specials),
    st.integers(1, 5), st.integers(1, 4), st.integers(0, 3), st.sampled_from(["ieee", "nan", "none"]),
)  # fmt: skip
finite = st.floats(allow_nan=False, allow_infinity=False, width=64)


def weight(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def numbers(fmt):
    """All finite values, ascending, one zero."""
    values = fmt.decode(torch.arange(2**fmt.bits))
    return values[values.isfinite()].double().unique()


@pytest.mark.parametrize(
    ("fmt", "bits", "largest", "smallest"),
    [
        (FP32, 32, torch.finfo(torch.float32).max, 2.0**-149),
        (TF32, 19, (2 - 2.0**-10) * 2.0**127, 2.0**-136),
        (BF16, 16, torch.finfo(torch.bfloat16).max, 2.0**-133),
        (FP16, 16, 65504.0, 2.0**-24),
        (FP8_E4M3, 8, 448.0, 2.0**-9),
        (FP8_E5M2, 8, 57344.0, 2.0**-16),
        (FP4_E2M1, 4, 6.0, 0.5),
    ],
    ids=lambda v: getattr(v, "name", ""),
)
def test_published_extremes(fmt, bits, largest, smallest):
    assert (fmt.bits, fmt.max, fmt.decode(torch.tensor(1)).item()) == (bits, largest, smallest)
    assert fmt.decode(torch.tensor(fmt.max_code)).item() == largest


def test_the_eight_magnitudes_of_fp4():
    assert FP4_E2M1.decode(torch.arange(8)).tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert torch.equal(FP4_E2M1.decode(torch.arange(8, 16)), -FP4_E2M1.decode(torch.arange(8)))


@settings(deadline=None)
@given(any_split, st.lists(finite, min_size=1, max_size=20))
def test_nearest_and_ties_to_even_by_exhaustion(fmt, xs):
    x = torch.tensor(xs, dtype=torch.float64).clamp(-fmt.max, fmt.max)
    codes = torch.arange(fmt.max_code + 1)
    table = fmt.decode(codes).double()
    distance = (x.abs()[:, None] - table).abs()
    code = fmt.encode(x).long() & (2 ** (fmt.bits - 1) - 1)
    best = distance == distance.amin(1, keepdim=True)
    assert best.gather(1, code[:, None]).all()
    assert (code[best.sum(1) == 2] % 2 == 0).all()


@settings(deadline=None)
@given(any_split, st.data())
def test_every_tie_goes_to_the_even_code(fmt, data):
    low = data.draw(st.integers(0, fmt.max_code - 1)) if fmt.max_code else 0
    pair = fmt.decode(torch.tensor([low, low + 1 if fmt.max_code else 0])).double()
    assert fmt.encode(pair.mean()).item() in (low + low % 2, 0)
    assert fmt.encode(pair.mean()).item() == low + low % 2


@settings(deadline=None)
@given(any_split)
def test_encode_undoes_decode_on_every_code(fmt):
    codes = torch.arange(2**fmt.bits)
    values = fmt.decode(codes)
    assert torch.equal(fmt.encode(values)[~values.isnan()].long(), codes[~values.isnan()])
    assert fmt.decode(fmt.encode(values)).isnan().equal(values.isnan())
    assert values.isnan().sum() == {"ieee": 2 * (2**fmt.mantissa_bits - 1), "nan": 2, "none": 0}[fmt.specials]
    assert values.isinf().sum() == (2 if fmt.specials == "ieee" else 0)


@settings(deadline=None)
@given(any_split, st.lists(st.floats(width=64, allow_nan=False), min_size=2, max_size=20))
def test_rounding_is_monotone_and_odd(fmt, xs):
    x = torch.tensor(xs, dtype=torch.float64).sort().values
    got = fmt.decode(fmt.encode(x, saturate=True))
    assert (got.diff() >= 0).all()
    assert torch.equal(fmt.decode(fmt.encode(-x, saturate=True)), -got)


@pytest.mark.parametrize("fmt", FLOATS, ids=lambda f: f.name)
def test_specials(fmt):
    x = torch.tensor([math.inf, -math.inf, -0.0])
    top, minus, zero = fmt.decode(fmt.encode(x)).tolist()
    assert math.copysign(1, zero) == -1
    assert zero == 0
    if fmt.specials == "ieee":
        assert (top, minus) == (math.inf, -math.inf)
    elif fmt.specials == "nan":
        assert math.isnan(top)
        assert math.isnan(minus)
    else:
        assert (top, minus) == (fmt.max, -fmt.max)
    assert fmt.decode(fmt.encode(x[:2], saturate=True)).tolist() == [fmt.max, -fmt.max]
    if fmt.specials == "none":
        with pytest.raises(ValueError, match="NaN"):
            fmt.encode(torch.tensor([1.0, math.nan]))
    else:
        assert fmt.decode(fmt.encode(torch.tensor([math.nan]), saturate=True)).isnan().all()


@pytest.mark.parametrize("fmt", FLOATS, ids=lambda f: f.name)
def test_overflow_begins_half_a_step_above_the_largest_value(fmt):
    step = fmt.max - fmt.decode(torch.tensor(fmt.max_code - 1)).item()
    x = torch.tensor([fmt.max + step / 2], dtype=torch.float64)
    below = torch.nextafter(x, torch.zeros_like(x))
    assert fmt.decode(fmt.encode(below)).item() == fmt.max
    above = fmt.decode(fmt.encode(torch.nextafter(x, x * 2))).item()
    assert above == fmt.max if fmt.specials == "none" else not math.isfinite(above)
    assert fmt.decode(fmt.encode(x * 2, saturate=True)).item() == fmt.max


@pytest.mark.parametrize("fmt", FLOATS, ids=lambda f: f.name)
def test_stochastic_rounding_takes_a_neighbor_and_is_unbiased(fmt):
    low = fmt.encode(torch.tensor(1.0)).item()
    a, b = fmt.decode(torch.tensor([low, low + 1])).double().tolist()
    n, p = 20_000, 0.3
    x = torch.full((n,), a + p * (b - a), dtype=torch.float64)
    got = fmt.decode(fmt.encode(x, generator=torch.Generator().manual_seed(1))).double()
    assert set(got.tolist()) == {a, b}
    spread = (p * (1 - p) / n) ** 0.5
    assert abs(((got - a) / (b - a)).mean().item() - p) < 5 * spread
    again = fmt.decode(fmt.encode(x, generator=torch.Generator().manual_seed(1))).double()
    assert torch.equal(got, again)


def test_stochastic_rounding_leaves_values_of_the_format_alone():
    codes = torch.arange(0x7F)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(FP8_E4M3.encode(FP8_E4M3.decode(codes), generator=generator).long(), codes)


@pytest.mark.parametrize("fmt", [INT8, INT4, TERNARY], ids=lambda f: f.name)
def test_integers(fmt):
    values = torch.arange(fmt.low, fmt.high + 1).float()
    codes = fmt.encode(values)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < 2**fmt.bits
    assert torch.equal(fmt.decode(codes), values)
    beyond = torch.tensor([-1e9, 1e9, -math.inf, math.inf])
    assert fmt.decode(fmt.encode(beyond)).tolist() == [fmt.low, fmt.high] * 2
    assert fmt.decode(fmt.encode(torch.tensor([0.5, -0.5]))).tolist() == [0, 0]
    with pytest.raises(ValueError, match="NaN"):
        fmt.encode(torch.tensor([math.nan]))


@settings(deadline=None)
@given(
    st.sampled_from(BLOCKS), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99), st.integers(-30, 30)
)
def test_block_error_is_bounded_by_the_elements_spacing(grid, rows, blocks, seed, exponent):
    w = weight(rows, blocks * grid.block_size, seed=seed) * 2.0**exponent
    q = grid.encode(w)
    scale = q.grid.block_scales() * (1 if q.grid.tensor_scale is None else q.grid.tensor_scale)
    scaled = w.unflatten(-1, (-1, grid.block_size)) / scale[..., None]
    got = q.dequantize().unflatten(-1, (-1, grid.block_size)) / scale[..., None]
    inside = scaled.abs() <= grid.element.max
    table = numbers(grid.element)
    best = (scaled.double()[..., None] - table).abs().amin(-1)
    off = (scaled - got).abs().double()
    assert torch.allclose(off[inside], best[inside], rtol=1e-4, atol=1e-5)
    assert torch.allclose(got[~inside].abs(), torch.tensor(grid.element.max), rtol=1e-5)


@pytest.mark.parametrize("grid", BLOCKS, ids=lambda g: g.name)
def test_stored_bits_by_counting_bytes(grid):
    w = weight(64, 256)
    q = grid.encode(w)
    assert q.bits_per_weight == 8 * q.nbytes / w.numel()
    expected = grid.element.bits + 8 / grid.block_size + (32 / w.numel() if grid is NVFP4 else 0)
    assert q.bits_per_weight == pytest.approx(expected, abs=1e-12)
    assert q.packed.dtype == torch.uint8
    assert q.packed.shape == (64, 256 * grid.element.bits // 8)


@pytest.mark.parametrize("grid", [MXFP4, MXFP8, MXFP8_E5M2], ids=lambda g: g.name)
def test_mx_rounding_is_idempotent(grid):
    once = grid.round(weight(8, 64))
    assert torch.equal(grid.round(once), once)


@pytest.mark.parametrize("grid", BLOCKS, ids=lambda g: g.name)
def test_zeros_tiny_huge_and_other_dtypes(grid):
    zeros = torch.zeros(2, 64)
    assert torch.equal(grid.round(zeros), zeros)
    for size in (2.0**-149, 2.0**-126, 3e38):
        got = grid.round(torch.full((2, 64), size))
        assert got.isfinite().all()
        assert (got >= 0).all()
    assert grid.round(torch.full((2, 64), 3e38)).amin() > 1.5e38
    w = weight(4, 128)[:, ::2]  # not contiguous
    assert torch.equal(grid.round(w), grid.round(w.contiguous()))
    half = w.to(torch.bfloat16)
    assert grid.round(half).dtype == torch.bfloat16
    assert torch.equal(grid.encode(half).dequantize(torch.float32), grid.round(half.float()))
    assert grid.round(w[0]).shape == (64,)


def test_mx_keeps_a_block_whose_scale_is_the_least():
    w = torch.full((32,), 2.0**-126)
    q = MXFP4.encode(w)
    assert q.grid.scales.item() == 0
    assert torch.equal(q.dequantize(), w)


def test_a_scale_of_nan_makes_its_block_nan():
    q = MXFP4.encode(weight(2, 64))
    codes = q.grid.scales.clone()
    codes[0, 1] = 255
    broken = dataclasses.replace(q, grid=dataclasses.replace(q.grid, scales=codes)).dequantize()
    assert broken[0, 32:].isnan().all()
    assert broken[0, :32].isfinite().all()
    assert broken[1].isfinite().all()


@pytest.mark.parametrize("grid", BLOCKS, ids=lambda g: g.name)
def test_a_fitted_grid_keeps_its_scales(grid):
    w = weight(4, 64)
    fitted = grid.fit(w)
    assert torch.equal(fitted.round(w), grid.round(w))
    assert torch.equal(fitted.encode(w / 8).grid.scales, fitted.scales)
    top = (
        grid.element.max
        * fitted.block_scales().amax()
        * (1 if fitted.tensor_scale is None else fitted.tensor_scale)
    )
    assert fitted.round(torch.full((4, 64), 1e6)).amax() == pytest.approx(top.item())


def test_nvfp4_beats_mxfp4_and_mxfp8_beats_both():
    w = weight(64, 512)
    error = {g.name: (g.round(w) - w).norm() / w.norm() for g in BLOCKS}
    assert error["mxfp8"] < error["nvfp4"] < error["mxfp4"]


def test_a_quantized_layer_holds_a_block_tensor():
    w, x = weight(8, 64), weight(3, 64, seed=1)
    for grid in BLOCKS:
        layer = QuantizedLinear(grid.encode(w), compute_dtype=torch.float32)
        assert torch.allclose(layer(x), x @ grid.round(w).T, atol=1e-5)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="specials='both'"):
        FloatFormat("x", 4, 3, 7, "both")
    for wrong in [(9, 3, 255), (0, 3, 0), (4, 24, 7), (4, 0, 7), (8, 23, 128), (8, 3, 126)]:
        with pytest.raises(ValueError, match="float32 must hold every value"):
            FloatFormat("x", *wrong)
    with pytest.raises(ValueError, match="float32"):
        FloatFormat("x", 8, 3, 127, "nan")
    for fmt in (FP4_E2M1, INT4):
        with pytest.raises(ValueError, match="0 to 15, got -1 to 16"):
            fmt.decode(torch.tensor([-1, 16]))
        with pytest.raises(TypeError, match="float32"):
            fmt.decode(torch.tensor([1.0]))
    with pytest.raises(ValueError, match="fit"):
        MXFP4.block_scales()
    for grid in BLOCKS:
        with pytest.raises(TypeError, match="int64"):
            grid.encode(torch.ones(2, 32, dtype=torch.long))
        for shape in [(4, 33), (0, 32), ()]:
            with pytest.raises(ValueError, match=r"blocks of \d+, got"):
                grid.encode(torch.ones(shape))
        for bad in (math.nan, math.inf):
            with pytest.raises(ValueError, match="NaN or infinity"):
                grid.fit(grid.round(weight(2, 32))).encode(torch.full((2, 32), bad))


def test_the_public_names_are_there():
    assert all(
        isinstance(getattr(formats, n), (FloatFormat, IntFormat, BlockFormat, type)) for n in formats.__all__
    )
