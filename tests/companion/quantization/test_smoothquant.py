import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qtune_companion.quantization.smoothquant import fold_scales_, smooth_scales


def data(seed, rows=5, channels=8):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, channels, generator=generator)
    x[:, 3] *= 40  # an outlier channel
    return x, torch.randn(6, channels, generator=generator)


@settings(deadline=None)
@given(st.floats(0, 1), st.integers(0, 99))
def test_scales_split_the_range_as_alpha_says(alpha, seed):
    x, w = data(seed)
    s = smooth_scales(w, x.abs().amax(0), alpha)
    product = x.abs().amax(0) * w.abs().amax(0)
    assert torch.allclose((x / s).abs().amax(0), product ** (1 - alpha), rtol=1e-4)
    assert torch.allclose((w * s).abs().amax(0), product**alpha, rtol=1e-4)
    assert torch.allclose((x / s) @ (w * s).T, x @ w.T, rtol=1e-3, atol=1e-4)


def test_layers_that_share_an_input_share_the_largest_column():
    x, w = data(0)
    both = smooth_scales([w, 3 * w], x.abs().amax(0))
    assert torch.equal(both, smooth_scales(3 * w, x.abs().amax(0)))
    assert not torch.equal(both, smooth_scales(w, x.abs().amax(0)))


def test_a_channel_that_was_always_zero_stays_finite():
    s = smooth_scales(torch.zeros(2, 2), torch.tensor([0.0, 1.0]))
    assert torch.isfinite(s).all()
    assert (s > 0).all()
    assert smooth_scales(torch.full((1, 1), 1e30), torch.zeros(1), 0.9).item() == pytest.approx(1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_folding_behind_a_norm_and_behind_a_gated_layer_changes_nothing(bias):
    torch.manual_seed(0)
    norm, q, k = nn.LayerNorm(8, bias=bias), nn.Linear(8, 6), nn.Linear(8, 4)
    nn.init.normal_(norm.weight)
    up, gate, down = nn.Linear(8, 12, bias=bias), nn.Linear(8, 12), nn.Linear(12, 8)
    x = torch.randn(5, 8)
    run = lambda: torch.cat([q(norm(x)), k(norm(x)), down(gate(x).relu() * up(x))], 1)  # noqa: E731
    before, columns = run(), down.weight.clone()
    fold_scales_(norm, [q, k], torch.rand(8) + 0.5)
    scales = torch.rand(12) + 0.5
    fold_scales_(up, down, scales)
    assert torch.allclose(run(), before, atol=1e-5)
    assert torch.allclose(down.weight, columns * scales)


def test_bad_input_is_named():
    w, absmax = torch.ones(3, 4), torch.ones(4)
    for weight, a in (
        (w, torch.ones(3)),
        ([], absmax),
        ([w, torch.ones(3, 5)], absmax),
        (torch.ones(4), absmax),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            smooth_scales(weight, a)
    with pytest.raises(ValueError, match="got 1.5"):
        smooth_scales(w, absmax, 1.5)
    for bad in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ValueError, match="NaN, infinity or negative"):
            smooth_scales(w, torch.tensor([1.0, bad, 1.0, 1.0]))
    with pytest.raises(ValueError, match="NaN, infinity or negative"):
        smooth_scales(w * float("nan"), absmax)
    norm, layer = nn.LayerNorm(4), nn.Linear(4, 2)
    kept = layer.weight.clone()
    for after, scales in ((layer, torch.ones(3)), (nn.Linear(5, 2), absmax), ([], absmax)):
        with pytest.raises(ValueError, match="do not fit 4 channels"):
            fold_scales_(norm, after, scales)
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="positive and finite"):
            fold_scales_(norm, layer, torch.tensor([1.0, bad, 1.0, 1.0]))
    assert torch.equal(layer.weight, kept)


class OneMore(torch.nn.Module):
    """As Gemma's norms: multiplies by 1 + weight."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((4,), 0.5))

    def forward(self, x):
        return x * (1 + self.weight)


def test_a_norm_that_does_not_multiply_by_its_weight_is_refused_whole():
    norm, layer = OneMore(), torch.nn.Linear(4, 2)
    before = layer.weight.clone()
    with pytest.raises(ValueError, match="OneMore does not multiply by its weight"):
        fold_scales_(norm, layer, torch.full((4,), 2.0))
    assert torch.equal(layer.weight, before)
    assert torch.equal(norm.weight, torch.full((4,), 0.5))


def test_integer_maxima_are_refused():
    with pytest.raises(TypeError, match=r"act_absmax must be floating point, got torch\.int64"):
        smooth_scales(torch.ones(1, 2), torch.tensor([16, 1]))
