"""Ranges for affine quantization: how far a grid should reach before it clips.

Min-max, percentile, least squared error, and the KL ("entropy") calibration of Migacz 2017, "8-bit
Inference with TensorRT" (GTC); all compared by Wu et al. 2020 (arXiv:2004.09602), section 5. Explained
in chapter 3.

Copy this file: it needs only torch.

A range is used by clamping before the scales are chosen: ``choose_qparams(x.clamp(low, high), …)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["choose_range"]


def _error(x: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Mean squared error of each row when rounded to the affine grid from ``low`` to ``high``, (rows, 1)."""
    scale = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(x.dtype).tiny)
    zero = torch.zeros_like(scale) if symmetric else -torch.round(low / scale)
    first = -(2 ** (bits - 1)) if symmetric else 0
    codes = (torch.round(x / scale) + zero).clamp(first, first + 2**bits - 1)
    return ((codes - zero) * scale - x).square().mean(1, keepdim=True)


def _kl_threshold(row: Tensor, levels: int, bins: int = 2048) -> float:
    """The threshold on |row| whose histogram, merged into ``levels``, keeps the least KL divergence."""
    top = row.abs().max().item()
    counts = torch.histc(row.abs().float(), bins, 0, top or 1.0).double()
    best, threshold = float("inf"), top
    for stop in range(levels, bins + 1):
        kept = counts[:stop]
        target = kept.clone()
        target[-1] += counts[stop:].sum()  # what is clipped lands on the last level
        group = torch.arange(stop, device=counts.device) * levels // stop
        filled = (target > 0).double()
        total, places = (torch.zeros_like(kept).index_add_(0, group, v) for v in (kept, filled))
        coarse = (total / places.clamp(min=1))[group] * filled  # a level's count, shared by its filled bins
        coarse = torch.where(target > 0, coarse.clamp(min=0.5), 0.0)  # an empty level: half an element
        p, q = target / target.sum(), coarse / coarse.sum()
        divergence = torch.where(p > 0, p * (p / q).log(), 0.0).sum().item()
        if divergence <= best:
            best, threshold = divergence, top * stop / bins
    return threshold


def choose_range(
    x: Tensor,
    bits: int,
    method: str = "mse",
    symmetric: bool = True,
    percentile: float = 99.9,
    steps: int = 100,
) -> tuple[Tensor, Tensor]:
    """One clipping range a row.

    Parameters
    ----------
    x : Tensor
        Floating point, finite, (rows, n): ``weight.reshape(1, -1)`` for one range a tensor, ``weight``
        for one a channel, ``weight.reshape(-1, 32)`` for one a group of 32.
    bits : int
        Bits a code, 2 to 8; only ``"mse"`` and ``"kl"`` look at it.
    method : str
        ``"minmax"``; ``"percentile"``: keep that share of the row; ``"mse"``: of ``steps`` ranges,
        min-max down to a hundredth of it, the one with the least squared error; ``"kl"``: symmetric only, slow.
    symmetric : bool
        ``low = -high``; else each end follows its own side.
    percentile : float
        Percent of the row's elements that are not clipped.
    steps : int
        Candidates of ``"mse"``.

    Returns
    -------
    tuple of Tensor
        ``low`` ≤ 0 ≤ ``high``, each (rows, 1).

    Raises
    ------
    ValueError, TypeError
        On an unknown method, bits outside 2 … 8, a shape that is not (rows, n), NaN, infinity, or integers.

    Examples
    --------
    >>> x = torch.cat([torch.linspace(-1, 1, 1000), torch.tensor([9.0])])[None]
    >>> [round(choose_range(x, 4, method)[1].item(), 1) for method in ("minmax", "percentile", "mse")]
    [9.0, 1.0, 3.4]
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if x.ndim != 2 or x.numel() == 0:
        raise ValueError(f"x must be (rows, n) and not empty, got shape {tuple(x.shape)}: reshape it")
    if not torch.isfinite(x).all():
        raise ValueError("x holds NaN or infinity: mend it before choosing a range")
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be 2 to 8, got {bits}")
    if not 0 < percentile <= 100 or steps < 1:
        raise ValueError(f"need 0 < percentile <= 100 and steps >= 1, got {percentile} and {steps}")
    if method == "kl" and symmetric:
        high = torch.tensor([[_kl_threshold(row, 2 ** (bits - 1))] for row in x], dtype=x.dtype).to(x.device)
        return -high, high
    if method not in ("minmax", "percentile", "mse"):
        raise ValueError(f"method must be minmax, percentile, mse or (if symmetric) kl, got {method!r}")
    ordered = (x.abs() if symmetric else x).sort(1).values
    clipped = x.shape[1] * (100 - percentile) / 100 + 1e-6  # of 1,000 at 99.9: 1, not 0.9999999
    cut = int(clipped / (1 if symmetric else 2)) if method == "percentile" else 0
    high = ordered[:, -1 - cut, None].clamp(min=0)
    low = -high if symmetric else ordered[:, cut, None].clamp(max=0)
    if method == "mse":
        x, low, high = (t.to(torch.promote_types(x.dtype, torch.float32)) for t in (x, low, high))
        unit = x.abs().amax(1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
        x, low, high = x / unit, low / unit, high / unit  # whose squares neither vanish nor overflow
        best, keep = _error(x, low, high, bits, symmetric), torch.ones_like(high)
        for step in range(1, steps):
            shrink = 0.01 ** (step / steps)
            error = _error(x, low * shrink, high * shrink, bits, symmetric)
            keep = torch.where(error < best, shrink, keep)
            best = torch.minimum(best, error)
        low, high = ((end * keep * unit).to(ordered.dtype) for end in (low, high))
    return low, high
