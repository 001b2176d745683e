"""Find a Chromium for the browser tests, or install one.

python scripts/browser.py [--install]

Looked for in this order: the environment variable CHROMIUM, `chromium` and Google Chrome on the PATH, and the
browser that Playwright downloaded. With --install and none found: apt-get where that is possible (root on a
Debian-like system), otherwise Playwright's own.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MAC_CHROME = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
# The browser itself asks nobody for anything either: no updates, no component downloads, no sync.
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def find_browser() -> str | None:
    """Return the path of a Chromium, or None. A CHROMIUM that is not there raises `ValueError`."""
    chosen = os.environ.get("CHROMIUM")
    if chosen:
        path = shutil.which(chosen)
        if path is None:
            raise ValueError(f"CHROMIUM={chosen} is not a program; set it to a Chromium's path or unset it")
        return path
    for name in (*NAMES, MAC_CHROME):
        path = shutil.which(name)
        if path and "snap" not in Path(path).resolve().parts:
            return path
    return playwright_browser()


def playwright_browser() -> str | None:
    """Return the path of the browser that Playwright downloaded, or None."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if Path(path).exists() else None


def install_browser() -> None:
    """Install a Chromium: apt-get as root on Debian, otherwise Playwright's own."""
    if shutil.which("apt-get") and hasattr(os, "geteuid") and os.geteuid() == 0:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        quiet = ["apt-get", "-qq", "-o", "Dpkg::Use-Pty=0"]
        subprocess.run([*quiet, "update"], check=True, env=environment)
        subprocess.run(
            [*quiet, "install", "-y", "chromium"], check=True, env=environment, stdin=subprocess.DEVNULL
        )
    else:
        subprocess.run([sys.executable, "-m", "playwright", "install", "chromium"], check=True)


def main() -> int:
    """Print the browser's path; return the exit status."""
    parser = argparse.ArgumentParser(description="Find a Chromium for the browser tests.")
    parser.add_argument("--install", action="store_true", help="install one when there is none")
    install = parser.parse_args().install
    try:
        if install and find_browser() is None:
            install_browser()
        path = find_browser()
    except (ValueError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
        return 1
    print(path or "no Chromium found; run `python scripts/browser.py --install`")
    return 0 if path else 1


if __name__ == "__main__":
    sys.exit(main())
