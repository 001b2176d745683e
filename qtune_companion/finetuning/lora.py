"""LoRA: fine-tune a frozen linear layer by a low-rank product added to it.

``y = base(x) + (alpha / rank) * B(A(x))`` with ``A`` of shape (rank, in) and ``B`` (out, rank), from Hu
et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685), equation 3.
Explained in chapter 13. Adapters are written and read in PEFT's own format.

Copy this file: it needs torch and safetensors.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

__all__ = ["LoRALinear", "add_lora_", "load_adapter_", "merge_lora_", "save_adapter"]

_PREFIX = "base_model.model."
_NOT_PLAIN = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "lora_bias",
              "alora_invocation_tokens")  # fmt: skip
_LEAVE_THE_BASE = ("gaussian", "eva", "orthogonal")  # PEFT's other ways to start change the base's weights


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank update.

    Parameters
    ----------
    base : nn.Module
        Any layer with ``in_features``, ``out_features`` and ``weight`` (dense or quantized). Frozen here.
    rank : int
        Inner dimension r, at least 1.
    alpha : float
        The update is scaled by ``alpha / rank``.
    dropout : float
        Dropout on the update's input while training, 0 ≤ p < 1.

    Attributes
    ----------
    lora_A : Tensor
        (rank, in_features), Kaiming-uniform; ``lora_B`` : (out_features, rank), zeros, so that training
        starts at the base model.

    Examples
    --------
    >>> base = nn.Linear(4, 3)
    >>> layer, x = LoRALinear(base, rank=2, alpha=4), torch.randn(5, 4)
    >>> torch.equal(layer(x), base(x))
    True
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        if not (hasattr(base, "in_features") and hasattr(base, "out_features")):
            raise TypeError(f"base must have in_features and out_features, got {type(base).__name__}")
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features = int(base.in_features), int(base.out_features)  # type: ignore[arg-type]
        self.rank, self.alpha, self.scaling = rank, alpha, alpha / rank
        reference = next(iter([*base.parameters(), *base.buffers()]))
        dtype = reference.dtype if reference.is_floating_point() else torch.float32
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, device=reference.device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=reference.device, dtype=dtype))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.dropout = nn.Dropout(dropout)
        self.train(base.training)  # in a model that is in eval mode, dropout is off

    @property
    def weight(self) -> Any:
        """The base layer's weight, untouched."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        """Input ``(…, in_features)`` → output ``(…, out_features)``."""
        y = self.base(x)
        down = nn.functional.linear(self.dropout(x).to(self.lora_A.dtype), self.lora_A)  # (…, rank)
        if y.dtype != down.dtype:
            return y + (nn.functional.linear(down, self.lora_B) * self.scaling).to(y.dtype)
        rows, low = y.reshape(-1, self.out_features), down.reshape(-1, self.rank)
        return torch.addmm(rows, low, self.lora_B.t(), alpha=self.scaling).view_as(y)

    @torch.no_grad()
    def merged(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A dense ``nn.Linear`` that computes the same; summed in float32. A quantized base becomes ``dtype``."""
        weight: Any = self.base.weight
        dense = weight if isinstance(weight, Tensor) else weight.dequantize()
        kept = dense.dtype if dtype is None or isinstance(weight, Tensor) else dtype
        update = self.lora_B.float() @ self.lora_A.float() * self.scaling
        bias: Any = self.base.bias
        out = nn.Linear(self.in_features, self.out_features, bias is not None, "meta", kept)
        out.weight = nn.Parameter((dense.float() + update).to(kept), requires_grad=False)
        if bias is not None:
            out.bias = nn.Parameter(bias.detach().to(kept, copy=True), requires_grad=False)
        return out


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def _lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layers that LoRA can wrap: everything linear except the output embedding."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    return {
        name: m
        for name, m in model.named_modules()
        if name
        and hasattr(m, "in_features")
        and hasattr(m, "weight")
        and m is not head
        and not isinstance(m, LoRALinear)
    }


def add_lora_(
    model: nn.Module,
    rank: int,
    alpha: float,
    targets: str | Iterable[str] = "all-linear",
    dropout: float = 0.0,
) -> list[str]:
    """Freeze ``model`` and wrap its linear layers in :class:`LoRALinear`, in place; return their names.

    Parameters
    ----------
    model : nn.Module
        Changed in place: every parameter frozen, then adapters added.
    rank, alpha, dropout
        See :class:`LoRALinear`.
    targets : str or iterable of str
        ``"all-linear"`` (all but the output embedding), or whole names, or their last parts such as ``["q_proj", "v_proj"]``.

    Raises
    ------
    ValueError
        When nothing matches, or the model carries LoRA already.
    """
    if _lora_layers(model):
        raise ValueError("the model carries LoRA layers already: merge them or load a fresh model")
    layers = _linear_layers(model)
    if targets != "all-linear":
        wanted = {targets} if isinstance(targets, str) else set(targets)
        layers = {n: m for n, m in layers.items() if n in wanted or n.rpartition(".")[2] in wanted}
    if not layers:
        raise ValueError(f"no linear layer of the model matches targets={targets!r}")
    model.requires_grad_(False)
    for name, layer in layers.items():
        _replace(model, name, LoRALinear(layer, rank, alpha, dropout))
    return list(layers)


def merge_lora_(model: nn.Module) -> int:
    """Replace every LoRA layer by a dense ``nn.Linear`` with the update added; return how many.

    A quantized base is dequantized, to the dtype of the model's other weights: it leaves the quantizer's grid.
    """
    layers = _lora_layers(model)
    others = (p.dtype for n, p in model.named_parameters() if ".lora_" not in n and p.is_floating_point())
    dtype = next(others, None)
    for name, layer in layers.items():
        _replace(model, name, layer.merged(dtype))
    return len(layers)


def _write_whole(path: Path, write: Any) -> None:
    """Write beside, then rename: a reader never sees half a file."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def save_adapter(
    model: nn.Module, folder: str | Path, base_model: str | None = None, task_type: str | None = None
) -> Path:
    """Write the adapter as PEFT does, ``adapter_config.json`` and ``adapter_model.safetensors``; return the folder.

    Parameters
    ----------
    model : nn.Module
        Holds LoRA layers, all of one rank and alpha.
    folder : path, made when missing
    base_model, task_type : str, optional
        Name or folder of the base (default: the model config's), and PEFT's task, such as ``"CAUSAL_LM"``.

    Raises
    ------
    ValueError
        When the model has no LoRA layers or mixes ranks; NotADirectoryError when ``folder`` is a file.
    """
    layers, folder = _lora_layers(model), Path(folder)
    if not layers:
        raise ValueError("the model has no LoRA layers: call add_lora_ first")
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: name a folder for the adapter")
    kinds = {(m.rank, m.alpha, m.dropout.p) for m in layers.values()}
    if len(kinds) > 1:
        raise ValueError(f"PEFT's format holds one (rank, alpha, dropout); the model mixes {sorted(kinds)}")
    ((rank, alpha, dropout),) = kinds
    every = {n.removesuffix(".base") for n in _linear_layers(model)} | set(layers)
    suffixes = sorted({n.rpartition(".")[2] for n in layers})
    if {n for n in every if n.rpartition(".")[2] in suffixes} != set(layers):
        suffixes = sorted(layers)
    config = {
        "peft_type": "LORA", "task_type": task_type, "r": rank, "lora_alpha": alpha, "lora_dropout": dropout,
        "target_modules": suffixes, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "base_model_name_or_path": base_model or getattr(getattr(model, "config", None), "name_or_path", None),
    }  # fmt: skip
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach().cpu().contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = layer.lora_B.detach().cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    _write_whole(
        folder / "adapter_model.safetensors", lambda p: save_file(tensors, p, metadata={"format": "pt"})
    )
    _write_whole(folder / "adapter_config.json", lambda p: p.write_text(json.dumps(config, indent=2) + "\n"))
    return folder


def load_adapter_(model: nn.Module, folder: str | Path) -> list[str]:
    """Load an adapter in PEFT's format into ``model``, in place, adding LoRA layers where there are none.

    Returns the names of the adapted layers. Raises FileNotFoundError when the folder lacks a file, ValueError
    when the adapter was made for another model, is broken, or is no plain LoRA. Warns when it names another base.
    """
    folder = Path(folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}: not an adapter in PEFT's format")
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}/adapter_config.json is broken ({error!r})") from error
    foreign = {key: config.get(key) for key in _NOT_PLAIN}
    if (start := config.get("init_lora_weights")) not in (True, False, None, *_LEAVE_THE_BASE):
        foreign["init_lora_weights"] = start
    for key in filter(foreign.get, foreign):
        raise ValueError(f"adapter {folder} uses {key}={foreign[key]!r}, which plain LoRA does not have")
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        raise ValueError(f"{folder} is not plain LoRA: {config.get('peft_type')}, bias={config.get('bias')}")
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
    except SafetensorError as error:
        raise ValueError(f"{folder}/adapter_model.safetensors is broken ({error})") from error
    if strange := [k for k in tensors if not k.endswith((".lora_A.weight", ".lora_B.weight"))]:
        raise ValueError(f"adapter {folder} is not plain LoRA: it holds {strange[0]}")
    names = sorted({k.removeprefix(_PREFIX).rsplit(".lora_", 1)[0] for k in tensors})
    present = _lora_layers(model)
    layers = present or _linear_layers(model)
    if missing := [n for n in names if n not in layers]:
        raise ValueError(
            f"adapter {folder} is for another model: {len(missing)} layers are missing, as {missing[0]}"
        )
    if present and len(names) < len(present):
        raise ValueError(
            f"adapter {folder} has {len(names)} of the {len(present)} layers that carry LoRA here"
        )
    for name in names:
        r = present[name].rank if present else rank
        for key, shape in (("A", (r, layers[name].in_features)), ("B", (layers[name].out_features, r))):
            tensor = tensors.get(f"{_PREFIX}{name}.lora_{key}.weight")
            got = None if tensor is None else tuple(tensor.shape)
            if got != shape:
                raise ValueError(
                    f"adapter {folder} is for another model or rank: {name} lora_{key} is {got}, needs {shape}"
                )
    here = getattr(getattr(model, "config", None), "name_or_path", None)
    if (made_for := config.get("base_model_name_or_path")) and here and made_for != here:
        warnings.warn(f"adapter {folder} was made for {made_for}, and this model is {here}", stacklevel=2)
    if not present:
        add_lora_(model, rank, alpha, names, config.get("lora_dropout", 0.0))
    for name in names:
        layer: Any = model.get_submodule(name)
        layer.alpha = alpha * math.sqrt(rank) if config.get("use_rslora") else alpha
        layer.scaling = layer.alpha / rank
        for key in "AB":
            getattr(layer, f"lora_{key}").data.copy_(tensors[f"{_PREFIX}{name}.lora_{key}.weight"])
    return names
