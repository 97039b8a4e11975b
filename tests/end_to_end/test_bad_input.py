"""Every row of the bad-input table is refused as `docs/bad-input.md` says.

Run: python -m pytest tests/end_to_end/test_bad_input.py; `make bad-input` writes the page anew.
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
from bad_input import Case, sections, world

PAGE = Path(__file__).parents[2] / "docs/bad-input.md"
CASES = [case for cases in sections().values() for case in cases]
INTRODUCTION = """# Bad input, and what it gets

Every row is a command that `tests/end_to_end/test_bad_input.py` ran in a folder with a tiny model
(`model/`), a finished SFT and reward run (`runs/mine/`) and a few rows of data. The command
trained, overwrote and deleted nothing. Its exit status is 2 unless the row says otherwise.
`make bad-input` writes this page.
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    return world.build(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    """Filled by the tests: what each case printed."""
    return {}


def run(case: Case, folder: Path, monkeypatch, capfd) -> tuple[int, str]:
    """Run a command in this process as `python -m` would: (exit status, stderr)."""
    module, *arguments = shlex.split(case.command)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # the command sets it; undone with the rest
    monkeypatch.setattr("sys.argv", [module, *arguments])
    capfd.readouterr()
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    return status, capfd.readouterr().err


def error_of(stderr: str, folder: Path) -> str:
    """The error in what a command printed, without the paths of this machine."""
    start = stderr.rfind("error: ")
    text = stderr[start:] if start >= 0 else stderr
    for path in (str(folder.resolve()), str(folder)):
        text = text.replace(f"{path}/", "").replace(path, ".")
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


@pytest.mark.parametrize("case", CASES, ids=lambda case: re.sub(r"\W+", "-", case.what))
def test_bad_input_is_refused(case, built, printed, tmp_path, monkeypatch, capfd):
    folder = tmp_path / "world"
    shutil.copytree(built, folder)
    if case.prepare is not None:
        case.prepare(folder)
    status, stderr = run(case, folder, monkeypatch, capfd)
    error = error_of(stderr, folder)
    assert status == case.status, stderr[-2000:]
    assert "Traceback" not in stderr
    assert [text for text in case.says if text not in error] == [], error
    printed[case.what] = error


def test_page_holds_what_was_printed(printed):
    if len(printed) < len(CASES):
        pytest.skip("needs every case: run the whole file")
    page = render(printed)
    if os.environ.get("WRITE_PAGE"):
        PAGE.write_text(page, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page, "run make bad-input"


def test_the_table_is_long_and_has_no_double_row():
    assert len(CASES) >= 60
    for values in (
        [case.what for case in CASES],
        [case.command for case in CASES if not case.prepare],
    ):
        assert sorted(values) == sorted(set(values))


def render(printed: dict[str, str]) -> str:
    """The page: a table for each section."""

    def cell(text: str) -> str:
        lines = text.replace("|", "\\|").replace("<", "&lt;").splitlines()
        return "<br>".join(line.strip() for line in lines)

    parts = [INTRODUCTION]
    for heading, cases in sections().items():
        parts.append(f"\n## {heading}\n\n| what is wrong | command | printed |\n|---|---|---|\n")
        for case in cases:
            status = f" (exit status {case.status})" if case.status != 2 else ""
            command = cell(f"python -m {case.command}")
            parts.append(f"| {case.what} | `{command}` | {cell(printed[case.what])}{status} |\n")
    return "".join(parts)
