"""AWQ: scale a layer's input channels, and clip its weights, so that rounding hurts the outputs least.

A channel whose inputs are large deserves finer weights. Multiply its column of the weight by ``s_j`` before rounding
and divide its input by it: Lin et al. 2023, "AWQ" (arXiv:2306.00978), equations 2 to 5. The clipping search shrinks
both ends of a block's range, as auto-round does. Fold the scales into the layer in front with ``fold_scales_`` (smoothquant.py). Explained in chapter 8.

Copy this file: it needs only torch.

A *grid* is any object with ``round(weight) -> weight`` (affine.py, codebook.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["awq_clip", "awq_scales"]


def _check(weights: Sequence[Tensor], inputs: Tensor) -> None:
    if (
        inputs.ndim != 2
        or not weights
        or any(w.ndim != 2 or w.shape[1:] != inputs.shape[1:] for w in weights)
    ):
        shapes = [tuple(w.shape) for w in weights]
        raise ValueError(
            f"weights {shapes} do not fit inputs {tuple(inputs.shape)}: (out, in) and (tokens, in)"
        )
    if inputs.numel() == 0 or not all(torch.isfinite(x).all() for x in (inputs, *weights)):
        raise ValueError("need at least one token, and no NaN or infinity in inputs and weights")


def _at_least_float32(*tensors: Tensor) -> list[Tensor]:
    """In one dtype: squares of half-precision numbers overflow, and their sums are coarse."""
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return [t.to(wide) for t in tensors]


@torch.no_grad()
def awq_scales(weight: Tensor | Sequence[Tensor], inputs: Tensor, grid: Any, n_grid: int = 20) -> Tensor:
    """Scales ``s_j = m_j**alpha``, m_j the mean of ``|x_j|``, with the alpha that keeps the outputs best.

    Tries ``alpha = 0, 1/n_grid, …, 1 - 1/n_grid`` and takes the least ``||x W^T - (x / s) round(W s)^T||^2``; the
    first is plain rounding, so on ``inputs`` the result is never worse than that. Computed in float32 at least.

    A channel that was always 0 (dead, or asleep in this text) gets the least scale of the others, so that it is still
    there should it wake up; where all channels are 0, all scales are 1.

    Parameters
    ----------
    weight : Tensor or sequence of Tensor
        ``(out, in)``; several when layers share their input (query, key and value; gate and up).
    inputs : Tensor
        The layer's inputs on calibration text, ``(tokens, in)``.
    grid : grid
        ``grid.round(w)`` rounds a weight. It must choose its scales anew at each call: do not ``fit`` it.
    n_grid : int
        How many exponents to try.

    Returns
    -------
    Tensor
        ``(in,)``, positive, ``max * min == 1``, float32 or float64: divide the input, multiply the columns.

    Raises
    ------
    ValueError
        On shapes that do not fit, no tokens, NaN or infinity, or n_grid below 1.

    Examples
    --------
    >>> class Halves:
    ...     def round(self, w):
    ...         return (2 * w).round() / 2
    >>> weight, inputs = torch.tensor([[0.25, 0.25]]), torch.tensor([[16.0, 1.0]])
    >>> awq_scales(weight, inputs, Halves(), n_grid=4)  # 16**0.5, over the root of max * min
    tensor([2.0000, 0.5000])
    """
    weights = [weight] if isinstance(weight, Tensor) else list(weight)
    _check(weights, inputs)
    if n_grid < 1:
        raise ValueError(f"n_grid must be at least 1, got {n_grid}")
    inputs, *weights = _at_least_float32(inputs, *weights)
    mean = inputs.abs().mean(0)  # (in,)
    awake = mean > 0
    least, best = float("inf"), torch.ones_like(mean)
    if not awake.any():
        return best
    mean = mean.clamp(min=mean[awake].min())
    for step in range(n_grid):
        scales = (mean ** (step / n_grid)).clamp(min=1e-4)
        scales = scales / (scales.max() * scales.min()).sqrt()
        loss = 0.0
        for w in weights:
            error = (grid.round(w * scales) / scales).sub_(w)  # (out, in)
            loss += (inputs @ error.T).square_().sum().item()
        if loss < least:
            least, best = loss, scales
    return best


@torch.no_grad()
def awq_clip(
    weight: Tensor, inputs: Tensor, grid: Any, block_size: int, n_grid: int = 20, max_shrink: float = 0.5
) -> Tensor:
    """The weight with each block clipped to the range that keeps the block's share of the output best.

    A block's range [min, max] is multiplied by ``1, 1 - 1/n_grid, …``, down to about ``1 - max_shrink``; judged is
    the mean over tokens of ``(sum over the block of x_j (w^_j - w_j))^2``. Round the result with the same grid.

    Parameters
    ----------
    weight : Tensor
        ``(out, in)``, times the scales if there are any.
    inputs : Tensor
        ``(tokens, in)``, divided by the scales if there are any.
    grid : grid
        As in :func:`awq_scales`, with blocks of ``(1, block_size)``.
    block_size : int
        Weights in a row that share a range; divides ``in``.
    n_grid, max_shrink : int, float
        The search: ``int(max_shrink * n_grid)`` ranges, the first of them unclipped.

    Returns
    -------
    Tensor
        ``(out, in)``, in ``weight``'s dtype. A block whose inputs were all 0 is left unclipped.

    Raises
    ------
    ValueError
        As :func:`awq_scales`; on a block size that does not divide ``in``; on fewer than one range to try.

    Examples
    --------
    >>> class Thirds:  # four levels from 0 to the largest
    ...     def round(self, w):
    ...         return (w / w.max() * 3).round() * w.max() / 3
    >>> weight, inputs = torch.tensor([[0.25, 0.25, 1.0]]), torch.tensor([[8.0, 8.0, 1.0]])
    >>> awq_clip(weight, inputs, Thirds(), block_size=3, n_grid=4)
    tensor([[0.2500, 0.2500, 0.7500]])
    """
    _check([weight], inputs)
    if block_size < 1 or weight.shape[1] % block_size:
        raise ValueError(f"block_size must divide the {weight.shape[1]} inputs, got {block_size}")
    if (ranges := int(max_shrink * n_grid)) < 1 or max_shrink > 1:
        raise ValueError(f"need 1 <= max_shrink * n_grid <= n_grid, got {max_shrink} and {n_grid}")
    inputs, w = _at_least_float32(inputs, weight)
    blocks = w.unflatten(1, (-1, block_size))  # (out, blocks, block)
    x = inputs.unflatten(1, (-1, block_size)).transpose(0, 1)  # (blocks, tokens, block)
    gram = x.transpose(1, 2) @ x  # (blocks, block, block): all that the inputs matter
    low, high = blocks.amin(-1, keepdim=True).clamp(max=0), blocks.amax(-1, keepdim=True).clamp(min=0)
    least, keep = torch.full_like(high, float("inf")), torch.ones_like(high)
    for step in range(ranges):
        shrink = 1 - step / n_grid
        rounded = grid.round(blocks.clamp(low * shrink, high * shrink).flatten(1))
        error = (rounded - w).unflatten(1, (-1, block_size)).transpose(0, 1)  # (blocks, out, block)
        loss = ((error @ gram) * error).sum(-1, keepdim=True).transpose(0, 1)  # (out, blocks, 1)
        keep = torch.where(loss < least, shrink, keep)
        least = torch.minimum(loss, least)
    return blocks.clamp(low * keep, high * keep).flatten(1).to(weight.dtype)
