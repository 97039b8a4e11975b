"""Runs of three steps that several processes make in slices, and one process whole."""

from __future__ import annotations

import dataclasses
import shutil

from helpers.runs import (
    directory_of,
    ppo_config,
    reward_config,
    sft_config,
    write_data,
    write_random_policy,
    write_rows,
)

from rlhf.config import PeftConfig, SamplingConfig, ScorerConfig

STATE = ("policy", "critic", "averages", "optimizer_policy", "optimizer_critic")
SAVED = [f"checkpoint-3/{name}.safetensors" for name in STATE]
LORA = PeftConfig(enabled=True, r=4)


def three_steps(folder):
    """SFT in full, a reward model with LoRA, and PPO in full with averaged weights, the best
    evaluated update as its result: three steps each, without dropout."""
    sft = sft_config(folder / "one", write_data(folder))
    sft.model.config["attention_dropout"], sft.num_samples = 0.0, 2
    sft.trainer |= {"max_steps": 3, "logging_steps": 1, "eval_steps": 3}
    reward = reward_config(folder / "one", folder, directory_of(sft) / "final")
    reward.peft = LORA
    reward.trainer |= {"max_steps": 3, "logging_steps": 1, "learning_rate": 1e-3}
    for config in (sft, reward):
        config.batch_size, config.checkpoint.every = 8, 2
        config.trainer |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    ppo = ppo_config(folder / "one", folder, write_random_policy(folder / "policy"))
    ppo.scorer = ScorerConfig("python:helpers.runs.lengths", normalize="none")
    ppo.ppo.num_updates, ppo.ppo.num_ppo_epochs = 3, 1
    ppo.checkpoint.every = ppo.evaluation.every = 1
    ppo.checkpoint.keep_last, ppo.checkpoint.background = 9, True
    return sft, reward, ppo


def one_step_in_bfloat16(folder):
    """The three stages, one after the other, as on a GPU: PPO with a reward model, by a copy."""
    sft, reward, ppo = three_steps(folder)
    ppo.model.path = str(directory_of(sft) / "final")
    ppo.scorer = ScorerConfig(str(directory_of(reward) / "final"))
    ppo.critic.init, ppo.sampling.dtype, ppo.preflight = "reward", "bfloat16", True
    sft.trainer["max_steps"] = reward.trainer["max_steps"] = ppo.ppo.num_updates = 1
    for config in (sft, reward, ppo):
        config.precision = "bfloat16"
    return sft, reward, ppo


def on_one_base(sft, reward, ppo):
    """The same PPO with LoRA on one base, which reads the reward model of the one process; two
    processes sample from slices."""
    shared = dataclasses.replace(ppo, run_name="shared", peft=LORA, preflight=True)
    shared.model = dataclasses.replace(ppo.model, path=str(directory_of(sft) / "final"))
    shared.ppo = dataclasses.replace(ppo.ppo, share_base=True)
    shared.scorer = ScorerConfig(str(directory_of(reward) / "final"))
    shared.critic = dataclasses.replace(ppo.critic, init="reward")
    shared.sampling = SamplingConfig(gather="layers")
    return shared


def guarded(ppo, folder):
    """Runs that add ptx texts, abandon epochs by `target_kl`, and end early by a budget."""
    file = folder / "texts.jsonl"
    texts = [{"text": "a plain text " * (i % 5 + 2)} for i in range(24)]
    write_rows(file, texts)
    ptx = dataclasses.replace(ppo.ptx, coef=0.5, path=str(file), batch_size=4, max_length=32)
    settings = dataclasses.replace(ppo.ppo, num_ppo_epochs=3, target_kl=1e-4)
    stops = dataclasses.replace(ppo, run_name="stops", ptx=ptx, ppo=settings)
    settings = dataclasses.replace(ppo.ppo, num_updates=4, kl_target=0.1, kl_horizon=50)
    ends = dataclasses.replace(ppo, run_name="ends", ppo=settings)
    ends.watchdog = dataclasses.replace(ppo.watchdog, kl_budget=1e-3)
    return stops, ends


def take_back(config, *names):
    """Remove what a run wrote at its end."""
    for name in names:
        shutil.rmtree(directory_of(config) / name)
