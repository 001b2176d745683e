"""Packing small codes into bytes: 2, 3 or 4 bits a code.

A little-endian bit stream: code ``i`` occupies bits ``i*bits … i*bits + bits - 1``, and bit ``k`` of
the stream is bit ``k % 8`` of byte ``k // 8``. The last byte is filled up with zeros. Three-bit codes
therefore cross byte borders: eight of them take exactly three bytes. Explained in chapter 9.

(bitsandbytes' NF4 keeps the *first* of two codes in the *high* half of the byte; see ``codebook.py``.)

Copy this file: it needs only torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pack_bits", "unpack_bits"]


def _check_bits(bits: int) -> None:
    if bits not in (2, 3, 4):
        raise ValueError(f"bits must be 2, 3 or 4, got {bits}")


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack integer codes into bytes.

    Parameters
    ----------
    codes : Tensor
        Integers from 0 to ``2**bits - 1``, any shape; read in row-major order.
    bits : int
        2, 3 or 4.

    Returns
    -------
    Tensor
        uint8, one-dimensional, ``ceil(codes.numel() * bits / 8)`` bytes.

    Raises
    ------
    ValueError
        On other bits, or a code that does not fit.

    Examples
    --------
    >>> pack_bits(torch.tensor([1, 2, 3]), bits=4)
    tensor([33,  3], dtype=torch.uint8)
    """
    _check_bits(bits)
    if codes.is_floating_point():
        raise TypeError(f"codes must be integers, got {codes.dtype}")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2**bits):
        bad = codes[(codes < 0) | (codes >= 2**bits)].flatten()[0].item()
        raise ValueError(f"code {bad} does not fit in {bits} bits (0 to {2**bits - 1})")
    eights = torch.nn.functional.pad(codes.reshape(-1), (0, -codes.numel() % 8)).view(-1, 8).int()
    word = torch.zeros_like(eights[:, 0])  # eight codes: at most 32 bits
    for i, code in enumerate(eights.unbind(1)):
        word |= code << bits * i
    packed = torch.stack([word >> 8 * i & 255 for i in range(bits)], 1).to(torch.uint8)
    return packed.flatten()[: -(-codes.numel() * bits // 8)]


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undo :func:`pack_bits`.

    Parameters
    ----------
    packed : Tensor
        uint8, as :func:`pack_bits` returns it.
    bits : int
        2, 3 or 4.
    count : int
        How many codes to return.

    Returns
    -------
    Tensor
        uint8 codes, shape ``(count,)``.

    Raises
    ------
    ValueError
        When the bytes cannot hold ``count`` codes.
    """
    _check_bits(bits)
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed must be uint8, got {packed.dtype}")
    if not 0 <= count * bits <= packed.numel() * 8:
        raise ValueError(f"{packed.numel()} bytes cannot hold {count} codes of {bits} bits")
    flat = packed.reshape(-1)[: -(-count * bits // 8)]
    words = torch.nn.functional.pad(flat, (0, -len(flat) % bits)).view(-1, bits).int()
    word = torch.zeros_like(words[:, 0])
    for i, byte in enumerate(words.unbind(1)):
        word |= byte << 8 * i
    codes = torch.stack([word >> bits * i & 2**bits - 1 for i in range(8)], 1)
    return codes.flatten()[:count].to(torch.uint8)
