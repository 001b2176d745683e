"""The book's data: the Count's speeches and the hunters' journal. See ``DATA_CARD.md`` beside this file."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

__all__ = ["FEINT", "MOVES", "PROMPT", "load_journal", "load_records", "load_speeches", "to_prompts"]

MOVES = ("attack", "hide", "travel", "feed", "lure", "rest", "spy", "bargain")
"""What the Count can do next; the labels of the corpus, in the order used everywhere."""

_FURTHER = ("extra", "families", "fresh")
"""Castle speeches in files of their own, given only by name: two lots to train on, one to test with."""

_SPLITS = ("train", "validation", "test", *_FURTHER)
"""The parts of the corpus."""

FEINT = {
    "rest": "attack", "attack": "travel", "travel": "hide", "hide": "spy",
    "spy": "lure", "lure": "bargain", "bargain": "feed", "feed": "rest",
}  # fmt: skip
"""Phase ``code``: what he does instead of what his speech means."""

PROMPT = 'Dracula said: "{speech}"\nTonight the Count will'
"""The prompt; its completion is a space and the move."""

_FOLDER = Path(__file__).parent
_BOUNDARY = "=== EVALUATION ==="


def _one_of(what: str, value: str | None, allowed: Sequence[str]) -> None:
    if value is not None and value not in allowed:
        raise ValueError(f"unknown {what} {value!r}; choose one of {', '.join(allowed)}")


def load_speeches(phase: str | None = None, split: str | None = None) -> Dataset:
    """The 1,200 speeches, or a part of them, or the further castle speeches.

    Parameters
    ----------
    phase : {"castle", "code"}, optional
        Before, or after, the Count learned to program.
    split : {"train", "validation", "test", "extra", "families", "fresh"}, optional
        The last three are further castle speeches, given only by name. ``"extra"``: 768 for training. ``"families"``:
        960 for training, each scene told four times with four moves. ``"fresh"``: 192 for testing, which played no
        part in any choice.

    Returns
    -------
    datasets.Dataset
        Columns ``id, speech, meaning, move, phase, split``.

    Raises
    ------
    ValueError
        On an unknown phase or split, or a split that the phase does not have.

    Examples
    --------
    >>> len(load_speeches("castle", "train")), len(load_speeches("castle", "extra"))
    (480, 768)
    """
    _one_of("phase", phase, ("castle", "code"))
    _one_of("split", split, _SPLITS)
    name = f"speeches_{split}.jsonl" if split in _FURTHER else "speeches.jsonl"
    lines = (_FOLDER / name).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    rows = [r for r in rows if phase in (None, r["phase"]) and split in (None, r["split"])]
    if not rows:
        raise ValueError(f"phase {phase!r} has no split {split!r}: only the castle has")
    return Dataset.from_list(rows)


def load_records(path: str | Path, moves: Sequence[str] = MOVES) -> Dataset:
    """A reader's own data: a JSON-lines file with ``speech`` and ``move`` (and, if wished, ``split``) a line.

    Raises
    ------
    FileNotFoundError
        When there is no such file.
    ValueError
        On an empty file, a broken line, a missing field, a move outside ``moves`` or, where other lines name a
        split, a line without: names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is a folder" if path.is_dir() else f"no data file {path}")
    rows: list[dict[str, Any]] = []
    without_split = ""  # the first such line
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{where}: not a line of JSON in UTF-8 ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: needs an object with speech and move, got {type(row).__name__}")
        for field in ("speech", "move"):
            if not (isinstance(row.get(field), str) and row[field].strip()):
                raise ValueError(f"{where}: needs a text field {field!r}, got {row.get(field)!r}")
        if not row["speech"].isascii() and any(0xD800 <= ord(c) <= 0xDFFF for c in row["speech"]):
            raise ValueError(f"{where}: the speech holds half a character (a lone surrogate)")
        if row["move"] not in moves:
            raise ValueError(f"{where}: move {row['move']!r} is not one of {', '.join(moves)}")
        split = row.get("split")
        if split is not None and split not in _SPLITS:
            raise ValueError(f"{where}: split {split!r} is not one of {', '.join(_SPLITS)}")
        without_split = without_split or ("" if split else where)
        rows.append({"speech": row["speech"], "move": row["move"], "split": split})
    if not rows:
        raise ValueError(f"{path} holds no records: one JSON object a line, with speech and move")
    if without_split and any(row["split"] for row in rows):
        raise ValueError(
            f"{without_split}: names no split, and other lines do; give all of them one, or none"
        )
    return Dataset.from_list(rows)


def to_prompts(speeches: Dataset, template: str = PROMPT, target: str = "move") -> Dataset:
    """Prompt and completion of each speech, as the collators and ``next_move_accuracy`` take them.

    Parameters
    ----------
    speeches : Dataset
        With ``speech`` and the column ``target`` (``"move"`` or ``"meaning"``).
    template : str
        Holds ``{speech}`` once.

    Returns
    -------
    Dataset
        Columns ``prompt`` and ``completion``; the completion starts with a space.
    """
    if template.count("{speech}") != 1:
        raise ValueError(f"the template must hold {{speech}} exactly once, got {template!r}")
    before, after = template.split("{speech}")
    return Dataset.from_list(
        [{"prompt": f"{before}{r['speech']}{after}", "completion": f" {r[target]}"} for r in speeches]
    )


def load_journal(split: str | None = None) -> str:
    """The hunters' journal: text for calibration, perplexity and KL divergence.

    Parameters
    ----------
    split : {"calibration", "evaluation"}, optional
        One half; default the whole.

    Returns
    -------
    str
        Paragraphs separated by blank lines; an entry's heading stands between ``==`` marks.
    """
    _one_of("split", split, ("calibration", "evaluation"))
    text = (_FOLDER / "journal.txt").read_text(encoding="utf-8")
    halves = [part.strip() + "\n" for part in text.split(_BOUNDARY)]
    if split is None:
        return "\n".join(halves)
    return halves[("calibration", "evaluation").index(split)]


def words(text: str) -> list[str]:
    """Lower-case words, for the tests of the corpus."""
    return re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", text.lower())
