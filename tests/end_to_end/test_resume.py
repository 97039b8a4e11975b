"""Where a stopped run continues: damaged checkpoints, others' checkpoints, changed settings.

Left out: kills (test_killed_runs.py) and signals (test_signals.py).

Run: python -m pytest tests/end_to_end/test_resume.py, with `-m slow` for two processes
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
from helpers.checkpoints import take_back_end
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


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        remove_manifest,
        pytest.param(truncate, marks=pytest.mark.slow),
        pytest.param(flip_in_manifest, marks=pytest.mark.slow),
    ],
)
def test_damaged_checkpoint_is_named_and_the_one_before_is_used(damage, killed, wholes, tmp_path):
    config, directory = continued(killed, tmp_path, wholes)
    problem = damage(directory / "checkpoint-8")
    finish(start(config), config)
    warning = f"{directory / 'checkpoint-8'} is damaged: {problem}"
    assert warning in text_of(config)
    assert f"{directory / 'checkpoint-4'} is used instead" in text_of(config)
    assert outcome(config) == wholes("sft")[2].outcome
    assert names(directory, "checkpoint-*") == ["checkpoint-12", "checkpoint-14"]


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
    assert names(directory, "checkpoint-*") == ["checkpoint-14"]


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


def printed_result(text: str, directory: Path) -> str:
    return text.split(f"\nresult={directory / 'final'}, ")[0].split("printed:\n")[-1]


@pytest.mark.parametrize("stage", STAGES)
def test_finished_run_has_nothing_to_do(stage, wholes):
    config, directory, whole = wholes(stage)
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    again = dataclasses.replace(config, resume="auto")
    finish(start(again), again)
    first, second = text_of(config).split(f"{directory} is finished: nothing to do (")
    second = second.partition(" would make it longer)\n")[2]
    table = printed_result(first, directory)
    assert first.count(table) == 2  # the command shows what print(result) shows
    words = printed_result(second, directory).split()  # without the number of held-out rows
    assert len(words) > 10 and all(word in table.split() for word in words)
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before


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
    take_back_end(directory)
    launch(stage, [*arguments, "resume=true"], tmp_path)
    assert outcome(config) == whole
