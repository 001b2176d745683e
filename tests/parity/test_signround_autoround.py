"""Chapter 8b's SignRound against auto-round's rounding and optimizer, whose results make_awq_hqq_fixture.py keeps."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from qtune_companion.quantization.affine import AffineGrid

CHAPTER = Path(__file__).parents[2] / "book/2_quantizing/08b_autoround.md"
PARTS = ("class PassThrough", "class Rounded", "class SignRound")
KEPT = load_file(Path(__file__).with_name("fixtures") / "awq_hqq.safetensors")


def chapter(*needles):
    """What the chapter's cells with these words define."""
    cells = re.findall(r"```\{code-cell\} ipython3\n(.*?)\n```", CHAPTER.read_text("utf-8"), re.S)
    names = {"torch": torch, "nn": nn}
    for needle in needles:
        exec(next(cell for cell in cells if needle in cell), names)
    return names


@pytest.fixture
def linear():
    linear = nn.Linear(128, 48, bias=False)
    linear.weight.data.copy_(KEPT["weight"])
    return linear


def test_starts_as_rounding_to_nearest_and_rounds_alike_with_given_offsets(linear):
    layer = chapter(*PARTS)["SignRound"](linear, 4)
    torch.testing.assert_close(layer.rounded(), AffineGrid(4, (1, 64)).round(KEPT["weight"]))
    layer.v.data.copy_(KEPT["sign_v"])
    layer.reach.data.copy_(torch.stack([KEPT["sign_low"], KEPT["sign_high"]])[..., None])
    same = (layer.rounded() - KEPT["sign_rounded"]).abs() < 1e-6
    assert same.float().mean() > 0.999  # one more operation in float32 may tip a tie


@pytest.mark.parametrize("bits", [2, 4])
def test_derivatives_written_out_are_those_of_autograd(linear, bits):
    parts = chapter(*PARTS)
    layer = parts["SignRound"](linear, bits)
    with torch.no_grad():
        layer.v.copy_(torch.rand_like(layer.v) - 0.5)
        layer.reach.copy_(0.7 + 0.3 * torch.rand_like(layer.reach))  # some weights are clamped
    straight = parts["PassThrough"].apply
    low, high = layer.low * layer.reach[0], layer.high * layer.reach[1]
    delta = (high - low) / layer.top
    zero = straight(-low / delta)
    codes = (straight(layer.blocks / delta + layer.v) + zero).clamp(0, layer.top)
    plain = (delta * (codes - zero)).view_as(layer.weight)
    assert 0.01 < ((codes == 0) | (codes == layer.top)).float().mean() < 0.9
    direction = torch.randn_like(plain)
    ours = torch.autograd.grad(layer.rounded(), [layer.v, layer.reach], direction)
    theirs = torch.autograd.grad(plain, [layer.v, layer.reach], direction)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_same_weights_after_fifty_steps(linear):
    """The chapter's train_signs, on one window of all inputs behind a first token that says nothing."""
    train_signs = chapter(*PARTS, "def train_signs")["train_signs"]
    weight = KEPT["weight"]
    inputs = KEPT["inputs"] / KEPT["inputs"].square().mean(0).sqrt()
    window = torch.cat([torch.zeros(1, 128), inputs])[None]  # (1, 97, 128)
    block = nn.Sequential(nn.Sequential(linear))
    train_signs(block, window, window @ weight.T, lambda block, x: block(x), 4, 50, batch=1)
    ours, theirs = linear.weight, KEPT["sign_trained"]
    assert ((ours - theirs).abs() < 1e-5).float().mean() > 0.99
    wrong = [(inputs @ (w - weight).T).square().mean().item() for w in (ours, theirs)]
    assert wrong[0] == pytest.approx(wrong[1], rel=0.01)
    nearest = AffineGrid(4, (1, 64)).round(weight)
    assert (ours - nearest).abs().gt(
        1e-5
    ).float().mean() > 0.1  # and it is not plain rounding that we agree on
    assert block[0][0] is linear  # everything is back in its place
