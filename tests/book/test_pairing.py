"""A chapter's source (.md) and its executed notebook (.ipynb) say the same, and what is stored is clean."""

import json
import re
from pathlib import Path

import nbformat
import pytest

from notebooks import BOOK, chapters, is_current, notebook_path, read_source, stored_metadata
from qtune_companion.evaluation.scoreboard import read_rows, table
from stored_output import PROGRESS_LINE, is_progress

CHAPTERS = chapters()
MACHINE_PATH = re.compile(r"(?<![\w.])/(home|root|Users|work|tmp|private|var/folders)/\w|[A-Z]:\\\\Users")
MAX_LINES = 25


@pytest.fixture(params=CHAPTERS, ids=lambda p: p.stem)
def source(request):
    return request.param


@pytest.fixture
def notebook(source):
    path = notebook_path(source)
    assert path.exists(), f"{path.name} is missing; run `make notebooks`"
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [(n, c) for n, c in enumerate(notebook.cells) if c.cell_type == "code"]


def stored_text(notebook):
    for _, cell in code_cells(notebook):
        for output in cell.outputs:
            yield output.get("text", "")
            for mime, value in output.get("data", {}).items():
                if mime.startswith("text/"):
                    yield value


def test_every_notebook_has_a_source():
    stray = [p for p in BOOK.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts]
    stray = [str(p.relative_to(BOOK)) for p in stray if p.with_suffix(".md") not in CHAPTERS]
    assert not stray, f"no .md is paired with {stray}"


def test_chapters_are_in_the_table_of_contents():
    toc = (BOOK.parent / "_toc.yml").read_text(encoding="utf-8")
    listed = re.findall(r"(?:file|root):\s*(\S+)", toc)
    missing = [c.stem for c in CHAPTERS if str(c.relative_to(BOOK).with_suffix("").as_posix()) not in listed]
    assert not missing, f"_toc.yml does not list {missing}"
    absent = [f for f in listed if not any((BOOK / f).with_suffix(s).exists() for s in (".md", ".ipynb"))]
    assert not absent, f"_toc.yml lists pages that are not there: {absent}"


def test_notebook_is_in_step_with_its_source(source, notebook):
    assert is_current(source), f"{source.name} changed since its notebook was executed; run `make notebooks`"
    expected = read_source(source)
    assert [(c.cell_type, c.source) for c in notebook.cells] == [
        (c.cell_type, c.source) for c in expected.cells
    ]
    tags = [c.metadata.get("tags", []) for c in notebook.cells]
    assert tags == [c.metadata.get("tags", []) for c in expected.cells]


def test_notebook_was_executed_from_top_to_bottom(notebook):
    counts = [c.execution_count for _, c in code_cells(notebook) if c.source.strip()]
    assert counts == list(range(1, len(counts) + 1))


def test_no_error_is_stored(notebook):
    failed = [n for n, c in code_cells(notebook) if any(o.output_type == "error" for o in c.outputs)]
    assert not failed, f"cells {failed} store an error"


def test_no_cell_is_long(notebook):
    long = [n for n, c in code_cells(notebook) if len(c.source.splitlines()) > MAX_LINES]
    assert not long, f"cells {long} have more than {MAX_LINES} lines"


def test_no_progress_bar_is_stored(notebook):
    assert "widgets" not in notebook.metadata
    outputs = [(n, o) for n, c in code_cells(notebook) for o in c.outputs]
    assert not [n for n, o in outputs if is_progress(o) or PROGRESS_LINE.search(o.get("text", ""))]


def test_nothing_of_the_machine_is_stored(notebook):
    found = [m.group(0) for text in stored_text(notebook) for m in [MACHINE_PATH.search(text)] if m]
    assert not found, f"stored outputs name paths of the machine that ran them: {found}"
    assert notebook.metadata["language_info"] == {"name": "python"}


def test_no_cell_shows_the_name_of_an_object(notebook):
    """As `torch.manual_seed(5)` does on a cell's last line."""
    shown = [
        output.data["text/plain"]
        for _, cell in code_cells(notebook)
        for output in cell.outputs
        if output.output_type == "execute_result" and list(output.data) == ["text/plain"]
    ]
    assert not [text for text in shown if text.startswith("<")]


def test_run_time_and_memory_keep_the_promise(source):
    measured = stored_metadata(source)
    trains = source.stem in ("13_qlora", "15_the_code")
    assert 0 < measured["seconds"] <= (360 if trains else 180), "three minutes at most; six where it trains"
    assert 0 < measured["peak_mb"] < 4000, "a chapter needs less than 4 GB"


def test_the_scoreboard_keeps_its_promises_and_its_page_shows_it():
    rows = read_rows(BOOK / "appendix" / "90_scoreboard.json")
    assert {row.chapter for row in rows} == {6, 7, 8, 9}
    for row in rows:
        assert row.seconds <= 90, row
        assert row.bytes == round(row.bits * 106_168_320 / 8), row
        assert (row.accuracy is not None) == (4 <= row.bits < 5 or row.bits == 32), row
    kl = {row.method.removesuffix(", blocks of 64"): row.kl for row in rows}
    rounding = kl["RTN, 4 bits"]
    assert max(kl["GPTQ, 4 bits"], kl["AWQ, 4 bits"], kl["HQQ, 4 bits"]) < 0.8 * rounding
    assert all(kl[f"GPTQ, {bits} bits"] < 0.7 * kl[f"RTN, {bits} bits"] for bits in (4, 3, 2))
    assert abs(kl["GPTQ, 4 bits"] / kl["AWQ, 4 bits"] - 1) < 0.1  # what chapters 8 and 8b say of the board
    assert max(kl["GPTQ, 4 bits"], kl["AWQ, 4 bits"]) < kl["AutoRound, 4 bits"] < rounding
    assert kl["GPTQ, 3 bits"] < 0.8 * min(kl["AWQ, 3 bits"], kl["AutoRound, 3 bits"])
    assert abs(kl["AutoRound, 3 bits"] / kl["AWQ, 3 bits"] - 1) < 0.3
    shown = nbformat.read(BOOK / "appendix" / "90_scoreboard.ipynb", as_version=4)
    assert table(rows) in list(stored_text(shown)), "run `make chapter N=90`"


def test_the_encoder_keeps_up_with_a_bag_of_words():
    stored = nbformat.read(
        next(p for p in map(notebook_path, CHAPTERS) if p.stem == "15_the_code"), as_version=4
    )
    outputs = [o for _, c in code_cells(stored) for o in c.outputs]
    said = {
        o.metadata.get("scrapbook", {}).get("name"): o.get("data", {}) for o in outputs if "metadata" in o
    }
    encoder, bag = (
        float(said[f"ch15_{n}"]["application/papermill.record/text/plain"].strip("'"))
        for n in ("encoder", "bag")
    )
    assert encoder >= bag > 40


def test_enough_is_asked(source):
    text = source.read_text(encoding="utf-8")
    if source.name[0] in "01" and source.name[:2] != "00":
        exercises = text.count("```{exercise-start}") + text.count("```{exercise}")
        assert exercises >= 5
        assert text.count("```{solution-start}") == exercises
        assert len(re.findall(r"[\"']question[\"']:", text)) >= 4


def test_some_output_is_compared(notebook):
    tagged = [n for n, c in code_cells(notebook) if "nbval-check-output" in c.metadata.get("tags", [])]
    assert tagged, "no cell carries the tag nbval-check-output"
    empty = [n for n in tagged if not notebook.cells[n].outputs]
    assert not empty, f"cells {empty} are to be compared but store no output"


def test_sources_declare_their_pairing(source):
    header = source.read_text(encoding="utf-8").split("---")[1]
    assert re.search(r"formats:\s*md:myst,ipynb", header), f"{source.name} has no `formats: md:myst,ipynb`"


def test_stored_files_are_valid_json():
    for path in (notebook_path(c) for c in CHAPTERS):
        assert json.loads(Path(path).read_text(encoding="utf-8"))["nbformat"] == 4
