"""The book's figures: one style, colors safe for color-blind readers (Okabe & Ito), readable on light and dark."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

__all__ = ["COLORS", "SliderFigure", "plot_confusion", "plot_ledger", "use_style"]

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


class SliderFigure:
    """Figures behind a slider, in one piece of HTML: it works without a kernel, a network or a library.

    Where scripts do not run, the figure at ``start`` stands still.

    Parameters
    ----------
    figures : sequence of matplotlib figures
        One a position of the slider, of the same size; each is drawn, then closed.
    labels : sequence of str
        What each position shows, e.g. ``"3 bits"``; written beside the slider, and part of the alt text.
    name : str
        What the slider moves, e.g. ``"Bits"``.
    alt : str
        What the figure shows, for those who cannot see it.
    caption : str
        Plain text below.
    start : int
        The position shown first.

    Raises
    ------
    ValueError
        Without figures, when the labels do not fit them, or on a start that is not among them.
    """

    def __init__(
        self,
        figures: Sequence[Any],
        labels: Sequence[str],
        name: str,
        alt: str,
        caption: str = "",
        start: int = 0,
    ) -> None:
        if not figures or len(figures) != len(labels):
            raise ValueError(
                f"{len(figures)} figures and {len(labels)} labels: one label a figure, at least one"
            )
        if not 0 <= start < len(figures):
            raise ValueError(f"start must be 0 to {len(figures) - 1}, got {start}")
        self.labels, self.name, self.alt, self.caption, self.start = list(labels), name, alt, caption, start
        self.images = []
        for figure in figures:
            drawn = io.BytesIO()
            figure.savefig(drawn, format="png", dpi=110, metadata={"Software": None})
            plt.close(figure)
            self.images.append(base64.b64encode(drawn.getvalue()).decode())

    def __repr__(self) -> str:
        return f"SliderFigure({self.name}: {', '.join(self.labels)})"

    def _repr_html_(self) -> str:
        images = "".join(
            f'<img src="data:image/png;base64,{data}" alt="{html.escape(f"{self.alt} {label}")}"'
            f"{'' if i == self.start else ' hidden'}>"
            for i, (data, label) in enumerate(zip(self.images, self.labels, strict=True))
        )
        labels = html.escape("|".join(self.labels))
        move = (
            "const box=this.closest('.book-slider');"
            "box.querySelectorAll('img').forEach((image,i)=>{image.hidden=i!=this.value});"
            "const label=box.dataset.labels.split('|')[this.value];"
            "box.querySelector('output').textContent=label;this.setAttribute('aria-valuetext',label)"
        )
        return (
            f'<figure class="book-slider" data-labels="{labels}">{images}<label>{html.escape(self.name)} '
            f'<input type="range" min="0" max="{len(self.images) - 1}" value="{self.start}" '
            f'aria-valuetext="{html.escape(self.labels[self.start])}" oninput="{move}"></label> '
            f"<output>{html.escape(self.labels[self.start])}</output>"
            f"<figcaption><p>{html.escape(self.caption)}</p></figcaption></figure>"
        )
