import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtune_companion.quantization.affine import AffineGrid
from qtune_companion.quantization.awq import awq_clip, awq_scales
from qtune_companion.quantization.codebook import NF4, CodebookGrid

GRID = AffineGrid(4, (1, 32))


def data(seed, tall=20.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 64, generator=generator)
    x[:, 5] *= tall
    return torch.randn(24, 64, generator=generator), x


def loss(weight, x, scales):
    return (x @ (GRID.round(weight * scales) / scales - weight).T).square().sum().item()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 999), st.floats(0.1, 100), st.integers(1, 12))
def test_scales_are_the_best_of_the_family_and_centered(seed, tall, n_grid):
    w, x = data(seed, tall)
    s = awq_scales(w, x, GRID, n_grid)
    assert (s.max() * s.min()).item() == pytest.approx(1, rel=1e-4)
    tried = [x.abs().mean(0) ** (i / n_grid) for i in range(n_grid)]
    losses = [loss(w, x, t / (t.max() * t.min()).sqrt()) for t in tried]
    assert loss(w, x, s) == pytest.approx(min(losses), rel=1e-5)


def test_a_tall_channel_is_scaled_up_and_the_outputs_gain():
    w, x = data(0)
    s = awq_scales(w, x, GRID)
    assert s.argmax() == 5
    assert loss(w, x, s) < 0.5 * loss(w, x, torch.ones(64))


def test_layers_that_share_an_input_share_the_scales():
    w, x = data(1)
    together = awq_scales([w[:8], w[8:]], x, GRID)
    assert torch.equal(together, awq_scales(w, x, GRID))
    alone = [awq_scales(part, x, GRID) for part in (w[:8] * 1000, w[8:])]
    assert torch.equal(awq_scales([w[:8] * 1000, w[8:]], x, GRID), alone[0])  # the louder one decides


def test_any_grid_will_do_and_one_exponent_is_plain_rounding():
    w, x = data(2)
    assert torch.equal(awq_scales(w, x, GRID, n_grid=1), torch.ones(64))
    assert awq_scales(w, x, CodebookGrid(NF4, 32)).argmax() == 5


def test_a_dead_channel_gets_the_least_scale_of_the_living():
    w, x = data(3)
    x[:, 7] = 0
    s = awq_scales(w, x, GRID)
    living = torch.arange(64) != 7
    assert s[7] == s[living].min()
    assert s.max() / s.min() < 100  # a weight of a dead channel is not ground to dust
    x[:, 7] = x[:, living].abs().mean(0).min()  # as if it had whispered
    torch.testing.assert_close(awq_scales(w, x, GRID)[7], s[7], rtol=0.2, atol=0)


def test_where_all_channels_are_dead_nothing_is_scaled_or_clipped():
    w, x = data(3)
    assert torch.equal(awq_scales(w, torch.zeros(3, 64), GRID), torch.ones(64))
    assert torch.equal(awq_clip(w, torch.zeros(3, 64), GRID, 32), w)
    w[:, 40] *= 3  # worth clipping
    x[:, 32:] = 0  # but nobody listens
    assert torch.equal(awq_clip(w, x, GRID, 32)[:, 32:], w[:, 32:])


def by_hand(w, x, n_grid, max_shrink):
    """Every block and every range in turn."""
    clipped = w.clone()
    for row in range(len(w)):
        for start in range(0, w.shape[1], 32):
            block, inputs = w[row, start : start + 32], x[:, start : start + 32]
            least = float("inf")
            for i in range(int(max_shrink * n_grid)):
                part = block.clamp(
                    block.min().clamp(max=0) * (1 - i / n_grid), block.max().clamp(min=0) * (1 - i / n_grid)
                )
                wrong = (inputs @ (GRID.round(part[None])[0] - block)).square().sum().item()
                if wrong < least * (1 - 1e-6):
                    least, clipped[row, start : start + 32] = wrong, part
    return clipped


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 999), st.sampled_from([(10, 0.5), (4, 1.0), (1, 1.0)]))
def test_clipping_is_the_exhaustive_search(seed, search):
    w, x = data(seed)
    n_grid, max_shrink = search
    ours, slow = awq_clip(w, x, GRID, 32, n_grid, max_shrink), by_hand(w, x, n_grid, max_shrink)
    assert (ours == slow).float().mean() > 0.99  # ties within rounding
    if int(n_grid * max_shrink) == 1:
        assert torch.equal(ours, w)


def test_clipping_helps_its_own_measure_and_stays_inside_the_range():
    w, x = data(4)
    w[3, 40] = 9.0  # a giant whose input is ordinary
    clipped = awq_clip(w, x, GRID, 32)
    assert clipped[3, 40] < 9
    assert ((clipped - w).abs() <= 0.5 * w.abs()).all()
    assert torch.equal(clipped.sign(), w.sign())

    def share(rounded):
        return (
            ((x.unflatten(1, (2, 32)) * 1.0)[:, None] * (rounded - w).unflatten(1, (2, 32)))
            .sum(-1)
            .square()
            .mean()
        )

    assert share(GRID.round(clipped)) < share(GRID.round(w))


def test_inputs_and_weights_of_other_dtypes():
    w, x = data(5)
    assert awq_scales(w.bfloat16(), x, GRID).dtype == torch.float32
    assert awq_clip(w.bfloat16(), x, GRID, 32).dtype == torch.bfloat16
    x[:, 5] *= 50  # its squares are too large for float16
    w, x = w.half(), x.half()
    assert torch.equal(awq_scales(w, x, GRID), awq_scales(w.float(), x.float(), GRID))
    assert awq_scales(w, x, GRID).argmax() == 5
    assert torch.equal(awq_clip(w, x, GRID, 32), awq_clip(w.float(), x.float(), GRID, 32).half())
    assert awq_scales(w.double(), x, GRID).dtype == torch.float64
    strided = torch.randn(64, 24).T
    assert awq_clip(strided, x, GRID, 32).shape == strided.shape


def test_bad_input_is_named():
    w, x = data(6)
    for weight, inputs in ((w, x[:, :32]), ([], x), ([w, w[:, :32]], x), (w[0], x), (w, x[0])):
        with pytest.raises(ValueError, match="do not fit inputs"):
            awq_scales(weight, inputs, GRID)
    with pytest.raises(ValueError, match="do not fit inputs"):
        awq_clip(w, x[:, :32], GRID, 32)
    for weight, inputs in ((w, x[:0]), (w * float("nan"), x), (w, x / 0), (w, x * float("nan"))):
        with pytest.raises(ValueError, match="at least one token, and no NaN"):
            awq_scales(weight, inputs, GRID)
        with pytest.raises(ValueError, match="at least one token, and no NaN"):
            awq_clip(weight, inputs, GRID, 32)
    with pytest.raises(ValueError, match="got 0"):
        awq_scales(w, x, GRID, n_grid=0)
    for size in (0, 48, -1):
        with pytest.raises(ValueError, match=f"got {size}"):
            awq_clip(w, x, GRID, size)
    for shrink in (0.01, 1.5, -1.0):
        with pytest.raises(ValueError, match=f"got {shrink}"):
            awq_clip(w, x, GRID, 32, max_shrink=shrink)


def test_the_grids_own_tensor_is_not_written_to():
    kept = torch.ones(4, 8)

    class Cached:
        def round(self, w):
            return kept

    awq_scales(torch.randn(4, 8), torch.randn(16, 8), Cached(), n_grid=3)
    assert torch.equal(kept, torch.ones(4, 8))
