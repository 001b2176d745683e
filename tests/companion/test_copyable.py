"""Each file of the three rooms works alone, in an empty folder, with torch and its declared third parties."""

import ast
import io
import json
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "qtune_companion"
FILES = sorted(
    p
    for room in ("quantization", "finetuning", "evaluation")
    for p in (PACKAGE / room).glob("*.py")
    if p.stem != "__init__"
)
RUN = """
import contextlib, doctest, importlib, importlib.abc, io, json, pathlib, sys, traceback
import torch
class NoCompanion(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == "qtune_companion":
            raise ImportError(name)
sys.meta_path.insert(0, NoCompanion())
found = {}
for folder in map(pathlib.Path, sys.argv[1:]):
    (file,) = folder.iterdir()
    sys.path[0] = str(folder)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            module = importlib.import_module(file.stem)
            failed, tried = doctest.testmod(module, extraglobs={"torch": torch})
        except BaseException:
            failed, tried = 1, 0
            traceback.print_exc(file=said)
    sys.modules.pop(file.stem, None)
    found[folder.name] = failed, tried, said.getvalue()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What each file's examples did: each in a folder of its own, all in one process, which imports torch once."""
    folders = []
    for path in FILES:
        folders.append(tmp_path_factory.mktemp("alone") / f"{path.parent.name}-{path.stem}")
        folders[-1].mkdir()
        (folders[-1] / path.name).write_text(path.read_text("utf-8"), "utf-8")
    command = [sys.executable, "-B", "-c", RUN, *map(str, folders)]
    run = subprocess.run(command, cwd=folders[0].parent, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.xdist_group("alone")
@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_file_alone(path, alone):
    failed, tried, said = alone[f"{path.parent.name}-{path.stem}"]
    assert failed == 0, said
    assert tried >= 1, "an example in the docstrings is missing"


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_file_says_what_it_needs_and_keeps_to_it(path):
    text = path.read_text("utf-8")
    needs = re.search(r"Copy this file: it needs (.*?)\.\s", text, re.S)
    assert needs, "the docstring must say 'Copy this file: it needs …'"
    allowed = {"torch"} | {w for w in ("safetensors", "transformers", "datasets") if w in needs.group(1)}
    nodes = list(ast.walk(ast.parse(text)))
    imported = {a.name.split(".")[0] for n in nodes if isinstance(n, ast.Import) for a in n.names}
    imported |= {(n.module or "sibling").split(".")[0] for n in nodes if isinstance(n, ast.ImportFrom)}
    assert imported - allowed - set(sys.stdlib_module_names) == set()
    assert "chapter" in text.split('"""')[1].lower()
    assert text.count("\n") <= 300


def code_lines(text):
    """Number of lines with code on them: no comments, no docstrings, nothing blank."""
    described = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = [
        node.body[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, described) and ast.get_docstring(node)
    ]
    prose = {line for doc in docs for line in range(doc.lineno, doc.end_lineno + 1)}
    silent = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in silent]
    return len({line for t in tokens for line in range(t.start[0], t.end[0] + 1)} - prose)


def test_code_lines_are_counted():
    text = '''"""A module."""\n\nimport os  # one\n\n\ndef f():\n    """Says\n    much."""\n    return (\n        os\n    )\n'''
    assert code_lines(text) == 5


def test_the_package_stays_small():
    texts = {p: p.read_text("utf-8") for p in PACKAGE.rglob("*.py")}
    assert sum(code_lines(text) for text in texts.values()) <= 3500
    for p, text in texts.items():
        assert text.count("\n") <= 300, p


def test_the_tests_mirror_the_package():
    here = Path(__file__).parent
    modules = {p.relative_to(PACKAGE).with_suffix("") for p in PACKAGE.rglob("*.py") if p.stem != "__init__"}
    tests = {p.relative_to(here).with_suffix("") for p in here.rglob("test_*.py")}
    tested = {t.with_name(t.stem.removeprefix("test_")) for t in tests}
    assert tested - modules == {Path("copyable"), Path("dracula/dracula"), Path("quantization/matmul")}
    assert modules <= tested


def test_every_public_name_is_there():
    import qtune_companion as qt

    assert all(getattr(qt, name) is not None for name in qt.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = qt.nope
