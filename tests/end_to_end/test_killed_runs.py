"""A run that was killed, however often and at whatever moment, ends as if it had never stopped.

Real processes are killed with SIGKILL: after a random time, or at a random access to a file in the
directory of the run (so while a checkpoint or `final/` is written, verified or deleted, or a row
appended). Weights, `metrics.jsonl`, `samples.jsonl` and `rlhf.json` must then be, byte for byte,
those of the run left alone. Left out: signals that ask (test_signals.py), damage (test_resume.py).

Run: python -m pytest tests/end_to_end/test_killed_runs.py, with `-m slow` for many more kills
"""

from __future__ import annotations

import random
import signal
import time

import pytest
from helpers.runs import STAGES, directory_of, new_run, outcome, start, text_of

from rlhf.config import CheckpointConfig


def kill_and_resume(stage, wholes, folder, num_kills, seed, **values) -> tuple[int, int]:
    """Kill runs until `num_kills` have died, each time continuing; compare all that finish.

    Returns:
        number of kills at a file, number of runs that finished.
    """
    plain, _, whole = wholes(stage)
    draw = random.Random(seed)
    kills = at_files = runs = 0
    longest = whole.seconds
    while kills < num_kills:
        config = new_run(plain, folder, f"run-{runs}", **values)
        finished = False
        while not finished:
            at_file = kills % 3 != 1  # two of three at a file, one after a random time
            kill_at = draw.randint(1, whole.accesses) if at_file and kills < num_kills else 0
            began = time.perf_counter()
            process = start(config, kill_at)
            if kills < num_kills and not at_file:
                process.join(draw.uniform(0.2, 1.0) * longest)
                process.kill()
            process.join(300)
            killed = process.exitcode == -signal.SIGKILL
            if not killed:  # the machine may have been slower when the whole run was timed
                longest = min(longest, time.perf_counter() - began)
            assert killed or process.exitcode == 0, text_of(config)[-3000:]
            kills, at_files = kills + killed, at_files + (killed and kill_at > 0)
            finished = not killed
        assert outcome(config) == whole.outcome
        assert not list(directory_of(config).glob("*.tmp"))
        runs += 1
    return at_files, runs


@pytest.mark.parametrize(
    "stage", [*(pytest.param(x, marks=pytest.mark.slow) for x in ("sft", "reward")), "ppo"]
)
def test_killed_runs_end_as_if_they_had_never_stopped(stage, wholes, tmp_path, capsys):
    num_kills = 2
    at_files, runs = kill_and_resume(stage, wholes, tmp_path, num_kills, seed=len(stage))
    assert at_files >= 1
    with capsys.disabled():
        print(
            f"\n{stage}: {num_kills} kills survived, {at_files} of them at a file; {runs} runs "
            "ended bit-identical",
            end=" ",
        )


@pytest.mark.slow
@pytest.mark.parametrize("seed", [10, 11, 12])
@pytest.mark.parametrize("stage", STAGES)
def test_many_killed_runs_end_as_if_they_had_never_stopped(stage, seed, wholes, tmp_path):
    kill_and_resume(stage, wholes, tmp_path, 40, seed)


@pytest.mark.slow
def test_killed_runs_that_save_in_the_background_end_as_if_they_had_never_stopped(wholes, tmp_path):
    checkpoint = CheckpointConfig(every=1, background=True)
    kill_and_resume("ppo", wholes, tmp_path, 10, seed=7, checkpoint=checkpoint)
