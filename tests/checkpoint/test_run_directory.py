"""Run directories: who may begin there, what is kept, and where a run continues.

Leaves out runs that are killed (tests/end_to_end/test_killed_runs.py).

Run: python -m pytest tests/checkpoint/test_run_directory.py
"""

import dataclasses
import json
import os
import re

import pytest
from helpers.checkpoints import config_of, make_checkpoint, names, write
from omegaconf import OmegaConf

from rlhf.checkpoint import checkpoint_to_resume, prune_checkpoints
from rlhf.checkpoint.config_changes import PROCESSES, refuse_changes
from rlhf.checkpoint.ownership import facts_of_run, seal
from rlhf.checkpoint.run_directory import finished_run, prepare_run_directory
from rlhf.config import (
    CheckpointConfig,
    InputError,
    PPOStageConfig,
    RewardStageConfig,
    TrackerConfig,
    read_yaml,
)


def test_new_run_directory_is_made(tmp_path):
    assert prepare_run_directory(config_of(tmp_path), "sft") == tmp_path / "mine" / "sft"
    assert (tmp_path / "mine" / "sft").is_dir()
    prepare_run_directory(config_of(tmp_path), "sft")  # still empty


def test_run_keeps_the_identity_that_it_got_first(tmp_path):
    directory = prepare_run_directory(config_of(tmp_path), "sft")
    first = json.loads((directory / "run.json").read_text())
    assert first["stage"] == "sft" and len(first["id"]) == 16
    prepare_run_directory(config_of(tmp_path, resume="auto"), "sft")
    assert json.loads((directory / "run.json").read_text()) == first
    (directory / "metrics.jsonl").touch()
    prepare_run_directory(config_of(tmp_path, overwrite=True), "sft")
    assert json.loads((directory / "run.json").read_text())["id"] != first["id"]


@pytest.mark.parametrize("inside, what", [("checkpoint-1", "an unfinished"), ("final", "a fini")])
def test_used_run_directory_is_refused_and_overwrite_empties_it(inside, what, tmp_path):
    (tmp_path / "mine" / "sft" / inside).mkdir(parents=True)
    (tmp_path / "mine" / "reward").mkdir()
    with pytest.raises(InputError, match=f"already holds {what}.*another run_name.*overwrite=true"):
        prepare_run_directory(config_of(tmp_path), "sft")
    assert (tmp_path / "mine" / "sft" / inside).is_dir()
    directory = prepare_run_directory(config_of(tmp_path, overwrite=True), "sft")
    assert names(directory) == ["config.yaml", "run.json"]
    assert (tmp_path / "mine" / "reward").is_dir()


@pytest.mark.parametrize("resume", [True, "auto"])
def test_resume_keeps_an_unfinished_run_and_refuses_what_is_in_place_of_its_result(
    resume, tmp_path
):
    config = config_of(tmp_path, resume=resume)
    checkpoint = make_checkpoint(prepare_run_directory(config_of(tmp_path), "sft"), 1, config)
    prepare_run_directory(config, "sft")
    assert checkpoint.is_dir()
    (tmp_path / "mine" / "sft" / "final").mkdir()
    with pytest.raises(InputError, match="final is in the way: no stage wrote it; move it"):
        prepare_run_directory(config, "sft")


@pytest.mark.parametrize("resume", [True, "auto"])
def test_resume_with_overwrite_is_refused_and_deletes_nothing(resume, tmp_path):
    (tmp_path / "mine" / "sft" / "final").mkdir(parents=True)
    with pytest.raises(InputError, match=f"resume={resume}.* contradict".lower()):
        prepare_run_directory(config_of(tmp_path, resume=resume, overwrite=True), "sft")
    assert (tmp_path / "mine" / "sft" / "final").is_dir()


@pytest.mark.parametrize("resume", [True, "auto"])
def test_finished_run_is_found_when_resuming_and_not_under_another_configuration(
    resume, tmp_path, tokenizer
):
    config = config_of(tmp_path, seed=5, resume=resume)
    assert finished_run(config, "sft") is None
    record = write(tmp_path / "mine" / "sft" / "final", tokenizer, config=config)
    assert finished_run(config, "sft") == record
    assert finished_run(dataclasses.replace(config, resume=False), "sft") is None
    with pytest.raises(InputError, match="with a different configuration:\n  seed: 5 -> 6\n"):
        finished_run(dataclasses.replace(config, seed=6), "sft")


# --- Continuing ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keep_last, kept", [(1, [2, 6]), (2, [2, 4, 6]), (3, [2, 3, 4, 6]), (9, [1, 2, 3, 4, 6])]
)
def test_newest_checkpoints_and_their_best_are_kept(keep_last, kept, tmp_path):
    for step, best in {1: 1, 2: 2, 3: 2, 4: 2, 6: 2}.items():
        make_checkpoint(tmp_path, step, best=best)
    (tmp_path / "checkpoint-best").mkdir()
    prune_checkpoints(tmp_path, keep_last)
    assert names(tmp_path) == [f"checkpoint-{step}" for step in kept] + ["checkpoint-best"]


def test_the_best_of_each_kept_checkpoint_is_kept(tmp_path):
    for step, best in {2: 2, 4: 2, 6: 6}.items():
        make_checkpoint(tmp_path, step, best=best)
    prune_checkpoints(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    prune_checkpoints(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-6"]


def test_what_was_left_of_a_checkpoint_goes_once_a_newer_one_is_there(tmp_path):
    (tmp_path / "run.json").write_text('{"id": "0123", "stage": "sft"}')
    for step in (3, 4, 8, 9):
        (make_checkpoint(tmp_path, step) / "manifest.json").unlink()
    for step in (4, 8):
        (tmp_path / f"checkpoint-{step}").rename(tmp_path / f"checkpoint-{step}.damaged")
    before = names(tmp_path)
    prune_checkpoints(tmp_path, 2)
    assert names(tmp_path) == before
    make_checkpoint(tmp_path, 4)
    prune_checkpoints(tmp_path, 2)
    left = [f"checkpoint-{name}" for name in ("4", "8.damaged", "9")]
    assert names(tmp_path) == [*left, "run.json"]


def test_checkpoint_whose_best_one_is_damaged_is_not_used(tmp_path, capsys):
    config = config_of(tmp_path, resume=True)
    directory = prepare_run_directory(config_of(tmp_path), "sft")
    for step, best in {1: None, 2: 2, 3: 2}.items():
        make_checkpoint(directory, step, config, best)
    os.truncate(directory / "checkpoint-2" / "policy.safetensors", 5)
    assert checkpoint_to_resume(config, directory) == directory / "checkpoint-1"
    warnings = capsys.readouterr().err
    assert (
        "checkpoint-3 is damaged: its best checkpoint, checkpoint-2, is damaged: policy" in warnings
    )
    assert "checkpoint-2 is damaged: policy.safetensors has 5 bytes" in warnings
    assert names(directory) == [
        *("checkpoint-1", "checkpoint-2.damaged", "checkpoint-3.damaged"),
        *("config.yaml", "run.json"),
    ]


def test_resume_true_does_not_start_afresh_where_no_checkpoint_is_intact(tmp_path):
    config = config_of(tmp_path, resume=True)
    directory = prepare_run_directory(config_of(tmp_path), "sft")
    os.truncate(make_checkpoint(directory, 3, config) / "policy.safetensors", 5)
    before = names(directory)
    with pytest.raises(
        InputError, match="(?s)no checkpoint is intact.*checkpoint-3: policy.* 5 bytes"
    ):
        checkpoint_to_resume(config, directory)
    assert names(directory) == before


def test_logs_are_cut_back_to_what_they_were_at_the_checkpoint(tmp_path):
    config = config_of(tmp_path, resume=True)
    directory = prepare_run_directory(config_of(tmp_path), "sft")
    (directory / "metrics.jsonl").write_text('{"step": 1}\n')
    make_checkpoint(directory, 1, config)
    (directory / "metrics.jsonl").write_text('{"step": 1}\n{"step": 1, "eval": 2}\n{"st')
    (directory / "samples.jsonl").write_text('{"step": 2}\n')
    checkpoint_to_resume(dataclasses.replace(config, resume=False), directory)
    assert (directory / "samples.jsonl").read_text() == '{"step": 2}\n'
    checkpoint_to_resume(config, directory)
    assert (directory / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert (directory / "samples.jsonl").read_text() == ""


def test_differences_of_the_configuration_are_listed_and_only_harmless_ones_pass(tmp_path, capsys):
    config = config_of(tmp_path, resume=True)
    directory = prepare_run_directory(config_of(tmp_path), "sft")
    config.model.path = str(directory / "final")
    checkpoint = make_checkpoint(directory, 1, config)
    moved = config_of(
        tmp_path / "elsewhere" / "..",
        resume="auto",
        checkpoint=CheckpointConfig(keep_last=7, grace_seconds=1),
        tracker=TrackerConfig(names=["wandb"]),
    )
    moved.model.path = str(moved.stage_dir("sft") / "final")  # the same place in the moved run
    assert checkpoint_to_resume(moved, directory) == checkpoint
    said = capsys.readouterr().out
    for line in ("checkpoint.keep_last: 2 -> 7", 'tracker.names: [] -> ["wandb"]', "runs_dir"):
        assert f"changed, without effect on what is trained: {line}" in said
    assert "model.path" not in said and "resume:" not in said
    moved.precision, moved.trainer = "float32", moved.trainer | {"learning_rate": 1.0}
    with pytest.raises(InputError) as caught:
        checkpoint_to_resume(moved, directory)
    assert '\n  precision: "auto" -> "float32"\n  trainer.learning_rate: null -> 1.0\n' in str(
        caught.value
    )


def test_a_setting_that_an_older_run_did_not_have_counts_as_its_default(tmp_path, capsys):
    config = config_of(tmp_path, resume=True)
    directory = prepare_run_directory(config_of(tmp_path), "sft")
    checkpoint = make_checkpoint(directory, 1, config)
    values = read_yaml(checkpoint / "config.yaml")
    del values["model"]["forward"], values["mix"]  # a setting and a group
    OmegaConf.save(values, checkpoint / "config.yaml")
    (checkpoint / "manifest.json").unlink()
    seal(checkpoint, directory, facts_of_run(directory))
    assert checkpoint_to_resume(config, directory) == checkpoint
    assert "changed" not in capsys.readouterr().out
    config.model.forward, config.mix.fraction = "padded", 0.5
    with pytest.raises(InputError) as caught:
        checkpoint_to_resume(config, directory)
    assert '\n  mix.fraction: 0.0 -> 0.5\n  model.forward: "auto" -> "padded"\n' in str(
        caught.value
    )


def test_other_number_of_processes_must_read_the_same_rows_in_a_step(tmp_path, monkeypatch, capsys):
    config = config_of(tmp_path, resume=True)
    directory = prepare_run_directory(config_of(tmp_path), "sft")
    make_checkpoint(directory, 1, config)
    monkeypatch.setenv("WORLD_SIZE", "2")
    problem = (
        "\n  rows of an optimiser step: 8 -> 16 (number of processes: 1 -> 2; "
        "trainer.per_device_train_batch_size=4 keeps 8)\n"
    )
    with pytest.raises(InputError, match=re.escape(problem)) as caught:
        prepare_run_directory(config, "sft")
    assert str(caught.value).endswith(
        "set these back to their old values, or start a new run with another run_name"
    )
    config.trainer["per_device_train_batch_size"] = 4
    assert refuse_changes(config, directory / "checkpoint-1").keys() == {
        "number of processes",
        "trainer.per_device_train_batch_size",
    }
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(InputError, match=re.escape("step: 8 -> 4 (trainer.per_device")):
        prepare_run_directory(config, "sft")
    config.trainer["gradient_accumulation_steps"] = 2
    assert PROCESSES not in refuse_changes(config, directory / "checkpoint-1")


def test_rows_of_a_pass_of_ppo_may_change_and_those_of_a_rollout_may_not(tmp_path):
    config = PPOStageConfig(runs_dir=str(tmp_path), run_name="mine")
    directory = prepare_run_directory(config, "ppo")
    make_checkpoint(directory, 1, config)
    passes = {"micro_batch_size": 1, "rollout_batch_size": 4, "chunk_tokens": 16}
    moved = dataclasses.replace(config, resume=True, ppo=dataclasses.replace(config.ppo, **passes))
    changes = refuse_changes(moved, directory / "checkpoint-1")
    assert changes.keys() == {f"ppo.{name}" for name in passes}
    moved.ppo.batch_size = 32
    with pytest.raises(InputError, match="different configuration:\n  ppo.batch_size: 64 -> 32\n"):
        refuse_changes(moved, directory / "checkpoint-1")


def test_batches_planned_by_tokens_go_on_with_as_many_in_a_step(tmp_path, monkeypatch):
    config = RewardStageConfig(runs_dir=str(tmp_path), run_name="mine", resume=True)
    config.reward.tokens_per_batch = 64
    config.trainer |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    directory = prepare_run_directory(dataclasses.replace(config, resume=False), "reward")
    make_checkpoint(directory, 1, config)
    checkpoint = directory / "checkpoint-1"
    config.trainer["per_device_train_batch_size"] = 3  # plays no part
    assert refuse_changes(config, checkpoint).keys() == {"trainer.per_device_train_batch_size"}
    monkeypatch.setenv("WORLD_SIZE", "2")
    problem = (
        "\n  batches of an optimiser step: 4 -> 8 (number of processes: 1 -> 2; trainer.per_device_"
        "train_batch_size: 4 -> 3; trainer.gradient_accumulation_steps=2 keeps 4)\n"
    )
    with pytest.raises(InputError, match=re.escape(problem)):
        prepare_run_directory(config, "reward")
    config.trainer["gradient_accumulation_steps"] = 2
    assert PROCESSES in refuse_changes(config, checkpoint)
