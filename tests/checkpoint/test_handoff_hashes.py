"""The hashes in `rlhf.json` are compared wherever a stage directory is read.

Run: python -m pytest tests/checkpoint/test_handoff_hashes.py
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from helpers.families import TOKENIZER
from helpers.tiny import tiny_model
from safetensors.torch import load_file, save_file

from rlhf.chat import ChatOptions, talk
from rlhf.checkpoint import (
    hash_weights,
    make_record,
    read_record,
    require_stage,
    warn_about_sft_model,
    write_stage,
)
from rlhf.config import (
    DatasetConfig,
    InputError,
    ModelConfig,
    PPOStageConfig,
    ScorerConfig,
    SFTStageConfig,
    StageConfig,
)
from rlhf.export import ExportOptions, export
from rlhf.models import init_reward_model
from rlhf.ppo.actors import load_checked_tokenizer
from rlhf.scorers import load_scorer
from rlhf.tokenizer import load_tokenizer


def write(directory, model, stage, parent=None, score_mean=None):
    tokenizer = load_tokenizer(ModelConfig(path="plain"))
    record = make_record(stage, StageConfig(), parent, tokenizer, "conversation")
    record.score_mean = score_mean
    write_stage(directory, model, tokenizer, StageConfig(), record)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """plain/ model, sft/, other/ of the SFT stage, reward/ and critic/ on sft/, ppo/ from sft/."""
    folder = tmp_path_factory.mktemp("stages")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tiny_model("llama", TOKENIZER).save_pretrained("plain")
        TOKENIZER.save_pretrained("plain")
        write(Path("sft"), tiny_model("llama", TOKENIZER), "sft", "plain")
        write(Path("other"), tiny_model("llama", TOKENIZER, seed=1), "sft", "plain")
        head = init_reward_model(ModelConfig(path="sft"), TOKENIZER, seed=1)
        write(Path("reward"), head, "reward", "sft")
        write(Path("critic"), head, "critic", score_mean=0.0)
        write(Path("ppo"), tiny_model("llama", TOKENIZER, seed=2), "ppo", "sft")
        write(Path("ppo_again"), tiny_model("llama", TOKENIZER, seed=3), "ppo", "ppo")
    return folder


@pytest.fixture(autouse=True)
def world(originals, tmp_path, monkeypatch):
    shutil.copytree(originals, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")


def change_weights(directory):
    file = Path(directory) / "model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, file, metadata={"format": "pt"})


def edit(file, **values):
    Path(file).write_text(json.dumps(json.loads(Path(file).read_text()) | values))


def start_sft(path):
    from rlhf import train_sft

    rows = [{"prompt": f"Name a fruit {i}.", "completion": f"An apple {i}."} for i in range(16)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DatasetConfig(path="rows.jsonl", format="prompt_completion", eval_fraction=0.25)
    config = SFTStageConfig(run_name="new", model=ModelConfig(path=path), dataset=data)
    config.trainer["max_steps"] = 1
    train_sft(dataclasses.replace(config, num_samples=0))


def start_reward(path):
    from rlhf import train_reward
    from rlhf.config import RewardStageConfig

    data = DatasetConfig(path="rows.jsonl", format="ranked")
    train_reward(RewardStageConfig(model=ModelConfig(path=path), dataset=data))


def ppo_config(**values):
    config = PPOStageConfig(model=ModelConfig(path="sft"), scorer=ScorerConfig(path="reward"))
    for name, value in values.items():
        setattr(config, name, value)
    return config


def start_ppo(path):
    load_checked_tokenizer(ppo_config(model=ModelConfig(path=path)))


def score(path):
    load_scorer(ScorerConfig(path=path, normalize="none"))


def start_critic(path):
    from rlhf.distributed import make_accelerator
    from rlhf.ppo.actors import load_actors

    config = ppo_config()
    config.critic.init = path
    tokenizer = load_tokenizer(config.model)
    load_actors(
        config, tokenizer, lambda prompts, _: [0.0] * len(prompts), make_accelerator("auto")
    )


READERS = {
    "sft": (start_sft, "sft", "model.path"),
    "reward": (start_reward, "sft", "model.path"),
    "ppo": (start_ppo, "sft", "model.path"),
    "scorer": (score, "reward", "scorer.path"),
    "critic": (start_critic, "critic", "critic.init"),
    "chat": (lambda path: talk(ChatOptions(path=path)), "sft", "path"),
    "export": (lambda path: export(ExportOptions(path, "out")), "sft", "path"),
}


@pytest.mark.parametrize("name", READERS)
def test_other_weights_than_those_in_the_record_are_refused(name):
    read, directory, field = READERS[name]
    change_weights(directory)
    with pytest.raises(InputError) as caught:
        read(directory)
    message = str(caught.value)
    assert message.startswith(f"{field}={directory} does not hold the weights that the ")
    assert f'to adopt them on purpose, set "weights": null in {directory}/rlhf.json' in message
    assert hash_weights(Path(directory))[:12] in message


@pytest.mark.parametrize("weights", [None, "left out"])
def test_weights_are_adopted_where_the_record_has_no_hash(weights):
    change_weights("sft")
    record = json.loads(Path("sft/rlhf.json").read_text()) | {"weights": None}
    if weights is not None:
        del record["weights"]  # as earlier versions wrote it
    Path("sft/rlhf.json").write_text(json.dumps(record))
    assert require_stage("sft", ("sft",), "model.path") is not None
    export(ExportOptions("sft", "out"))
    assert read_record("out").weights == hash_weights(Path("out")) == hash_weights(Path("sft"))


def test_an_exported_directory_has_the_hash_of_its_own_weights():
    edit("sft/rlhf.json", forward="padding-free")  # a fact of its training
    export(ExportOptions("sft", "out", dtype="bfloat16"))
    ours, theirs = require_stage("out", ("sft",), "model.path"), read_record("sft")
    assert ours.weights == hash_weights(Path("out")) != theirs.weights
    assert (ours.dtype, theirs.dtype) == ("bfloat16", "float32")
    assert (ours.tokenizer, ours.forward) == (theirs.tokenizer, "padding-free")


def test_a_large_directory_is_read_once_and_said_so(capfd, monkeypatch):
    monkeypatch.setattr("rlhf.checkpoint.record.ANNOUNCED_BYTES", 1000)
    with monkeypatch.context() as patch:
        patch.setattr("rlhf.checkpoint.record.TICK_SECONDS", 0)  # as if it had been there for long
        for _ in range(2):
            require_stage("other", ("sft",), "model.path")
    output, errors = capfd.readouterr()
    assert output == ""  # what chat says there are answers
    assert errors.count("reading 0.0 GB in ") == 1
    change_weights("other")
    with pytest.raises(InputError, match="does not hold the weights"):
        require_stage("other", ("sft",), "model.path")


@pytest.mark.parametrize("policy", ["sft", "ppo", "ppo_again"])
def test_a_reward_model_of_the_policys_own_sft_model_is_silent(policy, capsys):
    warn_about_sft_model("reward", policy)
    shutil.copytree("sft", "copy")
    warn_about_sft_model("reward", "copy")
    assert capsys.readouterr().err == ""


def test_a_reward_model_of_another_sft_model_is_a_warning_that_names_both(capsys):
    warn_about_sft_model("reward", "other")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the reward model reward was trained from sft (weights ")
    assert "but the SFT model of the policy is other (weights " in line
    edit("ppo/rlhf.json", parent="other", parent_weights=hash_weights(Path("other")))
    warn_about_sft_model("reward", "ppo_again")
    assert "the SFT model of the policy is other (weights " in capsys.readouterr().err


def test_ppo_warns_of_a_reward_model_of_another_sft_model(capsys, tmp_path):
    from helpers.tiny_ppo import make_config, make_trainer

    config = make_config(Path("other"), tmp_path)
    config.scorer = ScorerConfig(path="reward", normalize="none")
    make_trainer(config, tmp_path)
    assert "the reward model reward was trained from sft" in capsys.readouterr().err


def test_a_directory_without_a_model_is_looked_into_at_fixed_depths_only(tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    for place in ("mine/sft/final", "deep/down/mine/sft/final", "mine/sft/checkpoint-1/final"):
        (runs / place).mkdir(parents=True)
        (runs / place / "rlhf.json").write_text("{}")
    known = str((runs / "mine/sft/final").resolve())
    listed = []
    scandir = __import__("os").scandir
    monkeypatch.setattr("os.scandir", lambda path: listed.append(str(path)) or scandir(path))
    for given in (runs, runs / "mine", runs / "mine/sft"):
        listed.clear()
        with pytest.raises(InputError) as caught:
            require_stage(given, ("sft", "ppo"), "path")
        assert str(caught.value).endswith(f"did you mean {known}?")
        assert set(listed) <= {str(given.resolve())}


def test_chat_with_all_of_a_disk_looks_at_its_first_level_only(monkeypatch):
    listed = []
    scandir = __import__("os").scandir
    monkeypatch.setattr("os.scandir", lambda path: listed.append(str(path)) or scandir(path))
    with pytest.raises(InputError, match="^path=/ is not a model directory"):
        talk(ChatOptions(path="/"))
    assert set(listed) <= {"/"}
