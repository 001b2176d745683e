"""A linear layer whose weight stays quantized: dequantize, multiply, forget.

The frozen base of QLoRA: Dettmers et al. 2023 (arXiv:2305.14314), equation 5. The weight is
decoded when it is needed, in the forward pass and again in the backward pass, and never kept:
autograd flows through the *input*, and the weight has no gradient. Explained in chapter 13.

A few rows at a time, with no gradient wanted, are multiplied by the weight's own ``matmul`` where it
has one, which may read the packed codes without decoding them to memory. Explained in chapter 9.

Copy this file: it needs only torch. It holds any *quantized tensor*: a dataclass with
``dequantize(dtype)``, ``shape``, ``nbytes`` and ``bits_per_weight``, and perhaps ``matmul(x)``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

__all__ = ["QuantizedLinear", "QuantizedTensor"]


class QuantizedTensor(Protocol):
    """What :class:`QuantizedLinear` asks of a weight."""

    @property
    def shape(self) -> tuple[int, ...]:
        """``(out_features, in_features)``."""

    @property
    def nbytes(self) -> int:
        """Bytes stored, everything counted."""

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a weight, everything counted."""

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight."""


class _FrozenMatmul(torch.autograd.Function):
    """``x @ W.T`` with a quantized, frozen W; saves W's codes, not its values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantizedTensor, dtype: torch.dtype) -> Tensor:
        ctx.weight, ctx.dtype = weight, dtype
        return torch.nn.functional.linear(x.to(dtype), weight.dequantize(dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        return (grad.to(ctx.dtype) @ ctx.weight.dequantize(ctx.dtype)).to(grad.dtype), None, None


def _tensors(value: Any, prefix: str) -> dict[str, Tensor]:
    """Every tensor in a (nested) dataclass, by a dotted path written with underscores."""
    found: dict[str, Tensor] = {}
    for field in dataclasses.fields(value):
        part, name = getattr(value, field.name), f"{prefix}_{field.name}"
        if isinstance(part, Tensor):
            found[name] = part
        elif dataclasses.is_dataclass(part):
            found |= _tensors(part, name)
    return found


def _rebuild(value: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """A copy of the dataclass with its tensors taken from ``tensors``."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        part, name = getattr(value, field.name), f"{prefix}_{field.name}"
        if isinstance(part, Tensor):
            changes[field.name] = tensors[name]
        elif dataclasses.is_dataclass(part):
            changes[field.name] = _rebuild(part, name, tensors)
    return dataclasses.replace(value, **changes)


class QuantizedLinear(nn.Module):
    """``y = x @ dequantize(weight).T + bias`` with a frozen quantized weight.

    Parameters
    ----------
    weight : quantized tensor
        Shape ``(out_features, in_features)``.
    bias : Tensor, optional
        Shape ``(out_features,)``; kept as a frozen buffer.
    compute_dtype : torch.dtype, optional
        Precision of the multiplication; default: the input's. The result has the input's dtype.

    Attributes
    ----------
    fused_rows : int
        Up to so many rows (tokens) go to the weight's ``matmul``, when no gradient is wanted. More of
        them share one decoded weight. 0 never fuses; where the two meet depends on the machine.

    Raises
    ------
    TypeError
        When ``weight`` is not a dataclass with ``dequantize``.
    ValueError
        When the weight is not two-dimensional or the bias does not fit.

    Examples
    --------
    >>> @dataclasses.dataclass(frozen=True)
    ... class Halves:  # a toy quantized tensor: int8 codes in steps of a half
    ...     codes: Tensor
    ...     bits_per_weight = 8.0
    ...     shape = property(lambda self: tuple(self.codes.shape))
    ...     nbytes = property(lambda self: self.codes.nbytes)
    ...     def dequantize(self, dtype=torch.float32):
    ...         return self.codes.to(dtype) / 2
    >>> layer = QuantizedLinear(Halves(torch.tensor([[1, 2], [3, 4]], dtype=torch.int8)))
    >>> layer(torch.tensor([[1.0, 1.0]]))
    tensor([[1.5000, 3.5000]])
    """

    fused_rows = 64

    def __init__(
        self, weight: Any, bias: Tensor | None = None, compute_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        if not (dataclasses.is_dataclass(type(weight)) and hasattr(weight, "dequantize")):
            raise TypeError(
                f"weight must be a quantized tensor (a dataclass with dequantize), got {type(weight).__name__}"
            )
        if len(weight.shape) != 2:
            raise ValueError(f"weight must have shape (out_features, in_features), got {tuple(weight.shape)}")
        self.out_features, self.in_features = weight.shape
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise ValueError(f"bias of shape {tuple(bias.shape)} does not fit {self.out_features} outputs")
        self.compute_dtype = compute_dtype
        self._template: Any = weight
        self._built: tuple[Any, Any] = (None, None)  # which buffers, and the weight made of them
        for name, tensor in _tensors(weight, "weight").items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", None if bias is None else bias.detach())

    @property
    def weight(self) -> Any:
        """The quantized weight, on the layer's present device."""
        tensors = {name: t for name, t in self._buffers.items() if t is not None and name != "bias"}
        if torch.compiler.is_compiling():
            return _rebuild(self._template, "weight", tensors)
        built_from, weight = self._built
        now = [(id(t), 0 if t.is_inference() else t._version) for t in tensors.values()]
        if built_from != now:  # a buffer was moved, assigned or overwritten
            weight = _rebuild(self._template, "weight", tensors)
            self._built = now, weight
        return weight

    def fuses(self, x: Tensor) -> bool:
        """Whether ``forward(x)`` leaves the product to the weight's ``matmul``: few rows, and no gradient."""
        few = x.numel() <= self.fused_rows * self.in_features
        learns = torch.is_grad_enabled() and x.requires_grad
        return few and not learns and hasattr(self._template, "matmul") and not torch.compiler.is_compiling()

    def forward(self, x: Tensor) -> Tensor:
        """Input ``(…, in_features)`` → output ``(…, out_features)``, in the input's dtype."""
        dtype = self.compute_dtype or x.dtype
        if self.fuses(x):
            y = self.weight.matmul(x.to(dtype)).to(x.dtype)
        else:
            y = _FrozenMatmul.apply(x, self.weight, dtype)
        bias = self._buffers["bias"]
        return y if bias is None else y + bias.to(y.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Follow a move to another device; never a change of dtype, which would break the codes' scales."""
        for name, buffer in self._buffers.items():
            if buffer is not None:
                device = fn(torch.empty(0, device=buffer.device)).device
                self._buffers[name] = buffer.to(device)
        return self

    def extra_repr(self) -> str:
        """One line for ``print(model)``."""
        kind, bits = type(self._template).__name__, self._template.bits_per_weight
        has_bias = self._buffers["bias"] is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={has_bias}, {kind}, {bits:.3f} bits/weight"
