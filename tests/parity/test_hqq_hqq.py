"""HQQ against the library hqq, whose results make_awq_hqq_fixture.py keeps: the same steps in the same order, so
nearly all codes; a sum in another order may move a zero point by some 1e-6 and a code with it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qtune_companion.quantization.hqq import hqq

KEPT = load_file(Path(__file__).with_name("fixtures") / "awq_hqq.safetensors")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_same_codes_and_the_same_error(bits):
    weight, codes = KEPT["weight"], KEPT[f"hqq{bits}_codes"]
    scale, zero = KEPT[f"hqq{bits}_scale"], KEPT[f"hqq{bits}_zero"]
    ours = hqq(weight, bits, (1, 64))
    assert (ours.codes == codes).float().mean() >= 0.999
    torch.testing.assert_close(ours.scale.float(), scale, rtol=1e-3, atol=0)
    assert (
        (ours.zero.float() - zero).abs() <= 1e-3 + 1e-3 * zero.abs()
    ).float().mean() > 0.97  # of 96 blocks
    theirs = ((codes.view(-1, 64) - zero.half().float()) * scale.half().float()).view_as(weight)
    for power in (1, 2):
        wrong = [(x - weight).abs().pow(power).mean().item() for x in (ours.dequantize(), theirs)]
        assert wrong[0] == pytest.approx(wrong[1], rel=1e-3)
    if bits < 8:  # and it is not plain rounding that we agree on
        assert (hqq(weight, bits, (1, 64), iters=0).codes == codes).float().mean() < 0.999
