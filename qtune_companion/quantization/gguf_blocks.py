"""GGUF's block formats: the bytes of a tensor in a ``.gguf`` file, decoded to float32.

The formats of llama.cpp's ggml library (github.com/ggml-org/llama.cpp, ``ggml/src/ggml-common.h``): Q4_0, Q4_1
and Q8_0 with blocks of 32 weights, and the "k-quants" Q4_K and Q6_K (pull request 1684 of llama.cpp) with
super-blocks of 256. A block keeps its scales and codes side by side. The decoded bits agree with the ``gguf``
package 0.19. Explained in chapter 4.

Copy this file: it needs only torch.

======  =======  =====  ====  ==================================================================
kind    weights  bytes  bits  a block's bytes, in order (f16: little-endian float16)
======  =======  =====  ====  ==================================================================
Q4_0    32       18     4.5   f16 scale; 16 of codes
Q4_1    32       20     5     f16 scale, f16 minimum; 16 of codes
Q8_0    32       34     8.5   f16 scale; 32 signed codes
Q4_K    256      144    4.5   f16 scale, f16 minimum; 12 of 6-bit scales and minima; 128 of codes
Q6_K    256      210    6.56  128 of low 4 bits, 64 of high 2 bits; 16 signed scales; f16 scale
======  =======  =====  ====  ==================================================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["GGUF_BLOCKS", "GGUFTensor", "dequantize_gguf"]

GGUF_BLOCKS = {"Q4_0": (32, 18), "Q4_1": (32, 20), "Q8_0": (32, 34), "Q4_K": (256, 144), "Q6_K": (256, 210)}
"""Weights and bytes of one block."""


def _half(raw: Tensor) -> Tensor:
    """Pairs of bytes, uint8 (n, 2 * k), as float16 numbers, float32 (n, k)."""
    return raw.clone(memory_format=torch.contiguous_format).view(torch.float16).float()


def _codes(raw: Tensor, bits: int, run: int) -> Tensor:
    """Codes of ``bits`` bits, uint8 (n, codes): of each ``run`` bytes first all lowest bits, then the next."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=raw.device)[:, None]
    runs = raw.reshape(len(raw), raw.shape[1] // run, 1, run)
    return (runs >> shifts & (2**bits - 1)).flatten(1)


def _q4_0(raw: Tensor) -> Tensor:
    return _half(raw[:, :2]) * (_codes(raw[:, 2:], 4, 16).float() - 8)


def _q4_1(raw: Tensor) -> Tensor:
    scale, minimum = _half(raw[:, :4]).split(1, 1)
    return scale * _codes(raw[:, 4:], 4, 16).float() + minimum


def _q8_0(raw: Tensor) -> Tensor:
    return _half(raw[:, :2]) * raw[:, 2:].view(torch.int8).float()


def _q4_k(raw: Tensor) -> Tensor:
    scale, minimum = _half(raw[:, :4]).split(1, 1)  # (n, 1): they scale the scales
    low, middle, high = raw[:, 4:16].split(
        4, 1
    )  # (n, 4); the top bits of low and middle belong to blocks 4 … 7
    steps = torch.cat([low & 63, high & 15 | low >> 6 << 4], 1)  # (n, 8), 6 bits
    minima = torch.cat([middle & 63, high >> 4 | middle >> 6 << 4], 1)
    codes = _codes(raw[:, 16:], 4, 32).float().view(len(raw), 8, 32)
    return ((scale * steps.float())[..., None] * codes - (minimum * minima.float())[..., None]).flatten(1)


def _q6_k(raw: Tensor) -> Tensor:
    codes = _codes(raw[:, :128], 4, 64) | _codes(raw[:, 128:192], 2, 32) << 4  # (n, 256), 0 … 63
    steps = _half(raw[:, 208:]) * raw[:, 192:208].view(torch.int8).float()  # (n, 16)
    return (steps[..., None] * (codes.float() - 32).view(len(raw), 16, 16)).flatten(1)


_DECODERS = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q8_0": _q8_0, "Q4_K": _q4_k, "Q6_K": _q6_k}


def dequantize_gguf(raw: Tensor, kind: str) -> Tensor:
    """Decode the blocks of a GGUF tensor.

    Parameters
    ----------
    raw : Tensor
        uint8, ``(..., blocks * bytes a block)``: rows of whole blocks, as they lie in the file.
    kind : str
        ``"Q4_0"``, ``"Q4_1"``, ``"Q8_0"``, ``"Q4_K"`` or ``"Q6_K"``.

    Returns
    -------
    Tensor
        float32, ``(..., blocks * weights a block)``.

    Raises
    ------
    ValueError
        On another kind, or when the last axis is not a whole number of blocks.
    TypeError
        When ``raw`` is not uint8.

    Examples
    --------
    >>> block = torch.zeros(18, dtype=torch.uint8)
    >>> block[1], block[2] = 0x3C, 0x9F  # the float16 number 1.0, low byte first; codes 15 and 9
    >>> weights = dequantize_gguf(block, "Q4_0")
    >>> weights[0], weights[1], weights[16]
    (tensor(7.), tensor(-8.), tensor(1.))
    """
    if kind not in GGUF_BLOCKS:
        raise ValueError(f"kind must be one of {', '.join(GGUF_BLOCKS)}, got {kind!r}")
    if raw.dtype != torch.uint8:
        raise TypeError(f"raw must be uint8, the file's bytes, got {raw.dtype}")
    weights, size = GGUF_BLOCKS[kind]
    if raw.dim() == 0 or raw.shape[-1] % size:
        raise ValueError(f"{kind} blocks have {size} bytes, which do not divide the shape {tuple(raw.shape)}")
    blocks = raw.reshape(-1, size)  # (blocks, bytes)
    return _DECODERS[kind](blocks).view(*raw.shape[:-1], raw.shape[-1] // size * weights)


@dataclass(frozen=True)
class GGUFTensor:
    """A quantized tensor that keeps its weight as the file does and decodes when asked."""

    raw: Tensor  # uint8 (rows, blocks * bytes a block)
    kind: str
    dtype: torch.dtype = torch.float32

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight, shape ``shape``, in ``dtype`` (default: the tensor's own)."""
        return dequantize_gguf(self.raw, self.kind).to(dtype or self.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight: rows, then columns."""
        weights, size = GGUF_BLOCKS[self.kind]
        return (*self.raw.shape[:-1], self.raw.shape[-1] // size * weights)

    @property
    def nbytes(self) -> int:
        """Bytes stored, scales and all."""
        return self.raw.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a weight, scales counted."""
        return 8 * self.nbytes / math.prod(self.shape)
