"""Affine (uniform, integer) quantization: ``x ≈ scale * (code - zero_point)``.

Follows Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference" (arXiv:1712.05877), equation 1. Explained in chapter 3, ``matmul`` in chapter 9.

Copy this file: it needs only torch.

One argument, ``block_size``, says how many elements share a scale. It is a tuple as long as
the tensor's shape; ``-1`` means the whole axis. For a weight of shape ``(out, in)``:

==================  ===========================
``block_size``      one scale for …
==================  ===========================
``(-1, -1)``        the whole tensor
``(1, -1)``         each output channel (row)
``(1, 32)``         each group of 32 in a row
==================  ===========================

A block size that does not divide an axis leaves a shorter last block.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "AffineGrid", "AffineParams", "AffineTensor", "choose_qparams", "dequantize_affine", "fake_quantize",
    "quantize_affine",
]  # fmt: skip


@dataclass(frozen=True)
class AffineParams:
    """Scales and zero points of one tensor.

    Attributes
    ----------
    scale : Tensor
        Positive steps, one a block, shape ``ceil(shape / block_size)``, float32 or float64.
    zero_point : Tensor
        The code that stands for 0.0, int32, shaped like ``scale``.
    bits : int
        Bits a code, 2 to 8.
    block_size : tuple of int
        Elements a block along each axis; -1 was replaced by the axis' length.
    symmetric : bool
        Signed codes around zero (True), or unsigned codes from 0 (False).
    """

    scale: Tensor
    zero_point: Tensor
    bits: int
    block_size: tuple[int, ...]
    symmetric: bool

    @property
    def code_range(self) -> tuple[int, int]:
        """Lowest and highest code."""
        low = -(2 ** (self.bits - 1)) if self.symmetric else 0
        return low, low + 2**self.bits - 1


def _resolve(shape: torch.Size, block_size: tuple[int, ...]) -> tuple[int, ...]:
    if not isinstance(block_size, tuple) or len(block_size) != len(shape):
        raise ValueError(f"block_size {block_size} does not fit {tuple(shape)}, which needs {len(shape)}")
    for b in block_size:
        if b != -1 and b < 1:
            raise ValueError(f"block_size entries must be positive or -1 (the whole axis), got {b}")
    return tuple(n if b == -1 else min(b, n) for n, b in zip(shape, block_size, strict=True))


def _reduce(x: Tensor, block: tuple[int, ...], op: Callable[..., Tensor]) -> Tensor:
    """Minimum or maximum of each block; a short last block is extended by its own last element."""
    for axis, b in enumerate(block):
        if short := -x.shape[axis] % b:
            last = x.narrow(axis, -1, 1)
            x = torch.cat([x, last.expand(*x.shape[:axis], short, *x.shape[axis + 1 :])], axis)
        if b > 1:  # a pass over blocks of one changes nothing, and takes long
            x = op(x.unflatten(axis, (-1, b)), axis + 1)  # (…, blocks, b, …)
    return x


def _spread(per_block: Tensor, shape: torch.Size, block: tuple[int, ...]) -> Tensor:
    """Repeat one value a block over the block's elements, to ``shape``."""
    for axis, (n, b) in enumerate(zip(shape, block, strict=True)):
        if b == n:
            per_block = per_block.expand(*per_block.shape[:axis], n, *per_block.shape[axis + 1 :])
        elif b > 1:
            per_block = per_block.repeat_interleave(b, axis).narrow(axis, 0, n)
    return per_block


def _aligned(x: Tensor, block: tuple[int, ...], *per_block: Tensor) -> tuple[Tensor, ...]:
    """``x`` and the values of its blocks, to broadcast: (…, blocks, block, …) and (…, blocks, 1, …) where that works."""
    pairs = list(zip(x.shape, block, strict=True))
    if any(n % b for n, b in pairs):
        return x, *(_spread(t, x.shape, block) for t in per_block)
    values = (t.reshape([part for n in t.shape for part in (n, 1)]) for t in per_block)
    return x.reshape([part for n, b in pairs for part in (n // b, b)]), *values


def choose_qparams(
    x: Tensor, bits: int, block_size: tuple[int, ...], symmetric: bool = False
) -> AffineParams:
    """Scales and zero points from each block's minimum and maximum.

    Parameters
    ----------
    x : Tensor
        Any shape, floating point, not empty.
    bits : int
        Bits a code, 2 to 8.
    block_size : tuple of int
        Elements a block along each axis of ``x``; -1 means the whole axis.
    symmetric : bool
        True: ``zero_point`` is 0 and codes are signed. False: the range [min, max],
        widened to hold zero, is mapped on 0 … 2**bits - 1.

    Returns
    -------
    AffineParams

    Raises
    ------
    ValueError
        On bits outside 2 … 8, a bad block size, an empty tensor, NaN or infinity.
    TypeError
        When ``x`` is not floating point.

    Examples
    --------
    >>> p = choose_qparams(torch.tensor([[-1.0, 0.0, 2.0]]), bits=2, block_size=(1, -1))
    >>> p.scale, p.zero_point
    (tensor([[1.]]), tensor([[1]], dtype=torch.int32))
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be 2 to 8, got {bits}")
    if x.numel() == 0:
        raise ValueError(f"x is empty, shape {tuple(x.shape)}: there is no range to quantize")
    block, x = _resolve(x.shape, block_size), x.detach().to(torch.promote_types(x.dtype, torch.float32))
    low, high = _reduce(x, block, torch.amin), _reduce(x, block, torch.amax)
    if not torch.isfinite(high - low).all():
        raise ValueError("x holds NaN or infinity, or its range overflows: mend it before quantizing")
    eps = torch.finfo(x.dtype).eps
    low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        scale = (torch.maximum(-low, high) / ((2**bits - 1) / 2)).clamp(min=eps)
        zero = torch.zeros_like(scale, dtype=torch.int32)
    else:
        scale = ((high - low) / (2**bits - 1)).clamp(min=eps)
        zero = (-torch.round(low / scale)).clamp(0, 2**bits - 1).to(torch.int32)
    return AffineParams(scale, zero, bits, block, symmetric)


def quantize_affine(x: Tensor, params: AffineParams) -> Tensor:
    """Codes of ``x``: round to the nearest step (ties to even), clamp. int8 if symmetric, else uint8."""
    low, high = params.code_range
    blocks, inverse, zero = _aligned(x, params.block_size, 1.0 / params.scale, params.zero_point)
    codes = (blocks * inverse).round_().add_(zero).clamp_(low, high).reshape(x.shape)
    return codes.to(torch.int8 if params.symmetric else torch.uint8)


def dequantize_affine(codes: Tensor, params: AffineParams) -> Tensor:
    """``scale * (codes - zero_point)``, in the scale's dtype and the codes' shape."""
    blocks, scale, zero = _aligned(codes, params.block_size, params.scale, params.zero_point)
    return (blocks.to(scale.dtype, copy=True).sub_(zero) * scale).reshape(codes.shape)


def fake_quantize(x: Tensor, params: AffineParams) -> Tensor:
    """Quantize and dequantize; the gradient passes straight through inside the clamping range.

    The straight-through estimator of Bengio et al. 2013 (arXiv:1308.3432).
    """
    x_hat = dequantize_affine(quantize_affine(x.detach(), params), params)
    blocks, inverse, zero = _aligned(x.detach(), params.block_size, 1.0 / params.scale, params.zero_point)
    steps = torch.round(blocks * inverse) + zero
    inside = (steps == steps.clamp(*params.code_range)).reshape(x.shape)
    return x_hat.to(x.dtype) + (x - x.detach()) * inside


@dataclass(frozen=True)
class AffineTensor:
    """A quantized tensor of affine codes, packed where the bits divide a byte (2, 4 and 8).

    ``packed`` is uint8, first code in the low bits, the end padded with zero codes; with 3, 5, 6
    or 7 bits a code takes a whole byte, and ``bits_per_weight`` says so.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    block_size: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    def _unpack(self) -> Tensor:
        """Unsigned codes, uint8, shape ``shape``."""
        codes = self.packed
        if self.bits in (2, 4):
            shifts = torch.arange(0, 8, self.bits, dtype=torch.uint8, device=codes.device)
            codes = (codes[:, None] >> shifts).bitwise_and_(2**self.bits - 1)  # (bytes, codes a byte)
        return codes.reshape(-1)[: math.prod(self.shape)].view(self.shape)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight, shape ``shape``, in ``dtype`` (default: the original one)."""
        middle = torch.full_like(self.scale, 2 ** (self.bits - 1))  # what a symmetric 0 is stored as
        zero = middle if self.zero_point is None else self.zero_point
        params = AffineParams(self.scale, zero, self.bits, self.block_size, False)
        return dequantize_affine(self._unpack(), params).to(dtype or self.dtype)

    @functools.cached_property
    def _kernel(self) -> Callable[[Tensor], Tensor] | None:
        """PyTorch's fused bf16 kernel for this weight on a CPU, with operands in its own layout; None: there is none."""
        if len(self.shape) != 2 or self.packed.device.type != "cpu" or self.block_size[0] != 1:
            return None
        (n_out, n_in), block, scale = self.shape, self.block_size[1], self.scale.bfloat16()
        if self.bits == 8 and self.zero_point is None and block == n_in and n_in % 16 == 0:
            codes, scale = (self._unpack() ^ 128).view(torch.int8), scale.view(-1)  # minus 128
            return lambda x: torch.ops.aten._weight_int8pack_mm(x, codes, scale)
        if self.bits != 4 or block not in (32, 64, 128, 256) or n_in % block or n_out % 16:
            return None
        zero = 0 if self.zero_point is None else 8 - self.zero_point.to(torch.int16)
        pairs = torch.stack([scale, scale * zero], -1).transpose(0, 1).contiguous()  # (blocks, out, 2)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(self._unpack().int(), 1)
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, block, pairs)

    def matmul(self, x: Tensor) -> Tensor:
        """``x @ dequantize().T`` without gradient, ``(…, in)`` → ``(…, out)``.

        On a CPU in bf16, 4 bits in blocks of 32 to 256 and 8 symmetric bits a row have a kernel that decodes
        in registers. It keeps a copy of the codes in its own layout, and its scales are rounded to bf16.
        """
        kernel = self._kernel if x.dtype == torch.bfloat16 and x.numel() else None
        if kernel is None:
            return torch.nn.functional.linear(x, self.dequantize(x.dtype))
        rows = x.reshape(-1, self.shape[1]).clone(memory_format=torch.contiguous_format)  # aligned anew
        return kernel(rows).view(*x.shape[:-1], self.shape[0])

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_kernel"}  # its layout differs by machine

    @property
    def nbytes(self) -> int:
        """Bytes stored: codes, scales and zero points."""
        return sum(t.nbytes for t in (self.packed, self.scale, self.zero_point) if t is not None)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a weight, everything counted."""
        return 8 * self.nbytes / math.prod(self.shape)


@dataclass(frozen=True)
class AffineGrid:
    """The grid protocol over affine quantization: ``fit``, ``round``, ``encode``.

    Examples
    --------
    >>> w = torch.tensor([[1.0, -0.5], [0.25, 2.0]])
    >>> bool((AffineGrid(bits=8, block_size=(1, -1)).round(w) - w).abs().max() < 0.01)
    True
    """

    bits: int
    block_size: tuple[int, ...]
    symmetric: bool = False
    params: AffineParams | None = None

    def fit(self, weight: Tensor) -> AffineGrid:
        """A grid whose scales fit ``weight``."""
        return replace(self, params=choose_qparams(weight, self.bits, self.block_size, self.symmetric))

    def round(self, weight: Tensor) -> Tensor:
        """``weight`` moved to the nearest grid points, same shape and dtype."""
        params = self.params or choose_qparams(weight, self.bits, self.block_size, self.symmetric)
        return dequantize_affine(quantize_affine(weight, params), params).to(weight.dtype)

    def encode(self, weight: Tensor) -> AffineTensor:
        """``weight`` as packed codes."""
        params = self.params or choose_qparams(weight, self.bits, self.block_size, self.symmetric)
        first = 2 ** (self.bits - 1) if self.symmetric else 0
        flat = (quantize_affine(weight, params).to(torch.int16) + first).to(torch.uint8).reshape(-1)
        if self.bits in (2, 4):
            per_byte = 8 // self.bits
            flat = torch.nn.functional.pad(flat, (0, -flat.numel() % per_byte)).view(-1, per_byte)
            flat = functools.reduce(torch.bitwise_or, (flat[:, i] << i * self.bits for i in range(per_byte)))
        zero = None if self.symmetric else params.zero_point.to(torch.uint8)
        return AffineTensor(
            flat, params.scale, zero, self.bits, params.block_size, tuple(weight.shape), weight.dtype
        )
