"""Turn each chapter's source (`NN_slug.md` or `NNb_slug.md`, MyST) into an executed notebook (`NN_slug.ipynb`).

python scripts/notebooks.py [--only 07 13] [--force] [--check]

A chapter is executed again only when its source has changed since, and more of it than words. Chapters that measure a method add rows
to the scoreboard, book/appendix/90_scoreboard.json; the page that shows it comes after them. The preface comes
last and again after any other, because it shows a table of the run times that the others store in their metadata:

    nb.metadata.qtune = {"source_sha256": ..., "seconds": ..., "peak_mb": ..., "rows": [...]}

The same figures can be shown in a chapter's text with {glue:text}`measured-time` and
{glue:text}`measured-memory`. No chapter asks the network, unless HF_HUB_OFFLINE=0
lets one fetch a model that you have put in by its hub id. What differs from run to run for no good reason (progress bars, time stamps,
this machine's paths) is not stored. A notebook is replaced only when every cell of the new one ran.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import jupytext
import nbformat
from jupytext.formats import JupytextFormatError
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from nbformat.validator import NotebookValidationError
from tqdm import tqdm

from runner import Runner
from stored_output import clean_outputs, is_glued, measured_output, readable_time
from words import change_words, is_quiz, split_words

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
}


class ChapterError(Exception):
    """A chapter did not run to its end; the message says where and why."""


def chapters(book: Path = BOOK) -> list[Path]:
    """Return the sources of all chapters in the book's order, with the preface last."""
    sources = [
        p for p in book.rglob("[0-9][0-9]*_*.md") if not {"_build", ".ipynb_checkpoints"} & set(p.parts)
    ]
    return sorted(sources, key=lambda p: (p.name.startswith("00_"), p.name))


def number(source: Path) -> str:
    """Return what a chapter is called by: `7` for `07_gptq.md`, `8b` for `08b_autoround.md`."""
    return source.name.split("_")[0].removeprefix("0") or "0"


def notebook_path(source: Path) -> Path:
    """Return the path of the notebook paired with `source`."""
    return source.with_suffix(".ipynb")


def stored_metadata(source: Path) -> dict:
    """Return the `qtune` metadata of a chapter's notebook; empty when there is none."""
    try:
        return json.loads(notebook_path(source).read_text(encoding="utf-8"))["metadata"].get("qtune", {})
    except FileNotFoundError:
        return {}
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError) as error:
        raise ChapterError(
            f"{notebook_path(source)} is not a notebook ({error}); delete it and run again"
        ) from None


def fingerprint(source: Path, book: Path = BOOK) -> str:
    """Return the hash of what a notebook is made from: its source, and data beside it that has its name.

    For the preface, the run times of all others too.
    """
    digest = hashlib.sha256(source.read_text(encoding="utf-8").encode())
    if (data := source.with_suffix(".json")).is_file():  # what the page shows: the scoreboard's rows
        digest.update(data.read_text(encoding="utf-8").encode())
    if source.name.startswith("00_"):
        for other in chapters(book):
            if other != source:
                stored = stored_metadata(other)
                digest.update(json.dumps([other.name, stored.get("seconds"), stored.get("peak_mb")]).encode())
    return digest.hexdigest()


def is_current(source: Path, book: Path = BOOK) -> bool:
    """Tell whether a chapter's notebook was made from its present source."""
    return stored_metadata(source).get("source_sha256") == fingerprint(source, book)


def read_source(source: Path) -> NotebookNode:
    """Read a chapter's source as a notebook without outputs; cell ids follow from the cells' text."""
    try:
        nb = jupytext.read(source)
    except (JupytextFormatError, NotebookValidationError) as error:
        raise ChapterError(f"{source} cannot be read as a notebook: {str(error).splitlines()[0]}") from None
    seen: dict[str, int] = {}
    for cell in nb.cells:
        digest = hashlib.sha256(cell.source.encode()).hexdigest()[:10]
        seen[digest] = seen.get(digest, 0) + 1
        cell.id = f"{digest}-{seen[digest]}"
    nb.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return nb


def explain(source: Path, runner: Runner, error: Exception) -> str:
    """Return chapter, cell and reason of a failure as one text."""
    code = [c for c in runner.nb.cells if c.cell_type == "code"]
    name = source.relative_to(ROOT) if source.is_relative_to(ROOT) else source
    where = f"{name}, code cell {runner.cell_number}"
    listing = code[runner.cell_number - 1].source if 0 < runner.cell_number <= len(code) else ""
    if isinstance(error, CellTimeoutError):
        reason = f"ran longer than {runner.timeout} s (see --timeout)"
    elif isinstance(error, DeadKernelError):
        reason = "the Python process ended; most often the machine ran out of memory"
    else:
        reason = error.traceback if isinstance(error, CellExecutionError) else str(error)
    return f"{where} failed:\n\n{listing}\n\n{reason}"


def write_atomically(nb: NotebookNode, target: Path) -> None:
    """Write a notebook aside, then move it into place, so that no half notebook is ever seen."""
    partial = target.with_name(f".{target.name}.part")
    try:
        partial.write_text(nbformat.writes(nb) + "\n", encoding="utf-8")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def own_rows(source: Path, board: Path) -> list[dict]:
    """Return the scoreboard's rows of the page's chapter, but those that another page of the chapter says it added."""
    sisters = [p for p in source.parent.glob(f"{source.name[:2]}*_*.md") if p != source]
    theirs = {method for page in sisters for method in stored_metadata(page).get("rows", [])}
    rows = json.loads(board.read_text(encoding="utf-8")) if board.is_file() else []
    return [r for r in rows if f"{r['chapter']:02d}" == source.name[:2] and r["method"] not in theirs]


@contextlib.contextmanager
def own_rows_anew(source: Path, board: Path) -> Iterator[Path]:
    """Lend a copy of the scoreboard without the page's own rows; it takes the board's place if the run succeeds."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / board.name
        if board.is_file():
            rows, own = json.loads(board.read_text(encoding="utf-8")), own_rows(source, board)
            others = [row for row in rows if row not in own]
            copy.write_text(json.dumps(others, indent=1) + "\n", encoding="utf-8")
        yield copy
        if copy.is_file():
            aside = board.with_name(f".{board.name}.part")
            aside.write_text(copy.read_text(encoding="utf-8"), encoding="utf-8")
            aside.replace(board)


def execute_chapter(source: Path, timeout: int = 900, book: Path = BOOK) -> NotebookNode:
    """Execute one chapter and store its notebook; on failure raise `ChapterError` and leave the old one."""
    made_from, nb = fingerprint(source, book), read_source(source)  # what is edited meanwhile does not count
    scoreboard = book / "appendix" / "90_scoreboard.json"
    with tqdm(total=len(nb.cells), desc=source.stem, unit="cell", disable=None) as bar:
        runner = Runner(nb, source.parent, timeout, bar)
        try:
            with own_rows_anew(source, scoreboard) as lent:
                seconds, peak_mb = runner.measure(lent)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            raise ChapterError(explain(source, runner, error)) from None
        bar.n = len(nb.cells)
        bar.refresh()
    clean_outputs(nb, ROOT)
    measured_output(nb, seconds, peak_mb)
    nb.metadata["language_info"] = {"name": "python"}
    nb.metadata["qtune"] = {
        "source_sha256": made_from,
        "seconds": round(seconds, 1),
        "peak_mb": round(peak_mb),
        "rows": [row["method"] for row in own_rows(source, scoreboard)],
    }
    write_atomically(nb, notebook_path(source))
    print(
        f"{source.stem}: executed in {readable_time(seconds)}, {peak_mb / 1000:.1f} GB at most{runner.slowest()}"
    )
    return nb


def quiz_outputs(cell: NotebookNode, source: Path) -> list[NotebookNode]:
    """Return what the cell of a quiz shows; it needs no other cell but its import."""
    code = f"from jupyterquiz import display_quiz\n{cell.source}"
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nb.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    with tqdm(total=1, disable=True) as bar, tempfile.TemporaryDirectory() as folder:
        Runner(nb, source.parent, 60, bar).measure(Path(folder) / "no_rows.json")
    clean_outputs(nb, ROOT)
    return cast(list[NotebookNode], nb.cells[0].outputs)


def update_prose(source: Path, book: Path = BOOK) -> bool:
    """Keep the outputs where only words have changed (prose, captions, a quiz), and store the new; tell whether so."""
    target = notebook_path(source)
    shows_others = source.name.startswith("00_") or source.with_suffix(".json").is_file()  # run times, rows
    if shows_others or not target.is_file():
        return False
    old, nb = nbformat.read(target, as_version=4), read_source(source)
    was, now = ([c for c in n.cells if c.cell_type == "code"] for n in (old, nb))
    if "qtune" not in old.metadata or any(c.source.strip() and c.execution_count is None for c in was):
        return False  # written by another tool, or cleared
    before, after = ([split_words(c.source) for c in cells] for cells in (was, now))
    codes = [
        [(code, [keyword for keyword, _ in words], c.metadata.get("tags")) for (code, words), c in pairs]
        for pairs in (zip(before, was, strict=True), zip(after, now, strict=True))
    ]
    if codes[0] != codes[1]:
        return False
    for executed, cell, (_, old_words), (_, new_words) in zip(was, now, before, after, strict=True):
        if is_quiz(cell.source) and cell.source != executed.source:
            measured = [output for output in executed.outputs if is_glued(output)]
            cell.outputs = quiz_outputs(cell, source) + measured
        else:
            cell.outputs = change_words(executed.outputs, old_words, new_words)
        cell.execution_count = executed.execution_count
    nb.metadata["language_info"] = old.metadata["language_info"]
    nb.metadata["qtune"] = old.metadata["qtune"] | {"source_sha256": fingerprint(source, book)}
    write_atomically(nb, target)
    print(f"{source.stem}: only its prose has changed; the outputs are kept")
    return True


def selected(only: list[str] | None) -> list[Path]:
    """Return the chapters named by their numbers (`7` and `07` are the same), or all."""
    found = chapters()
    if not only:
        return found
    wanted = {n.lstrip("0") or "0" for n in only}
    if missing := wanted - {number(p) for p in found}:
        there = ", ".join(number(p) for p in found)
        raise ChapterError(f"no chapter {', '.join(sorted(missing))}; there are {there}")
    return [p for p in found if number(p) in wanted]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Execute the book's chapters into notebooks.")
    parser.add_argument("--only", nargs="+", metavar="N", help="these chapters, by number: 7 13 8b")
    parser.add_argument("--force", action="store_true", help="execute even when the source has not changed")
    parser.add_argument(
        "--check", action="store_true", help="execute nothing; exit 1 when a notebook is out of date"
    )
    parser.add_argument(
        "--timeout", type=int, default=900, metavar="S", help="seconds a cell may take (default: 900)"
    )
    arguments = parser.parse_args(argv)
    for name, value in OFFLINE.items():
        os.environ.setdefault(name, value)
    try:
        sources = selected(arguments.only)
        if arguments.check:
            stale = [p for p in sources if not is_current(p)]
            for source in stale:
                print(f"{source.relative_to(ROOT)}: its notebook is out of date; run `make notebooks`")
            return 1 if stale else 0
        for source in sources:
            if arguments.force or not (is_current(source) or update_prose(source)):
                execute_chapter(source, arguments.timeout)
    except (ChapterError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    if sys.platform == "win32":
        asyncio.set_event_loop_policy(asyncio.WindowsSelectorEventLoopPolicy())  # type: ignore[attr-defined]
    sys.exit(main())
