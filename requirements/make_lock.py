"""Write requirements/lock.txt: what a clean environment gets when everything is installed.

    python requirements/make_lock.py [--torch 2.13.0]

The file serves as a pip *constraints* file, so it may name packages that one platform does not need.
Version suffixes of a build (`2.13.0+cpu`) and CUDA packages are left out: they depend on the machine.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements" / "lock.txt"
HEADER = """\
# Exact versions of everything in `.[book,test,parity]`, for Python 3.11 to 3.13, used as constraints:
# pip install -c requirements/lock.txt -e '.[book,test,parity]'
# Written by requirements/make_lock.py; do not edit.
"""
MACHINE_DEPENDENT = re.compile(r"(nvidia|cuda)[-_]|triton|pip$|setuptools$|wheel$", re.IGNORECASE)


def locked_lines(freeze: str) -> list[str]:
    """Return `name==version` lines, sorted, without local version suffixes and machine-dependent packages."""
    lines = []
    for line in freeze.splitlines():
        name, separator, version = line.strip().partition("==")
        if not separator or name.startswith(("#", "-e")) or MACHINE_DEPENDENT.match(name):
            continue
        lines.append(f"{name.lower().replace('_', '-')}=={version.split('+')[0]}")
    return sorted(lines)


def main() -> None:
    """Install into a throw-away environment and freeze it."""
    parser = argparse.ArgumentParser(description="Write requirements/lock.txt from a clean environment.")
    parser.add_argument(
        "--torch", default="2.13.0", help="exact version of torch to lock (default: %(default)s)"
    )
    torch = parser.parse_args().torch
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / ("Scripts" if sys.platform == "win32" else "bin") / "python"
        pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", f"torch=={torch}", "-e", f"{ROOT}[book,test,parity]"], check=True)
        freeze = subprocess.run([*pip, "freeze"], check=True, capture_output=True, text=True).stdout
    partial = LOCK.with_suffix(".txt.part")
    partial.write_text(HEADER + "\n".join(locked_lines(freeze)) + "\n", encoding="utf-8")
    partial.replace(LOCK)
    print(f"wrote {LOCK.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
