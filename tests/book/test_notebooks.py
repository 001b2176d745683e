"""Every notebook runs again, and its outputs tagged `nbval-check-output` come out the same."""

import os
import re
import subprocess
import sys

import pytest

from notebooks import OFFLINE, ROOT, chapters, notebook_path


@pytest.mark.slow
@pytest.mark.parametrize("source", chapters(), ids=lambda p: p.stem)
def test_notebook_runs(source):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--nbval-lax",
        "--nbval-current-env",
        "--nbval-cell-timeout=2700",  # a training on one core of a slow machine
    ]
    options = [
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "--color=no",
        str(notebook_path(source)),
    ]
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith("PYTEST_") and k != "QTUNE_SCOREBOARD"
    }
    environment |= {**OFFLINE, "JUPYTER_PREFER_ENV_PATH": "1"}
    run = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert re.search(r"\b[1-9]\d* passed", run.stdout), run.stdout
