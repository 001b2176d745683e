"""Rotations: Hadamard matrices, and a Llama-style model turned so that its activations lie flat.

Ashkboos et al. 2024, "QuaRot" (arXiv:2404.00456), section 4. Explained in chapter 5.
Copy this file: it needs only torch.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["HadamardTransform", "hadamard", "rotate_"]


def _paley(q: int) -> Tensor:
    """Order q + 1 from a prime q = 3 (mod 4): Paley's first construction."""
    square = torch.full((q,), -1.0).index_fill(0, torch.arange(q) ** 2 % q, 1.0)  # 1 at 0 and the squares
    core = square[(torch.arange(q)[:, None] - torch.arange(q)) % q]
    return F.pad(F.pad(core, (1, 0), value=-1.0), (0, 0, 1, 0), value=1.0)


def _factors(n: int) -> tuple[Tensor, ...]:
    """Hadamard matrices whose Kronecker product has order n (Paley's, then Sylvester's), or none."""
    if n > 0 and n & (n - 1) == 0:
        two = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
        h = functools.reduce(torch.kron, [two] * min(n.bit_length() - 1, 7), torch.ones(1, 1))
        return (h, *_factors(n // 128)) if n > 128 else (h,)
    for order in (m for m in range(12, n + 1, 4) if n % m == 0 and m & (m - 1)):
        if all((order - 1) % d for d in range(2, math.isqrt(order) + 1)) and _factors(n // order):
            return (_paley(order - 1), *_factors(n // order))
    return ()


def _known_factors(n: int) -> tuple[Tensor, ...]:
    if not (factors := _factors(n)):
        raise ValueError(f"no Hadamard matrix of order {n} here: no product of 2 and q + 1, q prime, 3 mod 4")
    return factors


def hadamard(n: int) -> Tensor:
    """Hadamard matrix, float32 (n, n): entries ±1 and orthogonal rows, ``H @ H.T == n * I``.

    Sylvester's for powers of two, else a Kronecker product with Paley's of order q + 1 (q prime, 3 mod 4),
    least first: 576 = 12 · 12 · 4, 1536 = 12 · 128. ValueError for an order that is no such product.

    Examples
    --------
    >>> h = hadamard(12)
    >>> torch.equal(h @ h.T, 12 * torch.eye(12)), h.unique().tolist()
    (True, [-1.0, 1.0])
    """
    return functools.reduce(torch.kron, _known_factors(n))


class HadamardTransform(nn.Module):
    """``x @ hadamard(n) / n ** 0.5`` over the last axis, one Kronecker factor at a time; keeps the dtype."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n, self.factors = n, _known_factors(n)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y = x.unflatten(-1, [len(factor) for factor in self.factors])
        # Each factor takes the first of these axes and puts its result last; scaled one by one, lest float16 overflow.
        for factor in self.factors:
            y = torch.tensordot(y, factor.to(y) / len(factor) ** 0.5, dims=([x.ndim - 1], [0]))
        return y.reshape(x.shape)


@torch.no_grad()
def rotate_(model: Any, online: bool = True, q: Tensor | None = None) -> Tensor:
    """Rotate a Llama-style causal model in place; its logits stay what they were, up to rounding.

    Norm weights are folded into the layers that read them, a tied output layer is untied, the residual
    stream h becomes h Q, and each head's values are turned by a Hadamard matrix. Returns Q, float64.
    ValueError, and no change, on other layers, norms that are not two RMSNorms a layer, a size without H, a bad Q.

    Parameters
    ----------
    model : causal language model
        With Llama's attributes (as Mistral, Qwen2 and SmolLM2), and two RMSNorms a layer.
    online : bool
        Turn the input of ``down_proj`` too. It follows a nonlinearity, so no weight before it can do that:
        it becomes ``Sequential(HadamardTransform(n), down_proj)``, which ``from_pretrained`` cannot load.
    q : Tensor, optional
        Orthogonal, (hidden, hidden). Default: a Hadamard matrix whose rows got random signs (seed 0).
    """
    body, head, embed = model.model, model.lm_head, model.model.embed_tokens
    parts = {
        "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "mlp": ("gate_proj", "up_proj", "down_proj"),
    }
    for i, block in enumerate(body.layers):
        for where, leaves in parts.items():
            for leaf in leaves:
                if not hasattr(getattr(getattr(block, where, None), leaf, None), "in_features"):
                    raise ValueError(
                        f"layer {i} has no linear layer {where}.{leaf}: not Llama's kind, or rotated already"
                    )
    hidden, size = embed.weight.shape[1], body.layers[0].self_attn.head_dim
    width = body.layers[0].mlp.down_proj.in_features if online else 1
    fast, per_head, inner = (HadamardTransform(n) for n in (hidden if q is None else 1, size, width))
    signs = torch.randint(2, (hidden,), generator=torch.Generator().manual_seed(0)) * 2 - 1
    turn = (lambda w: fast(w * signs.to(w))) if q is None else (lambda w: w @ q.to(w))
    one = torch.eye(hidden, dtype=torch.float64, device=embed.weight.device)
    if q is not None and (q.shape != one.shape or not torch.allclose(turn(q.to(one).T), one, atol=1e-5)):
        raise ValueError(f"q of shape {tuple(q.shape)} must be orthogonal and ({hidden}, {hidden})")
    x = torch.linspace(-1, 2, hidden).to(embed.weight)
    for name, norm in body.named_modules():
        if name.endswith(("layernorm", "norm")) and not name.endswith(("q_norm", "k_norm")):
            known = name.endswith((".input_layernorm", ".post_attention_layernorm")) or name == "norm"
            plain = x * x.square().mean().rsqrt() * norm.weight
            if not known or (norm(x) - plain).abs().max() > 0.02 * plain.abs().max():
                raise ValueError(f"{name} is not one of a layer's two RMSNorms, x / rms(x) * weight")

    def rows(w: Tensor, by: Any = turn) -> None:  # in parts, so that no large matrix lies in float64 whole
        for part in w.split(4096):
            part.copy_(by(part.double()))

    def read(norm: Any, *layers: Any) -> None:
        for layer in layers:
            rows(layer.weight, lambda w: turn(w * norm.weight.double()))
        norm.weight.fill_(1)

    def write(by: Any, n: int, *layers: Any) -> None:  # outputs, in runs of n, are turned
        for p in (p for layer in layers for p in layer.parameters()):
            runs = p.double().view(-1, n, p.numel() // len(p)).transpose(1, 2)
            p.copy_(by(runs).transpose(1, 2).reshape(p.shape))

    if head.weight is embed.weight:
        head.weight = nn.Parameter(embed.weight.clone(), embed.weight.requires_grad)
        model.config.tie_word_embeddings = False
    rows(embed.weight)
    for block, attention, mlp in ((b, b.self_attn, b.mlp) for b in body.layers):
        read(block.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj)
        read(block.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
        write(per_head, size, attention.v_proj)
        o = attention.o_proj.weight
        o.copy_(per_head(o.double().unflatten(1, (-1, size))).flatten(1))
        write(turn, hidden, attention.o_proj, mlp.down_proj)
        if online:
            rows(mlp.down_proj.weight, inner)
            mlp.down_proj = nn.Sequential(inner, mlp.down_proj)
    read(body.norm, head)
    return turn(one)
