#!/usr/bin/env python3
"""Finds or installs a Chromium for the tests of the viewer page; never fails, the tests are skipped instead.

In this order: a browser on PATH; as root with apt-get, Debian's `chromium`; Playwright's own download.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
INSTALL_SECONDS = 600


def find_browser() -> str | None:
    """Path of a Chromium that starts, or None."""
    for name in NAMES:
        if (path := shutil.which(name)) and _starts(path):
            return path
    try:
        from playwright.sync_api import sync_playwright

        with sync_playwright() as playwright:
            path = playwright.chromium.executable_path
    except Exception:  # not installed, or its driver does not start here
        return None
    return path if _starts(path) else None


def _starts(path: str) -> bool:
    """Ubuntu's `chromium-browser`, for one, may be a stub that asks for a snap."""
    try:
        return subprocess.run([path, "--version"], capture_output=True, timeout=30).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _run(*command: str) -> str | None:
    """None, or why the command failed."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS, env=environment)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}"
    if run.returncode == 0:
        return None
    last = (run.stderr.strip() or run.stdout.strip() or "no message").splitlines()[-1]
    return f"{' '.join(command[:3])}: {last}"


def install() -> list[str]:
    """Tries what there is until a browser is found; why each try failed."""
    failures: list[str | None] = []
    if os.geteuid() == 0 and shutil.which("apt-get"):
        failures.append(_run("apt-get", "-q", "update"))
        failures.append(_run("apt-get", "-q", "-y", "install", "chromium"))
    if find_browser() is None:
        failures.append(_run(sys.executable, "-m", "playwright", "install", "chromium"))
    return [failure for failure in failures if failure is not None]


def main() -> None:
    found, failures = find_browser(), []
    if found is None:
        print("browser: installing Chromium for the viewer's tests", flush=True)
        failures = install()
        found = find_browser()
    if found is not None:
        print(f"browser: {found}")
    else:
        print(
            f"browser: none, so the viewer's tests will be skipped ({'; '.join(failures) or 'nothing to install it'})"
        )


if __name__ == "__main__":
    main()
