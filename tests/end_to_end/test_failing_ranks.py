"""One of two processes fails, whole models (DDP) or slices (FSDP2, DeepSpeed) on each: both end by
themselves, without a launcher, and the last line of the first names the rank, the phase and the
error.

What the processes say to each other is tested in one process in tests/test_failures.py.

Run: python -m pytest tests/end_to_end/test_failing_ranks.py -m slow
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import time
from importlib.util import find_spec
from itertools import count
from pathlib import Path

import pytest
import torch
from helpers.runs import (
    directory_of,
    lengths,
    outcome,
    ppo_config,
    reward_config,
    sft_config,
    train,
    write_data,
    write_random_policy,
    write_rows,
)
from helpers.sharded import in_group, text_of

from rlhf.cli import run_to_exit
from rlhf.config import SamplingConfig, ScorerConfig

pytestmark = pytest.mark.slow
ROWS = [{"prompt": f"Name a fruit {i}"} for i in range(24)]
TIMEOUT = 20  # seconds after which a process that hangs ends the others
NO_DEEPSPEED = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="make test-deepspeed installs it"
)
ZERO3 = pytest.param("zero3", marks=NO_DEEPSPEED)
SHARDS = pytest.mark.parametrize("shards", [False, True, ZERO3], ids=["ddp", "fsdp2", "zero3"])


def command(config, how: str, folder) -> None:
    """A run from the command line whose second process fails in its second update, or reads a bad
    row before."""
    from transformers import Trainer

    from rlhf.ppo import rollout
    from rlhf.ppo.update import Updater

    rank, plain = int(os.environ["RANK"]), Updater.accumulate
    rollouts, sample = count(), rollout.generate
    os.chdir(folder / f"host-{rank}")
    asked = {"SIGTERM to one": [1], "SIGTERM to all": [0, 1]}.get(how, [])
    config.seed += how == "settings" and rank

    def accumulate(self, batch, rows, update, *rest, **options):
        if update == 1 and how == f"memory of {rank}":
            raise torch.OutOfMemoryError("planted")
        if update == 1 and how == f"SIGKILL to {rank}":
            os.kill(os.getpid(), signal.SIGKILL)
        if update == 1 and rank == 1 and how == "hangs":
            time.sleep(3 * TIMEOUT)
            os._exit(3)
        if update == 1 and rank in asked:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, batch, rows, update, *rest, **options)

    def generate(*arguments, **options):
        number = next(rollouts)  # the first is of an evaluation
        if number == 2 and rank == 1 and how == "sampling":
            options["ended"] = run_out_of_memory
        return sample(*arguments, **options)

    Updater.accumulate, rollout.generate = accumulate, generate

    def training_step(self, *arguments, **options):
        if self.state.global_step == 1 and how == f"memory of {rank}":
            raise torch.OutOfMemoryError("planted")
        if self.state.global_step == 1 and how == f"SIGKILL to {rank}":
            os.kill(os.getpid(), signal.SIGKILL)
        return plain_step(self, *arguments, **options)

    plain_step = Trainer.training_step
    Trainer.training_step = training_step
    run_to_exit(lambda config: train(config).stopped_by, config)


def run_out_of_memory(row, ids):
    raise torch.OutOfMemoryError("planted")


def fails_on_one(prompts, responses):
    """Score by length; fail on the second process in the second update."""
    fails_on_one.calls = getattr(fails_on_one, "calls", 0) + 1
    if fails_on_one.calls == 2 and os.environ["RANK"] == "1":
        raise ConnectionError("the judge is away")
    return lengths(prompts, responses)


def config_in(folder):
    """Three updates on rows that each host has in a file of its own."""
    for rank in (0, 1):
        (folder / f"host-{rank}").mkdir(exist_ok=True)
        write_rows(folder / f"host-{rank}" / "rows.jsonl", ROWS)
    config = ppo_config(folder / "runs", folder, write_random_policy(folder / "policy"))
    config.dataset.path, config.dataset.on_bad_row = "rows.jsonl", "stop"
    config.scorer = ScorerConfig("python:helpers.runs.lengths", normalize="none")
    config.ppo.num_updates, config.ppo.num_ppo_epochs = 3, 1
    config.evaluation.every, config.checkpoint.every = 3, 100
    return config


FAILURES = {
    "row": ("error: rank 1 (before training): ", "rows.jsonl"),
    "rows": ("error: the processes were not started alike:\n  rows of dataset.path: ", "on rank 1"),
    "scorer": ("error: rank 1: the scorer failed ", "the judge is away"),
    "settings": ("error: the processes were not started alike:\n  seed: ", "on rank 1"),
    "batch": (
        "error: ppo.batch_size / ppo.num_mini_batches = 9 must be divisible by the 2 ",
        "change",
    ),
    "sampling": ("error: rank 1 (sampling, update 2): OutOfMemoryError: planted", "resume=auto"),
    "memory of 1": ("error: rank 1 (training, update 2): OutOfMemoryError: planted", "resume=auto"),
    "SIGKILL to 1": ("error: no word from rank 1: killed", "; rank 0 (training, update 2): "),
}


@SHARDS
@pytest.mark.parametrize("how", FAILURES)
def test_failure_of_one_process_ends_both_and_the_first_names_it(how, shards, tmp_path):
    config = config_in(tmp_path)
    if how.startswith("row"):
        row = {"prompt": 3} if how == "row" else {"prompt": "Another one"}
        write_rows(tmp_path / "host-1/rows.jsonl", [*ROWS[:-1], row])
    if how == "scorer":
        config.scorer.path = f"python:{__name__}.fails_on_one"
    if how == "sampling":
        config.sampling = SamplingConfig(gather="layers")
    if how == "batch":
        config.ppo.batch_size, config.ppo.num_mini_batches = 9, 1
    log = tmp_path / "log"
    codes = in_group(command, config, how, tmp_path, log=log, shards=shards)
    assert codes[0] in (1, 2), (codes, text_of(log))
    assert codes[1] == -signal.SIGKILL if how == "SIGKILL to 1" else codes[1] in (1, 2), codes
    begins, holds = FAILURES[how]
    first = (tmp_path / "log-0").read_text()
    last = first[first.rindex("error: ") :]
    assert last.startswith(begins) and holds in last, first[-3000:]
    assert "not started alike" in begins or last.count("\n") == 1, last
    assert "Traceback" not in first, first


OTHERS = pytest.mark.parametrize("stage", ["sft", "reward"])


def other_config_in(folder, stage):
    """SFT or reward on rows that each host has in a file of its own."""
    for rank in (0, 1):
        (folder / f"host-{rank}").mkdir()
        write_data(folder / f"host-{rank}")
    if stage == "sft":
        return sft_config(folder / "runs", Path())
    return reward_config(folder / "runs", Path(), write_random_policy(folder / "policy"))


@SHARDS
@OTHERS
@pytest.mark.parametrize("how", ["memory of 1", "SIGKILL to 1"])
def test_failure_in_other_stages_ends_both_and_the_first_names_it(how, stage, shards, tmp_path):
    config, log = other_config_in(tmp_path, stage), tmp_path / "log"
    codes = in_group(command, config, how, tmp_path, log=log, shards=shards)
    assert codes == [1, 1 if how == "memory of 1" else -signal.SIGKILL], (codes, text_of(log))
    last = (tmp_path / "log-0").read_text().splitlines()[-1]
    begins, holds = FAILURES[how]
    said = begins.replace("update 2", "step 2"), holds.replace("update 2", "step 2")
    assert last.startswith(said[0]) and said[1] in last, last


@OTHERS
def test_other_stages_refuse_other_rows_on_one_process(stage, tmp_path):
    config = other_config_in(tmp_path, stage)
    file = tmp_path / "host-1" / config.dataset.path
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    log = tmp_path / "log"
    assert 0 not in in_group(command, config, "", tmp_path, log=log, shards=False)
    first = (tmp_path / "log-0").read_text()
    assert "error: the processes were not started alike:\n  rows of dataset.path: " in first, first


@SHARDS
def test_first_process_that_fails_ends_both_and_its_last_lines_name_it(shards, tmp_path):
    config, log = config_in(tmp_path), tmp_path / "log"
    arguments = command, config, "memory of 0", tmp_path
    assert in_group(*arguments, log=log, shards=shards) == [1, 1], text_of(log)
    first = (tmp_path / "log-0").read_text()
    assert "error on rank 0 (training, update 2):\n" in first
    last = ["torch.OutOfMemoryError: planted", "phase: training", "phase: update 2", "rank: 0"]
    assert first.splitlines()[-4:] == last


@SHARDS
def test_second_process_says_that_the_first_was_killed(shards, tmp_path):
    config, log = config_in(tmp_path), tmp_path / "log"
    arguments = command, config, "SIGKILL to 0", tmp_path
    codes = in_group(*arguments, log=log, shards=shards)
    assert codes == [-signal.SIGKILL, 1], (codes, text_of(log))
    last = (tmp_path / "log-1").read_text().splitlines()[-1]
    assert last.startswith("error: no word from rank 0: killed"), last
    assert "; rank 1 (training, update 2): " in last and last.count("resume=auto") == 1, last


@SHARDS
def test_process_that_hangs_ends_the_others_after_the_timeout(shards, tmp_path):
    config, log = config_in(tmp_path), tmp_path / "log"
    config.distributed_timeout = TIMEOUT
    codes = in_group(command, config, "hangs", tmp_path, log=log, shards=shards)
    assert codes == [1, 3], (codes, text_of(log))
    last = (tmp_path / "log-0").read_text().splitlines()[-1]
    assert last.startswith("error: no word from rank 1: killed") and ", hanging, or" in last, last
    assert f"Timed out waiting {TIMEOUT}000ms" in last, "it waits no longer than that"


@SHARDS
@pytest.mark.parametrize("how", ["SIGTERM to one", "SIGTERM to all"])
def test_sigterm_saves_on_all_processes_and_the_run_goes_on_bit_identically(how, shards, tmp_path):
    config, log = config_in(tmp_path), tmp_path / "log"
    assert in_group(command, config, "", tmp_path, log=log, shards=shards) == [0, 0], text_of(log)
    assert ("sharding: " in text_of(log)) is bool(shards)
    expected = outcome(config)
    shutil.rmtree(directory_of(config))
    config = dataclasses.replace(config, resume="auto")
    codes = in_group(command, config, how, tmp_path, log=log, shards=shards)
    assert codes == [128 + signal.SIGTERM] * 2, text_of(log)
    assert (directory_of(config) / "checkpoint-2/manifest.json").is_file()
    assert in_group(command, config, "", tmp_path, log=log, shards=shards) == [0, 0], text_of(log)
    assert "resuming from" in text_of(log)
    assert outcome(config) == expected
