"""Words in code cells, which change nothing else: a slider's caption and alt text, and a quiz."""

from __future__ import annotations

import ast
import html

from nbformat import NotebookNode

WORDS = ("alt", "caption")


def name_of(function: ast.expr) -> str:
    """Return the last part of what is called: ``SliderFigure`` of ``qt.SliderFigure``."""
    return getattr(function, "attr", getattr(function, "id", ""))


def split_words(code: str) -> tuple[str, list[tuple[str, str]]]:
    """Split the code of a cell into the code without its words, and its sliders' words: ``(keyword, text)``.

    Only literals count: what is computed is code. A cell that is not plain Python is all code, a quiz none.
    """
    if is_quiz(code):
        return "", []
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return code, []
    literals: list[tuple[str, str, ast.Constant]] = []
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and name_of(call.func) == "SliderFigure":
            for keyword in call.keywords:
                value = keyword.value
                if keyword.arg in WORDS and isinstance(value, ast.Constant) and isinstance(value.value, str):
                    literals.append((keyword.arg, value.value, value))
    raw = code.encode()  # whose bytes are what ast counts
    starts = [0]
    for line in raw.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    literals_backward = sorted(
        literals, key=lambda found: (found[2].lineno, found[2].col_offset), reverse=True
    )
    for _, _, value in literals_backward:
        assert value.end_lineno is not None
        assert value.end_col_offset is not None
        begin = starts[value.lineno - 1] + value.col_offset
        end = starts[value.end_lineno - 1] + value.end_col_offset
        raw = raw[:begin] + b"''" + raw[end:]
    return raw.decode(), [(keyword, text) for keyword, text, _ in literals]


def change_words(
    outputs: list[NotebookNode], old: list[tuple[str, str]], new: list[tuple[str, str]]
) -> list[NotebookNode]:
    """Put a slider's new words in place of the old ones in the outputs of its cell."""
    for output in outputs:
        page = output.get("data", {}).get("text/html")
        if page is None or 'class="book-slider"' not in page:
            continue
        for (keyword, before), (_, after) in zip(old, new, strict=True):
            was, now = html.escape(before), html.escape(after)
            if keyword == "alt":  # followed by the label of each image
                page = page.replace(f' alt="{was} ', f' alt="{now} ')
            else:
                page = page.replace(f"<figcaption><p>{was}</p>", f"<figcaption><p>{now}</p>")
        output["data"]["text/html"] = page
    return outputs


def is_quiz(code: str) -> bool:
    """Tell whether a cell is a quiz and nothing else: one call with literals, after its import perhaps."""
    try:
        match ast.parse(code).body:
            case [ast.Expr(value=ast.Call(func=ast.Name("display_quiz")) as call)] | [
                ast.ImportFrom(module="jupyterquiz"),
                ast.Expr(value=ast.Call(func=ast.Name("display_quiz")) as call),
            ]:
                for value in [*call.args, *(keyword.value for keyword in call.keywords)]:
                    ast.literal_eval(value)
                return True
    except (SyntaxError, ValueError):
        pass
    return False
