"""Codebook quantization: NF4, FP4, Lloyd–Max, and double quantization of the scales.

A weight is cut into blocks. Each block is divided by its largest magnitude (``absmax``), and each
number is replaced by the index of the nearest entry of a small table. NF4 and double quantization:
Dettmers et al. 2023, "QLoRA" (arXiv:2305.14314), section 3; the 8-bit dynamic map of the scales:
Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization" (arXiv:2110.02861); Lloyd–Max:
Lloyd 1982. Explained in chapters 4 and 13. The bits agree with bitsandbytes 0.50.

Copy this file: it needs only torch.
"""

from __future__ import annotations

import functools
import math
import sys
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = [
    "FP4", "NF4", "CodebookGrid", "CodebookTensor", "DoubleQuantized", "NF4Tensor", "dynamic_map", "lloyd_max",
    "quantize_nf4",
]  # fmt: skip

NF4 = torch.tensor(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]
)  # fmt: skip
"""The 16 values of the 4-bit NormalFloat, ascending (QLoRA, appendix E)."""

FP4 = torch.tensor([0.0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3]) / 12
"""bitsandbytes' 4-bit float, in the order of its bit patterns (sign bit first)."""

_TINY = 1e-38  # the smallest divisor, so that an all-zero block stays zero


@functools.cache
def dynamic_map() -> Tensor:
    """The 256 values of the signed 8-bit dynamic map, ascending, float32.

    Seven decades below 1; each decade up doubles the evenly spaced steps. 0 and 1 take one value each.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        middles = ((edges[:-1] + edges[1:]) / 2.0) * 10 ** (decade - 6)
        values += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(values))


def lloyd_max(samples: Tensor, bits: int, iterations: int = 100) -> Tensor:
    """Codebook with the least mean squared error for ``samples``, by Lloyd's algorithm.

    Takes at least ``2**bits`` distinct finite samples of any shape and 1 to 8 bits; stops early when nothing
    moves. Returns ``(2**bits,)`` levels, ascending, in the samples' dtype (at least float32). Raises ValueError on too few distinct or non-finite samples, or bits outside 1 … 8.

    Examples
    --------
    >>> lloyd_max(torch.tensor([0.0, 1.0, 10.0, 11.0]), bits=1)
    tensor([ 0.5000, 10.5000])
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits}")
    x = samples.reshape(-1).to(torch.promote_types(samples.dtype, torch.float32)).sort().values
    if not torch.isfinite(x).all():
        raise ValueError("samples hold NaN or infinity")
    distinct = x.unique()
    if distinct.numel() < 2**bits:
        raise ValueError(f"{distinct.numel()} distinct samples cannot fill {2**bits} levels")
    start = torch.linspace(0, x.numel() - 1, 2 * 2**bits + 1)[1::2].round().long()
    table = x[start]
    if table.unique().numel() < table.numel():
        table = distinct[torch.linspace(0, distinct.numel() - 1, 2**bits).round().long()]
    for _ in range(iterations):
        cell = torch.bucketize(x, (table[:-1] + table[1:]) / 2)
        count = torch.bincount(cell, minlength=table.numel())
        total = torch.zeros_like(table, dtype=torch.float64).index_add_(0, cell, x.double())
        new = torch.where(count > 0, (total / count.clamp(min=1)).to(table), table)
        if torch.equal(new, table):
            break
        table = new
    return table


def _nearest(values: Tensor, table: Tensor) -> Tensor:
    """Index of the nearest entry of an ascending table, uint8; halfway it is the lower one."""
    codes, above = (torch.zeros_like(values, dtype=dtype) for dtype in (torch.uint8, torch.bool))
    for middle in ((table[:-1] + table[1:]) / 2).tolist():  # for 16 entries faster than a binary search
        codes += torch.gt(values, middle, out=above).view(torch.uint8)
    return codes


def _blockwise_codes(flat: Tensor, table: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Nearest-entry codes (n,) and absmax (blocks,) of a flat float32 tensor; ``table`` ascends."""
    whole = flat.numel() // block_size * block_size
    blocks = flat[:whole].view(-1, block_size)  # (blocks, block)
    absmax = blocks.abs().amax(1) if whole else flat.new_empty(0)
    scaled = (blocks * (1.0 / absmax.clamp(min=_TINY))[:, None]).clamp_(-1, 1).reshape(-1)
    if whole < flat.numel():  # a short last block; bitsandbytes divides here, and keeps the clamped absmax
        last = flat[whole:].abs().amax().clamp(min=_TINY)
        absmax = torch.cat([absmax, last[None]])
        scaled = torch.cat([scaled, (flat[whole:] / last).clamp(-1, 1)])
    return _nearest(scaled, table), absmax


def _scale_blocks(values: Tensor, absmax: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    """Flat float32 values times their blocks' absmax, rounded once, to ``dtype``."""
    whole = values.numel() - values.numel() % block_size
    out = values if dtype == values.dtype else torch.empty_like(values, dtype=dtype)
    blocks = values[:whole].view(-1, block_size), absmax[: whole // block_size, None]
    torch.mul(*blocks, out=out[:whole].view(-1, block_size))
    if whole < values.numel():
        torch.mul(values[whole:], absmax[-1], out=out[whole:])
    return out


@functools.lru_cache(maxsize=8)
def _quads(bits: tuple[int, ...]) -> Tensor:
    """What each number of 16 bits, four packed codes, stands for: four float32 as one of 128 bits, (65536,)."""
    table = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    quads = torch.cartesian_prod(table, table, table, table).view(256, 256, 4)  # first byte, second byte
    return (
        quads.transpose(0, 1).contiguous().view(torch.complex128).flatten()
    )  # the first byte is the low one


def _decode(packed: Tensor, codebook: Tensor) -> Tensor:
    """Table values of packed codes, flat float32: four at a time on a CPU, two at a time elsewhere."""
    table = codebook.to(packed.device, torch.float32)
    if packed.device.type == "cpu" and sys.byteorder == "little":
        packed = torch.nn.functional.pad(packed, (0, packed.numel() % 2))
        quads = _quads(tuple(table.view(torch.int32).tolist()))
        return quads.index_select(0, packed.view(torch.uint16).int()).view(torch.float32)
    pairs = torch.cartesian_prod(table, table).contiguous()  # (256, 2): high code, low code
    return pairs.view(torch.int64).squeeze(1).index_select(0, packed.int()).view(torch.float32)


@dataclass(frozen=True)
class DoubleQuantized:
    """Scales that are themselves quantized: 8-bit dynamic-map codes, one float32 for 256 scales."""

    codes: Tensor  # uint8, one a block of weights
    absmax: Tensor  # float32, one for ``block_size`` codes
    offset: Tensor  # float32 scalar, the mean of the scales, subtracted before quantizing
    block_size: int = 256

    @classmethod
    def encode(cls, scales: Tensor) -> DoubleQuantized:
        """Quantize float32 scales, shape (blocks,)."""
        offset = scales.mean()
        padded = torch.nn.functional.pad(scales - offset, (0, -scales.numel() % 256)).view(-1, 256)
        absmax = padded.abs().amax(1)
        # bitsandbytes looks codes up on a grid of 65,536 points in [-1, 1]; 0/0 goes to the first
        point = ((padded * (1.0 / absmax)[:, None]).clamp(-1, 1) + 1) * 32767.5 + 0.5
        value = point.nan_to_num(0.0).floor() / 32767.5 - 1
        table = dynamic_map().to(scales.device)
        codes = torch.bucketize(value.reshape(-1)[: scales.numel()], (table[:-1] + table[1:]) / 2)
        return cls(codes.to(torch.uint8), absmax, offset)

    def dequantize(self) -> Tensor:
        """The scales, float32, shape (blocks,)."""
        table = dynamic_map().to(self.codes.device)
        values = table.index_select(0, self.codes.int())
        return _scale_blocks(values, self.absmax, self.block_size, torch.float32) + self.offset

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        return self.codes.nbytes + self.absmax.nbytes + self.offset.nbytes


@dataclass(frozen=True)
class CodebookTensor:
    """A quantized tensor: packed 4-bit indices into ``codebook`` and one scale a block."""

    packed: Tensor  # uint8, ``ceil(numel / 2)`` bytes; the first of two codes is in the high half
    absmax: Tensor | DoubleQuantized  # one scale a block of the flattened weight
    shape: tuple[int, ...]
    dtype: torch.dtype
    block_size: int
    codebook: Tensor

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight, shape ``shape``, in ``dtype`` (default: the original one)."""
        values = _decode(self.packed, self.codebook)
        absmax = self.absmax.dequantize() if isinstance(self.absmax, DoubleQuantized) else self.absmax
        values = values[: math.prod(self.shape)]
        return _scale_blocks(values, absmax, self.block_size, dtype or self.dtype).view(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes stored: codes and scales (the 64-byte table is shared by the whole model)."""
        return self.packed.nbytes + self.absmax.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a weight, scales counted."""
        return 8 * self.nbytes / math.prod(self.shape)


@dataclass(frozen=True)
class NF4Tensor(CodebookTensor):
    """A :class:`CodebookTensor` over the NF4 table."""

    codebook: Tensor = NF4


@dataclass(frozen=True)
class CodebookGrid:
    """The grid protocol over a 16-entry codebook with values in [-1, 1].

    Examples
    --------
    >>> w = torch.tensor([[0.5, -1.0, 0.1, 0.0]])
    >>> CodebookGrid(NF4, block_size=4).encode(w).dequantize()
    tensor([[ 0.4407, -1.0000,  0.0796,  0.0000]])
    """

    codebook: Tensor
    block_size: int = 64
    double_quant: bool = False
    absmax: Tensor | None = None

    def fit(self, weight: Tensor) -> CodebookGrid:
        """A grid whose scales fit ``weight``."""
        _, absmax = replace(self, absmax=None)._codes(weight)
        return replace(self, absmax=absmax)

    def round(self, weight: Tensor) -> Tensor:
        """``weight`` moved to the nearest grid points, same shape and dtype."""
        return self.encode(weight).dequantize(weight.dtype)

    def encode(self, weight: Tensor) -> CodebookTensor:
        """``weight`` as packed 4-bit codes."""
        if self.codebook.numel() != 16:
            raise ValueError(f"4-bit codes need a codebook of 16 values, got {self.codebook.numel()}")
        codes, absmax = self._codes(weight)
        is_nf4 = torch.equal(self.codebook.cpu(), NF4)
        codes = torch.nn.functional.pad(codes, (0, codes.numel() % 2), value=7 if is_nf4 else 0)
        packed = codes[::2] << 4 | codes[1::2]
        scales = DoubleQuantized.encode(absmax) if self.double_quant else absmax
        kind = NF4Tensor if is_nf4 else CodebookTensor
        return kind(packed, scales, tuple(weight.shape), weight.dtype, self.block_size, self.codebook)

    def _codes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        if not weight.is_floating_point():
            raise TypeError(f"weight must be floating point, got {weight.dtype}")
        if self.block_size < 1:
            raise ValueError(f"block_size must be positive, got {self.block_size}")
        if weight.numel() == 0:
            raise ValueError(f"weight is empty, shape {tuple(weight.shape)}")
        flat = weight.detach().reshape(-1).float()
        if not all(extreme.isfinite() for extreme in flat.aminmax()):
            raise ValueError("weight holds NaN or infinity (as float32): mend it before quantizing")
        table, order = self.codebook.to(weight.device, torch.float32).sort(stable=True)
        if table[0] < -1 or table[-1] > 1:
            raise ValueError(f"a codebook lies in [-1, 1], got {table[0]:g} to {table[-1]:g}: rescale it")
        if self.absmax is None:
            codes, absmax = _blockwise_codes(flat, table, self.block_size)
        else:
            absmax = self.absmax
            spread = absmax.clamp(min=_TINY).repeat_interleave(self.block_size)[: flat.numel()]
            codes = _nearest((flat / spread).clamp(-1, 1), table)
        return order.to(torch.uint8).index_select(0, codes.int()), absmax


def quantize_nf4(weight: Tensor, block_size: int = 64, double_quant: bool = False) -> NF4Tensor:
    """Quantize a weight to 4-bit NormalFloat.

    Parameters
    ----------
    weight : Tensor
        Any shape, floating point, finite; flattened and cut into blocks, the last may be short.
    block_size : int
        Weights that share a scale.
    double_quant : bool
        Also quantize the scales: 4.5 → 4.127 bits a weight at block size 64.

    Returns
    -------
    NF4Tensor

    Raises
    ------
    ValueError
        On NaN, infinity, an empty weight or a block size below 1.

    Examples
    --------
    >>> q = quantize_nf4(torch.linspace(-1, 1, 4096).view(64, 64))
    >>> q.packed.shape, q.bits_per_weight
    (torch.Size([2048]), 4.5)
    """
    return CodebookGrid(NF4, block_size, double_quant).encode(weight)  # type: ignore[return-value]
