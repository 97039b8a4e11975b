"""Nothing that is not finite is trained on, saved or loaded; a run that met such a number stops and
can go on with other settings.

Leaves out that scorers must return finite numbers (test_scorers.py).

Run: python -m pytest tests/checkpoint/test_finite.py
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import take_back_end
from helpers.families import LORA, TOKENIZER, save
from helpers.tiny import tiny_model
from helpers.tiny_ppo import make_config
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from rlhf import train_ppo, train_reward, train_sft
from rlhf.checkpoint import (
    NonFiniteError,
    complete_or_nothing,
    find_damage,
    find_non_finite,
    read_manifest,
    read_record,
)
from rlhf.checkpoint.config_changes import write_stop
from rlhf.checkpoint.ownership import complete_checkpoints, facts_of_run, seal
from rlhf.checkpoint.run_directory import refuse_used_directory
from rlhf.checkpoint.state import load_training_state, save_training_state
from rlhf.config import (
    CheckpointConfig,
    DatasetConfig,
    InputError,
    ModelConfig,
    PPOStageConfig,
    RewardStageConfig,
    ScorerConfig,
    SFTStageConfig,
    StageConfig,
    load_config,
)
from rlhf.export import ExportOptions, export
from rlhf.metrics import read_jsonl
from rlhf.models import add_lora, init_reward_model, load_policy, load_reward_model
from rlhf.scorers import load_scorer

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# --- Tensors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_number_anywhere_is_found_and_named(bad, dtype):
    tensor = torch.ones(3, 5, dtype=dtype)
    assert find_non_finite([("a", tensor)]) is None
    for index in range(tensor.numel()):
        changed = tensor.clone()
        changed.view(-1)[index] = bad
        assert find_non_finite([("a", tensor), ("b", changed)]) == f"b holds {bad}"


def test_integers_and_empty_tensors_are_finite():
    tensors = torch.tensor([1, 2]), torch.empty(0), torch.tensor([True]), torch.tensor(1.5)
    assert find_non_finite((str(i), tensor) for i, tensor in enumerate(tensors)) is None


# --- Writers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("existing", [True, False])
def test_a_directory_with_a_bad_tensor_is_not_written(existing, tmp_path):
    if existing:
        with complete_or_nothing(tmp_path / "final") as directory:
            save_file({"head": torch.ones(2)}, directory / "model.safetensors")
    with pytest.raises(NonFiniteError, match="not written: b.safetensors: head holds nan"):
        with complete_or_nothing(tmp_path / "final") as directory:
            save_file({"head": torch.ones(2)}, directory / "a.safetensors")
            save_file({"head": torch.tensor([1.0, math.nan])}, directory / "b.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["final"] * existing
    if existing:
        assert [path.name for path in (tmp_path / "final").iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("where", ["weights", "optimiser", "averages"])
def test_a_training_state_with_a_bad_tensor_is_not_written(where, tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    averages = {"weight": torch.ones(2)}
    tensors = {
        "weights": model.bias.data,
        "optimiser": optimizer.state[model.weight]["exp_avg_sq"],
        "averages": averages["weight"],
    }
    tensors[where].view(-1)[0] = math.inf
    with pytest.raises(NonFiniteError, match="checkpoint-1 was not written: .* holds inf"):
        save_training_state(
            tmp_path / "checkpoint-1",
            {"policy": model, "averages": averages},
            {"policy": optimizer},
            {},
            StageConfig(),
        )
    assert not list(tmp_path.iterdir())


# --- Runs -----------------------------------------------------------------------------------------


def sft_config(data: Path, folder: Path, **trainer) -> SFTStageConfig:
    """Twelve steps on a tiny model; by the warm-up, the first step changes nothing."""
    config = SFTStageConfig(
        runs_dir=str(folder / "runs"),
        model=ModelConfig(path=str(data / "policy")),
        dataset=DatasetConfig(path=str(data / "rows.jsonl"), format="prompt_completion"),
        num_samples=0,
        checkpoint=CheckpointConfig(every=1, keep_last=9),
    )
    config.dataset.max_length, config.dataset.eval_fraction = 64, 0.2
    config.trainer |= {"max_steps": 6, "logging_steps": 1, "warmup_steps": 4} | trainer
    return config


def reward_config(data: Path, folder: Path, **trainer) -> RewardStageConfig:
    """The same of the reward stage."""
    config = RewardStageConfig(
        runs_dir=str(folder / "runs"),
        model=ModelConfig(path=str(data / "policy")),
        dataset=DatasetConfig(path=str(data / "ranked.jsonl"), format="ranked"),
        checkpoint=CheckpointConfig(every=1, keep_last=9),
    )
    config.dataset.max_length, config.dataset.eval_fraction = 64, 0.2
    config.trainer |= {"max_steps": 6, "logging_steps": 1, "warmup_steps": 4} | trainer
    return config


STAGES = {"sft": (sft_config, train_sft), "reward": (reward_config, train_reward)}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A tiny policy, demonstrations and rankings."""
    folder = tmp_path_factory.mktemp("data")
    tiny_model("llama", TOKENIZER).save_pretrained(folder / "policy")
    TOKENIZER.save_pretrained(folder / "policy")
    rows = [{"prompt": f"Fruit {i}?", "completion": f" An apple {i}."} for i in range(40)]
    ranked = [
        {"prompt": f"Fruit {i}?", "responses": ["An", f"{i}"], "ranks": [0, 1]} for i in range(40)
    ]
    for name, content in (("rows", rows), ("ranked", ranked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in content))
    return folder


def numbers(directory: Path) -> torch.Tensor:
    """Every weight in the safetensors files of a directory."""
    tensors = [t for f in directory.glob("*.safetensors") for t in load_file(f).values()]
    return torch.cat([tensor.flatten().float() for tensor in tensors])


def run_command(text: str, monkeypatch) -> None:
    """Run the command that an error ends with."""
    _, _, module, *arguments = text[text.index("python -m rlhf.") :].split()
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    runpy.run_module(module, run_name="__main__")


@pytest.mark.parametrize("stage", ["sft", pytest.param("reward", marks=pytest.mark.slow)])
def test_a_run_that_diverges_stops_and_its_advice_works(stage, data, tmp_path, monkeypatch):
    make, train = STAGES[stage]
    directory = tmp_path / "runs/run" / stage
    with pytest.raises(InputError) as stop:
        train(make(data, tmp_path, learning_rate=1e30))
    text = str(stop.value)
    # the first step has the rate 0, the second leaves weights that the third cannot use
    assert re.match(r"the (loss|gradient norm) is (nan|inf) in step 3; nothing was updated", text)
    assert f"To go on from {directory}/checkpoint-1: delete {directory}/checkpoint-2, " in text
    command = f"python -m rlhf.{stage} resume=true run_name=run runs_dir={tmp_path}/runs"
    assert text.endswith(f" then {command} trainer.learning_rate=0.001")
    assert sorted(p.name for p in directory.glob("checkpoint-*")) == [
        "checkpoint-1",
        "checkpoint-2",
    ]
    assert not (directory / "final").exists()
    assert all(find_damage(path) is None for path in complete_checkpoints(directory))

    shutil.rmtree(directory / "checkpoint-2")
    run_command(text, monkeypatch)
    assert numbers(directory / "final").isfinite().all()
    changes = [{"after_step": 1, "changed": ["trainer.learning_rate: 1e+30 -> 0.001"]}]
    assert read_record(directory / "final").changes == changes
    assert read_manifest(directory / "checkpoint-5")["changes"] == changes
    rates = [r["learning_rate"] for r in read_jsonl(directory / "metrics.jsonl") if "loss" in r]
    # step k warms up to (k - 1) / 4 of the rate; the cosine then falls over two steps
    assert_close(rates[1:], [0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 0.5e-3])


def test_other_rates_are_refused_without_such_a_stop_and_once_it_is_passed(data, tmp_path):
    config = sft_config(data, tmp_path, learning_rate=1e-3, max_steps=2)
    train_sft(config)
    directory = tmp_path / "runs/run/sft"
    take_back_end(directory)
    lower = dataclasses.replace(
        sft_config(data, tmp_path, learning_rate=1e-4, max_steps=2), resume=True
    )
    with pytest.raises(InputError, match="trainer.learning_rate: 0.001 -> 0.0001"):
        refuse_used_directory(lower, "sft")
    write_stop(directory, 1, "the loss is nan in step 1")
    with pytest.raises(InputError, match="trainer.learning_rate: 0.001 -> 0.0001"):
        refuse_used_directory(lower, "sft")
    write_stop(directory, 2, "the loss is nan in step 2")
    refuse_used_directory(lower, "sft")
    lower.seed = 2
    with pytest.raises(InputError, match=r"seed: 1 -> 2\n.*only precision, .* may change after"):
        refuse_used_directory(lower, "sft")


@pytest.mark.parametrize("stage", STAGES)
def test_an_evaluation_after_the_last_step_stops_the_run_too(stage, data, tmp_path):
    make, train = STAGES[stage]
    with pytest.raises(InputError, match=r"eval_\w+ is nan after step 2\. To go on from"):
        train(make(data, tmp_path, learning_rate=1e30, max_steps=2, warmup_steps=1))
    assert not (tmp_path / "runs/run" / stage / "final").exists()


def test_no_checkpoint_with_a_bad_weight_is_written(data, tmp_path):
    config = sft_config(data, tmp_path, learning_rate=1e60, max_steps=3, warmup_steps=1)
    with pytest.raises(InputError, match="checkpoint-2 was not written: .* holds (nan|-?inf)"):
        train_sft(config)
    directory = tmp_path / "runs/run/sft"
    assert [path.name for path in directory.glob("checkpoint-*")] == ["checkpoint-1"]


def test_without_an_earlier_checkpoint_the_advice_is_to_start_again(data, tmp_path):
    config = sft_config(data, tmp_path, learning_rate=1e30, warmup_steps=0, max_steps=3)
    text = "No checkpoint is from before: .* same command, overwrite=true and .*=0.001"
    with pytest.raises(InputError, match=f"in step 2; .*{text}"):
        train_sft(config)
    again = sft_config(data, tmp_path, learning_rate=1e-3, warmup_steps=0, max_steps=3)
    train_sft(dataclasses.replace(again, overwrite=True))
    assert read_record(tmp_path / "runs/run/sft/final").changes == []


def spoil(file: Path, name: str) -> None:
    """Make the first number of a tensor in a safetensors file nan."""
    tensors = load_file(file)
    tensors[name].view(-1)[0] = math.nan
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_bad_checkpoint_of_an_older_version_is_not_continued(data, tmp_path):
    config = sft_config(data, tmp_path, learning_rate=1e30)
    with pytest.raises(InputError):
        train_sft(config)
    checkpoint = tmp_path / "runs/run/sft/checkpoint-2"
    spoil(checkpoint / "model.safetensors", "model.norm.weight")
    (checkpoint / "manifest.json").unlink()
    seal(checkpoint, checkpoint.parent, facts_of_run(checkpoint.parent))
    with pytest.raises(InputError, match="checkpoint-2: model.norm.weight holds nan; delete it"):
        train_sft(dataclasses.replace(config, resume=True))


# --- PPO ------------------------------------------------------------------------------------------


def test_ppo_goes_on_with_the_rates_that_its_error_names(policy_dir, tmp_path, monkeypatch):
    # the rates of the first update are next to 0, the second spoils the weights half-way
    warmup = {"num_updates": 3, "lr_warmup_updates": 1, "lr_warmup_start": 1e-36}
    config = make_config(policy_dir, tmp_path, learning_rate=1e30, **warmup)
    config.checkpoint.every, directory = 1, tmp_path / "runs/run/ppo"
    with pytest.raises(InputError, match="is not finite in update 2; got nan") as stop:
        train_ppo(config)
    command = f"python -m rlhf.ppo resume=true run_name=run runs_dir={tmp_path}/runs"
    rates = "ppo.learning_rate=0.001 critic.learning_rate=0.0001"
    assert str(stop.value).endswith(f" from {directory}/checkpoint-1: {command} {rates}")
    run_command(str(stop.value), monkeypatch)
    assert numbers(directory / "final").isfinite().all()
    (change,) = read_record(directory / "final").changes
    assert change["after_step"] == 1 and len(change["changed"]) == 2
    saved = load_config(PPOStageConfig, directory / "checkpoint-2/config.yaml")
    assert saved.ppo.learning_rate == 1e-3


def test_ppo_does_not_advise_a_checkpoint_whose_weights_gave_the_number(policy_dir, tmp_path):
    # one step an update: checkpoint-1 holds what the second update cannot sample from
    config = make_config(policy_dir, tmp_path, num_ppo_epochs=1, num_mini_batches=1)
    config.ppo.learning_rate, config.checkpoint.every = 1e30, 1
    with pytest.raises(InputError, match="logprobs.* is not finite in update 2.*overwrite=true"):
        train_ppo(config)


# --- Loaders --------------------------------------------------------------------------------------


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path):
    policy = save(tmp_path / "policy", tiny_model("llama", TOKENIZER))
    reward = save(tmp_path / "reward", init_reward_model(policy, TOKENIZER, 0), "reward")
    for path, name in (("policy", "model.norm.weight"), ("reward", "score.weight")):
        spoil(tmp_path / path / "model.safetensors", name)
        record = tmp_path / path / "rlhf.json"
        if record.is_file():  # else the hash in it is refused first
            record.write_text(json.dumps(json.loads(record.read_text()) | {"weights": None}))
    problem = "policy cannot be used: model.safetensors: model.norm.weight holds nan"
    with pytest.raises(InputError, match=f"model.path=.*{problem}"):
        load_policy(policy, TOKENIZER)
    with pytest.raises(InputError, match=f"model.path=.*{problem}"):
        init_reward_model(policy, TOKENIZER, 0)
    with pytest.raises(InputError, match="evaluation.scorer=.*: score.weight holds nan"):
        load_reward_model(reward, "evaluation.scorer")
    with pytest.raises(InputError, match="reward cannot be used.* score.weight holds nan"):
        load_scorer(ScorerConfig(reward.path, "none"))


def test_an_adapter_that_is_not_finite_is_refused_by_name(tmp_path):
    policy = save(tmp_path / "policy", tiny_model("llama", TOKENIZER))
    adapted = add_lora(load_policy(policy, TOKENIZER), LORA, "CAUSAL_LM", 0)
    adapted.peft_config["default"].base_model_name_or_path = policy.path
    adapted.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    spoil(file, next(name for name in load_file(file) if name.endswith("lora_B.weight")))
    with pytest.raises(InputError, match="adapter_model.safetensors: .*lora_B.weight holds nan"):
        load_policy(ModelConfig(path=str(tmp_path / "adapter")), TOKENIZER)


def test_weights_too_large_for_float16_are_refused_with_the_dtype(tmp_path):
    model = tiny_model("llama", TOKENIZER)
    model.model.norm.weight.data[0] = 1e6
    policy = save(tmp_path / "policy", model)
    policy.dtype = "float16"
    with pytest.raises(InputError, match="model.dtype=float16 cannot hold .* model.norm.weight"):
        load_policy(policy, TOKENIZER)
    options = ExportOptions(policy.path, str(tmp_path / "out"), dtype="float16")
    with pytest.raises(InputError, match="with dtype=float16: model.norm.weight holds inf"):
        export(options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["policy", "optimizer_policy"])
def test_a_bad_training_state_is_not_loaded(file, tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    state = {"policy": model}, {"policy": optimizer}
    save_training_state(tmp_path / "checkpoint-1", *state, {}, StageConfig())
    path = tmp_path / f"checkpoint-1/{file}.safetensors"
    spoil(path, {"policy": "bias", "optimizer_policy": "0.exp_avg"}[file])
    with pytest.raises(InputError, match=f"{file}.safetensors: .* holds nan; delete .*point-1"):
        load_training_state(tmp_path / "checkpoint-1", *state)
