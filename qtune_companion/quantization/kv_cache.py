"""A quantized KV cache for transformers: what attention remembers, in 2, 3, 4 or 8 bits.

Keys share a step along tokens, values along channels; the last tokens stay as they came: Liu et al. 2024, "KIVI"
(arXiv:2402.02750), section 3. So does the first: Hooper et al. 2024, "KVQuant" (arXiv:2401.18079), section 3. Heads
may be turned before: Ashkboos et al. 2024, "QuaRot" (arXiv:2404.00456), section 4. Explained in chapter 10.

Copy this file: it needs torch and transformers 5.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

__all__ = ["QuantizedCache", "decode_blocks", "encode_blocks"]


@torch.no_grad()
def encode_blocks(x: Tensor, bits: int, block_size: int, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, step and minimum of each run of ``block_size`` numbers along an axis.

    Parameters
    ----------
    x : Tensor
        (batch, heads, tokens, channels), channels a multiple of 8.
    bits, block_size, axis : int
        2, 3, 4 or 8; a divisor of the axis; -2 (a channel of some tokens) or -1 (some channels of a token).

    Returns
    -------
    packed, step, low : Tensor
        uint8 (batch, heads, tokens, channels * bits / 8), eight codes in ``bits`` bytes, little-endian; and
        float16, one a block, shaped as x with the axis cut in (blocks, 1).

    Raises
    ------
    ValueError
        On other arguments or shapes, and on NaN, infinity or numbers beyond float16.

    Examples
    --------
    >>> packed, step, low = encode_blocks(torch.arange(8.0).view(1, 1, 1, 8), bits=3, block_size=8, axis=-1)
    >>> packed.tolist(), step.item(), decode_blocks(packed, step, low, bits=3)[0, 0, 0, 5].item()
    ([[[[136, 198, 250]]]], 1.0, 5.0)
    """
    if bits not in (2, 3, 4, 8) or axis not in (-1, -2):
        raise ValueError(f"bits must be 2, 3, 4 or 8 and axis -1 or -2, got {bits} and {axis}")
    if x.ndim != 4 or x.shape[-1] % 8 or block_size < 1 or x.shape[axis] % block_size:
        need = "(batch, heads, tokens, channels), channels a multiple of 8, the axis of the block size"
        raise ValueError(
            f"x must be {need}; got {tuple(x.shape)} for blocks of {block_size} along axis {axis}"
        )
    blocks = x.float().unflatten(axis, (-1, block_size))
    low, high = (bound.half() for bound in torch.aminmax(blocks, dim=axis, keepdim=True))
    if not (low.isfinite().all() and high.isfinite().all()):
        raise ValueError(
            "NaN, infinity or numbers beyond float16 in keys or values: use QuantizedCache(None)"
        )
    step = ((high.float() - low.float()) / (2**bits - 1)).clamp(min=2**-24).half()  # never 0
    codes = ((blocks - low.float()) / step.float()).round_().clamp_(0, 2**bits - 1).view(x.shape)
    if bits == 8:
        return codes.to(torch.uint8), step, low
    shifts = torch.arange(8, device=x.device)
    words = (codes.long().unflatten(-1, (-1, 8)) << bits * shifts).sum(-1, keepdim=True)  # 8 * bits bits each
    return (words >> 8 * shifts[:bits] & 255).flatten(-2).to(torch.uint8), step, low


def decode_blocks(packed: Tensor, step: Tensor, low: Tensor, bits: int) -> Tensor:
    """Undo :func:`encode_blocks`: float32 (batch, heads, tokens, channels)."""
    axis, codes = -2 if step.shape[-2] == 1 else -1, packed
    if bits < 8:
        shifts = torch.arange(8, device=packed.device, dtype=torch.int32)
        words = packed.unflatten(-1, (-1, bits)).int() << 8 * shifts[:bits]
        words = words.sum(-1, keepdim=True, dtype=torch.int32)
        codes = (words >> bits * shifts & 2**bits - 1).flatten(-2)
    blocks = codes.unflatten(axis, (step.shape[axis - 1], -1))
    return torch.addcmul(low.float(), blocks.float(), step.float()).flatten(axis - 1, axis)


@functools.lru_cache
def _hadamard(n: int, device: torch.device) -> Tensor:
    h = torch.ones(1, 1, device=device)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / n**0.5  # symmetric and orthogonal: its own inverse


class _Layer(DynamicLayer):
    """A layer: ``keys`` and ``values`` hold the last tokens, ``stored`` the older (packed, step, low; twice)."""

    def __init__(
        self, bits: Any, blocks: tuple[int, int], residual: int, sink: int, keys: str, rotate: bool
    ) -> None:
        super().__init__()
        self.bits, self.blocks, self.residual, self.rotate = bits, blocks, residual, rotate
        self.sink, self.key_axis = sink, -2 if keys == "channel" else -1
        self.stored: list[Tensor] = []
        self.first: list[Tensor] = []  # the sink, once it has left the window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        for n in (key_states.shape[-1], value_states.shape[-1]) if self.bits else ():
            if n % 8 or n % min(self.blocks[1], n) or (self.rotate and n & (n - 1)):
                need = f"a multiple of 8 and of {self.blocks[1]}, and a power of two to rotate"
                raise ValueError(f"heads of {n} channels do not fit: need {need}")
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]

    @torch.no_grad()
    def _encode(self, x: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor]:
        if axis == -2:
            return encode_blocks(x, self.bits, self.blocks[0], axis)
        turned = x.float() @ _hadamard(x.shape[-1], x.device) if self.rotate else x
        return encode_blocks(turned, self.bits, min(self.blocks[1], x.shape[-1]), axis)

    def _decode(self) -> list[Tensor]:
        both = []
        for i, axis in enumerate((self.key_axis, -1)):
            packed, step, low = self.stored[3 * i : 3 * i + 3]
            x = decode_blocks(packed, step, low, self.bits)
            x = x @ _hadamard(x.shape[-1], x.device) if self.rotate and axis == -1 else x
            both.append(x.to(self.dtype))
            both[i][..., : self.sink, :] = self.first[i]
        return both

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        shapes = [tuple(x.shape) for x in (key_states, value_states)]
        if key_states.ndim != 4 or shapes[0][:3] != shapes[1][:3]:
            raise ValueError(f"keys and values must be (batch, heads, tokens, channels), got {shapes}")
        held = [tuple(x.shape) for x in (self.keys, self.values)] if self.is_initialized else shapes
        if any(new[:2] + new[3:] != old[:2] + old[3:] for new, old in zip(shapes, held, strict=True)):
            raise ValueError(
                f"keys and values of {shapes} do not continue {held}: use a new cache, or reset()"
            )
        keys, values = super().update(key_states, value_states)
        if self.stored:
            old_keys, old_values = self._decode()
            keys, values = torch.cat([old_keys, keys], dim=-2), torch.cat([old_values, values], dim=-2)
        n = self.keys.shape[-2] - self.residual
        n -= n % self.blocks[0]
        if self.bits and n > 0:  # the oldest of the window are stored, once
            old_keys, old_values = self.keys[..., :n, :], self.values[..., :n, :]
            new = [*self._encode(old_keys, self.key_axis), *self._encode(old_values, -1)]
            self.first = self.first or [x[..., : self.sink, :].clone() for x in (old_keys, old_values)]
            self.stored = (
                [torch.cat(pair, 2) for pair in zip(self.stored, new, strict=True)] if self.stored else new
            )
            self.keys, self.values = self.keys[..., n:, :].clone(), self.values[..., n:, :].clone()
        return keys, values

    def get_seq_length(self) -> int:
        window = self.keys.shape[-2] if self.is_initialized else 0
        return window + self.stored[0].shape[2] if self.stored else window

    def crop(self, tokens_to_remove: int) -> None:
        total = self.get_seq_length()
        old, left = self.stored[0].shape[2] if self.stored else 0, max(total + tokens_to_remove, 0)
        if left < old:  # the block that is cut comes back to the window, as it was stored
            whole = left - left % self.blocks[0]
            self.keys, self.values = (x[..., whole:left, :].clone() for x in self._decode())
            self.stored = [t[:, :, : t.shape[2] * whole // old].clone() for t in self.stored] if whole else []
            self.first = self.first if whole else []
        else:
            super().crop(tokens_to_remove)  # refuses a positive number
            self._each(torch.clone)  # a view would keep all alive

    def reset(self) -> None:
        super().reset()
        self.stored, self.first = [], []

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self.keys, self.values = change(self.keys), change(self.values)
            self.stored, self.first = [*map(change, self.stored)], [*map(change, self.first)]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda t: t[indices])


class QuantizedCache(Cache):
    """Give it to a causal model as ``past_key_values``, in ``model(...)`` or ``model.generate(...)``.

    A chunk sees itself and the window as they came, and older tokens as stored; then the oldest of the window
    are stored, once. So a prompt that is read in one piece is read without loss.

    Parameters
    ----------
    bits : {2, 3, 4, 8} or None
        Bits a number; None: nothing is quantized, and logits are those of ``DynamicCache``.
    block_size : int or (int, int)
        Tokens that share a step in a channel of the keys; channels that share one in a token of the values (at
        most a head's). A block has two float16 numbers of its own: 32 / block_size bits for each of its members.
    residual : int
        At least so many of the last tokens, and less than a block more, stay in the model's dtype.
    sink : int
        The first tokens, at most a block of the keys, stay exact too: attention rests on them. In a batch that
        is padded on the left they are padding: results stay valid, but a row's own first token is rounded.
    keys : {"channel", "token"}
        Which numbers of the keys share a step.
    rotate : bool
        Turn what shares a step along channels by a Hadamard matrix, and back when it is read.

    Raises
    ------
    ValueError
        On other arguments; at the first use, when the heads' sizes do not fit; at any, when batch, heads or
        channels are not those of the tokens held; on NaN, infinity or numbers beyond float16.

    Notes
    -----
    All layers are kept as full attention (a sliding window is masked, not forgotten). Layers with a recurrent
    state need a cache of their own: transformers says so. Each call decodes all that is stored, layer by layer.

    Examples
    --------
    >>> cache = QuantizedCache(bits=4, block_size=64, residual=0, sink=0)
    >>> keys, values = cache.update(torch.ones(1, 2, 64, 32), torch.ones(1, 2, 64, 32), layer_idx=0)
    >>> cache.nbytes, cache.get_seq_length()  # 2 * 4096 codes of 4 bits; 64 + 128 blocks with 4 bytes each
    (4864, 64)
    """

    def __init__(
        self,
        bits: int | None = 4,
        block_size: int | tuple[int, int] = 128,
        residual: int = 128,
        sink: int = 1,
        keys: str = "channel",
        rotate: bool = False,
    ) -> None:
        blocks = tuple(block_size) if isinstance(block_size, (tuple, list)) else (block_size, block_size)
        if bits not in (2, 3, 4, 8, None) or isinstance(bits, float):
            raise ValueError(f"bits must be 2, 3, 4, 8 or None, got {bits}")
        whole = all(isinstance(n, int) for n in (*blocks, residual, sink))
        if not whole or len(blocks) != 2 or min(blocks) < 1 or residual < 0 or not 0 <= sink <= blocks[0]:
            need = "integers: one or two block sizes >= 1, residual >= 0 and 0 <= sink <= block size"
            raise ValueError(f"need {need}, got {block_size}, {residual} and {sink}")
        if keys not in ("channel", "token"):
            raise ValueError(f"keys must be 'channel' or 'token', got {keys!r}")
        layer = functools.partial(_Layer, bits, blocks, residual, sink, keys, rotate)
        super().__init__(layer_class_to_replicate=layer)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept: codes, steps, minima and the window."""
        layers = [layer for layer in self.layers if layer.is_initialized]
        tensors = [t for layer in layers for t in (layer.keys, layer.values, *layer.stored, *layer.first)]
        return sum(t.untyped_storage().nbytes() for t in tensors)
