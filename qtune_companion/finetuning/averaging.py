"""Weight averaging: the mean of the weights over the last steps, which often predicts better than the last step's.

Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization" (arXiv:1803.05407),
algorithm 1, here over steps instead of epochs. Explained in chapter 15.

Copy this file: it needs torch and safetensors.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

__all__ = ["WeightAverage"]


class WeightAverage:
    """Running mean of the trainable weights of a model.

    Attributes
    ----------
    count : int
        How many states were averaged.
    mean : dict of str to Tensor
        The mean of each trainable parameter, float32, on the parameter's device.

    Examples
    --------
    >>> model, average = nn.Linear(1, 1, bias=False), WeightAverage()
    >>> for value in (1.0, 2.0, 6.0):
    ...     _ = model.weight.data.fill_(value)
    ...     average.update(model)
    >>> average.copy_to_(model)
    >>> model.weight.item()
    3.0
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the present weights into the mean."""
        self.count += 1
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                now = parameter.detach().float()
                if name not in self.mean:
                    self.mean[name] = torch.zeros_like(now)
                self.mean[name] += (now - self.mean[name]) / self.count

    @torch.no_grad()
    def copy_to_(self, model: nn.Module) -> None:
        """Set the model's weights to the mean, in place.

        Raises
        ------
        ValueError
            When nothing was averaged yet, or the model lacks an averaged parameter.
        """
        if not self.count:
            raise ValueError("nothing was averaged: call update first")
        parameters = dict(model.named_parameters())
        if missing := sorted(set(self.mean) - set(parameters)):
            raise ValueError(f"the model has no parameter {missing[0]!r}: the average is of another model")
        for name, mean in self.mean.items():
            parameters[name].copy_(mean)

    def save(self, path: str | Path) -> None:
        """Write the mean and the count, whole or not at all."""
        path = Path(path)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            tensors = {name: mean.cpu().contiguous() for name, mean in self.mean.items()}
            save_file(tensors, aside, metadata={"format": "pt", "count": str(self.count)})
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)

    def load(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        """Go on from a saved mean.

        Raises
        ------
        FileNotFoundError
            When there is no such file.
        ValueError
            When the file is broken or holds no count.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no saved average {path}")
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                count = int((file.metadata() or {}).get("count", -1))
                mean = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except SafetensorError as error:
            raise ValueError(f"{path} is broken ({error})") from error
        if count < 0:
            raise ValueError(f"{path} holds no count: not a saved average")
        self.count, self.mean = count, mean
