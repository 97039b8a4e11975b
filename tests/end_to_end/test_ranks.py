"""An error on any of several processes is printed once, with its rank, and ends all of them.

Run: python -m pytest tests/end_to_end/test_ranks.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import rlhf.cli
from rlhf.cli import hydra_main
from rlhf.config import InputError

ROOT = Path(__file__).parents[2]
STAGE = """
import os, sys, time
from rlhf import cli
from rlhf.config import InputError

def run(config):
    if os.environ["RANK"] in failing:
        raise InputError("dataset.path=rows.jsonl is not there")
    time.sleep(900)  # as in an exchange that the other process never joins

failing = sys.argv.pop(1).split(",")
if len(failing) > 1:
    cli.REPEAT_SECONDS = 900.0  # the launcher ends the second process, however late it looks
cli.hydra_main("sft", run)
"""


# Both processes are in the loop, where a launcher's SIGTERM is a wish, before one of them dies.
KILLED = """
import os, pathlib, signal
import torch
from rlhf.checkpoint import GracefulStop
from rlhf.checkpoint.run_directory import join_group
from rlhf.cli import hydra_main
from rlhf.failures import phase

def run(config):
    join_group(config)
    with phase("training"), GracefulStop(600, pathlib.Path()):
        torch.distributed.all_reduce(torch.ones(1))
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        torch.distributed.all_reduce(torch.ones(1))

hydra_main("sft", run)
"""


def launched(folder, text, *arguments):
    """What torchrun does with two processes of a file."""
    (folder / "stage.py").write_text(text)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*launcher, "--nproc_per_node", "2", "stage.py", *arguments, "recipe=demo"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,  # a process that waits for the other one would take longer
    )


def test_first_process_under_a_launcher_tells_which_one_was_killed(tmp_path):
    done = launched(tmp_path, KILLED)
    assert done.returncode != 0 and "exitcode  : -9" in done.stderr, done.stderr
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert error.startswith("error: no word from rank 1: killed"), error
    assert "; rank 0 (training): " in error and error.endswith("the newest checkpoint"), error


@pytest.mark.parametrize("failing, rank", [("1", "rank 1: "), ("0,1", "")])
def test_error_on_one_process_is_printed_once_and_ends_all(failing, rank, tmp_path):
    done = launched(tmp_path, STAGE, failing)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: {rank}dataset.path=rows.jsonl is not there"]


@pytest.mark.parametrize(
    "error, status, printed",
    [
        (InputError("no room"), 2, "error: rank 1: no room\n"),
        (InputError("rank 1: no room"), 2, "error: rank 1: no room\n"),
        (KeyError("mine"), None, "error on rank 1 (before training):\n"),
    ],
)
def test_error_of_a_stage_has_its_rank(error, status, printed, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for name, value in {"HYDRA_FULL_ERROR": "0", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rlhf.console, "REPEAT_SECONDS", 0.0)
    monkeypatch.setattr("sys.argv", ["rlhf.sft"])
    for_launcher = tmp_path / "error.json"  # torchrun ends with the rank and this text
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(for_launcher))

    def run(config):
        raise error

    with pytest.raises((SystemExit, KeyError)) as stop:
        hydra_main("sft", run)
    assert getattr(stop.value, "code", None) == status
    assert capfd.readouterr().err.startswith(printed)
    told = json.loads(for_launcher.read_text())["message"]["extraInfo"]["py_callstack"]
    assert told.rstrip().endswith(str(error))
