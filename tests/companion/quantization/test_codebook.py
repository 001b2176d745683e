import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtune_companion.quantization.codebook import (
    FP4,
    NF4,
    CodebookGrid,
    DoubleQuantized,
    lloyd_max,
    quantize_nf4,
)


def weight(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None)
@given(st.integers(1, 400), st.sampled_from([1, 16, 64]), st.integers(0, 99), st.sampled_from([NF4, FP4]))
def test_every_value_goes_to_the_nearest_entry(count, block, seed, table):
    w = weight((count,), seed)
    got = CodebookGrid(table, block).round(w)
    scale = torch.cat([b.abs().amax().expand(len(b)) for b in w.split(block)])
    best = (w[:, None] - table * scale[:, None]).abs().amin(1)
    assert torch.allclose((w - got).abs(), best, atol=1e-6)


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(0, 99))
def test_rounding_is_idempotent(count, seed):
    once = CodebookGrid(NF4, 64).round(weight((count,), seed))
    assert torch.allclose(CodebookGrid(NF4, 64).round(once), once, atol=1e-6)


def test_a_fitted_grid_keeps_its_scales():
    w = weight((4, 64))
    grid = CodebookGrid(NF4, 64).fit(w)
    half = w / 2
    by_hand = NF4[(half[..., None] / grid.absmax.view(4, 1, 1) - NF4).abs().argmin(-1)] * grid.absmax.view(
        4, 1
    )
    torch.testing.assert_close(grid.round(half), by_hand)
    assert not torch.equal(grid.round(half), CodebookGrid(NF4, 64).round(half))  # this one fits its own
    assert grid.round(torch.full((4, 64), 99.0)).amax() == grid.absmax.amax()


def test_halfway_goes_to_the_lower_entry():
    middles = (NF4[:-1] + NF4[1:]) / 2
    block = torch.cat([middles, torch.ones(1)])  # the scale is 1
    fresh = CodebookGrid(NF4, 16)
    for grid in (fresh, fresh.fit(block)):
        assert torch.equal(grid.round(block), torch.cat([NF4[:-1], torch.ones(1)]))
    above = torch.nextafter(block, torch.ones(16))
    assert torch.equal(fresh.round(above), torch.cat([NF4[1:], torch.ones(1)]))


def test_stored_bits_by_counting_bytes():
    w = weight((256, 256))
    plain, double = quantize_nf4(w), quantize_nf4(w, double_quant=True)
    assert plain.packed.nbytes == 256 * 256 // 2
    assert plain.bits_per_weight == 4.5
    # 4 bits a code, 8 a block of 64, 32 for 256 blocks, and the offset
    assert double.bits_per_weight == pytest.approx(4 + 8 / 64 + 32 / (64 * 256) + 32 / w.numel(), abs=1e-12)
    assert double.bits_per_weight <= 4.13


def test_double_quantization_error_is_small():
    scales = weight((1000,)).abs() + 1
    restored = DoubleQuantized.encode(scales).dequantize()
    assert ((restored - scales).abs() / (scales - scales.mean()).abs().amax()).amax() < 0.02


def test_zero_blocks_and_short_tails():
    w = torch.zeros(130)
    w[129] = 5.0
    q = quantize_nf4(w)
    assert torch.equal(q.dequantize(), w)
    assert q.packed[0].item() == 0x77
    assert quantize_nf4(torch.tensor([-3.0])).dequantize().item() == -3.0


def test_lloyd_max_beats_nf4_on_its_own_samples():
    x = weight((20000,)).clamp(-3, 3) / 3
    nearest = lambda table: (x[:, None] - table).abs().amin(1).square().mean()  # noqa: E731
    assert nearest(lloyd_max(x, 4)) < nearest(NF4)
    assert lloyd_max(x, 2).shape == (4,)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused(bad):
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize_nf4(torch.tensor([1.0, bad]))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="got 0"):
        quantize_nf4(torch.ones(4), block_size=0)
    with pytest.raises(ValueError, match="empty"):
        quantize_nf4(torch.ones(0))
    with pytest.raises(TypeError, match="int64"):
        quantize_nf4(torch.ones(4, dtype=torch.long))
    with pytest.raises(ValueError, match="16 values, got 8"):
        CodebookGrid(NF4[:8]).encode(torch.ones(4))
    with pytest.raises(ValueError, match="2 distinct samples cannot fill 16"):
        lloyd_max(torch.tensor([1.0, 2.0]), 4)


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_fitted_grid_can_be_fitted_again(double_quant):
    w = weight((4, 64))
    again = CodebookGrid(NF4, 64, double_quant).fit(w).fit(3 * w)
    assert torch.equal(again.absmax, CodebookGrid(NF4, 64).fit(3 * w).absmax)
    assert again.double_quant is double_quant


def test_lloyd_max_counts_millions_of_samples_right():
    samples = torch.linspace(0, 1, 8_000_000)
    torch.testing.assert_close(
        lloyd_max(samples, 1, iterations=3), torch.tensor([0.25, 0.75]), rtol=0, atol=1e-4
    )


def test_a_codebook_beyond_one_and_weights_beyond_float32_are_refused():
    with pytest.raises(ValueError, match=r"lies in \[-1, 1\], got -2 to 2"):
        CodebookGrid(torch.linspace(-2, 2, 16)).encode(weight((4, 64)))
    with pytest.raises(ValueError, match="as float32"):
        quantize_nf4(torch.tensor([1e300, 1.0], dtype=torch.float64))


def test_a_copy_of_the_table_is_nf4_too():
    assert type(CodebookGrid(NF4.clone(), 64).encode(weight((3, 5)))).__name__ == "NF4Tensor"
