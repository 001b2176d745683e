"""SmoothQuant: move the difficulty of quantizing from the activations to the weights.

A channel j of a layer's input is divided by ``s_j``, and the weight's column j is multiplied by it, so that
the product stays what it was. Xiao et al. 2022, "SmoothQuant" (arXiv:2211.10438), equations 3 and 4. Explained
in chapter 5.

Copy this file: it needs only torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["fold_scales_", "smooth_scales"]


def smooth_scales(
    weight: Tensor | Sequence[Tensor], act_absmax: Tensor, alpha: float = 0.5, eps: float = 1e-5
) -> Tensor:
    """Scales ``s_j = max|X_j|**alpha / max|W_j|**(1 - alpha)``, one an input channel.

    Parameters
    ----------
    weight : Tensor or sequence of Tensor
        ``(out, in)``; several when layers share their input (query, key and value; gate and up).
    act_absmax : Tensor
        Largest magnitude of each input channel on calibration text, ``(in,)``.
    alpha : float
        How much of the difficulty moves, 0 to 1. At 1 every channel of the input gets the range ±1, at 0
        every column of the weight.
    eps : float
        Both maxima are raised to it, and so is the result: a channel that was always 0 stays finite.

    Returns
    -------
    Tensor
        ``(in,)``, positive, in ``act_absmax``'s dtype: divide the input by it, multiply the weight's columns.

    Raises
    ------
    ValueError
        On shapes that do not fit, alpha outside 0 … 1, or maxima that are negative, NaN or infinite; TypeError on
        integer maxima.

    Examples
    --------
    >>> weight, absmax = torch.tensor([[1.0, 4.0], [-0.25, 1.0]]), torch.tensor([16.0, 1.0])
    >>> smooth_scales(weight, absmax)
    tensor([4.0000, 0.5000])
    """
    weights = [weight] if isinstance(weight, Tensor) else list(weight)
    if not act_absmax.is_floating_point():
        raise TypeError(f"act_absmax must be floating point, got {act_absmax.dtype}")
    if not weights or any(w.ndim != 2 or w.shape[1:] != act_absmax.shape for w in weights):
        shapes = [tuple(w.shape) for w in weights]
        raise ValueError(
            f"weights {shapes} do not fit act_absmax {tuple(act_absmax.shape)}: (out, in) and (in,)"
        )
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be 0 to 1, got {alpha}")
    columns = torch.stack([w.detach().abs().amax(0) for w in weights]).amax(0).to(act_absmax)  # (in,)
    if not all(torch.isfinite(x).all() for x in (columns, act_absmax)) or (act_absmax < 0).any():
        raise ValueError("the maxima hold NaN, infinity or negative numbers: give max(|x|) of finite inputs")
    return (act_absmax.clamp(min=eps) ** alpha / columns.clamp(min=eps) ** (1 - alpha)).clamp(min=eps)


@torch.no_grad()
def fold_scales_(before: Any, after: Any, scales: Tensor) -> None:
    """Divide what ``before`` gives by ``scales`` and multiply the columns of ``after``, in place.

    Exact (up to rounding) where each output channel of ``before`` reaches ``after`` unchanged or only multiplied
    by something: a norm and the layers that read it; ``up_proj`` and ``down_proj``.

    Parameters
    ----------
    before : nn.Module
        A norm that multiplies by its weight (n,), or a linear layer with (n, in); a bias is divided too.
    after : nn.Module or sequence of nn.Module
        All the linear layers that read it, weights (out, n). One left out would compute something else.
    scales : Tensor
        Positive, (n,).

    Raises
    ------
    ValueError
        When the shapes do not fit, a scale is not positive and finite, or a norm does not multiply by its weight
        (Gemma's multiply by 1 more). Then nothing is changed.
    """
    layers: list[Any] = [after] if isinstance(after, nn.Module) else list(after)
    n = before.weight.shape[0]
    if scales.shape != (n,) or not layers or any(layer.weight.shape[1:] != (n,) for layer in layers):
        shapes = [tuple(layer.weight.shape) for layer in layers]
        raise ValueError(f"{tuple(scales.shape)} scales do not fit {n} channels and weights {shapes}")
    if not (torch.isfinite(scales).all() and (scales > 0).all()):
        raise ValueError("scales must be positive and finite: take them from smooth_scales")
    if before.weight.ndim == 1 and isinstance(before, nn.Module):
        norm: Any = before
        probe, own = torch.linspace(-1, 2, n).to(norm.weight).view(1, n), norm.weight.detach().clone()
        bias = 0 if getattr(norm, "bias", None) is None else norm.bias
        once = norm(probe) - bias
        norm.weight.mul_(2)
        twice = norm(probe) - bias
        norm.weight.copy_(own)
        if (twice - 2 * once).abs().max() > 0.02 * once.abs().max():
            raise ValueError(
                f"{type(norm).__name__} does not multiply by its weight: it cannot take the scales"
            )
    column = scales.view(-1, *[1] * (before.weight.ndim - 1))  # (n,) for a norm, (n, 1) for a linear layer
    before.weight.div_(column.to(before.weight))
    if getattr(before, "bias", None) is not None:
        before.bias.div_(scales.to(before.bias))
    for layer in layers:
        layer.weight.mul_(scales.to(layer.weight))
