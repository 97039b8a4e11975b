"""Runs of two processes that are killed, or asked to stop, end as if they had never stopped.

As under a launcher, the death of one process ends the other. What kills one process alone is in
test_killed_runs.py.

Run: python -m pytest tests/end_to_end/test_two_processes.py, with `-m slow` for all stages and
more kills
"""

from __future__ import annotations

import os
import random
import signal
import time

import pytest
from helpers.ports import held_port
from helpers.processes import Fork
from helpers.runs import directory_of, log_of, new_run, outcome, run_stage, text_of

from rlhf.config import ScorerConfig


def run_rank(config, rank: int, port: int, kill_at: int, ask: int | None) -> None:
    """One of the two processes of a run."""
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    run_stage(config, str(log_of(config)), kill_at, None, ask)


def launch(config, kill_at: tuple[int, int] = (0, 0), after: float | None = None, ask=None):
    """Run two processes; kill one at an access to a file, or both after some seconds.

    Returns:
        Exit status of each.
    """
    os.makedirs(config.runs_dir, exist_ok=True)
    with held_port() as port:
        ranks = [
            Fork(target=run_rank, args=(config, rank, port, kill_at[rank], ask))
            for rank in range(2)
        ]
        return ends(ranks, config, after, ask)


def ends(ranks, config, after: float | None, ask) -> list[int]:
    for rank in ranks:
        rank.start()
    began = time.monotonic()
    while any(rank.is_alive() for rank in ranks):
        seconds = time.monotonic() - began
        assert seconds < 300, text_of(config)[-3000:]
        is_over = (after is not None and seconds > after) or any(rank.exitcode for rank in ranks)
        if is_over and not ask:  # both end by themselves after SIGTERM
            for rank in ranks:
                rank.kill()
        time.sleep(0.01)
    return [rank.exitcode for rank in ranks]


def of_two(wholes, stage, folder):
    """A run of two processes that is left alone, and how long it takes."""
    config = new_run(wholes(stage)[0], folder, "whole", resume=False)
    if stage == "ppo":
        config.scorer = ScorerConfig("python:helpers.runs.lengths", normalize="none")
    began = time.monotonic()
    assert launch(config) == [0, 0], text_of(config)[-3000:]
    return config, outcome(config), time.monotonic() - began


def kill_and_continue(plain, expected, seconds, folder, num_kills, draw) -> None:
    kills = runs = 0
    while kills < num_kills:
        config = new_run(plain, folder, f"run-{runs}")
        runs += 1
        statuses = [1]
        while statuses != [0, 0]:
            at_file = kills % 2 == 0 and kills < num_kills
            after = draw.uniform(0.3, 1.0) * seconds if kills % 2 and kills < num_kills else None
            began = time.monotonic()
            statuses = launch(config, (draw.randint(1, 150) if at_file else 0, 0), after)
            killed = -signal.SIGKILL in statuses
            if not killed:  # the machine may have been slower when the whole run was timed
                seconds = min(seconds, time.monotonic() - began)
            assert killed or statuses == [0, 0], text_of(config)[-3000:]
            kills += killed
            if at_file and not killed:
                break
        assert outcome(config) == expected
        assert not list(directory_of(config).glob(".*"))


def test_killed_run_of_two_processes_ends_as_if_it_had_never_stopped(wholes, tmp_path):
    config, expected, seconds = of_two(wholes, "sft", tmp_path)
    kill_and_continue(config, expected, seconds, tmp_path, 2, random.Random(3))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_many_killed_runs_of_two_processes_end_as_if_they_had_never_stopped(
    stage, wholes, tmp_path
):
    config, expected, seconds = of_two(wholes, stage, tmp_path)
    kill_and_continue(config, expected, seconds, tmp_path, 12, random.Random(4))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_run_of_two_processes_that_is_asked_to_stop_saves_and_continues(stage, wholes, tmp_path):
    plain, expected, _ = of_two(wholes, stage, tmp_path)
    config = new_run(plain, tmp_path, "run")
    status = 128 + signal.SIGHUP
    assert launch(config, ask=signal.SIGHUP) == [status, status], text_of(config)[-3000:]
    assert launch(config) == [0, 0], text_of(config)[-3000:]
    assert "resuming from" in text_of(config)
    assert outcome(config) == expected
