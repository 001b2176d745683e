"""A gated MLP that keeps less for its backward pass: SwiGLU by recomputation.

``down(silu(gate(x)) * up(x))`` is the feed-forward part of Llama-like models (Shazeer 2020, "GLU Variants
Improve Transformer", arXiv:2002.05202, equation 6). Written with two operations, autograd keeps three tensors of
(tokens, inner) for them: the gate before and after its nonlinearity, and the other branch. The second
follows from the first at the price of one elementwise pass. Used in chapter 15.

Copy this file: it needs only torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["GatedMLP", "lean_swiglu_"]


class _SwiGLU(torch.autograd.Function):
    """``silu(gate) * up``, saving its two inputs only."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,) = grads
        gate, up = ctx.saved_tensors
        share = torch.sigmoid(gate)
        slope = (gate * (1 - share)).add_(1).mul_(share)  # silu'(g) = σ(g) (1 + g (1 - σ(g)))
        return slope.mul_(up).mul_(grad), share.mul_(gate).mul_(grad)


class GatedMLP(nn.Module):
    """``down(silu(gate(x)) * up(x))`` over three layers that it takes as they are.

    Parameters
    ----------
    gate_proj, up_proj : nn.Module
        (…, width) to (…, inner).
    down_proj : nn.Module
        (…, inner) to (…, width).

    Examples
    --------
    >>> mlp = GatedMLP(nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4))
    >>> x = torch.randn(2, 4)
    >>> by_hand = mlp.down_proj(nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    >>> torch.allclose(mlp(x), by_hand)
    True
    """

    def __init__(self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj

    def forward(self, x: Tensor) -> Tensor:
        """Input ``(…, width)`` → output ``(…, width)``."""
        hidden: Tensor = _SwiGLU.apply(self.gate_proj(x), self.up_proj(x))
        return self.down_proj(hidden)


@torch.no_grad()
def lean_swiglu_(model: nn.Module) -> list[str]:
    """Put a :class:`GatedMLP` wherever a module computes the same, in place; return their names.

    A candidate holds ``gate_proj``, ``up_proj``, ``down_proj`` and perhaps a nonlinearity, and no parameter
    besides. It is replaced only when both give the same outputs for random inputs, so a model with another
    nonlinearity, or none of these layers, stays as it is. Parameter names do not change.
    """
    changed = []
    for name, module in list(model.named_modules()):
        children = dict(module.named_children())
        if not name or set(children) - {"act_fn"} != {"gate_proj", "up_proj", "down_proj"}:
            continue
        lean = GatedMLP(children["gate_proj"], children["up_proj"], children["down_proj"]).train(
            module.training
        )
        width = getattr(children["gate_proj"], "in_features", None)
        tensor = next(iter([*module.parameters(), *module.buffers()]), None)
        if width is None or tensor is None or any(True for _ in module.parameters(recurse=False)):
            continue
        dtype = tensor.dtype if tensor.is_floating_point() else torch.float32
        probe = torch.randn(2, 3, width, device=tensor.device, dtype=dtype)
        probe *= 2 / lean.gate_proj(probe).std().clamp(min=1e-6)  # where nonlinearities differ
        expected = module(probe)
        if (lean(probe) - expected).norm() <= 1e-3 * expected.norm():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, lean)
            changed.append(name)
    return changed
