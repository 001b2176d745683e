"""scripts/notebooks.py executes what changed, stores it clean, and loses nothing when a cell fails."""

import copy
import json

import jupyterquiz
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

import notebooks
from stored_output import GLUE_MIME, clean_outputs, readable_time, without_progress

HEADER = """---
jupytext:
  formats: md:myst,ipynb
kernelspec:
  display_name: Python 3
  name: python3
---

# A chapter

```{code-cell} ipython3
"""
BAR = """\
import pathlib
from tqdm import tqdm
for _ in tqdm(range(3)):
    pass
print(pathlib.Path.home())
print(42)"""


def chapter(folder, name, code):
    source = folder / name
    source.write_text(f"{HEADER}{code}\n```\n", encoding="utf-8")
    return source


def test_chapter_is_executed_and_stored_clean(tmp_path):
    source = chapter(tmp_path, "07_small.md", BAR)
    assert not notebooks.is_current(source, tmp_path)
    notebooks.execute_chapter(source, book=tmp_path)
    assert notebooks.is_current(source, tmp_path)
    stored = nbformat.read(tmp_path / "07_small.ipynb", as_version=4)
    nbformat.validate(stored)
    *shown, time, memory = stored.cells[-1].outputs
    assert [o.get("text") for o in shown] == ["~\n42\n"]
    assert [o.metadata.scrapbook["name"] for o in (time, memory)] == ["measured-time", "measured-memory"]
    assert stored.metadata.qtune.seconds > 0
    assert stored.metadata.qtune.peak_mb > 10


def test_slow_cells_are_named(tmp_path, capsys):
    cell = "```\n\n```{code-cell} ipython3\n"
    source = chapter(tmp_path, "07_small.md", f"1\n{cell}import time\ntime.sleep(1.2)\n{cell}2")
    notebooks.execute_chapter(source, book=tmp_path)
    assert [line for line in capsys.readouterr().out.splitlines() if "in code cell" in line] == [
        "  1 s in code cell 2: import time"
    ]


def test_same_source_gives_the_same_notebook(tmp_path):
    source = chapter(tmp_path, "07_small.md", "print(42)")
    first = notebooks.read_source(source)
    assert [c.id for c in first.cells] == [c.id for c in notebooks.read_source(source).cells]
    assert len({c.id for c in first.cells}) == len(first.cells)


def test_changed_source_is_noticed(tmp_path):
    source = chapter(tmp_path, "07_small.md", "print(42)")
    notebooks.execute_chapter(source, book=tmp_path)
    chapter(tmp_path, "07_small.md", "print(43)")
    assert not notebooks.is_current(source, tmp_path)


def test_a_source_edited_during_its_run_is_out_of_date(tmp_path):
    edit = "from pathlib import Path\np = Path('07_small.md')\np.write_text(p.read_text('utf-8') + 'more', 'utf-8')"
    source = chapter(tmp_path, "07_small.md", edit)
    notebooks.execute_chapter(source, book=tmp_path)
    assert "more" in source.read_text("utf-8")
    assert not notebooks.is_current(source, tmp_path)


def test_changed_prose_keeps_the_outputs_and_changed_code_does_not(tmp_path):
    source = chapter(tmp_path, "07_small.md", "print(42)")
    executed = notebooks.execute_chapter(source, book=tmp_path)
    source.write_text(source.read_text("utf-8").replace("# A chapter", "# The chapter, revised"), "utf-8")
    assert notebooks.update_prose(source, tmp_path)
    assert notebooks.is_current(source, tmp_path)
    stored = nbformat.read(tmp_path / "07_small.ipynb", as_version=4)
    assert stored.cells[0].source == "# The chapter, revised"
    assert stored.cells[-1].outputs == executed.cells[-1].outputs
    assert stored.cells[-1].execution_count == 1
    assert stored.metadata.qtune.seconds == executed.metadata.qtune.seconds
    caption = "---\nmystnb:\n  figure:\n    caption: A number.\n---\nprint(42)"
    assert notebooks.update_prose(chapter(tmp_path, "07_small.md", caption), tmp_path)
    stored = nbformat.read(tmp_path / "07_small.ipynb", as_version=4)
    assert stored.cells[-1].metadata.mystnb.figure.caption == "A number."
    assert stored.cells[-1].outputs == executed.cells[-1].outputs
    for changed in ("print(43)", ":tags: [hide-input]\n\nprint(42)"):
        chapter(tmp_path, "07_small.md", changed)
        assert not notebooks.update_prose(source, tmp_path)
    assert not notebooks.update_prose(chapter(tmp_path, "08_new.md", "1"), tmp_path)


def test_a_notebook_that_was_cleared_or_made_elsewhere_is_not_kept(tmp_path):
    source, target = chapter(tmp_path, "07_small.md", "print(42)"), tmp_path / "07_small.ipynb"
    notebooks.execute_chapter(source, book=tmp_path)
    source.write_text(source.read_text("utf-8").replace("# A chapter", "# Another"), "utf-8")
    executed = nbformat.read(target, as_version=4)
    cleared, foreign = copy.deepcopy(executed), copy.deepcopy(executed)
    cleared.cells[-1].update(outputs=[], execution_count=None)
    foreign.metadata = {}
    for notebook in (cleared, foreign):
        nbformat.write(notebook, target)
        assert not notebooks.update_prose(source, tmp_path)
    nbformat.write(executed, target)
    assert notebooks.update_prose(source, tmp_path)


SLIDER = """import matplotlib.pyplot as plt
import qtune_companion as qt
qt.SliderFigure([plt.figure(figsize=(1, 1)) for _ in "ab"], ["a", "b"], name="Ü", alt="one",
    caption="Two's company.")"""  # fmt: skip


def test_words_of_a_slider_are_prose_and_its_figures_are_not(tmp_path):
    source = chapter(tmp_path, "07_small.md", SLIDER)
    notebooks.execute_chapter(source, book=tmp_path)
    before = nbformat.read(tmp_path / "07_small.ipynb", as_version=4).cells[-1].outputs[0].data["text/html"]
    chapter(
        tmp_path, "07_small.md", SLIDER.replace("Two's company.", "3 < 4").replace('"one"', "'the \"A\"'")
    )
    assert notebooks.update_prose(source, tmp_path)
    cell = nbformat.read(tmp_path / "07_small.ipynb", as_version=4).cells[-1]
    page = cell.outputs[0].data["text/html"]
    assert "<figcaption><p>3 &lt; 4</p>" in page
    assert "company" not in page
    assert page.count('alt="the &quot;A&quot; ') == 2 == before.count('alt="one ')
    assert "3 < 4" in cell.source
    for old, new in (
        ("(1, 1)", "(1, 2)"),
        ("Ü", "Y"),
        ('caption="', 'caption="" + "'),
        ('alt="one",', "alt=str(1),"),
    ):
        assert old in SLIDER
        chapter(tmp_path, "07_small.md", SLIDER.replace(old, new))
        assert not notebooks.update_prose(source, tmp_path)


QUIZ = """from jupyterquiz import display_quiz

display_quiz([{"question": "Bytes?", "type": "numeric", "answers": [
    {"type": "value", "value": 6, "correct": True, "feedback": "Six."}]}])"""


def test_a_changed_quiz_runs_alone(tmp_path):
    cell = "```\n\n```{code-cell} ipython3\n"
    before = f"slow = 1\n{cell}slow\n{cell}{QUIZ}"
    source = chapter(tmp_path, "07_small.md", before)
    executed = notebooks.execute_chapter(source, book=tmp_path)
    assert [o.metadata.scrapbook.name for o in executed.cells[-1].outputs[-2:]] == [
        "measured-time",
        "measured-memory",
    ]
    chapter(tmp_path, "07_small.md", before.replace("Six.", "Two times three."))
    assert notebooks.update_prose(source, tmp_path)
    cells = nbformat.read(tmp_path / "07_small.ipynb", as_version=4).cells
    shown = str(cells[-1].outputs)
    assert "Two times three." in shown
    assert "Six." not in shown
    assert len(cells[-1].outputs) == len(executed.cells[-1].outputs)
    assert cells[-1].outputs[-2:] == executed.cells[-1].outputs[-2:]
    assert cells[-2].outputs == executed.cells[-2].outputs
    for changed in (
        QUIZ.replace("6", "slow"),
        QUIZ + "\nprint(1)",
        QUIZ.replace("display_quiz([", "print(["),
    ):
        chapter(tmp_path, "07_small.md", f"slow = 1\n{cell}slow\n{cell}{changed}")
        assert not notebooks.update_prose(source, tmp_path)


def test_failing_cell_names_the_place_and_keeps_the_old_notebook(tmp_path):
    source = chapter(tmp_path, "07_small.md", "print(42)")
    notebooks.execute_chapter(source, book=tmp_path)
    before = (tmp_path / "07_small.ipynb").read_bytes()
    chapter(tmp_path, "07_small.md", "print(42)\n```\n\n```{code-cell} ipython3\n1 / 0")
    with pytest.raises(
        notebooks.ChapterError, match=r"(?s)07_small\.md, code cell 2 failed.*ZeroDivisionError"
    ):
        notebooks.execute_chapter(source, book=tmp_path)
    assert (tmp_path / "07_small.ipynb").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["07_small.ipynb", "07_small.md"]


def test_endless_cell_is_ended(tmp_path):
    source = chapter(tmp_path, "07_small.md", "while True: pass")
    with pytest.raises(notebooks.ChapterError, match=r"code cell 1 failed(?s:.*)ran longer than 1 s"):
        notebooks.execute_chapter(source, timeout=1, book=tmp_path)


def test_preface_depends_on_the_measured_run_times(tmp_path):
    preface, other = (
        chapter(tmp_path, "00_preface.md", "print(1)"),
        chapter(tmp_path, "07_small.md", "print(2)"),
    )
    assert notebooks.chapters(tmp_path) == [other, preface]
    notebooks.execute_chapter(preface, book=tmp_path)
    assert notebooks.is_current(preface, tmp_path)
    notebooks.execute_chapter(other, book=tmp_path)
    assert not notebooks.is_current(preface, tmp_path)


def test_rows_go_to_the_scoreboard_and_its_page_is_then_out_of_date(tmp_path):
    (tmp_path / "appendix").mkdir()
    board = chapter(tmp_path / "appendix", "90_scoreboard.md", "print(1)")
    notebooks.execute_chapter(board, book=tmp_path)
    assert notebooks.is_current(board, tmp_path)
    add = """from qtune_companion.evaluation.scoreboard import add_row
add_row(7, "toy", bits=4.5, perplexity=20.0, kl=0.1, kl_interval=(0.1, 0.1), bytes=1, seconds=1.0)"""
    source = chapter(tmp_path, "07_small.md", add)
    assert notebooks.chapters(tmp_path) == [source, board]
    notebooks.execute_chapter(source, book=tmp_path)
    assert '"toy"' in board.with_suffix(".json").read_text(encoding="utf-8")
    assert notebooks.is_current(source, tmp_path)
    assert not notebooks.is_current(board, tmp_path)
    assert not notebooks.update_prose(board, tmp_path)  # it shows the rows: to be executed again
    other = chapter(tmp_path, "08_large.md", add.replace("7, ", "8, "))
    notebooks.execute_chapter(other, book=tmp_path)
    source = chapter(tmp_path, "07_small.md", add.replace("toy", "wheel"))
    notebooks.execute_chapter(source, book=tmp_path)  # a method that was renamed leaves no row behind
    rows = json.loads(board.with_suffix(".json").read_text(encoding="utf-8"))
    assert [(row["chapter"], row["method"]) for row in rows] == [(7, "wheel"), (8, "toy")]
    source = chapter(tmp_path, "07_small.md", add.replace("toy", "horse") + "\n1 / 0")
    with pytest.raises(notebooks.ChapterError):
        notebooks.execute_chapter(source, book=tmp_path)
    assert json.loads(board.with_suffix(".json").read_text(encoding="utf-8")) == rows  # nothing lost


def test_two_pages_of_a_chapter_leave_each_others_rows_alone(tmp_path):
    (tmp_path / "appendix").mkdir()
    board = tmp_path / "appendix" / "90_scoreboard.json"

    def run(name, method):
        code = f"""from qtune_companion.evaluation.scoreboard import add_row
add_row(7, "{method}", bits=4.5, perplexity=20.0, kl=0.1, kl_interval=(0.1, 0.1), bytes=1, seconds=1.0)"""
        notebooks.execute_chapter(chapter(tmp_path, name, code), book=tmp_path)
        return sorted(row["method"] for row in json.loads(board.read_text(encoding="utf-8")))

    assert run("07_small.md", "horse") == ["horse"]
    assert run("07b_smaller.md", "cart") == ["cart", "horse"]
    assert run("07_small.md", "mule") == ["cart", "mule"]
    assert run("07b_smaller.md", "sled") == ["mule", "sled"]
    assert notebooks.stored_metadata(tmp_path / "07b_smaller.md")["rows"] == ["sled"]


def test_chapters_are_named_by_their_numbers():
    assert [notebooks.number(p) for p in notebooks.selected(["8b", "07"])] == ["7", "8b"]
    assert [notebooks.number(p) for p in notebooks.selected(["8"])] == ["8"]


def test_source_that_is_no_notebook_is_refused(tmp_path):
    source = tmp_path / "07_small.md"
    source.write_text(HEADER.replace("  display_name: Python 3\n", ""), encoding="utf-8")
    with pytest.raises(notebooks.ChapterError, match=r"07_small\.md.*display_name"):
        notebooks.read_source(source)


def test_unknown_chapter_is_refused(capsys):
    assert notebooks.main(["--only", "99"]) == 1
    assert "no chapter 99" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("  0%|          | 0/3 [00:00<?, ?it/s]\r100%|███| 3/3 [00:00<00:00, 3.0it/s]\n", ""),
        ("before\n 33%|█  | 1/3 [00:00<?, ?it/s]\rafter", "before\nafter"),
        ("a\rb\nrest\n", "b\nrest\n"),
        ("accuracy 75% | loss 0.1\n", "accuracy 75% | loss 0.1\n"),
        ("\n\n", "\n\n"),
    ],
)
def test_progress_is_dropped_and_text_kept(text, kept):
    assert without_progress(text) == kept


def test_quiz_asks_no_cdn_and_is_closed(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(jupyterquiz.dynamic.display, "display", lambda shape: shown.append(shape.data))
    question = {"question": "$2^2$?", "type": "numeric", "answers": [{"type": "value", "value": 4}]}
    jupyterquiz.display_quiz([question])
    mimes = ("text/html", "application/javascript")
    outputs = [new_output("display_data", data={m: data}) for m, data in zip(mimes, shown, strict=True)]
    nb = new_notebook(cells=[new_code_cell("display_quiz(...)", outputs=outputs)])
    clean_outputs(nb, tmp_path)
    html, script = nb.cells[0].outputs
    assert html.data["text/html"].count("<div") == html.data["text/html"].count("</div>")
    assert "cdn" not in script.data["application/javascript"]
    assert "typesetPromise" in script.data["application/javascript"]


def test_run_times_are_readable():
    assert readable_time(42.4) == "42 s"
    assert readable_time(150) == "2.5 min"
    assert GLUE_MIME.endswith("/")
