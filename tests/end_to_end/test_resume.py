"""A run that was killed, however often and at whatever moment, ends as if it had never stopped.

Real processes are killed with SIGKILL: after a random time, or at a random access to a file in the
directory of the run (so while a checkpoint or `final/` is written, verified or deleted, or a row
appended). Weights, `metrics.jsonl`, `samples.jsonl` and `rlhf.json` must then be, byte for byte,
those of the run left alone. So too after SIGTERM, after Ctrl-C, and with damaged checkpoints.

Run: python -m pytest tests/end_to_end/test_resume.py, with `-m slow` for many more kills
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
from helpers.runs import (
    STAGES,
    directory_of,
    finish,
    names,
    new_run,
    outcome,
    start,
    text_of,
    wait_for,
)
from helpers.stages import launch

from rlhf.config import ScorerConfig, save_config
from rlhf.metrics import TIMINGS, read_jsonl

# --- SIGKILL --------------------------------------------------------------------------------------


def kill_and_resume(stage, wholes, folder, num_kills, seed) -> tuple[int, int]:
    """Kill runs until `num_kills` have died, each time continuing; compare all that finish.

    Returns:
        number of kills at a file, number of runs that finished.
    """
    plain, _, whole = wholes(stage)
    draw = random.Random(seed)
    kills = at_files = runs = 0
    while kills < num_kills:
        config = new_run(plain, folder, f"run-{runs}")
        finished = False
        while not finished:
            at_file = draw.random() < 0.6
            kill_at = draw.randint(1, whole.accesses) if at_file and kills < num_kills else 0
            process = start(config, kill_at)
            if kills < num_kills and not at_file:
                process.join(draw.uniform(0.2, 1.0) * whole.seconds)
                process.kill()
            process.join(120)
            killed = process.exitcode == -signal.SIGKILL
            assert killed or process.exitcode == 0, text_of(config)[-3000:]
            kills, at_files = kills + killed, at_files + (killed and kill_at > 0)
            finished = not killed
        assert outcome(config) == whole.outcome
        assert not list(directory_of(config).glob("*.tmp"))
        runs += 1
    return at_files, runs


@pytest.mark.parametrize("stage", STAGES)
def test_killed_runs_end_as_if_they_had_never_stopped(stage, wholes, tmp_path, capsys):
    num_kills = 8
    at_files, runs = kill_and_resume(stage, wholes, tmp_path, num_kills, seed=len(stage))
    assert at_files >= 2
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


def test_metrics_hold_one_row_for_each_log_and_each_evaluation(wholes):
    rows = read_jsonl(wholes("sft")[1] / "metrics.jsonl")
    logs = [row["step"] for row in rows if "loss" in row]
    evaluations = [row["step"] for row in rows if "eval_loss" in row]
    assert (logs, evaluations) == ([3, 6, 9, 12], [5, 10, 14])
    assert len(rows) == 7 and all(row.keys().isdisjoint(TIMINGS) for row in rows)
    timings = read_jsonl(wholes("sft")[1] / "timings.jsonl")
    assert [row["step"] for row in timings] == [row["step"] for row in rows]


# --- Damage ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(wholes, tmp_path_factory) -> Path:
    """The folder of an SFT run that was killed in step 10, with checkpoints of steps 4 and 8."""
    config = new_run(wholes("sft")[0], tmp_path_factory.mktemp("killed"), "run")
    process = start(config, hang_at=9)
    wait_for(lambda: "hanging" in text_of(config), process)
    process.kill()
    process.join()
    return Path(config.runs_dir)


def continued(killed: Path, folder: Path, wholes, **values):
    """The configuration that continues a copy of the killed run, and the copy's directory."""
    shutil.copytree(killed / "run", folder / "run")
    config = new_run(wholes("sft")[0], folder, "run", **values)
    return config, directory_of(config)


def truncate(checkpoint: Path) -> str:
    file = checkpoint / "optimizer.pt"
    size = file.stat().st_size
    os.truncate(file, size - 1)
    return f"optimizer.pt has {size - 1} bytes instead of {size}"


def flip(checkpoint: Path, name: str = "model.safetensors") -> str:
    content = bytearray((checkpoint / name).read_bytes())
    content[-5] ^= 1
    (checkpoint / name).write_bytes(content)
    return f"the content of {name} has changed"


def flip_in_manifest(checkpoint: Path) -> str:
    flip(checkpoint, "manifest.json")
    return "manifest.json is damaged itself"


def remove_manifest(checkpoint: Path) -> str:
    (checkpoint / "manifest.json").unlink()
    return "manifest.json is missing: its writing was cut off"


@pytest.mark.parametrize("damage", [truncate, flip, flip_in_manifest, remove_manifest])
def test_damaged_checkpoint_is_named_and_the_one_before_is_used(damage, killed, wholes, tmp_path):
    config, directory = continued(killed, tmp_path, wholes)
    problem = damage(directory / "checkpoint-8")
    finish(start(config), config)
    warning = f"{directory / 'checkpoint-8'} is damaged: {problem}"
    assert warning in text_of(config)
    assert f"{directory / 'checkpoint-4'} is used instead" in text_of(config)
    assert outcome(config) == wholes("sft")[2].outcome
    assert names(directory, "checkpoint-*") == ["checkpoint-12", "checkpoint-8"]


def test_run_without_an_intact_checkpoint_starts_afresh_and_says_so(killed, wholes, tmp_path):
    config, directory = continued(killed, tmp_path, wholes)
    flip(directory / "checkpoint-4")
    shutil.rmtree(directory / "checkpoint-8")
    finish(start(config), config)
    assert "is damaged: the content of model.safetensors" in text_of(config)
    assert "no earlier one is intact" in text_of(config)
    assert "no checkpoint to resume from: starting afresh" in text_of(config)
    assert outcome(config) == wholes("sft")[2].outcome


# --- Whose checkpoint, and with which configuration -----------------------------------------------


def refusal(config) -> str:
    """What a stage that must not start says."""
    process = start(config)
    process.join(120)
    assert process.exitcode == 1
    return text_of(config).split("InputError: ")[-1]


def test_changed_configuration_is_refused_and_every_change_listed(killed, wholes, tmp_path):
    config, directory = continued(killed, tmp_path, wholes, seed=2)
    config.trainer = config.trainer | {"learning_rate": 1e-3, "adam_beta1": 0.8}
    config.checkpoint = dataclasses.replace(config.checkpoint, keep_last=5)
    before = names(directory, "[!.]*")
    message = refusal(config)
    for line in (
        f"{directory / 'checkpoint-8'} was written with a different configuration:",
        "  seed: 1 -> 2",
        "  trainer.adam_beta1: (not set) -> 0.8",
        "  trainer.learning_rate: 0.003 -> 0.001",
        "or start a new run with another run_name",
    ):
        assert line in message
    assert "keep_last" not in message
    assert names(directory, "[!.]*") == before


def test_harmless_changes_are_said_and_change_nothing(killed, wholes, tmp_path):
    config, directory = continued(killed, tmp_path, wholes)
    config.checkpoint = dataclasses.replace(config.checkpoint, every=5, keep_last=1)
    finish(start(config), config)
    said = "changed, without effect on what is trained: checkpoint"
    assert f"{said}.every: 4 -> 5" in text_of(config)
    assert f"{said}.keep_last: 2 -> 1" in text_of(config)
    assert outcome(config) == wholes("sft")[2].outcome
    assert names(directory, "checkpoint-*") == ["checkpoint-10"]


def test_checkpoint_of_another_run_is_refused(killed, wholes, tmp_path):
    config, directory = continued(killed, tmp_path, wholes)
    (directory / "run.json").write_text('{"id": "0123", "stage": "sft"}')
    theirs = json.loads((killed / "run/sft/run.json").read_text())["id"]
    message = refusal(config)
    assert f"{directory / 'checkpoint-8'} belongs to another run (sft {theirs})" in message
    assert "than its directory (sft 0123, by run.json)" in message


def test_checkpoint_that_was_brought_alone_is_continued(killed, wholes, tmp_path):
    config, directory = continued(killed, tmp_path, wholes)
    for path in directory.iterdir():
        if path.name.endswith((".json", ".jsonl")):
            path.unlink()
    finish(start(config), config)
    ours, theirs = outcome(config), wholes("sft")[2].outcome
    assert ours["model.safetensors"] == theirs["model.safetensors"]
    assert theirs["metrics.jsonl"].endswith(ours["metrics.jsonl"])
    assert "metrics.jsonl is shorter than when the checkpoint was written" in text_of(config)
    assert (directory / "run.json").read_text() == (killed / "run/sft/run.json").read_text()


@pytest.mark.parametrize("stage", STAGES)
def test_finished_run_has_nothing_to_do(stage, wholes):
    config, directory, whole = wholes(stage)
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    again = dataclasses.replace(config, resume="auto")
    finish(start(again), again)
    assert f"{directory} is finished: nothing to do" in text_of(config)
    assert f"\nresult={directory / 'final'}, " in text_of(config).split("nothing to do")[-1]
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before


# --- SIGTERM and Ctrl-C ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stage, number", [("sft", signal.SIGINT), ("reward", signal.SIGHUP), ("ppo", signal.SIGTERM)]
)
def test_run_that_is_asked_to_stop_saves_and_continues(stage, number, wholes, tmp_path):
    plain, _, whole = wholes(stage)
    config = new_run(plain, tmp_path, "run")
    process = start(config, ask=number)  # for PPO: in the evaluation before the first update
    process.join(120)
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
    process.join(20)
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


# --- Several processes ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_continue_bit_identically(stage, wholes, tmp_path):
    config = new_run(wholes(stage)[0], tmp_path / "runs", "run", resume=False)
    if stage == "ppo":  # without noise: the random numbers saved are those of the first process
        scorer = "def lengths(prompts, responses):\n    return [len(r) / 10 for r in responses]\n"
        (tmp_path / "own_scorer.py").write_text(scorer)
        config.scorer = ScorerConfig("python:own_scorer.lengths", normalize="none")
    (tmp_path / "recipe").mkdir()
    recipe = tmp_path / "recipe" / "mine.yaml"
    save_config(config, recipe)
    recipe.write_text("# @package _global_\n" + recipe.read_text())
    arguments = ["--config-dir", str(tmp_path), "recipe=mine"]
    launch(stage, arguments, tmp_path)
    whole, directory = outcome(config), directory_of(config)
    shutil.rmtree(directory / "final")
    launch(stage, [*arguments, "resume=true"], tmp_path)
    assert outcome(config) == whole
