import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtune_companion.quantization.hqq import hqq


def weight(seed, rows=6, columns=96, scale=0.1):
    return scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 8), st.sampled_from([1, 3, 8, 32, 96]), st.integers(0, 99), st.floats(0.01, 3))
def test_every_code_survives_packing_and_errors_stay_within_the_clipped_range(bits, size, seed, scale):
    w = weight(seed, scale=scale)
    q = hqq(w, bits, (1, size))
    assert q.codes.shape == w.shape
    assert q.codes.max().item() < 2**bits
    again = q.dequantize().view(-1, size)
    low, high = w.view(-1, size).amin(1, keepdim=True), w.view(-1, size).amax(1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    assert ((again - w.view(-1, size)).abs() <= 1.1 * step + 5e-3 * scale + 1e-4).all()
    assert q.nbytes == -(-bits * w.numel() // 8) + 4 * w.numel() // size


def test_no_iteration_is_min_max_with_a_real_zero_point():
    w = weight(0)
    blocks = w.view(-1, 32)
    low, step = (
        blocks.amin(1, keepdim=True),
        (blocks.amax(1, keepdim=True) - blocks.amin(1, keepdim=True)) / 15,
    )
    q = hqq(w, 4, (1, 32), iters=0)
    assert torch.equal(q.codes.view(-1, 32), torch.round((blocks - low) / step).byte())
    assert q.bits_per_weight == 4 + 32 / 32
    torch.testing.assert_close(q.dequantize().view(-1, 32)[blocks == low], low.flatten(), rtol=2e-3, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_solver_lowers_both_errors(bits):
    w = weight(1, 64, 256)
    before, after = (hqq(w, bits, (1, 64), iters=n).dequantize() - w for n in (0, 20))
    assert after.abs().mean() < before.abs().mean()
    assert after.square().mean() < 0.995 * before.square().mean()


def test_one_step_is_least_squares_when_nothing_is_an_outlier():
    w = weight(2, 4, 64)
    start, step = hqq(w, 3, (1, 64), iters=0), hqq(w, 3, (1, 64), iters=1)
    scale = (w.amax(1, keepdim=True) - w.amin(1, keepdim=True)) / 7
    best = (start.codes - w / scale).mean(1, keepdim=True)
    torch.testing.assert_close(step.zero.float(), best, rtol=2e-3, atol=0)


def test_large_errors_are_treated_as_outliers():
    """With all errors below 0.1 ** (1 / 1.3) = 0.17 the norm does not matter; above, it does."""
    w = weight(3, 16, 64, scale=0.05)
    w[:, 0] = 1.0
    small, large = [
        [hqq(scale * w, 2, (1, 64), iters=1, p=p).zero for p in (0.5, 0.9)] for scale in (0.1, 20.0)
    ]
    assert torch.equal(*small)
    assert not torch.equal(*large)


def test_the_solver_stops_when_the_error_no_longer_falls():
    """Left running, these six would still be moving after 20 steps."""
    weights = [weight(seed, 6, 192, scale=1.0) for seed in (2, 12, 14, 26, 29, 38)]
    pairs = [[hqq(w, 3, (1, 32), iters=n).zero for n in (20, 21)] for w in weights]
    assert sum(torch.equal(*zeros) for zeros in pairs) >= 4  # sums in another order may move the end of one


@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
def test_constant_blocks_come_back(value):
    torch.testing.assert_close(
        hqq(torch.full((2, 64), value), 4, (1, 64)).dequantize(), torch.full((2, 64), value)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept_and_any_layout_taken(dtype):
    w = weight(4).to(dtype)
    q = hqq(w, 4, (1, 32))
    assert q.dequantize().dtype == dtype
    assert q.dequantize(torch.float32).dtype == torch.float32
    assert torch.equal(hqq(w.T.contiguous().T, 4, (1, 32)).packed, q.packed)
    assert torch.equal(hqq(w, 4, (1, -1)).packed, hqq(w, 4, (1, 96)).packed)


def test_bad_input_is_named():
    w = weight(5)
    for bits in (0, 9):
        with pytest.raises(ValueError, match=f"got {bits}"):
            hqq(w, bits, (1, 32))
    for block in ((1, 36), (2, 32), (1, 0), (1, -2), (1, 32, 1), (32,)):
        with pytest.raises(ValueError, match="divisor of 96"):
            hqq(w, 4, block)
    for bad in (w[0], w[:0], w / 0, w * float("nan")):
        with pytest.raises(ValueError, match="finite and not empty"):
            hqq(bad, 4, (1, 32))
    with pytest.raises(TypeError, match="int32"):
        hqq(w.int(), 4, (1, 32))
    with pytest.raises(ValueError, match="float16"):
        hqq(w * 1e8, 4, (1, 32))
    with pytest.raises(ValueError, match="float16"):
        hqq(w * 0.001 + 10, 4, (1, 32))


def test_a_block_of_hardly_any_range_becomes_its_mean():
    w = torch.linspace(0.2, 0.20005, 64).view(1, 64)
    q = hqq(w, 4, (1, 64))
    assert q.scale.item() == 1
    torch.testing.assert_close(q.dequantize(), w.mean().expand(1, 64), rtol=1e-3, atol=0)


def test_a_scale_is_at_least_one_in_twenty_thousand():
    """As in the library: smaller ones would be coarse in float16."""
    q = hqq(torch.linspace(0.2, 0.205, 64).view(1, 64), 8, (1, 64))  # a 255th of the range would be 2e-5
    assert q.scale.item() == pytest.approx(5e-5, rel=1e-2)
