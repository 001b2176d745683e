import json
import multiprocessing
import os

import pytest

from qtune_companion.evaluation import scoreboard
from qtune_companion.evaluation.scoreboard import Row, add_row, pareto, read_rows, table

NUMBERS = {
    "bits": 4.5, "perplexity": 20.0, "kl": 0.1, "kl_interval": (0.09, 0.11), "bytes": 1000, "seconds": 1.0,
}  # fmt: skip


@pytest.fixture
def board(monkeypatch, tmp_path):
    path = tmp_path / "sub" / "board.json"
    monkeypatch.setenv("QTUNE_SCOREBOARD", str(path))
    return path


def test_without_a_file_rows_are_kept_in_memory(monkeypatch):
    monkeypatch.delenv("QTUNE_SCOREBOARD", raising=False)
    monkeypatch.setattr(scoreboard, "_memory", [])
    add_row(8, "AWQ", **NUMBERS)
    add_row(7, "GPTQ", **NUMBERS)
    again = add_row(8, "AWQ", **{**NUMBERS, "bits": 3.0})
    assert [row.method for row in read_rows()] == ["GPTQ", "AWQ"]
    assert read_rows()[1] == again


def test_a_file_keeps_rows_ordered_and_replaces_a_row_that_is_measured_again(board):
    assert read_rows() == []
    add_row(8, "AWQ", **NUMBERS)
    add_row(7, "GPTQ", **NUMBERS, accuracy=0.4)
    assert [row["method"] for row in json.loads(board.read_text())] == ["GPTQ", "AWQ"]
    row = add_row(8, "AWQ", **{**NUMBERS, "kl": 0.1001})
    assert read_rows() == read_rows(board) == [Row(7, "GPTQ", **NUMBERS, accuracy=0.4), row]
    assert sorted(p.name for p in board.parent.iterdir()) == ["board.json", "board.json.lock"]


def _write(path, chapter):
    os.environ["QTUNE_SCOREBOARD"] = path
    for i in range(5):
        add_row(chapter, f"method {i}", **NUMBERS)


def test_processes_that_write_at_once_lose_nothing(board):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write, args=(str(board), chapter)) for chapter in (1, 2, 3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert len(read_rows(board)) == 15


def test_a_write_that_fails_leaves_the_old_file(board, monkeypatch):
    add_row(7, "GPTQ", **NUMBERS)
    before = board.read_text()

    def broken(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(scoreboard.Path, "write_text", broken)
    with pytest.raises(OSError, match="disk full"):
        add_row(8, "AWQ", **NUMBERS)
    assert board.read_text() == before


def test_another_file_is_refused(board):
    board.parent.mkdir()
    for text in ("{", '{"a": 1}', '[{"a": 1}]', "[3]", '[{"kl_interval": [1, 2], "method": "x"}]'):
        board.write_text(text)
        with pytest.raises(ValueError, match="not a scoreboard"):
            add_row(7, "GPTQ", **NUMBERS)
        assert board.read_text() == text


@pytest.mark.parametrize(
    "bad",
    [
        {"kl": float("nan")}, {"perplexity": float("inf")}, {"perplexity": 0.5}, {"bits": 0.0}, {"bytes": 0},
        {"seconds": -1.0}, {"accuracy": 40.0}, {"kl_interval": (0.2, 0.3)}, {"accuracy": -0.1},
        {"kl_interval": (0.0, float("nan"))},
    ],
)  # fmt: skip
def test_what_is_no_measurement_is_refused(bad, board):
    with pytest.raises(ValueError, match="must be finite|must hold kl"):
        add_row(7, "GPTQ", **{**NUMBERS, **bad})
    assert not board.exists()


def test_the_front_holds_what_nothing_beats():
    def row(name, bits, kl):
        return Row(6, name, bits, 20.0, kl, (kl, kl), 1000, 1.0)

    rows = [
        row("a", 8, 0.001),
        row("b", 4, 0.1),
        row("worse", 4.5, 0.2),
        row("c", 4.25, 0.05),
        row("tie", 4, 0.3),
    ]
    assert [r.method for r in pareto(rows)] == ["b", "c", "a"]
    assert pareto([]) == []
    assert [r.method for r in pareto(rows, cost="kl", damage="bits")] == ["a", "c", "b"]


def test_the_table_is_markdown():
    text = table([Row(6, "NF4", 4.5, 1234.6, 0.1, (0.09, 0.11), 59_700_000, 1.5, 0.4)]).splitlines()
    assert len({line.count("|") for line in text}) == 1
    assert text[2] == "| 6 | NF4 | 4.5 | 59.7 | 1,235 | 0.1 (0.09–0.11) | 40% | 1.5 |"
