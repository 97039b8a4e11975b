"""A real browser, and a command that serves a page to it.

Needs chromium (apt-get install chromium) and playwright; SCREENSHOTS=<folder> keeps pictures.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium")


def launched() -> Iterator[Any]:
    """A headless Chromium; the test is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as player:
        yield player.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


def pages(browser: Any) -> Iterator[Callable[..., Any]]:
    """A function that opens the page of a server; errors in the browser fail the test."""
    contexts, errors = [], []

    def start(server: Served, **options: Any) -> Any:
        options = {"viewport": {"width": 1180, "height": 720}} | options
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(server.address)
        return page

    yield start
    for context in contexts:
        context.close()
    assert errors == []


def servers() -> Iterator[list[Served]]:
    """A list of servers that are killed at the end."""
    started: list[Served] = []
    yield started
    for server in started:
        if server.process.poll() is None:
            server.kill()


def keep_picture(page: Any, name: str) -> None:
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


class Served:
    """A command in a folder that serves a page; it may be killed and given again."""

    def __init__(self, folder: Path, *command: str):
        self.folder, self.command, self.port = folder, command, 0
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", *self.command, f"port={self.port}"],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for line in self.process.stdout or ():
            if found := re.search(r" at (http://127\.0\.0\.1:(\d+)/\S*)", line):
                self.address, self.port = found[1], int(found[2])
                return
        raise AssertionError(f"the server ended with {self.process.wait()}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> str:
        """Ctrl-C; return what it prints."""
        self.process.send_signal(signal.SIGINT)
        output, _ = self.process.communicate(timeout=300)
        assert self.process.returncode == 0
        return str(output)
