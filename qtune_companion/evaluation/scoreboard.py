"""One table for many quantization methods, in one JSON file that several processes may write to.

A row says what a method costs (bits, bytes and seconds) and what it damages (perplexity, KL divergence with its
interval, accuracy). Rows are kept in memory, or in the file that the environment variable ``QTUNE_SCOREBOARD`` names.
Explained in chapter 6.

Copy this file: it needs only the standard library.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["Row", "add_row", "pareto", "read_rows", "table"]


@dataclass(frozen=True)
class Row:
    """One method, measured once. ``bits`` a weight and ``bytes`` count all that is stored for the quantized layers.

    Raises ValueError on what is no measurement: NaN, infinity, no bits or bytes, a perplexity below 1, an accuracy
    outside 0 … 1, an interval that does not hold ``kl``.
    """

    chapter: int
    method: str
    bits: float
    perplexity: float
    kl: float  # nats a prediction, to the unquantized model
    kl_interval: tuple[float, float]  # 95%, by block bootstrap
    bytes: int
    seconds: float  # to quantize, on the machine that wrote the row
    accuracy: float | None = None  # of the next move, 0 to 1

    def __post_init__(self) -> None:
        low, high = self.kl_interval
        numbers = [self.bits, self.bytes, self.perplexity, self.seconds, low, self.kl, high]
        if (
            not all(map(math.isfinite, numbers))
            or min(numbers[:3]) <= 0
            or self.perplexity < 1
            or self.seconds < 0
        ):
            raise ValueError(
                f"numbers must be finite, bits and bytes positive, perplexity at least 1: {self}"
            )
        if not low <= self.kl <= high or not 0 <= (self.accuracy or 0) <= 1:
            raise ValueError(f"the interval must hold kl, and accuracy be 0 to 1 or None: {self}")


_memory: list[Row] = []


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock beside ``path``; the system takes it back, should the process die."""
    with path.with_name(path.name + ".lock").open("a") as lock:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(lock.fileno(), msvcrt.LK_LOCK, 1)
        else:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def read_rows(path: str | os.PathLike[str] | None = None) -> list[Row]:
    """The rows of ``path``, else of QTUNE_SCOREBOARD, else those in memory; by chapter. ValueError on other files."""
    file = path or os.environ.get("QTUNE_SCOREBOARD")
    if not file:
        return sorted(_memory, key=lambda row: row.chapter)
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
        rows = [Row(**{**row, "kl_interval": tuple(row["kl_interval"])}) for row in found]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is not a scoreboard ({error!r}): delete it and run the chapters") from None
    return sorted(rows, key=lambda row: row.chapter)


def add_row(chapter: int, method: str, **numbers: Any) -> Row:
    """Add a row, or replace the one of this chapter and method; returns it. For ``numbers`` see :class:`Row`.

    Examples
    --------
    >>> row = add_row(99, "toy", bits=4.5, perplexity=20.0, kl=0.1, kl_interval=(0.09, 0.11), bytes=1000, seconds=1.0)
    >>> row.bits
    4.5
    """
    row = Row(chapter, method, **numbers)
    file = os.environ.get("QTUNE_SCOREBOARD")
    if not file:
        _memory[:] = [r for r in _memory if (r.chapter, r.method) != (chapter, method)] + [row]
        return row
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        rows = [r for r in read_rows(path) if (r.chapter, r.method) != (chapter, method)] + [row]
        rows.sort(key=lambda r: r.chapter)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        aside.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n", encoding="utf-8")
        aside.replace(path)  # whole, or not at all
    return row


def pareto(rows: Sequence[Row], cost: str = "bits", damage: str = "kl") -> list[Row]:
    """The rows that no other beats, by rising ``cost``: whatever costs no more damages more."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda r: (getattr(r, cost), getattr(r, damage))):
        if not front or getattr(row, damage) < getattr(front[-1], damage):
            front.append(row)
    return front


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table: bits a weight and MB of the quantized layers, KL in nats."""
    head = "| chapter | method | bits | MB | perplexity | KL (95% interval) | next move | seconds |"
    lines = [head, "|--:|:--|--:|--:|--:|:--|--:|--:|"]
    for r in rows:
        kl = "{:.3g} ({:.2g}\N{EN DASH}{:.2g})".format(r.kl, *r.kl_interval)
        damage = f"{r.perplexity:,.{1 if r.perplexity < 1000 else 0}f} | {kl}"
        move = "\N{EN DASH}" if r.accuracy is None else f"{100 * r.accuracy:.0f}%"
        cost = f"{round(r.bits, 3):g} | {r.bytes / 1e6:.1f}"
        lines.append(f"| {r.chapter} | {r.method} | {cost} | {damage} | {move} | {r.seconds:.1f} |")
    return "\n".join(lines)
