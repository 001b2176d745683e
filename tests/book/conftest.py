"""What the book's tests share: the list of chapters, and the site, built once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"
sys.path.insert(0, str(ROOT / "scripts"))
from notebooks import stored_metadata  # noqa: E402


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    """With pytest-xdist, build the site once, on one worker, and begin with what takes longest."""
    for item in items:
        if "site" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("site"))
    items.sort(key=longest_first)


def longest_first(item):
    """Notebooks by their stored run times, then what uses the site, then the rest."""
    if getattr(item, "originalname", "") == "test_notebook_runs":
        return -stored_metadata(item.callspec.params["source"]).get("seconds", 0.0)
    return 0.0 if item.get_closest_marker("xdist_group") else 1.0


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The HTML of the whole book, built with warnings as errors."""
    out = tmp_path_factory.mktemp("site")
    program = str(Path(sys.executable).with_name("jupyter-book"))
    command = [program, "build", "book", "--path-output", str(out)]
    options = ["--config", "_config.yml", "--toc", str(ROOT / "_toc.yml"), "-W", "-n", "--keep-going"]
    environment = {**os.environ, "NO_COLOR": "1"}
    run = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, env=environment)
    warnings = [
        line for line in (run.stdout + run.stderr).splitlines() if "WARNING" in line or "ERROR" in line
    ]
    assert run.returncode == 0, "the build failed:\n" + (
        "\n".join(warnings) or (run.stdout + run.stderr)[-4000:]
    )
    return out / "_build" / "html"


@pytest.fixture(scope="session")
def pages(site):
    """The paths of all pages of the site, relative to it."""
    found = sorted(
        p.relative_to(site) for p in site.rglob("*.html") if "_static" not in p.relative_to(site).parts
    )
    assert Path("index.html") in found
    return found
