"""The PPO loop: collect, shape rewards, estimate advantages, update, log.

Formulas live in `rlhf.functional`, the optimiser steps in `rlhf.ppo.update`, the estimators
in `rlhf.ppo.estimators`; loading, evaluation and the run directory in `rlhf.ppo.stage`.

Decisions and sources: Z = Ziegler et al. 2019 (arXiv 1909.08593), S = Stiennon et al. 2020
(2009.01325), IG = InstructGPT (2203.02155), N = "The N implementation details of RLHF with PPO"
(ICLR blog track 2024), N+ = 2403.17031, Sec = "Secrets of RLHF in LLMs I" (2307.04964), L = Llama 2
(2307.09288).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from rlhf.config import InputError, PPOStageConfig
from rlhf.functional import (
    Moments,
    adaptive_kl_coef,
    explained_variance,
    kl_estimate,
    masked_mean,
    shape_rewards,
    update_moments,
    whiten,
)
from rlhf.ppo.estimators import ESTIMATORS, WHITENED
from rlhf.ppo.rollout import (
    Actors,
    CollectSettings,
    Rollout,
    collect,
    component_scores,
    cut_metric,
)
from rlhf.ppo.saved_rollouts import write_rollout
from rlhf.ppo.update import Optimization, stream_rows
from rlhf.scorers import CombinedScorer, Scorer


class PPOTrainer:
    """Trains a policy, and a critic where the estimator has one, against a scorer.

    Attributes:
        actors: unwrapped models; `policy` and `critic` are trained in place.
        optimization: optimisers, and averaged weights where asked.
        update: number of finished updates.
        kl_coef: weight of the KL penalty now; changes with `ppo.kl_target` only.
        score_moments: of all scores so far; used with `ppo.scale_scores`.
    """

    def __init__(
        self,
        config: PPOStageConfig,
        actors: Actors,
        prompts: Sequence[dict[str, Any]],
        settings: CollectSettings,
        accelerator: Accelerator,
        directory: Path,
        texts: Sequence[Sequence[int]] = (),
    ):
        """Prepare models and optimisers.

        Args:
            prompts: encoded prompts (`prompt`, `input_ids`), the same on every process.
            directory: where a batch with a number that is not finite is saved.
            texts: token ids of the PPO-ptx texts, each at least two.
        """
        self.config, self.actors, self.prompts, self.settings = config, actors, prompts, settings
        self.accelerator, self.directory = accelerator, directory
        self.optimization = Optimization(
            config, actors, settings.sampling, accelerator, directory, texts
        )
        self.update = 0
        self.kl_coef = config.ppo.kl_coef
        self.score_moments = Moments(0, 0.0, 0.0)

    def step(self) -> dict[str, float]:
        """Make one PPO update and return its metrics (names of `metrics.METRICS`)."""
        began = time.perf_counter()
        rollout = self.collect()
        collected = time.perf_counter()
        kl, rewards = self.shape_rewards(rollout)
        metrics = self.estimate_advantages(rollout, rewards)
        self.save_rollout(rollout, kl, rewards)
        metrics |= self.optimization.run(rollout, self.update, self.kl_coef)
        ended = time.perf_counter()
        metrics |= component_metrics(rollout, self.actors.scorer)
        metrics |= cut_metric("", rollout.cut, self.actors, self.actors.scorer)
        metrics |= rollout_metrics(rollout, rewards) | {
            "kl_coef": self.kl_coef,
            "collect_seconds": collected - began,
            "optimize_seconds": ended - collected,
            "tokens_per_second": float(rollout.response_mask.sum()) / (ended - began),
        }
        self.adapt_kl_coef(metrics["kl"])
        self.update += 1
        return metrics

    def collect(self) -> Rollout:
        """Sample `samples_per_prompt` responses to each of this update's prompts and evaluate
        them."""
        ppo = self.config.ppo
        self.optimization.update, self.optimization.num_steps = self.update, 0
        settings = self.settings
        if ppo.whiten_scores:  # of all scores; the penalty takes its place in `shape_rewards`
            settings = replace(settings, missing_eos_penalty=None)
        rollout = collect(
            self.actors,
            self.prompts_of_update(),
            (self.config.seed, self.update),
            settings,
            self.accelerator,
            self.optimization.minibatches(0, ppo.batch_size),
        )
        if ppo.mask_truncated:
            rollout.loss_mask = rollout.response_mask & rollout.finished[:, None]
        self.require_finite(rollout, "logprobs", "ref_logprobs", "values", "scores")
        return rollout

    def require_finite(self, rollout: Rollout, *names: str, **others: Tensor) -> None:
        """Stop the run if fields of a rollout, or other tensors made of it, are not finite."""
        tensors = {name: getattr(rollout, name) for name in names} | others
        sums = {name: float(tensor.sum()) for name, tensor in tensors.items()}
        self.optimization.require_finite(sums, rollout)

    def prompts_of_update(self) -> list[dict[str, Any]]:
        """The encoded prompt of each response of this update, over all processes."""
        ppo = self.config.ppo
        num_prompts = ppo.batch_size // ppo.samples_per_prompt
        numbers = range(self.update * num_prompts, (self.update + 1) * num_prompts)
        rows = stream_rows(numbers, len(self.prompts), (self.config.seed,))
        return [self.prompts[row] for row in rows for _ in range(ppo.samples_per_prompt)]

    def save_rollout(self, rollout: Rollout, kl: Tensor, rewards: Tensor) -> None:
        """Write this update's rollout where `ppo.save_rollouts` asks for it."""
        every, number = self.config.ppo.save_rollouts, self.update + 1
        if every is None or number % every or not self.accelerator.is_main_process:
            return
        prompts = [row["prompt"] for row in self.prompts_of_update()]
        tokenizer = self.actors.tokenizer
        write_rollout(self.directory, number, prompts, rollout, kl, rewards, tokenizer)

    def shape_rewards(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Put the KL penalty on every token and the score on the last (Z, S, IG, N, N+).

        A scorer's rewards per token are given at their tokens, what is left of the score on the
        last. Where asked, both are first divided by the running standard deviation of the scores
        (Sec), or the scores whitened (L), and then clipped (Sec). So without KL, the rewards of a
        response add up to its score.

        Returns:
            kl (B, T), by `ppo.kl_estimator`, and rewards (B, T).
        """
        ppo, mask = self.config.ppo, rollout.response_mask
        scores, dense = rollout.scores, rollout.dense_rewards
        if ppo.scale_scores:
            counted = rollout.loss_mask.any(dim=1)
            self.score_moments = update_moments(self.score_moments, scores[counted])
            std = self.score_moments.std or 1.0
            scores, dense = scores / std, dense / std
        if ppo.whiten_scores:
            scores = whitened_scores(rollout, self.settings.missing_eos_penalty)
        if ppo.clip_scores is not None:
            scores = scores.clamp(-ppo.clip_scores, ppo.clip_scores)
        kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs, ppo.kl_estimator)
        at_end, kl_coef = scores - dense.sum(dim=1), self.kl_coef if ppo.kl_in == "reward" else 0.0
        rewards = shape_rewards(at_end, kl, mask, kl_coef) + dense
        if ppo.whiten_rewards:  # N: scaled, but not shifted
            rewards = whiten(rewards, rollout.loss_mask, center=False)
        self.require_finite(rollout, rewards=rewards)
        return kl, rewards

    def estimate_advantages(self, rollout: Rollout, rewards: Tensor) -> dict[str, float]:
        """Fill in advantages (whitened over all tokens of the rollout, N) and returns; the metrics
        are of the tokens that the losses count."""
        ppo, mask = self.config.ppo, rollout.loss_mask
        advantages, returns = ESTIMATORS[ppo.advantage](rollout, rewards, ppo)
        whitened = ppo.whiten_advantages
        if whitened is None:
            whitened = ppo.advantage in WHITENED
        rollout.advantages = whiten(advantages, mask) if whitened else advantages
        rollout.returns = returns
        self.require_finite(rollout, "advantages", "returns")
        metrics = {"return": float(masked_mean(returns, mask))}
        if mask.any():
            metrics["advantage_std"] = float(advantages[mask].std(unbiased=False))
        if self.optimization.has_critic:
            metrics["value"] = float(masked_mean(rollout.values, mask))
            metrics["explained_variance"] = float(explained_variance(rollout.values, returns, mask))
        return metrics

    def adapt_kl_coef(self, kl: float) -> None:
        """Move `kl_coef` towards `ppo.kl_target`, once per rollout with that rollout's KL (Z)."""
        ppo = self.config.ppo
        if ppo.kl_target is not None:
            self.kl_coef = adaptive_kl_coef(
                self.kl_coef, kl, ppo.kl_target, ppo.kl_horizon, ppo.batch_size
            )

    def state(self) -> dict[str, Any]:
        """What resuming needs beside weights and optimisers, as JSON values."""
        return {
            "update": self.update,
            "kl_coef": self.kl_coef,
            "score_moments": list(self.score_moments),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` returned."""
        self.update, self.kl_coef = state["update"], state["kl_coef"]
        self.score_moments = Moments(*state["score_moments"])


def whitened_scores(rollout: Rollout, penalty: float | None) -> Tensor:
    """Give the scores of a rollout mean 0 and variance 1, and put the penalty for a missing EOS in
    the place of those of unfinished responses afterwards.

    L whitens logit(R) with R the sigmoid of the reward model's output: that output, which is what
    a score is here.

    Args:
        rollout: its scores are without the penalty.

    Returns:
        (B,).

    Raises:
        InputError: the scorer gives rewards per token.
    """
    if rollout.dense_rewards.any():
        raise InputError(
            "ppo.whiten_scores=true whitens one score per response, but the scorer gives rewards "
            "per token; set it to false (ppo.scale_scores=true scales both)"
        )
    scores = whiten(rollout.scores, rollout.loss_mask.any(dim=1))
    return scores if penalty is None else torch.where(rollout.finished, scores, penalty)


def component_metrics(rollout: Rollout, scorer: Scorer) -> dict[str, float]:
    """Mean score of each component, as it returned them, and the share of gated responses."""
    scores = component_scores(rollout, scorer)
    metrics = {name: float(values.mean()) for name, values in scores.items()}
    if isinstance(scorer, CombinedScorer):
        gated = scorer.gated(rollout.component_scores.T.cpu())
        if gated is not None:
            metrics["gated_rate"] = float(gated.float().mean())
    return metrics


def rollout_metrics(rollout: Rollout, rewards: Tensor) -> dict[str, float]:
    """Metrics of a rollout; KL is summed over tokens and averaged over sequences, nats per
    sequence."""
    mask, finished = rollout.response_mask, rollout.finished

    def per_sequence(x: Tensor) -> Tensor:
        return x.where(mask, 0.0).sum(dim=1)  # (B,)

    k1 = per_sequence(kl_estimate(rollout.logprobs, rollout.ref_logprobs, "k1"))
    gap = (rollout.sampler_logprobs - rollout.logprobs).abs().where(mask, 0.0)
    metrics = {
        "score": float(rollout.scores.mean()),
        "score_std": float(rollout.scores.std(unbiased=False)),
        "reward": float(per_sequence(rewards).mean()),
        "kl": float(k1.mean()),
        "kl_std": float(k1.std(unbiased=False)),
        "kl_k3": float(
            per_sequence(kl_estimate(rollout.logprobs, rollout.ref_logprobs, "k3")).mean()
        ),
        "response_length": float(rollout.lengths.float().mean()),
        "response_length_max": int(rollout.lengths.max()),
        "eos_rate": float(finished.float().mean()),
        "sampler_gap": float(gap.max()),
    }
    if finished.any():
        metrics["finished_score"] = float(rollout.scores[finished].mean())
    return metrics
