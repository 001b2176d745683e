"""Calibration: what a model's layers see while it reads a little text.

The inputs themselves; their second moments ``E[x x^T]``, the Hessian of a layer's squared output error up to a factor
(Frantar et al. 2022, "GPTQ", arXiv:2210.17323, section 3); or each channel's largest magnitude. Explained in chapter 6.

Copy this file: it needs only torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["collect_absmax", "collect_hessians", "collect_inputs"]
Batches = Iterable[Tensor]
Names = Iterable[str] | None


def _targets(model: nn.Module, names: Names) -> dict[str, nn.Module]:
    """The modules to watch, by name, after a check."""
    modules, owners = dict(model.named_modules()), dict[int, list[str]]()
    for name, module in modules.items():
        if (weight := module._parameters.get("weight")) is not None:  # its own, not the wrapped layer's
            owners.setdefault(weight.data_ptr(), []).append(name)
    tied = {name: together for together in owners.values() for name in together if len(together) > 1}
    if names is None:
        names = [n for n, m in modules.items() if isinstance(m, nn.Linear) and n not in tied]
    wanted = [names] if isinstance(names, str) else list(names)
    if not wanted:
        raise ValueError(f"no layers to watch in {type(model).__name__}: give some names")
    for name in wanted:
        if name not in modules:
            raise ValueError(f"{type(model).__name__} has no layer {name!r}: see model.named_modules()")
        if name in tied:
            raise ValueError(
                f"one weight is tied to {' and '.join(tied[name])}: what suits {name} would spoil the other. Leave it "
                f"out, or untie it first (clone the weight)"
            )
    return {name: modules[name] for name in wanted}


@torch.no_grad()
def _watch(model: nn.Module, batches: Batches, names: Names, note: Callable[[str, Tensor], None]) -> None:
    """Run the model on each batch; ``note(name, x)`` gets every input of a layer as (tokens, in)."""
    targets, tokens = _targets(model, names), 0
    idle = dict.fromkeys(targets)

    def look(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        if not torch.isfinite(x).all():
            raise ValueError(
                f"the input of {name} holds NaN or infinity: calibrate in float32 or bfloat16, and check the weights "
                f"of the layers before it"
            )
        if x.numel():
            idle.pop(name, None)
            note(name, x.flatten(0, -2))

    tensors = [*model.parameters(), *model.buffers()]
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    handles = [m.register_forward_pre_hook(partial(look, n), with_kwargs=True) for n, m in targets.items()]
    try:
        for batch in batches:
            tokens += batch.numel()
            if batch.numel():
                model(batch.to(tensors[0].device) if tensors else batch)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in was_training.items():
            module.training = mode
    if tokens == 0:
        raise ValueError("no calibration text: batches is empty, or a generator that was read before")
    if idle:
        raise ValueError(
            f"never called during calibration: {', '.join(idle)}. Leave them out of names, or give text that reaches "
            f"them (a rarely chosen expert may need much of it)"
        )


def collect_inputs(model: nn.Module, batches: Batches, names: Names = None) -> dict[str, Tensor]:
    """All inputs of some layers, ``{name: (tokens, in)}``, in the model's dtype and on its device.

    Parameters
    ----------
    model : nn.Module
        Called as ``model(batch)`` in eval mode, without gradients; left as it was.
    batches : iterable of Tensor
        Calibration text: token ids (B, T) without padding, or whatever the model takes.
    names : iterable of str, optional
        Layers, as in ``model.named_modules()``. Default: all linear layers but those that share their weight with
        another module, as an output layer tied to the embedding does.

    Raises
    ------
    ValueError
        On no text, no such layer, a layer that is never called, one whose weight is tied, or an input with NaN or
        infinity.

    Examples
    --------
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    >>> {name: tuple(x.shape) for name, x in collect_inputs(model, [torch.ones(4, 2), torch.ones(1, 2)]).items()}
    {'0': (5, 2), '2': (5, 3)}
    """
    seen: dict[str, list[Tensor]] = {}
    _watch(model, batches, names, lambda name, x: seen.setdefault(name, []).append(x.clone()))
    return {name: torch.cat(parts) for name, parts in seen.items()}


def collect_hessians(model: nn.Module, batches: Batches, names: Names = None) -> dict[str, Tensor]:
    """Mean of ``x x^T`` over all tokens, ``{name: (in, in)}``, float32; arguments, errors as :func:`collect_inputs`."""
    sums, counts = dict[str, Tensor](), dict[str, int]()
    last: list[Tensor] = []  # an input and its product: query, key and value read the same one

    def note(name: str, x: Tensor) -> None:
        if not last or not torch.equal(last[0], x):  # a copy, for what follows may change x in place
            last[:] = x.clone(), x.float().T @ x.float()
        sums[name] = sums[name].add_(last[1]) if name in sums else last[1].clone()
        counts[name] = counts.get(name, 0) + len(x)

    _watch(model, batches, names, note)
    return {name: total.div_(counts[name]) for name, total in sums.items()}


def collect_absmax(model: nn.Module, batches: Batches, names: Names = None) -> dict[str, Tensor]:
    """Largest magnitude of each input channel, ``{name: (in,)}``; arguments, errors as :func:`collect_inputs`."""
    most: dict[str, Tensor] = {}

    def note(name: str, x: Tensor) -> None:
        now = x.abs().amax(0)
        most[name] = torch.maximum(most[name], now) if name in most else now

    _watch(model, batches, names, note)
    return most
