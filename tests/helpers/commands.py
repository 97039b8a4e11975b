"""Run commands as a user types them, in a folder of the user's."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[2]


def draw_no_pictures() -> None:
    """From now on stages draw no curves and no report, which would take as long as a tiny stage."""
    import rlhf.curves
    import rlhf.reward.report.page

    rlhf.curves.draw_curves = lambda runs: SimpleNamespace(savefig=lambda file: None)
    rlhf.reward.report.page.draw = lambda *_: b"\x89PNG"


def run(
    command: list[str], folder: Path, timeout: float = 1200, **environment: str
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


def run_forked(
    arguments: list[str], folder: Path, timeout: float = 1200, **environment: str
) -> subprocess.CompletedProcess:
    """As `run` for `python <arguments>`, but in a fork of a process that has imported torch and the
    libraries: that saves six seconds. Not for variables that a library reads as it is imported."""
    from helpers.processes import Fork

    outputs = [folder / f".{name}" for name in ("stdout", "stderr")]
    variables = os.environ | environment
    process = Fork(target=_python, args=(arguments, folder, outputs, variables))
    process.start()
    process.join(timeout)
    assert process.exitcode is not None, process.kill()
    texts = [file.read_text(encoding="utf-8") for file in outputs]
    for file in outputs:
        file.unlink()
    return subprocess.CompletedProcess(arguments, process.exitcode, *texts)


_IN_FORKS = """
import gc, importlib, json, os, pathlib, runpy, shlex, sys
from hydra.core.plugins import Plugins

commands, imports = map(json.loads, sys.argv[1:])
for name in imports:
    importlib.import_module(name)
Plugins.instance()
gc.freeze()
answers = []
for command in commands:
    child = os.fork()
    if child == 0:
        for descriptor, name in ((1, ".stdout"), (2, ".stderr")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        python, *sys.argv = shlex.split(command)
        assert python == "python"
        if sys.argv[0] == "-m":
            del sys.argv[0]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
        sys.exit()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    files = [pathlib.Path(name) for name in (".stdout", ".stderr")]
    answers.append([status, *(file.read_text(encoding="utf-8") for file in files)])
    for file in files:
        file.unlink()
print(json.dumps(answers))
"""


def run_in_forks(
    commands: list[str], imports: list[str], folder: Path, timeout: float = 1200, **environment: str
) -> dict[str, subprocess.CompletedProcess]:
    """As `run` for several `python ...`, one after another: forks of one process of their own
    environment, which imports once what all of them import."""
    arguments = [json.dumps(commands), json.dumps(imports)]
    done = run([sys.executable, "-c", _IN_FORKS, *arguments], folder, timeout, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout)
    return {
        command: subprocess.CompletedProcess(command, *answer)
        for command, answer in zip(commands, answers, strict=True)
    }


def _python(
    arguments: list[str], folder: Path, outputs: list[Path], environment: dict[str, str]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    tempfile.tempdir = None  # else TMPDIR is that of the first process
    for descriptor, name in enumerate([os.devnull, *map(str, outputs)]):
        opened = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, descriptor)
    if arguments[0] == "-m":
        sys.argv, sys.path[:0] = arguments[1:], [str(folder)]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def check_runs(command: str, folder: Path, timeout: float = 1200, **environment: str) -> str:
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
