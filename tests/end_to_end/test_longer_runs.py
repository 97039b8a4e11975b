"""A run becomes longer than it was planned, finished or not: `resume=true ppo.num_updates=200`.

Run: python -m pytest tests/end_to_end/test_longer_runs.py
"""

from __future__ import annotations

import dataclasses
import shutil

import pytest
from helpers.runs import directory_of, names, train
from helpers.tiny_sft import sft_config
from safetensors.torch import load_file

from rlhf.checkpoint import read_record
from rlhf.checkpoint import stage_directory as hand_off
from rlhf.config import InputError, ModelConfig
from rlhf.metrics import read_jsonl

# stage -> the setting that makes it longer, the steps of the finished run, and of the longer one
LONGER = {
    "sft": ("trainer.max_steps", 20, 14, 20),
    "reward": ("trainer.num_train_epochs", 3, 10, 15),
    "ppo": ("ppo.num_updates", 10, 7, 10),
}


def with_setting(config, setting, value, **values):
    """A copy of a configuration, with one setting of `trainer` or `ppo` changed."""
    group, name = setting.split(".")
    if group == "trainer":
        return dataclasses.replace(config, trainer=config.trainer | {name: value}, **values)
    return dataclasses.replace(
        config, ppo=dataclasses.replace(config.ppo, **{name: value}), **values
    )


@pytest.fixture
def finished(wholes, tmp_path):
    """Stage -> configuration that continues a copy of a finished run."""

    def copy(stage):
        config, directory, _ = wholes(stage)
        shutil.copytree(directory.parent, tmp_path / "run")
        model = dataclasses.replace(config.model)
        if stage == "reward":
            model.path = str(tmp_path / "run/sft/final")
        return dataclasses.replace(config, runs_dir=str(tmp_path), model=model, resume=True)

    return copy


@pytest.mark.parametrize("stage", ["sft", pytest.param("reward", marks=pytest.mark.slow), "ppo"])
def test_finished_run_becomes_longer(stage, finished, tmp_path, capsys, monkeypatch):
    setting, value, old_end, new_end = LONGER[stage]
    config = finished(stage)
    directory = directory_of(config)
    old = (directory / "final/rlhf.json").read_text()
    seen = []
    open_new = hand_off.complete_or_nothing
    monkeypatch.setattr(
        hand_off,
        "complete_or_nothing",
        lambda final: seen.append((directory / "final/rlhf.json").read_text()) or open_new(final),
    )
    longer = with_setting(config, setting, value)
    train(longer)
    said = capsys.readouterr().out
    assert f"resuming from {directory}/checkpoint-{old_end}\n" in said
    assert f"changed, the end of the run: {setting}: " in said
    assert (
        f"schedule now ends at {'update' if stage == 'ppo' else 'step'} {new_end} instead" in said
    )
    assert seen and set(seen) == {old}  # the old result was there until the new one was complete
    assert f"checkpoint-{new_end}" in names(directory, "checkpoint-*")
    changes = read_record(directory / "final").changes
    assert [change["after_step"] for change in changes] == [old_end]
    rows = read_jsonl(directory / "metrics.jsonl")
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps)) and steps[-1] == new_end
    logs = [row for row in rows if "learning_rate" in row]
    assert logs[-1]["step"] > old_end
    # as in a run that was planned so long
    train(dataclasses.replace(longer, run_name="planned", resume=False))
    planned = read_jsonl(
        directory_of(dataclasses.replace(longer, run_name="planned")) / "metrics.jsonl"
    )
    rates = {row["step"]: row["learning_rate"] for row in planned if "learning_rate" in row}
    for row in logs:
        if row["step"] > old_end:
            assert row["learning_rate"] == pytest.approx(rates[row["step"]], rel=1e-12)
    capsys.readouterr()
    train(longer)
    said = capsys.readouterr().out
    assert (
        said
        == f"{directory} is finished: nothing to do ({setting}={2 * value} would make it longer)\n"
    )


def test_longer_run_at_a_constant_rate_is_the_one_that_was_planned_so_long(tmp_path, policy_dir):
    def run(name, steps, **values):
        model = ModelConfig(path=str(policy_dir))
        config = sft_config(tmp_path, name, steps, model=model, **values)
        config.trainer["eval_steps"] = 5  # an evaluation draws random numbers, and so does dropout
        train(config)

    run("mine", 5)  # in the middle of an epoch
    run("mine", 9, resume=True)
    run("planned", 9)
    finals = (tmp_path / f"runs/{name}/sft/final" for name in ("mine", "planned"))
    one, two = (load_file(final / "model.safetensors") for final in finals)
    assert all((one[name] == two[name]).all() for name in one)


@pytest.mark.parametrize("stage", LONGER)
def test_end_that_a_run_has_passed_is_refused(stage, finished):
    setting, _, old_end, _ = LONGER[stage]
    config = finished(stage)
    made = {"sft": "14 steps", "reward": "2 epochs", "ppo": "7 updates"}[stage]
    with pytest.raises(InputError, match=f"^{setting}=1.*has made {made} already; give a larger"):
        train(with_setting(config, setting, 1))
    shutil.rmtree(directory_of(config) / "final")  # stopped right before its end
    with pytest.raises(InputError, match=f"{setting}=1"):
        train(with_setting(config, setting, 1))


def test_epochs_do_not_lengthen_a_run_whose_steps_are_given(finished):
    with pytest.raises(InputError, match="max_steps=14 .it replaces trainer.num_train_epochs"):
        train(with_setting(finished("sft"), "trainer.num_train_epochs", 9))


def test_other_settings_of_a_longer_run_stay(finished):
    config = with_setting(finished("ppo"), "ppo.num_updates", 10)
    config.ppo.kl_coef = 0.2
    with pytest.raises(InputError, match="ppo.kl_coef: 0.05 -> 0.2\n"):
        train(config)


def test_finished_run_without_checkpoints_is_continued_by_a_new_one(finished):
    config = with_setting(finished("ppo"), "ppo.num_updates", 10)
    for checkpoint in directory_of(config).glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    final = directory_of(config) / "final"
    with pytest.raises(InputError, match=f"another run_name and model.path={final}"):
        train(config)
    new = dataclasses.replace(config, run_name="new", resume=False)
    new.model.path, new.ppo.num_updates = str(final), 1
    assert train(new).directory.is_dir()


@pytest.mark.parametrize("stage", LONGER)
def test_run_that_stopped_right_before_its_result_makes_no_further_step(stage, finished, wholes):
    config = finished(stage)
    directory = directory_of(config)
    shutil.rmtree(directory / "final")
    train(config)
    one, two = (
        load_file(folder / "final/model.safetensors") for folder in (directory, wholes(stage)[1])
    )
    assert all((one[name] == two[name]).all() for name in one)
    assert (directory / "metrics.jsonl").read_text() == (
        wholes(stage)[1] / "metrics.jsonl"
    ).read_text()
