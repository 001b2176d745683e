"""Clean a notebook's outputs before they are stored: no progress bars, no time stamps, no machine's paths."""

import re
from pathlib import Path

from nbformat import NotebookNode
from nbformat.v4 import new_output

GLUE_MIME = "application/papermill.record/"
WIDGET_MIMES = ("application/vnd.jupyter.widget-view+json", "application/vnd.jupyter.widget-state+json")
PROGRESS_LINE = re.compile(r"\d+%\s*\|.*\||\d+\s*(it|examples?|ba|batch(es)?) ?\[\d+:\d+|\[\d+:\d+<")
QUIZ_MATHJAX = re.compile(
    r"// Trigger MathJax typesetting if available.*?(?=// Prevent link clicks)", re.DOTALL
)
QUIZ_TYPESET = """const typeset = () => window.MathJax && MathJax.startup && MathJax.startup.promise
        .then(() => MathJax.typesetPromise([container]));
    if (document.readyState === 'complete') typeset(); else window.addEventListener('load', typeset);

    """
ADDRESS = re.compile(r" at 0x[0-9a-f]{6,16}")


def without_progress(text: str) -> str:
    """Keep what a terminal would show at the end, less the lines that are progress bars."""
    kept = []
    for line in text.split("\n"):
        shown = line.rstrip("\r").rsplit("\r", 1)[-1]
        if not PROGRESS_LINE.search(shown) and (shown or "\r" not in line):
            kept.append(shown)
    return "\n".join(kept)


def without_machine(text: str, root: Path) -> str:
    """Shorten this machine's paths, and drop the addresses of objects in memory."""
    return ADDRESS.sub("", text.replace(str(root), ".").replace(str(Path.home()), "~"))


def local_quiz(script: str) -> str:
    """Let a quiz of jupyterquiz typeset by the page's own MathJax, and never ask a CDN for one."""
    return QUIZ_MATHJAX.sub(lambda _: QUIZ_TYPESET, script)


def closed(html: str) -> str:
    """Close the one <div> that jupyterquiz leaves open, which would swallow the rest of the page."""
    return html + "</div>" if html.count("<div") == html.count("</div>") + 1 else html


def is_progress(output: NotebookNode) -> bool:
    """Tell whether an output is a progress bar: a widget, or HTML with a progress element."""
    data = output.get("data", {})
    return any(mime in data for mime in WIDGET_MIMES) or "<progress" in data.get("text/html", "")


def clean_outputs(nb: NotebookNode, root: Path) -> None:
    """Clean every output of `nb` in place."""
    for cell in nb.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        kept = []
        for output in cell.outputs:
            if output.output_type == "stream":
                output.text = without_machine(without_progress(output.text), root)
                if not output.text.strip():
                    continue
            elif is_progress(output):
                continue
            for mime, value in output.get("data", {}).items():
                if isinstance(value, str) and mime.startswith("text/"):
                    output.data[mime] = without_machine(value, root)
                if mime == "text/html":
                    output.data[mime] = closed(output.data[mime])
                elif mime == "application/javascript":
                    output.data[mime] = local_quiz(value)
            kept.append(output)
        cell.outputs = kept
    nb.metadata.pop("widgets", None)


def readable_time(seconds: float) -> str:
    """Return a run time as a person would say it."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def is_glued(output: NotebookNode) -> bool:
    """Tell whether an output is a value kept for {glue:text}, and shows nothing."""
    return "scrapbook" in output.get("metadata", {})


def measured_output(nb: NotebookNode, seconds: float, peak_mb: float) -> None:
    """Store run time and peak memory for the page's {glue:text}; in a notebook they show nothing."""
    plain = [
        c
        for c in nb.cells
        if c.cell_type == "code" and "nbval-check-output" not in c.metadata.get("tags", [])
    ]
    if not plain:
        return
    values = {"measured-time": readable_time(seconds), "measured-memory": f"{peak_mb / 1000:.1f} GB"}
    for name, value in values.items():
        plain[-1].outputs.append(
            new_output(
                "display_data",
                data={GLUE_MIME + "text/plain": repr(value)},
                metadata={"scrapbook": {"mime_prefix": GLUE_MIME, "name": name}},
            )
        )
