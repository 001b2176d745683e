"""GPTQ: round a weight's columns one after another; the columns still to come make up for the error.

Frantar et al. 2022, "GPTQ" (arXiv:2210.17323), algorithm 1. With H = L L^T, L *upper* triangular,
and U = L^-1, rounding leaves W - W_hat = E U and the layer's error tr((W - W_hat) H (W - W_hat)^T) = |E|^2, where
column j of E is that column's own rounding error over U[j, j]. Explained in chapter 7.

Copy this file: it needs only torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["gptq"]

_BLOCK = 128  # columns whose errors are collected before they are passed on, in one product


def _invert(upper: Tensor) -> Tensor:
    """The inverse of an upper triangular matrix, from those of its halves: mostly products, which are fast."""
    n = len(upper)
    if n <= 192:
        one = torch.eye(n, dtype=upper.dtype, device=upper.device)
        return torch.linalg.solve_triangular(upper, one, upper=True)
    half, inverse = n // 2, torch.zeros_like(upper)
    inverse[:half, :half], inverse[half:, half:] = _invert(upper[:half, :half]), _invert(upper[half:, half:])
    inverse[:half, half:] = -inverse[:half, :half] @ (upper[:half, half:] @ inverse[half:, half:])
    return inverse


def _factor(hessian: Tensor, damp: float) -> Tensor:
    """U, upper triangular, (in, in), with U^T U the inverse of the damped Hessian; inner work in float64."""
    if not torch.isfinite(hessian).all():
        raise ValueError("the Hessian holds NaN or infinity: some calibration input did")
    uneven = (hessian - hessian.T).abs().max() > 1e-4 * hessian.diagonal().abs().max()
    h = hessian.double()
    diagonal = h.diagonal()
    dead = diagonal == 0
    if uneven or (diagonal < 0).any():
        raise ValueError("the Hessian must be symmetric with no negative diagonal: use the mean of x x^T")
    if dead.all():
        raise ValueError(
            "the Hessian is zero: no calibration token reached this layer; use grid.encode(weight)"
        )
    h = h + torch.diag((damp + dead.double()) * diagonal.mean())  # a dead channel stands for itself
    h = h.flip(0, 1)  # so that flipping back gives an upper L
    lower, failed = torch.linalg.cholesky_ex(h)
    news = lower.diagonal().square() / h.diagonal()  # of each input, the share that those after it leave open
    if failed or news.min() < 1e-10:
        raise ValueError(
            f"the Hessian is not positive definite with damp={damp}, for want of tokens, or because some inputs "
            f"determine another: raise damp (0.01 is usual)"
        )
    return _invert(lower.flip(0, 1))


def _rounder(grid: Any, fitted: Any, group: Tensor, index: int) -> Callable[[Tensor], Tensor]:
    """What rounds one column (out,) of a group of columns (out, width), the ``index``-th of those ``fitted``.

    The book's grids give up their group's scales, and then round the column alone, affine grids and codebooks in
    the few operations that it takes. Of any other grid we know that it rounds each number by itself, so it may
    round the column as often as its group is wide.
    """
    known: list[Any] = [getattr(fitted, name, None) for name in ("params", "absmax", "scales")]
    params, absmax, scales = known
    if hasattr(params, "zero_point"):  # affine, in few operations
        scale, zero = (
            t[:, index].repeat_interleave(params.block_size[0])[: len(group)]
            for t in (params.scale, params.zero_point.to(params.scale))
        )
        inverse, (low, high) = 1.0 / scale, params.code_range
        return lambda column: (column * inverse).round_().add_(zero).clamp_(low, high).sub_(zero).mul_(scale)
    if isinstance(absmax, Tensor) and hasattr(fitted, "codebook"):
        absmax = absmax.view(len(group), -1)[:, index]
        table = fitted.codebook.to(absmax).sort(stable=True).values
        middles, spread = (table[:-1] + table[1:]) / 2, absmax.clamp(min=1e-38)
        return lambda column: table[torch.bucketize((column / spread).clamp_(-1, 1), middles)] * absmax
    if isinstance(scales, Tensor) and hasattr(fitted, "element"):
        width = 2  # two codes of four bits fill a byte
        thin = replace(fitted, scales=scales[:, index : index + 1], block_size=width)
    else:
        thin, width = grid.fit(group), group.shape[1]
    return lambda column: thin.round(column[:, None].expand(-1, width))[:, 0]


@torch.no_grad()
def gptq(
    weight: Tensor,
    hessian: Tensor,
    grid: Any,
    damp: float = 0.01,
    act_order: bool = False,
    static_groups: bool = False,
) -> Any:
    """Quantize a linear layer's weight so that its *output* changes little.

    Parameters
    ----------
    weight : Tensor
        ``(out, in)``, floating point, finite. Layers with one input (query, key, value) may be stacked.
    hessian : Tensor
        ``(in, in)``, mean of x x^T over the layer's inputs x (any positive multiple of it does as well).
        A channel that was always 0 is rounded to nearest.
    grid : grid
        ``fit``, ``round`` and ``encode``, and ``block_size`` (its last entry, columns a group, must divide
        ``in`` unless the grid takes a short last block).
    damp : float
        This part of the mean diagonal is added to the diagonal. 0 works when there are more tokens than inputs
        and no input is determined by others.
    act_order : bool
        Columns with the largest inputs first, instead of left to right. Implies ``static_groups``.
    static_groups : bool
        Fit all groups to the weight as it is given, instead of each, when its turn comes, to what it has become.

    Returns
    -------
    quantized tensor
        ``grid.fit(...).encode(...)``; its ``dequantize()`` is float32 (float64 for a float64 weight).

    Raises
    ------
    ValueError, TypeError
        On shapes that do not fit, NaN or infinity, integers, a Hessian that is zero, not symmetric, or singular
        with this ``damp``, a negative ``damp``, or groups that reach from one row into the next.

    Examples
    --------
    >>> class Whole:  # the least grid there is: whole numbers
    ...     fit = lambda self, weight: self
    ...     round = encode = lambda self, weight: weight.round()
    >>> weight, inputs = torch.tensor([[0.4, 0.4]]), torch.tensor([[1.0, 0.9], [2.0, 2.1]])
    >>> gptq(weight, inputs.T @ inputs, Whole())  # the inputs are nearly equal: 0.4 + 0.4 is nearer to 1 than to 0
    tensor([[0., 1.]])
    """
    if not weight.is_floating_point():
        raise TypeError(f"weight must be floating point, got {weight.dtype}")
    if weight.ndim != 2 or weight.numel() == 0 or hessian.shape != (weight.shape[1],) * 2:
        raise ValueError(
            f"a Hessian {tuple(hessian.shape)} does not fit a weight (out, in) = {tuple(weight.shape)}"
        )
    if not torch.isfinite(weight).all():
        raise ValueError("the weight holds NaN or infinity: mend it before quantizing")
    if not damp >= 0:
        raise ValueError(f"damp must be 0 or more, got {damp}")
    weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    fitted = grid.fit(weight)
    columns = weight.shape[1]
    sizes = getattr(grid, "block_size", -1)
    if not isinstance(sizes, tuple) and columns % sizes:
        raise ValueError(f"blocks of {sizes} do not divide {columns} inputs: choose a block_size that does")
    size = sizes[-1] if isinstance(sizes, tuple) else sizes
    size = columns if size == -1 or size > columns else size

    hessian = hessian.to(weight.device)
    order = torch.arange(columns, device=weight.device)
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    u = _factor(hessian[order][:, order], damp).to(weight)
    static = static_groups or act_order or getattr(fitted, "tensor_scale", None) is not None
    seen = weight.clone()  # each group as it was when its scales were chosen
    w = weight.T[order]  # (in, out): a column is contiguous; what has been rounded stays as the result
    groups = order // size
    rounders: dict[int, Callable[[Tensor], Tensor]] = {}

    start, pivots = 0, u.diagonal().tolist()
    while start < columns:
        stop = min(start + _BLOCK, columns)
        if not static:  # a block must not run into a group that has yet to be fitted to finished columns
            stop = min(stop, start - start % size + size)
        errors = torch.empty_like(w[start:stop])  # E^T, (block, out)
        for j, group in zip(range(start, stop), groups[start:stop].tolist(), strict=True):
            if group not in rounders:
                part = slice(group * size, (group + 1) * size)
                if not static:
                    seen[:, part] = w[part].T
                now = seen[:, part]
                rounders[group] = (
                    _rounder(grid, fitted, now, group) if static else _rounder(grid, grid.fit(now), now, 0)
                )
            past = errors[: j - start]
            column = torch.addmv(w[j], past.T, u[start:j, j], alpha=-1)
            w[j] = rounders[group](column)
            torch.sub(column, w[j], out=errors[j - start]).div_(pivots[j])
        w[stop:].addmm_(u[start:stop, stop:].T, errors, alpha=-1)
        start = stop
    result = torch.empty_like(weight)
    result[:, order] = w.T
    return (fitted if static else grid.fit(seen)).encode(result)
