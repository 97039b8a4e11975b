"""The twelve journeys of docs/journeys.md, typed as the page shows them, end as the page shows.

The folder has the files that the page names and a small chat model; commands with SmolLM2 need its
GGUF file. `make journeys` writes the outputs of the page anew.

Run: RLHF_SMOLLM2=<file.gguf> python -m pytest -m slow tests/end_to_end/test_journeys.py
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.journeys import write_folder
from helpers.smollm2 import find_smollm2

PAGE = Path(__file__).parents[2] / "docs/journeys.md"
SECTIONS = re.split(r"^(?=## )", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]*)\")?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
STOPPED = "# Ctrl-C"  # a command that the user stops after its first checkpoint
FAILED = "(exit status {})"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The user's folder: later journeys find what earlier ones made."""
    folder = tmp_path_factory.mktemp("journeys")
    write_folder(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS, ids=lambda text: text.splitlines()[0][3:])
def test_a_journey_prints_what_the_page_shows(section, folder, tmp_path):
    if "smollm2.gguf" in section and not (folder / "smollm2.gguf").exists():
        (folder / "smollm2.gguf").symlink_to(find_smollm2(tmp_path))
    written, printed = section, ""
    for block in BLOCK.finditer(section):
        language, title, text = block.groups()
        if title and (folder / title).exists():
            assert (folder / title).read_text().startswith(text.removesuffix("...\n")), title
        elif title:
            (folder / title).write_text(text)
        elif language == "bash":
            printed = "".join(output_of(line, folder) for line in text.splitlines())
        elif os.environ.get("WRITE_PAGE"):
            written = written.replace(f"```text\n{text}```", f"```text\n{printed}```", 1)
        else:
            missing = [line for line in shapes(text) if line not in shapes(printed)]
            assert not missing, f"{printed}\nrun make journeys"
    if written != section:
        PAGE.write_text(PAGE.read_text(encoding="utf-8").replace(section, written))


def test_the_page_has_twelve_journeys():
    assert len(SECTIONS) == 12


def output_of(command: str, folder: Path) -> str:
    """What a terminal shows after a command, without progress bars."""
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PAGE.parents[1]), "COLUMNS": "100"}
    variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(
        ["bash", "-c", f"exec {command}" if STOPPED in command else command],
        cwd=folder,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
    )
    if STOPPED in command:
        run = re.findall(r"run_name=(\w+)", command)[0]
        while process.poll() is None and not [*folder.glob(f"runs/{run}/*/checkpoint-*")]:
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=1200)
    lines = [line.rstrip() for line in text.replace("\r", "\n").splitlines()]
    is_bar = re.compile(r"\d+%\|| \d+/\d+ \[|^$")
    kept = [line for line in lines if not is_bar.search(line) or not line]
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip("\n")
    text = text.replace(f"{folder}/", "")
    status = f"\n{FAILED.format(process.returncode)}" if process.returncode else ""
    return f"{text}{status}\n"


def shapes(text: str) -> list[str]:
    """The lines of an output without what differs between machines: numbers, widths of columns, and
    sampled answers."""
    text = re.sub(r"^> .*?(?=^\n|^\[|\Z)", "", text, flags=re.DOTALL | re.MULTILINE)  # of a stage
    text = re.sub(r"^(--- .*\n).*", r"\1", text, flags=re.MULTILINE)  # of the chat
    text = re.sub(r'("responses?":).*', r"\1", text)  # of a file
    lines = [re.sub(r"[-+]?\d[\d.,e+-]*", "#", line) for line in text.splitlines()]
    return [re.sub(r"[\s-]+", " ", line).strip() for line in lines]
