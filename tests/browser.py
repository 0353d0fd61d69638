"""The browser that looks at the built book: found, or fetched once by ``python -m tests.browser``.

The system's Chromium or Chrome if there is one; else Debian's package where apt-get may be used; else playwright's own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def installed() -> str | None:
    """Return the path of a system browser, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def launch(playwright):
    """Start the browser headless."""
    return playwright.chromium.launch(executable_path=installed(), args=ARGUMENTS)


def fetch() -> None:
    """Make sure that there is a browser."""
    if installed():
        return
    if shutil.which("apt-get") and os.geteuid() == 0:
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update", "-qq"], env=quiet, check=False)
        subprocess.run(
            ["apt-get", "install", "-y", "-qq", "chromium"], env=quiet, check=False, stdout=subprocess.DEVNULL
        )
    if not installed():
        subprocess.run([sys.executable, "-m", "playwright", "install", "--with-deps", "chromium"], check=True)


if __name__ == "__main__":
    fetch()
