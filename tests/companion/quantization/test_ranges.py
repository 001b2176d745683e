import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtune_companion.quantization.affine import choose_qparams, dequantize_affine, quantize_affine
from qtune_companion.quantization.ranges import choose_range

METHODS = ["minmax", "percentile", "mse"]
seeds = st.integers(0, 99)
bits = st.integers(2, 8)


def sample(seed, rows=3, n=400, heavy=True):
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(seed))
    return x**3 if heavy else x


def error(x, low, high, bits, symmetric):
    """Squared error of each row by ``affine.py``, clamped as a user would."""
    params = choose_qparams(x.clamp(low, high), bits, (1, -1), symmetric)
    return (dequantize_affine(quantize_affine(x, params), params) - x).square().mean(1)


@settings(deadline=None)
@given(seeds, bits, st.sampled_from(METHODS), st.booleans())
def test_lies_inside_min_max_and_holds_zero(seed, bits, method, symmetric):
    x = sample(seed)
    low, high = choose_range(x, bits, method, symmetric)
    assert low.shape == high.shape == (3, 1)
    assert (low <= 0).all()
    assert (high >= 0).all()
    assert (high <= x.abs().amax(1, keepdim=True)).all()
    assert (low >= -x.abs().amax(1, keepdim=True)).all()
    if symmetric:
        assert torch.equal(low, -high)


@settings(deadline=None, max_examples=25)
@given(seeds, bits, st.booleans())
def test_mse_is_the_best_of_its_candidates_as_affine_rounds(seed, bits, symmetric):
    x = sample(seed)
    widest = choose_range(x, bits, "minmax", symmetric)
    best = error(x, *choose_range(x, bits, "mse", symmetric), bits, symmetric)
    for step in range(100):
        low, high = (end * 0.01 ** (step / 100) for end in widest)
        assert (best <= error(x, low, high, bits, symmetric) * (1 + 1e-3)).all()


def test_mse_clips_a_heavy_tail_and_less_with_more_bits():
    x = sample(0, rows=1, n=100_000)
    found = [choose_range(x, b)[1].item() for b in (2, 4, 8)]
    assert found == sorted(found)
    assert found[0] < 0.2 * x.abs().max()


@settings(deadline=None)
@given(seeds, st.sampled_from([50.0, 90.0, 99.0, 100.0]), st.booleans())
def test_percentile_keeps_that_share(seed, percentile, symmetric):
    x = sample(seed)
    low, high = choose_range(x, 4, "percentile", symmetric, percentile=percentile)
    kept = ((x >= low) & (x <= high)).float().mean(1)
    assert (kept >= percentile / 100 - 1e-6).all()
    assert (kept <= percentile / 100 + 3 / x.shape[1]).all()


def test_kl_keeps_a_flat_histogram_whole_and_drops_a_lone_giant():
    flat = torch.linspace(-1, 1, 40_000)[None]
    assert choose_range(flat, 8, "kl")[1].item() > 0.95
    giant = torch.cat([sample(1, 1, 40_000, heavy=False), torch.tensor([[80.0]])], 1)
    low, high = choose_range(giant, 8, "kl")
    assert 2 < high.item() < 10
    assert low.item() == -high.item()


@pytest.mark.parametrize("method", [*METHODS, "kl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_zeros_and_dtypes(method, dtype):
    low, high = choose_range(torch.zeros(2, 8, dtype=dtype), 4, method)
    assert low.dtype == high.dtype == dtype
    assert not low.any()
    assert not high.any()


def test_rows_are_independent_and_scale_along():
    x = sample(5, rows=2)
    both = choose_range(x, 4)[1]
    assert torch.equal(both, torch.cat([choose_range(row[None], 4)[1] for row in x]))
    torch.testing.assert_close(choose_range(4 * x, 4)[1], 4 * both, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("x", "options", "words"),
    [
        (torch.ones(4), {}, "reshape"),
        (torch.ones(0, 4), {}, "empty"),
        (torch.tensor([[float("nan")]]), {}, "NaN"),
        (torch.ones(1, 4), {"bits": 1}, "got 1"),
        (torch.ones(1, 4), {"method": "max"}, "'max'"),
        (torch.ones(1, 4), {"method": "kl", "symmetric": False}, "'kl'"),
        (torch.ones(1, 4), {"percentile": 0.0}, "0.0"),
        (torch.ones(1, 4), {"steps": 0}, "and 0"),
    ],
)
def test_bad_input_is_named(x, options, words):
    with pytest.raises(ValueError, match=words):
        choose_range(x, **({"bits": 4} | options))


def test_integers_are_refused():
    with pytest.raises(TypeError, match="int64"):
        choose_range(torch.ones(1, 4, dtype=torch.int64), 4)


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float16, 1e-3), (torch.float16, 1e3), (torch.float32, 1e-25)]
)
def test_mse_does_not_depend_on_the_units(dtype, size):
    x = torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    high = choose_range((x * size).to(dtype), 4)[1].float() / size
    torch.testing.assert_close(high, choose_range(x, 4)[1], rtol=0.02, atol=0)


@pytest.mark.parametrize("n", [1000, 2000, 3000, 10_000])
def test_percentile_clips_a_whole_number_of_elements(n):
    x = torch.arange(1.0, n + 1)[None]
    assert choose_range(x, 4, "percentile")[1].item() == n - n // 1000
