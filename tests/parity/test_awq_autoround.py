"""AWQ's clipping search against auto-round's, whose ranges make_awq_hqq_fixture.py keeps."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qtune_companion.quantization.affine import AffineGrid
from qtune_companion.quantization.awq import awq_clip

KEPT = load_file(Path(__file__).with_name("fixtures") / "awq_hqq.safetensors")


@pytest.mark.parametrize("bits", [3, 4])
def test_same_ranges(bits):
    weight, low, high = KEPT["weight"], KEPT[f"clip{bits}_low"], KEPT[f"clip{bits}_high"]
    theirs = weight.view(48, 2, 64).clamp(low, high).view_as(weight)
    ours = awq_clip(weight, KEPT["inputs"], AffineGrid(bits, (1, 64)), 64)
    same = ((ours - theirs).abs() < 1e-6).view(48, 2, 64).all(-1)
    assert same.float().mean() > 0.95  # their scales are float16: a near tie may fall the other way
    assert not torch.equal(theirs, weight)
