"""Quantize a model in place: every linear layer becomes a ``QuantizedLinear``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .finetuning.quantized_linear import QuantizedLinear
from .quantization.affine import AffineGrid
from .quantization.codebook import NF4, CodebookGrid

__all__ = ["Grid", "LayerReport", "QuantizationReport", "model_bytes", "quantize_"]


class Grid(Protocol):
    """What a quantizer must offer."""

    def fit(self, weight: Tensor) -> Grid:
        """A grid whose scales fit ``weight``."""

    def round(self, weight: Tensor) -> Tensor:
        """``weight`` moved to the nearest grid points."""

    def encode(self, weight: Tensor) -> Any:
        """``weight`` as a quantized tensor."""


_SCHEMES: dict[str, Callable[[], Grid]] = {
    "nf4": lambda: CodebookGrid(NF4, 64),
    "nf4-dq": lambda: CodebookGrid(NF4, 64, double_quant=True),
    "int8": lambda: AffineGrid(8, (1, -1), symmetric=True),
    "int4": lambda: AffineGrid(4, (1, 32)),
}


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer: its name, shape, stored size and relative error ``|W - W_hat| / |W|`` (Frobenius)."""

    name: str
    shape: tuple[int, ...]
    nbytes: int
    bits_per_weight: float
    relative_error: float


@dataclass(frozen=True)
class QuantizationReport:
    """What :func:`quantize_` did.

    Attributes
    ----------
    layers : list of LayerReport
    bytes_before, bytes_after : int
        Stored bytes of the quantized layers' weights.
    """

    layers: list[LayerReport] = field(repr=False)
    bytes_before: int
    bytes_after: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a weight over all quantized layers, everything counted."""
        weights = sum(torch.Size(layer.shape).numel() for layer in self.layers)
        return 8 * self.bytes_after / weights

    def __str__(self) -> str:
        before, after = self.bytes_before / 2**20, self.bytes_after / 2**20
        return f"{len(self.layers)} layers: {before:.1f} MiB -> {after:.1f} MiB, {self.bits_per_weight:.3f} bits a weight"


def quantize_(
    model: nn.Module,
    scheme: str | Grid,
    skip: Sequence[str] = ("lm_head",),
    compute_dtype: torch.dtype | None = None,
) -> QuantizationReport:
    """Replace the linear layers of ``model`` by quantized ones, in place.

    What stays dense is copied, so that the file the weights were mapped from can be let go.

    Parameters
    ----------
    model : nn.Module
    scheme : str or grid
        ``"nf4"``, ``"nf4-dq"`` (scales quantized too), ``"int8"`` (a scale a row), ``"int4"`` (a scale and
        zero point for 32 weights), or a grid.
    skip : sequence of str
        Layers to leave alone: whole names, or their last parts. A layer whose weight is tied to an
        embedding must be skipped.
    compute_dtype : torch.dtype, optional
        Precision of the layers' multiplications; default: their input's.

    Returns
    -------
    QuantizationReport

    Raises
    ------
    ValueError
        On an unknown scheme, a model without linear layers or that is one, weights with NaN or infinity, or a
        weight that is tied to another layer's (names the layer). Then the model is unchanged.
    """
    if isinstance(scheme, str):
        if scheme not in _SCHEMES:
            raise ValueError(
                f"unknown scheme {scheme!r}; choose one of {', '.join(_SCHEMES)}, or pass a grid"
            )
        grid = _SCHEMES[scheme]()
    else:
        grid = scheme
    if isinstance(model, nn.Linear):
        raise ValueError("the model is a linear layer itself, and cannot be replaced in place: wrap it")
    targets = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and name not in skip and name.rpartition(".")[2] not in skip
    }
    if not targets:
        raise ValueError(
            f"{type(model).__name__} has no linear layers to quantize (skipped: {', '.join(skip)})"
        )
    for name, layer in targets.items():
        if not torch.isfinite(layer.weight).all():
            raise ValueError(f"the weight of {name} holds NaN or infinity: mend it before quantizing")
        for other, module in model.named_modules():
            if module is not layer and getattr(module, "weight", None) is layer.weight:
                raise ValueError(f"the weight of {name} is also {other}'s: skip it, or untie the two first")
    reports, before = [], 0
    for name, layer in targets.items():
        weight = layer.weight.detach()
        quantized = grid.encode(weight)
        error = (quantized.dequantize(torch.float32) - weight.float()).norm() / weight.float().norm().clamp(
            min=1e-30
        )
        before += weight.nbytes
        reports.append(
            LayerReport(name, tuple(weight.shape), quantized.nbytes, quantized.bits_per_weight, error.item())
        )
        parent, _, child = name.rpartition(".")
        bias = None if layer.bias is None else layer.bias.detach().clone()
        new = QuantizedLinear(quantized, bias, compute_dtype).train(layer.training)
        setattr(model.get_submodule(parent), child, new)
    for parameter in model.parameters():  # a view of a mapped weights file would keep all of it in memory
        parameter.data = parameter.data.clone()
    return QuantizationReport(reports, before, sum(r.nbytes for r in reports))


def model_bytes(model: nn.Module) -> dict[str, int]:
    """A memory ledger: stored bytes by what they are; tied tensors count once.

    Returns
    -------
    dict
        ``quantized`` (codes and scales), ``frozen`` (other weights without gradient), ``trainable``,
        and ``gradients`` and ``adam`` (two fp32 moments), what training the trainable ones will add.
    """
    ledger = dict.fromkeys(("quantized", "frozen", "trainable"), 0)
    seen: set[int] = set()
    for module in model.modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in own:
            if tensor.data_ptr() in seen and tensor.numel():
                continue
            seen.add(tensor.data_ptr())
            if tensor.requires_grad:
                ledger["trainable"] += tensor.nbytes
            elif isinstance(module, QuantizedLinear) and name != "bias":
                if not name.endswith("codebook"):
                    ledger["quantized"] += tensor.nbytes
            else:
                ledger["frozen"] += tensor.nbytes
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    ledger["gradients"] = ledger["trainable"]
    ledger["adam"] = 8 * trainable
    return ledger
