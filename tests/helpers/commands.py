"""Run commands as a user types them, in a folder of the user's."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(
    command: list[str], folder: Path, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess:
    """Run a command on one thread, without a terminal."""
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(
        command,
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
    )


def check_runs(command: str, folder: Path, timeout: float = 300, **environment: str) -> str:
    """Run a shell command, which must succeed; return what it printed."""
    result = run(["bash", "-c", command], folder, timeout, **environment)
    assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}{result.stderr[-3000:]}"
    return result.stdout


def blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """(title, text) of the fenced blocks of a language in a page; "" for those without one."""
    fenced = re.findall(
        r"^```([^\n]*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    found = []
    for head, text in fenced:
        name, _, rest = head.partition(" ")
        if name == language:
            title = re.search('title="([^"]*)"', rest)
            found.append((title[1] if title else "", text))
    return found


def commands(page: Path) -> list[str]:
    """The lines of the page's bash blocks."""
    text = "".join(block for _, block in blocks(page, "bash"))
    return [line for line in text.splitlines() if line.strip()]
