"""PPO on one base: the results of models of their own from a base that is in memory once, and what
the stage refuses, prints, saves and resumes.

Run: python -m pytest tests/ppo/test_share_base.py
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers.tiny_ppo import crashed_and_resumed, make_config, make_trainer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

from rlhf import train_ppo
from rlhf.checkpoint import make_record, read_record, write_stage
from rlhf.config import InputError, ModelConfig, PeftConfig, RewardStageConfig, ScorerConfig
from rlhf.metrics import read_jsonl
from rlhf.models import (
    add_lora,
    init_reward_model,
    load_policy,
    load_reward_model,
    unwrap_peft,
    what_to_save,
)
from rlhf.ppo import stage
from rlhf.ppo.critic import require_same_base
from rlhf.ppo.preflight.longest_step import longest_micro_batch
from rlhf.ppo.preflight.memory import estimate_memory
from rlhf.tokenizer import load_tokenizer

LORA = PeftConfig(enabled=True, r=4)


def write_reward(directory, policy_dir, save="both"):
    """A reward stage's directory whose adapter and head are away from where they began."""
    config = RewardStageConfig(model=ModelConfig(path=str(policy_dir)))
    config.peft = PeftConfig(enabled=True, r=2, save=save)
    tokenizer = load_tokenizer(config.model)
    model = add_lora(init_reward_model(config.model, tokenizer, 1), config.peft, "SEQ_CLS", 1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    record = make_record("reward", config, str(policy_dir), tokenizer)
    record.score_mean, record.score_std = 0.5, 2.0
    plain, write = what_to_save(model, config.peft, str(policy_dir))
    write_stage(directory, plain, tokenizer, config, record, write_adapter=write)
    return str(directory)


@pytest.fixture(scope="module")
def reward_dir(policy_dir, tmp_path_factory):
    return write_reward(tmp_path_factory.mktemp("run") / "reward/final", policy_dir)


def lora_config(policy_dir, folder, reward=None, critic=None, share_base=True, **ppo):
    """A run with LoRA; with a reward model, that is the scorer and the critic's start."""
    config = make_config(policy_dir, folder, share_base=share_base, **ppo)
    config.peft = LORA
    if reward is not None:
        config.scorer = ScorerConfig(reward, "standardise")
        config.critic.init = "reward"
    config.critic.init = critic or config.critic.init
    return config


def batch_of(trainer):
    rollout = trainer.collect()
    return trainer.estimate_advantages(rollout, *trainer.shape_rewards(rollout))


def test_a_run_with_a_new_critic_has_the_numbers_of_one_with_models_of_its_own(
    policy_dir, reward_dir, tmp_path
):
    metrics = []
    for share_base in (True, False):
        config = lora_config(policy_dir, tmp_path, reward_dir, "policy", share_base)
        trainer = make_trainer(config, tmp_path)
        metrics.append([trainer.step() for _ in range(2)])
    for one, two in zip(*metrics, strict=True):
        assert one.keys() == two.keys() and one["score_std"] > 0
        for name, value in one.items():
            assert value == pytest.approx(two[name], rel=1e-4, abs=1e-5), name
    assert metrics[0][-1]["kl"] != 0


def test_critic_and_scores_begin_at_the_reward_model(policy_dir, reward_dir, tmp_path):
    shared, apart = (
        make_trainer(lora_config(policy_dir, tmp_path, reward_dir, None, share), tmp_path)
        for share in (True, False)
    )
    one, two = shared.collect(), apart.collect()
    for name in ("scores", "values", "logprobs", "ref_logprobs"):
        torch.testing.assert_close(getattr(one, name), getattr(two, name), rtol=1e-4, atol=1e-5)
    assert one.scores.std() > 0.05 and one.values.abs().max() > 0.05
    assert torch.equal(one.response_ids, two.response_ids)


def test_a_base_in_bfloat16_runs_through_preflight_and_update(policy_dir, reward_dir, tmp_path):
    config = lora_config(policy_dir, tmp_path, reward_dir, num_updates=1)
    config.model.dtype = config.precision = "bfloat16"
    config.ppo.missing_eos_penalty, config.preflight = None, True
    directory = train_ppo(config).directory
    assert {row["step"] for row in read_jsonl(directory.parent / "metrics.jsonl")} == {0, 1}


def test_updates_change_the_adapters_of_policy_and_critic_and_nothing_else(
    policy_dir, reward_dir, tmp_path
):
    trainer = make_trainer(lora_config(policy_dir, tmp_path, reward_dir), tmp_path)
    actors, updater = trainer.actors, trainer.updater
    named = {"policy": actors.policy, "critic": actors.critic, "reward": actors.scorer.model}
    before = {
        (model, name): parameter.clone()
        for model, module in named.items()
        for name, parameter in module.named_parameters()
    }
    for _ in range(2):
        trainer.step()
    changed = {
        (model, name)
        for (model, name), old in before.items()
        if not torch.equal(old, named[model].get_parameter(name))
    }
    trained = {(model, name) for model in updater.trainable for name in updater.trainable[model]}
    assert changed == trained
    assert {model for model, _ in changed} == {"policy", "critic"}
    assert all("lora_" in name or "score.modules_to_save" in name for _, name in changed)
    ours = {id(p) for model in updater.trainable.values() for p in model.values()}
    for optimizer in updater.optimizers.values():
        assert {id(p) for p in optimizer.state} <= ours


def test_adapters_are_switched_once_for_the_reference_and_never_between_models(
    policy_dir, reward_dir, tmp_path, monkeypatch
):
    trainer = make_trainer(lora_config(policy_dir, tmp_path, reward_dir), tmp_path)
    layers = [m for m in trainer.actors.policy.modules() if isinstance(m, BaseTunerLayer)]
    switched = []
    plain = BaseTunerLayer.enable_adapters

    def record(layer, enabled):
        switched.append(enabled)
        return plain(layer, enabled)

    monkeypatch.setattr(BaseTunerLayer, "enable_adapters", record)
    trainer.step()
    assert switched == [False] * len(layers) + [True] * len(layers)


def roles_in_turn(trainer):
    """A list that gets the name of each role when another one was read before."""
    actors, found = trainer.actors, []
    layer = next(m for m in actors.policy.modules() if isinstance(m, BaseTunerLayer))

    def note(name):
        name = "reference" if name == "policy" and layer.disable_adapters else name
        if found[-1:] != [name]:
            found.append(name)

    scalars = {"critic": actors.critic.model, "reward": actors.scorer.model.model}
    for name, model in {"policy": actors.policy, **scalars}.items():
        backbone = unwrap_peft(model).base_model
        backbone.register_forward_pre_hook(lambda *_, name=name: note(name))
    return found


def test_all_passes_of_a_role_come_before_those_of_the_next(policy_dir, reward_dir, tmp_path):
    config = lora_config(policy_dir, tmp_path, reward_dir, micro_batch_size=2)
    trainer = make_trainer(config, tmp_path)
    turns = roles_in_turn(trainer)
    trainer.step()
    rollout = ["policy", "reward", "policy", "reference", "critic"]
    assert turns == [*rollout, "policy", *["critic", "policy"] * 3]  # four optimiser steps


def test_memory_holds_the_base_once_and_the_estimate_knows(policy_dir, reward_dir, tmp_path):
    trainer = make_trainer(lora_config(policy_dir, tmp_path, reward_dir), tmp_path)
    apart = make_trainer(lora_config(policy_dir, tmp_path, reward_dir, None, False), tmp_path)
    actors = trainer.actors
    models = (actors.policy, actors.critic, actors.scorer.model)
    tensors = {p.data_ptr(): p for model in models for p in model.parameters()}.values()
    estimates = [estimate_memory(t, longest_micro_batch(t)) for t in (trainer, apart)]
    assert estimates[0].sum("weights") == sum(p.nbytes for p in tensors)
    base = load_policy(ModelConfig(path=str(policy_dir)), actors.tokenizer)
    backbone = sum(p.nbytes for p in base.base_model.parameters())
    saved = estimates[1].sum("weights") - estimates[0].sum("weights")
    # apart, the reward model is merged: it has no adapter, and one head
    adapter = sum(p.nbytes for n, p in actors.scorer.model.named_parameters() if "lora_" in n)
    smaller = estimates[1].models["critic"].gradients - estimates[0].models["critic"].gradients
    assert saved == 2 * backbone - adapter - 2 * 4 * 32 + smaller + 4 * 32


def test_a_resumed_run_equals_the_uninterrupted_one(
    policy_dir, reward_dir, tmp_path, monkeypatch, capsys
):
    def config():
        config = lora_config(policy_dir, tmp_path, reward_dir, ema_decay=0.9, response_length=6)
        config.evaluation.num_prompts, config.ppo.num_ppo_epochs = 0, 1
        return config

    whole = train_ppo(config())
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith("     one base: "))
    assert "in memory once, for policy, reference, critic, reward model;" in line
    assert read_record(whole.directory).shared_base == line.removeprefix("     one base: ")
    resumed = crashed_and_resumed(config(), monkeypatch)
    for file in ("final/model.safetensors", "final/adapter/adapter_model.safetensors"):
        one, two = (load_file(run.stage_dir / file) for run in (whole, resumed))
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    rows = [read_jsonl(run.stage_dir / "metrics.jsonl") for run in (whole, resumed)]
    assert rows[0] == rows[1]


def test_a_run_starts_from_the_critic_of_another_one_on_the_same_base(
    policy_dir, reward_dir, tmp_path
):
    config = lora_config(policy_dir, tmp_path, reward_dir, num_updates=1)
    config.evaluation.select = "last"
    saved = train_ppo(config).stage_dir / "critic"
    record = read_record(saved)
    assert (record.parent, record.score_mean, record.score_std) == (str(policy_dir), 0.5, 2.0)
    again = make_trainer(lora_config(policy_dir, tmp_path, None, str(saved)), tmp_path)
    merged = load_reward_model(ModelConfig(path=str(saved)))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        values = again.actors.critic(ids, ids > 0)
        expected = (merged.eval()(ids).logits[:, 0] - 0.5) / 2.0
    torch.testing.assert_close(values[:, -1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("field", ["scorer.path", "scorer.components[1].path", "critic.init"])
def test_an_adapter_on_another_base_is_refused_and_both_are_named(
    policy_dir, reward_dir, tmp_path, field, monkeypatch
):
    other = tmp_path / "other"
    shutil.copytree(policy_dir, other)
    tensors = load_file(other / "model.safetensors")
    from safetensors.torch import save_file

    save_file({k: v + 1 for k, v in tensors.items()}, other / "model.safetensors")
    config = lora_config(other, tmp_path)
    if field == "critic.init":
        config.critic.init = reward_dir
    elif field == "scorer.path":
        config.scorer = ScorerConfig(reward_dir)
    else:
        parts = [{"path": "my_module.score"}, {"path": reward_dir, "name": "b"}]
        config.scorer = ScorerConfig(components=parts)
    with pytest.raises(InputError) as caught:
        require_same_base(config)
    message = str(caught.value)
    assert f"{field}={reward_dir} is an adapter on {policy_dir} (weights " in message
    assert f"the base is model.path={other} (weights " in message
    assert f"python -m rlhf.reward peft=lora model.path={other}" in message
    if field == "scorer.path":  # PPO says so before it reads rows or loads a model
        for late in ("load_splits", "load_actors"):
            monkeypatch.setattr(stage, late, lambda *_: pytest.fail("it loaded"))
        with pytest.raises(InputError, match="is an adapter on"):
            train_ppo(config)


def test_a_merged_reward_model_is_refused_and_an_adapter_alone_is_not(policy_dir, tmp_path):
    merged = write_reward(tmp_path / "merged", policy_dir, save="merged")
    with pytest.raises(InputError, match="holds no adapter, so it needs a base of its own"):
        require_same_base(lora_config(policy_dir, tmp_path, merged))
    alone = write_reward(tmp_path / "alone", policy_dir, save="adapter")
    require_same_base(lora_config(policy_dir, tmp_path, alone))
    (tmp_path / "alone/rlhf.json").unlink()  # an adapter that PEFT saved
    require_same_base(lora_config(policy_dir, tmp_path, alone))
    settings = tmp_path / "alone/adapter_config.json"
    values = json.loads(settings.read_text()) | {"base_model_name_or_path": "owner/name"}
    settings.write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"is an adapter on owner/name, but the base is"):
        require_same_base(lora_config(policy_dir, tmp_path, alone))
