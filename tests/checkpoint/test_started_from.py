"""A resumed run notices other rows, and other weights that it reads again.

Run: python -m pytest tests/checkpoint/test_started_from.py
"""

from pathlib import Path

import pytest
import torch
from helpers.checkpoints import make_checkpoint
from safetensors.torch import save_file

from rlhf import failures
from rlhf.checkpoint.run_directory import prepare_run_directory
from rlhf.checkpoint.started_from import note_inputs, require_same_base, require_same_models
from rlhf.config import (
    InputError,
    ModelConfig,
    PeftConfig,
    PPOStageConfig,
    ScorerComponent,
    ScorerConfig,
    SFTStageConfig,
)

ROWS = {"rows of dataset.path": [{"prompt": "a"}], "held-out rows": [{"prompt": "b"}]}


def weights(directory, number):
    directory.mkdir(exist_ok=True)
    save_file({"weight": torch.tensor([number])}, directory / "model.safetensors")
    return str(directory)


def begun(config):
    """The stage directory of a run that has a checkpoint."""
    stage = "ppo" if isinstance(config, PPOStageConfig) else "sft"
    directory = prepare_run_directory(config, stage)
    note_inputs(directory, config, ROWS)
    make_checkpoint(directory, 1, config)
    return directory


def test_other_rows_are_warned_about_where_the_run_goes_on(tmp_path, capsys):
    config = SFTStageConfig(runs_dir=str(tmp_path), run_name="mine", resume="auto")
    directory = prepare_run_directory(config, "sft")
    note_inputs(directory, config, {"rows of dataset.path": []})
    note_inputs(directory, config, ROWS)  # it has not begun to train
    make_checkpoint(directory, 1, config)
    note_inputs(directory, config, ROWS)
    assert not capsys.readouterr().err
    note_inputs(directory, config, ROWS | {"rows of dataset.path": [{"prompt": "c"}, *[{}] * 2]})
    said = capsys.readouterr().err
    assert "the rows of dataset.path are not those that the run was started with (1 with" in said
    assert " -> 3 with SHA-256" in said and "held-out" not in said
    (directory / "inputs.json").unlink()  # of a run of an earlier version
    note_inputs(directory, config, {"rows of dataset.path": []})
    assert not capsys.readouterr().err


def config_of(kind, folder):
    base = weights(folder / "base", 1.0)
    shared = {"runs_dir": str(folder / "runs"), "model": ModelConfig(path=base)}
    if kind == "sft":
        return SFTStageConfig(**shared, peft=PeftConfig(enabled=True))
    if kind == "components":
        parts = [ScorerComponent("os.path.join"), ScorerComponent(weights(folder / "other", 2.0))]
        return PPOStageConfig(**shared, scorer=ScorerConfig(components=parts))
    config = PPOStageConfig(**shared, scorer=ScorerConfig(weights(folder / "other", 2.0)))
    config.ppo.reference = weights(folder / "third", 3.0)
    return config


@pytest.mark.parametrize(
    "kind, name, setting",
    [
        ("sft", "base", "model.path"),
        ("ppo", "base", "model.path"),
        ("ppo", "other", "scorer.path"),
        ("ppo", "third", "ppo.reference"),
        ("components", "other", "scorer.components[1].path"),
    ],
)
def test_other_weights_that_are_read_again_are_refused(kind, name, setting, tmp_path):
    config = config_of(kind, tmp_path)
    directory = begun(config)
    note_inputs(directory, config, ROWS)
    weights(tmp_path / name, 9.0)
    with pytest.raises(
        InputError, match="(?s)started from other weights .*put these weights"
    ) as error:
        note_inputs(directory, config, ROWS)
    assert f"\n  {setting}: " in str(error.value) and str(error.value).count("->") == 1


def test_adapters_are_not_exported_on_another_base(tmp_path):
    config = config_of("sft", tmp_path)
    directory = begun(config)
    require_same_base(directory, config)
    weights(tmp_path / "base", 9.0)
    with pytest.raises(InputError, match=r"model\.path=.*base does not hold the weights any more"):
        require_same_base(directory, config)
    config.peft.enabled = False
    require_same_base(directory, config)


def test_weights_that_a_checkpoint_holds_itself_may_change(tmp_path, capsys):
    config = config_of("sft", tmp_path)
    config.peft.enabled = False
    directory = begun(config)
    weights(tmp_path / "base", 9.0)
    note_inputs(directory, config, ROWS)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.path", "scorer.path", "critic.init", "ppo.reference"])
def test_hosts_with_other_weights_under_the_same_path_are_refused(name, tmp_path, monkeypatch):
    paths = {n: weights(tmp_path / n, 1.0) for n in ("model.path", "scorer.path", "critic.init")}
    paths["ppo.reference"] = weights(tmp_path / "reference", 1.0)
    config = PPOStageConfig(model=ModelConfig(path=paths["model.path"]))
    config.scorer, config.critic.init = ScorerConfig(paths["scorer.path"]), paths["critic.init"]
    config.ppo.reference = paths["ppo.reference"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    said = []
    monkeypatch.setattr(failures, "gather_object", lambda own: said.extend(own) or own * 2)
    require_same_models(config)  # the first host, and another one like it

    weights(Path(paths[name]), 2.0)
    first = iter(said)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(failures, "gather_object", lambda own: [next(first), *own])
    with pytest.raises(InputError, match=f"not started alike:\n  weights of {name}: .* on rank 1"):
        require_same_models(config)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # one host: the same files
    require_same_models(config)


@pytest.mark.parametrize("number, of_host", enumerate("aabb"))
def test_the_first_process_of_each_host_does_a_task_for_all_there(number, of_host, monkeypatch):
    done, hosts = [], ["a", None, "b", None]
    monkeypatch.setattr(
        failures, "gather_object", lambda own: hosts if own == hosts[number:][:1] else []
    )
    monkeypatch.setenv("RANK", str(number))
    monkeypatch.setenv("LOCAL_RANK", str(number % 2))
    assert failures.once_per_host(lambda: done.append(of_host) or of_host) == of_host
    assert done == [of_host] * (number in (0, 2))
