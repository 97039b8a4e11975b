"""SIGHUP, terminals and pipes that go away, and the death of the pipeline: nothing is lost, nothing
goes on alone.

Left out: the handler alone (test_interruption.py) and SIGKILL (test_killed_runs.py).

Run: python -m pytest tests/end_to_end/test_signals.py
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from helpers.processes import Fork
from helpers.runs import directory_of, finish, names, new_run, outcome, start, text_of, wait_for

from rlhf.checkpoint import GracefulStop
from rlhf.console import say

ROOT = Path(__file__).parents[2]


def test_sighup_asks_to_stop_as_sigterm_does(tmp_path, capfd):
    before = signal.getsignal(signal.SIGHUP)
    with GracefulStop(60, tmp_path) as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.requested() and stop.signal == signal.SIGHUP
    assert "\nSIGHUP: finishing this step, then saving a checkpoint" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGHUP) == before


def test_sighup_stays_ignored_under_nohup(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with GracefulStop(60, tmp_path) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def train_in(terminal: str, folder: Path) -> None:
    """A loop that says and saves, with a terminal of its own or with a pipe into a program."""
    os.setsid()
    if terminal:
        output = os.open(terminal, os.O_RDWR)
        fcntl.ioctl(output, termios.TIOCSCTTY, 0)
    else:
        reader, output = os.pipe()
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    with GracefulStop(60, folder) as stop:
        if not terminal:
            (folder / "ready").touch()
            os.close(reader)  # Ctrl-C reaches the `tee` of `python -m rlhf.sft | tee log`, too
            os.kill(os.getpid(), signal.SIGINT)
        deadline = time.monotonic() + 300
        while not stop.requested() and time.monotonic() < deadline:
            (folder / "ready").touch()
            time.sleep(0.01)
        say("progress")
        print("more", file=sys.stderr, flush=True)
        (folder / "saved").write_text(str(stop.signal))
    say("stopped; continue with resume=true")
    (folder / "done").touch()


@pytest.mark.parametrize("output, number", [("terminal", signal.SIGHUP), ("pipe", signal.SIGINT)])
def test_run_saves_when_its_terminal_or_pipe_is_gone(output, number, tmp_path):
    ours, theirs = os.openpty()
    name = os.ttyname(theirs) if output == "terminal" else ""
    process = Fork(target=train_in, args=(name, tmp_path))
    process.start()
    deadline = time.monotonic() + 300
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.close(theirs)
    os.close(ours)  # the connection is lost
    process.join(300)
    assert (tmp_path / "saved").read_text() == str(int(number))
    assert (tmp_path / "done").exists() and process.exitcode == 0


# --- The pipeline ---------------------------------------------------------------------------------

PARENT = """
import sys
from rlhf import pipeline
sys.executable = {stage!r}
raise SystemExit(pipeline.run_stage("sft", []))
"""


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split(") ")[1][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # it ended before, or between open and read
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can do that")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_killed_pipeline_leaves_no_orphan(number, tmp_path):
    """A shell script, in place of Python, is the stage: the pipeline starts and ends it."""
    stage, pid = tmp_path / "stage", tmp_path / "pid"
    stage.write_text(f"#!/bin/sh\necho $$ > {pid}.tmp; mv {pid}.tmp {pid}; exec sleep 900\n")
    stage.chmod(0o755)
    command = [sys.executable, "-c", PARENT.format(stage=str(stage))]
    parent = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 300
    while not pid.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    child = int(pid.read_text())
    assert is_running(child)
    parent.send_signal(number)
    status = parent.wait(300)
    assert status == (-signal.SIGKILL if number == signal.SIGKILL else 128 + signal.SIGTERM)
    deadline = time.monotonic() + 300
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(child)


@pytest.mark.parametrize(
    "stage, number", [("sft", signal.SIGINT), ("reward", signal.SIGHUP), ("ppo", signal.SIGTERM)]
)
def test_run_that_is_asked_to_stop_saves_and_continues(stage, number, wholes, tmp_path):
    plain, _, whole = wholes(stage)
    config = new_run(plain, tmp_path, "run")
    process = start(config, ask=number)  # for PPO: in the evaluation before the first update
    process.join(300)
    assert process.exitcode == 128 + number
    assert "finishing this step, then saving a checkpoint" in text_of(config)
    assert "continue with resume=true" in text_of(config)
    assert len(names(directory_of(config), "checkpoint-*/manifest.json")) == 1
    assert not (directory_of(config) / "final").exists()
    finish(start(config), config)
    assert "resuming from" in text_of(config)
    assert outcome(config) == whole.outcome


def test_step_that_outlasts_the_grace_time_is_given_up(wholes, tmp_path):
    config = new_run(wholes("sft")[0], tmp_path, "run")
    config.checkpoint = dataclasses.replace(config.checkpoint, grace_seconds=0.2)
    process = start(config, hang_at=6)
    wait_for(lambda: "hanging" in text_of(config), process)
    os.kill(process.pid, signal.SIGTERM)
    process.join(300)
    assert process.exitcode == 143
    checkpoint = directory_of(config) / "checkpoint-4"
    assert f"exiting without saving; {checkpoint} remains" in text_of(config)
    assert names(directory_of(config), "checkpoint-*") == ["checkpoint-4"]
    finish(start(config), config)
    assert outcome(config) == wholes("sft")[2].outcome


@pytest.mark.parametrize("stopped_by, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_command_ends_with_the_status_of_the_signal(stopped_by, status, tmp_path, monkeypatch):
    from rlhf.cli import hydra_main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # the command sets it; undone with the rest
    monkeypatch.setattr("sys.argv", ["rlhf.sft"])
    with pytest.raises(SystemExit) as stop:
        hydra_main("sft", lambda config: stopped_by)
    assert stop.value.code == status
