"""The PPO stage around the loop: loading, checks, evaluation, checkpoints, the closing table."""

from __future__ import annotations

import dataclasses
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from rlhf.checkpoint import (
    GracefulStop,
    StageRecord,
    check_run_directory,
    check_same_tokenizer,
    checkpoint_to_resume,
    complete_checkpoints,
    hash_tokenizer,
    load_training_state,
    make_record,
    prepare_run_directory,
    read_record,
    require_stage,
    save_training_state,
    warn_about_prompts,
    write_stage,
)
from rlhf.config import InputError, PPOStageConfig, ScorerConfig, check, load_object
from rlhf.data import encode_prompts, load_splits
from rlhf.generation import context_length, sampling_for
from rlhf.metrics import (
    MetricsWriter,
    is_main_process,
    progress_bar,
    quiet_libraries,
    say,
    table,
    truncate_jsonl,
    warn,
)
from rlhf.models import (
    ScalarModel,
    add_lora,
    disable_dropout,
    init_reward_model,
    load_policy,
    load_reference,
    load_reward_model,
    load_tokenizer,
    merged,
    parameter_count,
    use_bfloat16,
)
from rlhf.ppo.evaluation import evaluate
from rlhf.ppo.trainer import PPOTrainer
from rlhf.rollout import Actors, CollectSettings
from rlhf.scorers import Scorer, load_scorer, score_statistics

SHOWN = {"score": "score", "kl": "kl", "response_length": "len", "eos_rate": "eos"}
TABLE = (
    ("score", "eval_score"),
    ("independent score", "eval_independent_score"),
    ("KL to the reference, nats per response", "eval_kl"),
    ("response length, tokens", "eval_response_length"),
    ("share of responses that end with EOS", "eval_eos_rate"),
)


@dataclass
class PPOResult:
    """What `train_ppo` returns.

    Attributes:
        directory: the stage directory with the trained policy; None when training was interrupted.
        before: metrics on held-out prompts before the first update.
        after: the same after the last.
    """

    directory: Path | None
    before: dict[str, float]
    after: dict[str, float]


def train_ppo(config: PPOStageConfig, scorer: Scorer | None = None) -> PPOResult:
    """Train a policy with PPO against a scorer.

    Args:
        config: see `conf/ppo.yaml` for every knob; `model.path` and `scorer.path` default to this
            run's SFT and reward directories.
        scorer: a callable `(prompts, responses) -> (B,)` in place of `config.scorer`; needs
            `critic.init=policy`.

    Raises:
        InputError: bad configuration, directory or data; nothing has been trained or overwritten
            then.
    """
    config = _with_default_paths(config, scorer)
    check(config)
    quiet_libraries()
    check_run_directory(config, "ppo")
    independent = config.evaluation.scorer
    independent = load_object(independent, "evaluation.scorer") if independent else None
    tokenizer, parent = _load_checked_tokenizer(config)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="bf16" if use_bfloat16(config.precision) else "no",
    )
    num_processes = accelerator.num_processes
    _check_batches(config, num_processes)
    splits = load_splits(config.dataset, "ppo", config.seed)
    warn_about_prompts(parent, splits.prompts)
    actors = load_actors(config, tokenizer, scorer, accelerator)
    settings = collect_settings(config, actors.policy, tokenizer)
    budget = _prompt_budget(config, actors.policy)
    prompts, too_long = encode_prompts(splits.train, tokenizer, budget)
    if len(prompts) < config.ppo.batch_size:
        raise InputError(
            f"ppo.batch_size={config.ppo.batch_size} is more than the {len(prompts)} training "
            "prompts; lower it or give more prompts"
        )
    heldout = encode_prompts(splits.eval, tokenizer, budget)[0][: config.evaluation.num_prompts]
    heldout = heldout[: len(heldout) - len(heldout) % num_processes]
    say(describe_batches(config, len(prompts), num_processes, actors))
    say(splits.describe(too_long))
    directory = prepare_run_directory(config, "ppo")
    trainer = PPOTrainer(config, actors, prompts, settings, accelerator, directory)
    return _Run(config, trainer, heldout, splits.prompts, independent).run()


# --- Loading ------------------------------------------------------------------------------------


def _load_checked_tokenizer(config: PPOStageConfig) -> tuple[Any, StageRecord | None]:
    """Load the policy's tokenizer, and check that the stages named fit together."""
    policy, scorer = str(config.model.path), str(config.scorer.path)
    record = require_stage(policy, ("sft", "ppo"), "model.path")
    tokenizer = load_tokenizer(config.model)
    if config.critic.init == "reward":
        reward_record = require_stage(scorer, ("reward",), "scorer.path")
        check_same_tokenizer(tokenizer, reward_record, policy, scorer)
    return tokenizer, record


def load_actors(
    config: PPOStageConfig, tokenizer: Any, scorer: Scorer | None, accelerator: Accelerator
) -> Actors:
    """Load policy, reference, critic and scorer, without dropout, on this process's device."""
    device = accelerator.device
    if scorer is None:
        scorer = load_scorer(config.scorer, device)
    policy, reference = load_policy(config.model, tokenizer), None
    critic = _load_critic(config, tokenizer)
    if config.peft.enabled:
        policy = add_lora(
            policy, config.peft, "CAUSAL_LM", config.seed
        )  # adapters off = the reference
        critic.model = add_lora(critic.model, config.peft, "SEQ_CLS", config.seed)
    else:
        reference = load_reference(config.model, tokenizer).to(device)
    disable_dropout(policy)
    disable_dropout(critic)
    return Actors(
        policy=policy.to(device),
        reference=reference,
        critic=critic.to(device),
        scorer=scorer,
        tokenizer=tokenizer,
        tokenizer_hash=hash_tokenizer(tokenizer),
    )


def _load_critic(config: PPOStageConfig, tokenizer: Any) -> ScalarModel:
    """Start the critic from the reward model (IG, N+; predicting normalised scores) or from the
    policy."""
    if config.critic.init == "policy":
        return ScalarModel(init_reward_model(config.model, tokenizer, config.seed))
    source = dataclasses.replace(
        config.model, path=config.scorer.path, tokenizer=None, revision=None
    )
    mean, std = score_statistics(config.scorer, read_record(str(config.scorer.path)))
    return ScalarModel(load_reward_model(source), mean, std)


def collect_settings(config: PPOStageConfig, policy: Any, tokenizer: Any) -> CollectSettings:
    """Derive how rollouts are collected."""
    ppo = config.ppo
    sampling = sampling_for(
        policy, tokenizer, ppo.response_length, ppo.temperature, ppo.top_p, ppo.top_k
    )
    return CollectSettings(
        sampling, ppo.missing_eos_penalty, ppo.rollout_batch_size, ppo.micro_batch_size
    )


def _with_default_paths(config: PPOStageConfig, scorer: Scorer | None) -> PPOStageConfig:
    """Point model and scorer at this run's own earlier stages, where those exist."""
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model), scorer=dataclasses.replace(config.scorer)
    )
    for holder, stage in ((config.model, "sft"), (config.scorer, "reward")):
        final = config.stage_dir(stage) / "final"
        if holder.path is None and final.is_dir():
            holder.path = str(final)
    if scorer is not None:
        if config.critic.init == "reward":
            raise InputError(
                "critic.init=reward needs a reward model; with a scorer of your own set "
                "critic.init=policy"
            )
        name = getattr(scorer, "__qualname__", type(scorer).__qualname__)
        config.scorer = ScorerConfig(path=f"python:{scorer.__module__}.{name}")
    return config


def _prompt_budget(config: PPOStageConfig, policy: Any) -> int:
    """Longest prompt that leaves room for the response in the model's context."""
    ppo = config.ppo
    context = context_length(policy)
    if ppo.response_length >= context:
        raise InputError(
            f"ppo.response_length={ppo.response_length} leaves no room for a prompt in the model's "
            f"context of {context} tokens; use at most {context - 1}"
        )
    budget = ppo.max_prompt_length or context - ppo.response_length
    if budget + ppo.response_length > context:
        raise InputError(
            f"ppo.max_prompt_length={budget} + ppo.response_length={ppo.response_length} exceed "
            f"the model's context of {context} tokens; lower one of them"
        )
    return budget


def _check_batches(config: PPOStageConfig, num_processes: int) -> None:
    per_minibatch = config.ppo.batch_size // config.ppo.num_mini_batches
    if per_minibatch % num_processes:
        raise InputError(
            f"ppo.batch_size / ppo.num_mini_batches = {per_minibatch} must be divisible by the "
            f"{num_processes} processes; change ppo.batch_size"
        )


def describe_batches(
    config: PPOStageConfig, num_prompts: int, num_processes: int, actors: Actors
) -> str:
    """Spell out the derived batch arithmetic."""
    ppo = config.ppo
    minibatch = ppo.batch_size // ppo.num_mini_batches
    share = minibatch // num_processes
    micro = -(-share // ppo.micro_batch_size)
    total, trainable = parameter_count(actors.policy)
    reference = "adapters off" if actors.reference is None else "own copy"
    steps = ppo.num_ppo_epochs * ppo.num_mini_batches
    episodes = ppo.num_updates * ppo.batch_size
    return "\n".join(
        [
            f"ppo: policy {total:,} parameters, {trainable:,} trainable (reference: {reference}); "
            f"critic from {config.critic.init}, {parameter_count(actors.critic)[1]:,} trainable",
            f"     rollout: {ppo.batch_size} of {num_prompts} prompts, at most "
            f"{ppo.response_length} tokens each; {ppo.num_updates} updates = {episodes} episodes "
            f"= {episodes / num_prompts:.1f} passes over the prompts",
            f"     update: {ppo.num_ppo_epochs} epochs x {ppo.num_mini_batches} minibatches of "
            f"{minibatch} = {steps} optimiser steps; {num_processes} "
            f"process{'es' * (num_processes > 1)} x {micro} micro-batches of at most "
            f"{ppo.micro_batch_size}",
        ]
    )


# --- Running ------------------------------------------------------------------------------------


class _Run:
    """The outer loop: updates, evaluations, checkpoints, interruption."""

    def __init__(
        self,
        config: PPOStageConfig,
        trainer: PPOTrainer,
        heldout: list[dict[str, Any]],
        prompts: str,
        independent: Scorer | None,
    ):
        self.config, self.trainer, self.heldout = config, trainer, heldout
        self.prompts, self.independent = prompts, independent
        self.directory = trainer.directory
        self.before: dict[str, float] = {}
        self.samples_file = self.directory / "samples.jsonl"

    def run(self) -> PPOResult:
        trainer, config = self.trainer, self.config
        self._resume()
        writer = MetricsWriter(
            self.directory, config, "ppo", trainer.update if config.resume else None
        )
        began = time.perf_counter()
        if trainer.update == 0:
            self.before = self._evaluate(writer)
            _warn_about_penalty(config, self.before)
        after = dict(self.before)
        bar = progress_bar(config.ppo.num_updates, trainer.update, "update")
        with GracefulStop() as stop:
            while trainer.update < config.ppo.num_updates:
                metrics = trainer.step() | {"seconds": time.perf_counter() - began}
                if trainer.update == 1:
                    _warn_about_critic(config, metrics)
                bar.set_postfix(
                    {short: f"{metrics[name]:.3g}" for name, short in SHOWN.items()}, refresh=False
                )
                bar.update(1)
                last = trainer.update == config.ppo.num_updates
                interrupted = stop.requested()
                writer.write(trainer.update, metrics)
                if last or trainer.update % config.evaluation.every == 0:
                    after = self._evaluate(writer)
                if interrupted or (trainer.update % config.checkpoint.every == 0 and not last):
                    self._save()
                if interrupted and not last:
                    bar.close()
                    writer.close()
                    say(f"stopped after update {trainer.update}; continue with resume=true")
                    return PPOResult(None, self.before, after)
        bar.close()
        writer.close()
        return self._finish(after)

    def _evaluate(self, writer: MetricsWriter) -> dict[str, float]:
        if not self.heldout:
            return {}
        metrics, samples = evaluate(self.trainer, self.heldout, self.independent)
        writer.write(self.trainer.update, metrics)
        writer.write_samples(self.trainer.update, self.samples_file, samples)
        return metrics

    def _finish(self, after: dict[str, float]) -> PPOResult:
        trainer, config = self.trainer, self.config
        if trainer.accelerator.is_main_process:
            record = make_record(
                "ppo", config, config.model.path, trainer.actors.tokenizer, self.prompts
            )
            record.metrics = after
            write_stage(
                self.directory / "final",
                merged(trainer.actors.policy),
                trainer.actors.tokenizer,
                config,
                record,
            )
        trainer.accelerator.wait_for_everyone()
        rows = [(name, self.before.get(key), after.get(key)) for name, key in TABLE if key in after]
        if rows:
            say(f"\n{len(self.heldout)} held-out prompts:\n" + table(rows, ("", "before", "after")))
        say(f"\nsaved {self.directory / 'final'}")
        return PPOResult(self.directory / "final", self.before, after)

    def _parts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        actors = self.trainer.actors
        return {"policy": actors.policy, "critic": actors.critic}, self.trainer.optimizers

    def _save(self) -> None:
        if self.trainer.accelerator.is_main_process:
            state = {"update": self.trainer.update, "before": self.before}
            save_training_state(
                self.directory / f"checkpoint-{self.trainer.update}",
                *self._parts(),
                state,
                self.config,
            )
            for old in complete_checkpoints(self.directory)[: -self.config.checkpoint.keep_last]:
                shutil.rmtree(old)
        self.trainer.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        checkpoint = checkpoint_to_resume(self.config, self.directory)
        if checkpoint is not None:
            state = load_training_state(checkpoint, *self._parts())
            self.trainer.update, self.before = state["update"], state["before"]
        if self.config.resume and is_main_process():
            truncate_jsonl(self.samples_file, self.trainer.update if checkpoint else -1)


def _warn_about_penalty(config: PPOStageConfig, before: dict[str, float]) -> None:
    penalty = config.ppo.missing_eos_penalty
    if penalty is None or not before:
        return
    if before["eval_score"] < penalty:
        warn(
            f"the mean score before training ({before['eval_score']:.2f}) is below "
            f"ppo.missing_eos_penalty ({penalty}): not ending a response would pay; lower the "
            "penalty, or use scorer.normalize=standardise"
        )
    if before["eval_eos_rate"] < 0.5:
        warn(
            f"only {before['eval_eos_rate']:.0%} of the responses end with a stop token: raise "
            "ppo.response_length, or train the SFT stage longer"
        )


def _warn_about_critic(config: PPOStageConfig, metrics: dict[str, float]) -> None:
    if metrics["explained_variance"] < -0.5 and not config.critic.warmup_updates:
        warn(
            "the critic predicts returns worse than a constant would (explained variance "
            f"{metrics['explained_variance']:.2f}, mean value {metrics['value']:.2f}, mean return "
            f"{metrics['return']:.2f}): its error will steer the policy; set "
            "critic.warmup_updates=5 or more"
        )
