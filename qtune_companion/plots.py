"""The book's figures: one style, colors safe for color-blind readers (Okabe & Ito), readable on light and dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

__all__ = ["COLORS", "plot_confusion", "plot_ledger", "use_style"]

COLORS = {
    "blue": "#0072B2", "orange": "#E69F00", "green": "#009E73", "red": "#D55E00",
    "purple": "#CC79A7", "sky": "#56B4E9", "yellow": "#F0E442", "gray": "#6b6b6b",
}  # fmt: skip


def use_style() -> None:
    """Set matplotlib's defaults for the book's figures."""
    plt.rcParams.update({
        "figure.figsize": (6.4, 3.6), "figure.dpi": 110, "savefig.facecolor": "white", "font.size": 10,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
        "axes.axisbelow": True, "axes.prop_cycle": plt.cycler(color=list(COLORS.values())),
        "figure.constrained_layout.use": True, "legend.frameon": False,
    })  # fmt: skip


def plot_confusion(matrix: Any, labels: Sequence[str], xlabel: str, ylabel: str) -> Any:
    """Confusion matrix (rows: truth, columns: prediction) with its counts written in; returns the figure."""
    counts = np.asarray(matrix)
    if counts.shape != (len(labels), len(labels)):
        raise ValueError(f"a matrix of shape {counts.shape} does not fit {len(labels)} labels")
    figure, axes = plt.subplots(figsize=(5.2, 4.6))
    axes.imshow(counts, cmap="Blues", vmin=0)
    axes.grid(False)
    axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    middle = counts.max() / 2
    for (i, j), n in np.ndenumerate(counts):
        if n:
            axes.text(
                j, i, str(n), ha="center", va="center", fontsize=9, color="white" if n > middle else "black"
            )
    return figure


def plot_ledger(ledgers: Mapping[str, Mapping[str, int]], unit: float = 2**20, xlabel: str = "MiB") -> Any:
    """Stacked bars, one a ledger (see ``surgery.model_bytes``), with the totals written out; returns the figure."""
    parts = list(dict.fromkeys(part for ledger in ledgers.values() for part in ledger))
    figure, axes = plt.subplots(figsize=(6.4, 0.9 + 0.55 * len(ledgers)))
    left = np.zeros(len(ledgers))
    for part, color in zip(parts, COLORS.values(), strict=False):
        sizes = np.array([ledger.get(part, 0) / unit for ledger in ledgers.values()])
        axes.barh(list(ledgers), sizes, left=left, label=part, color=color)
        left += sizes
    for i, total in enumerate(left):
        axes.text(total, i, f" {total:,.0f}", va="center")
    axes.invert_yaxis()
    axes.set(xlabel=xlabel, xlim=(0, left.max() * 1.15))
    axes.grid(False, axis="y")
    figure.legend(loc="outside upper center", ncols=len(parts), fontsize=9)
    return figure
