"""Numbers in few bits: floats of any split, small integers, and the block formats MXFP8, MXFP4 and NVFP4.

Layout, subnormals, rounding: IEEE 754-2019. FP8: Micikevicius et al. 2022 (arXiv:2209.05433), table 1. MX: Rouhani
et al. 2023, "OCP Microscaling Formats (MX) Specification v1.0", sections 5 and 6.3. NVFP4: as torchao 0.18. The
bits agree with ml_dtypes, PyTorch and torchao; a NaN becomes its sign's quiet NaN. Explained in chapter 2.

Copy this file: it needs only torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = [
    "BF16", "FP4_E2M1", "FP8_E4M3", "FP8_E5M2", "FP16", "FP32", "INT4", "INT8", "MXFP4", "MXFP8", "MXFP8_E5M2",
    "NVFP4", "TERNARY", "TF32", "BlockFormat", "BlockTensor", "FloatFormat", "IntFormat",
]  # fmt: skip


def _exponent(magnitude: Tensor) -> Tensor:
    """floor(log2) of float64 magnitudes, int64, read from their bits; -1023 for zero."""
    return (magnitude.contiguous().view(torch.int64) >> 52) - 1023


def _power(exponent: Tensor) -> Tensor:
    """2**exponent as float64, exactly, from -1022 to 1023."""
    return ((exponent + 1023) << 52).view(torch.float64)


def _checked(codes: Tensor, bits: int) -> Tensor:
    if codes.is_floating_point():
        raise TypeError(f"codes must be integers, got {codes.dtype}")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2**bits):
        raise ValueError(f"codes must be 0 to {2**bits - 1}, got {int(codes.min())} to {int(codes.max())}")
    return codes.long()


@dataclass(frozen=True)
class FloatFormat:
    """A binary floating-point format: a sign bit, the exponent field, the mantissa.

    Examples
    --------
    >>> FP8_E4M3.encode(torch.tensor([1.0, -448.0, 0.3])), FP8_E4M3.decode(torch.tensor([56, 42]))
    (tensor([ 56, 254,  42], dtype=torch.uint8), tensor([1.0000, 0.3125]))
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int  # subtracted from the exponent field; as a rule 2**(exponent_bits - 1) - 1
    specials: str = "ieee"  # top exponent: infinity and NaN; or "nan": only the top code; or "none"

    def __post_init__(self) -> None:
        e, m, ieee = self.exponent_bits, self.mantissa_bits, self.specials == "ieee"
        fits = e >= 1 and ieee <= m <= 23 and 2**e - 1 - ieee - self.bias <= 127 and self.bias + m <= 150
        if not fits or self.specials not in ("ieee", "nan", "none"):
            raise ValueError(f"float32 must hold every value; specials: 'ieee', 'nan', 'none'; got {self}")

    @property
    def bits(self) -> int:
        """Bits a number."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def max_code(self) -> int:
        """The code of the largest finite value."""
        spent = {"ieee": 2**self.mantissa_bits, "nan": 1, "none": 0}[self.specials]
        return 2 ** (self.bits - 1) - 1 - spent

    @property
    def max(self) -> float:
        """The largest finite value."""
        return self.decode(torch.tensor(self.max_code)).item()

    def encode(self, x: Tensor, saturate: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """Codes of ``x``, same shape: uint8 up to 8 bits, else int64. Raises ValueError on NaN if the format has none.

        Rounds to nearest, ties to even; with a ``generator`` stochastically, right on average. What is too large
        becomes infinity, or NaN for want of it, or the largest value for want of both or with ``saturate``.
        """
        nan, wide = torch.isnan(x), x.detach().double()
        if self.specials == "none" and nan.any():
            raise ValueError(f"x holds NaN, and {self.name} has no code for it: mend x first")
        magnitude = torch.where(torch.isfinite(wide), wide.abs(), 0.0)
        lowest = 1 - self.bias  # the exponent of subnormals and of the smallest normal
        exponent = _exponent(magnitude).clamp(min=lowest)
        steps = magnitude / _power(exponent - self.mantissa_bits)
        noise = None if generator is None else torch.empty_like(steps).uniform_(generator=generator)
        steps = steps.round() if noise is None else (steps + noise).floor()
        # codes count steps from zero: a mantissa that rounds up to 2 carries into the exponent by itself
        code = ((exponent - lowest) << self.mantissa_bits) + steps.long()
        over = self.max_code + (not saturate and self.specials != "none")
        code = torch.where((code > self.max_code) | torch.isinf(wide), over, code)
        quiet = self.max_code + 1 + (2**self.mantissa_bits // 2 if self.specials == "ieee" else 0)
        code = torch.where(nan, quiet, code) | torch.signbit(x).long() << (self.bits - 1)
        return code.to(torch.uint8) if self.bits <= 8 else code

    def decode(self, codes: Tensor) -> Tensor:
        """Float32 values of integer ``codes``, same shape. Raises TypeError or ValueError on what is no code."""
        wide = _checked(codes, self.bits)
        magnitude = wide & (2 ** (self.bits - 1) - 1)
        field, fraction = magnitude >> self.mantissa_bits, magnitude & (2**self.mantissa_bits - 1)
        significand = fraction + ((field > 0).long() << self.mantissa_bits)  # subnormals lack the hidden 1
        value = significand * _power(field.clamp(min=1) - self.bias - self.mantissa_bits)
        value = torch.where(magnitude > self.max_code, math.nan, value)
        if self.specials == "ieee":
            value = torch.where(magnitude == self.max_code + 1, math.inf, value)
        return torch.where(wide > magnitude, -value, value).float()


@dataclass(frozen=True)
class IntFormat:
    """Integers ``low`` to ``high`` as two's complement codes of ``bits`` bits; for scales see ``affine.py``."""

    name: str
    bits: int
    low: int
    high: int

    def encode(self, x: Tensor) -> Tensor:
        """Codes of the nearest integers in range (halves to even), uint8. Raises ValueError on NaN."""
        if torch.isnan(x).any():
            raise ValueError(f"x holds NaN, and {self.name} has no code for it: mend x first")
        whole = x.detach().double().round().clamp(self.low, self.high).long()
        return (whole & (2**self.bits - 1)).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """Float32 values of ``codes``. Raises TypeError or ValueError on what is no code."""
        wide = _checked(codes, self.bits)
        return (wide - (wide >> (self.bits - 1) << self.bits)).float()


@dataclass(frozen=True)
class BlockTensor:
    """A quantized tensor in a block format."""

    packed: Tensor  # uint8, (..., in) or, for 4-bit codes, (..., in / 2), the first of two in the low half
    grid: BlockFormat  # fitted: it holds the scales
    shape: tuple[int, ...]
    dtype: torch.dtype

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight, shape ``shape``, in ``dtype`` (default: the original one)."""
        codes, element, whole = self.packed, self.grid.element, self.grid.tensor_scale
        if element.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], dim=-1)
        values = element.decode(torch.arange(2**element.bits, device=codes.device))[codes.int()]
        scale = self.grid.block_scales() if whole is None else whole * self.grid.block_scales()
        return (values.view(*scale.shape, -1) * scale[..., None]).view(self.shape).to(dtype or self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes stored: codes and scales."""
        return sum(t.nbytes for t in (self.packed, self.grid.scales, self.grid.tensor_scale) if t is not None)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a weight, scales counted."""
        return 8 * self.nbytes / math.prod(self.shape)


@dataclass(frozen=True)
class BlockFormat:
    """Blocks of the last axis with one scale each: a grid (``fit``, ``round``, ``encode``).

    ``scale``: "e8m0", a power of two that brings the block's largest exponent to the element's largest (what is
    still too large saturates), or "e4m3", an FP8 number, times one float32 for the whole tensor.
    """

    name: str
    element: FloatFormat
    block_size: int = 32
    scale: str = "e8m0"
    scales: Tensor | None = None  # uint8, one code a block, (..., in / block_size)
    tensor_scale: Tensor | None = None  # float32 scalar, with "e4m3" only

    def __post_init__(self) -> None:
        if self.block_size < 1 or self.scale not in ("e8m0", "e4m3"):
            raise ValueError(
                f"need block_size >= 1 and scale e8m0 or e4m3, got {self.block_size}, {self.scale!r}"
            )

    def block_scales(self) -> Tensor:
        """Float32 values of ``scales``; raises ValueError before ``fit``. E8M0's code 255 is NaN."""
        if self.scales is None:
            raise ValueError(f"{self.name} has no scales yet: use fit(weight)")
        if self.scale == "e4m3":
            return FP8_E4M3.decode(self.scales)
        return torch.where(self.scales == 255, math.nan, _power(self.scales.long() - 127)).float()

    def fit(self, weight: Tensor) -> BlockFormat:
        """A grid whose scales fit ``weight``, shape (..., in); raises as :meth:`encode` does."""
        if not weight.is_floating_point():
            raise TypeError(f"weight must be floating point, got {weight.dtype}")
        if weight.numel() == 0 or weight.ndim == 0 or weight.shape[-1] % self.block_size:
            raise ValueError(f"pad the last axis to blocks of {self.block_size}, got {tuple(weight.shape)}")
        absmax = weight.detach().float().unflatten(-1, (-1, self.block_size)).abs().amax(-1)
        if not torch.isfinite(absmax).all():
            raise ValueError("weight holds NaN or infinity: mend it before quantizing")
        if self.scale == "e8m0":
            codes = _exponent(absmax.double()) - int(math.log2(self.element.max)) + 127
            return replace(self, scales=codes.clamp(0, 254).to(torch.uint8))
        # torchao's float32 arithmetic and limits; the floor keeps the reciprocal in encode finite
        whole = (absmax.max() / (FP8_E4M3.max * self.element.max)).clamp(min=2.0**-119)
        ratio = (absmax / self.element.max / whole).clamp(2.0**-6, FP8_E4M3.max)
        return replace(self, scales=FP8_E4M3.encode(ratio), tensor_scale=whole)

    def round(self, weight: Tensor) -> Tensor:
        """``weight`` moved to the nearest grid points, same shape and dtype."""
        return self.encode(weight).dequantize()

    def encode(self, weight: Tensor) -> BlockTensor:
        """``weight`` as packed codes. Raises TypeError, or ValueError on NaN, infinity or a ragged last axis."""
        grid = self.fit(weight)  # checks the weight, too
        grid = grid if self.scales is None else self
        scale, whole = grid.block_scales()[..., None], grid.tensor_scale
        blocks = weight.detach().float().unflatten(-1, (-1, self.block_size))  # (..., blocks, block)
        blocks = blocks.double() / scale if whole is None else blocks * ((1.0 / whole) / scale)
        codes = self.element.encode(blocks, saturate=True).flatten(-2)
        if self.element.bits == 4:
            codes = codes[..., ::2] | codes[..., 1::2] << 4
        return BlockTensor(codes, grid, tuple(weight.shape), weight.dtype)


FP32, TF32 = FloatFormat("fp32", 8, 23, 127), FloatFormat("tf32", 8, 10, 127)
BF16, FP16 = FloatFormat("bf16", 8, 7, 127), FloatFormat("fp16", 5, 10, 15)
FP8_E4M3, FP8_E5M2 = FloatFormat("fp8_e4m3", 4, 3, 7, "nan"), FloatFormat("fp8_e5m2", 5, 2, 15)
FP4_E2M1, TERNARY = FloatFormat("fp4_e2m1", 2, 1, 1, "none"), IntFormat("ternary", 2, -1, 1)
INT8, INT4 = IntFormat("int8", 8, -128, 127), IntFormat("int4", 4, -8, 7)
MXFP8, MXFP8_E5M2 = BlockFormat("mxfp8", FP8_E4M3), BlockFormat("mxfp8_e5m2", FP8_E5M2)
MXFP4, NVFP4 = BlockFormat("mxfp4", FP4_E2M1), BlockFormat("nvfp4", FP4_E2M1, 16, "e4m3")
