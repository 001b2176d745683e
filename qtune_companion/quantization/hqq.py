"""HQQ: a real-valued zero point for each block, found without any data by a half-quadratic solver.

Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models" (Mobius Labs), with the constants of
their library, ``hqq``. Explained in chapter 8.

Copy this file: it needs only torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["HQQTensor", "hqq"]


@dataclass(frozen=True)
class HQQTensor:
    """A quantized tensor ``scale * (code - zero)``, with a real-valued zero point for each block of a row.

    ``packed`` is uint8: the codes' bits one after another, lowest first, eight a byte, the end padded with zeros.
    ``scale`` and ``zero`` are (blocks, 1), float16, the blocks in the order of the flattened weight.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    block_size: tuple[int, int]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def codes(self) -> Tensor:
        """Codes 0 … 2**bits - 1, uint8, in the weight's shape."""
        count = math.prod(self.shape)
        codes = self.packed.new_empty(-(-count // 8), 8)
        padded = torch.nn.functional.pad(self.packed, (0, self.bits * len(codes) - len(self.packed)))
        word = torch.zeros(len(codes), dtype=torch.int64, device=self.packed.device)
        for i, byte in enumerate(padded.view(-1, self.bits).unbind(1)):
            word |= byte.long() << 8 * i
        for i in range(8):
            codes[:, i] = word >> self.bits * i & 2**self.bits - 1
        return codes.flatten()[:count].view(self.shape)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight, shape ``shape``, in ``dtype`` (default: the original one)."""
        codes = self.codes.view(-1, self.block_size[1]).float()  # (blocks, block)
        return ((codes - self.zero.float()) * self.scale.float()).view(self.shape).to(dtype or self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes stored: codes, scales and zero points."""
        return self.packed.nbytes + self.scale.nbytes + self.zero.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a weight, everything counted."""
        return 8 * self.nbytes / math.prod(self.shape)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Eight codes of ``bits`` bits at a time make ``bits`` bytes; bytes that hold padding alone are cut off."""
    eights = torch.nn.functional.pad(codes.flatten(), (0, -codes.numel() % 8)).view(-1, 8)
    word = torch.zeros(len(eights), dtype=torch.int64, device=codes.device)
    for i, code in enumerate(eights.unbind(1)):
        word |= code.long() << bits * i
    packed = codes.new_empty(len(eights), bits)
    for i in range(bits):
        packed[:, i] = word >> 8 * i & 255
    return packed.flatten()[: -(-codes.numel() * bits // 8)]


@torch.no_grad()
def hqq(
    weight: Tensor,
    bits: int,
    block_size: tuple[int, int],
    iters: int = 20,
    p: float = 0.7,
    beta: float = 10.0,
) -> HQQTensor:
    """Quantize a weight by its values alone: min-max scales, zero points by half-quadratic splitting.

    Alternates ``E = shrink(W - W^)``, the part of the error that is treated as outliers, and
    ``zero = mean(code - (W - E) / scale)``, until the mean magnitude of the error no longer falls.

    Parameters
    ----------
    weight : Tensor
        ``(out, in)``, floating point, finite.
    bits : int
        Bits a code, 1 to 8.
    block_size : tuple of int
        ``(1, g)``: g weights in a row share a scale and a zero point; g divides ``in``, -1 is the whole row.
    iters : int
        Steps at most; 0 rounds with the min-max zero point, left unrounded.
    p, beta : float
        Exponent of the error's norm, and strength of the coupling (the paper lets it grow by 1% a step, the library
        keeps it). With the defaults an error below 0.17 is no outlier.

    Returns
    -------
    HQQTensor

    Raises
    ------
    ValueError, TypeError
        On bits outside 1 … 8, a block size that does not fit, an empty weight, NaN or infinity, integers.

    Examples
    --------
    >>> quantized = hqq(torch.linspace(-1, 1, 128).view(2, 64), bits=4, block_size=(1, 64))
    >>> quantized.bits_per_weight, quantized.codes[0, :8].tolist()
    (4.5, [0, 0, 0, 1, 1, 1, 1, 2])
    """
    if not weight.is_floating_point():
        raise TypeError(f"weight must be floating point, got {weight.dtype}")
    if weight.ndim != 2 or weight.numel() == 0 or not all(x.isfinite() for x in weight.aminmax()):
        raise ValueError(f"weight must be (out, in), finite and not empty, got shape {tuple(weight.shape)}")
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits}")
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    size = block_size[-1] if block_size[-1] != -1 else weight.shape[1]
    if len(block_size) != 2 or block_size[0] != 1 or size < 1 or weight.shape[1] % size:
        raise ValueError(f"block_size must be (1, g) with g a divisor of {weight.shape[1]}, got {block_size}")
    w, top = weight.float().reshape(-1, size), 2**bits - 1  # (blocks, block)
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    inverse = torch.where(high - low <= 1e-4, 1.0, top / (high - low)).clamp(max=2e4)  # of the scale
    scale, zero, least = 1 / inverse, -low * inverse, math.inf
    # in place where it can be: fresh memory for a large tensor costs more than the arithmetic on it
    steps = w * inverse
    codes, error, magnitude = (torch.empty_like(w) for _ in range(3))
    for _ in range(iters):
        torch.add(steps, zero, out=codes).round_().clamp_(0, top)
        torch.sub(codes, zero, out=error).mul_(-scale).add_(w)
        torch.abs(error, out=magnitude)
        mean, target = magnitude.mean().item(), steps
        if magnitude.max() ** (2 - p) > 1 / beta:  # else shrinking leaves nothing, and need not be computed
            outliers = (magnitude - 1 / beta * magnitude ** (p - 1)).clamp_(min=0) * error.sign()
            target = (w - outliers) * inverse
        zero = torch.sub(codes, target, out=error).mean(1, keepdim=True)
        if mean >= least:
            break
        least = mean
    codes = torch.add(steps, zero, out=codes).round_().clamp_(0, top).to(torch.uint8)
    scale, zero = scale.half(), zero.half()
    if not (torch.isfinite(scale).all() and torch.isfinite(zero).all()):
        raise ValueError(
            "a block is too large, or too far from 0 for its spread, for a scale and zero in float16"
        )
    return HQQTensor(_pack(codes, bits), scale, zero, bits, (1, size), tuple(weight.shape), weight.dtype)
