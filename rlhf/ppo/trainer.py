"""The PPO loop: collect, shape rewards, estimate advantages, update, log.

Formulas live in `rlhf.functional`; loading, evaluation and the run directory in `rlhf.ppo.stage`.
The accumulation loop is ours: an update makes exactly epochs x minibatches optimiser steps, and a
minibatch's loss is a sum over its tokens divided by their number, so that neither micro-batches nor
processes change it.

Decisions and sources: Z = Ziegler et al. 2019 (arXiv 1909.08593), S = Stiennon et al. 2020
(2009.01325), IG = InstructGPT (2203.02155), N = "The N implementation details of RLHF with PPO"
(ICLR blog track 2024), N+ = 2403.17031.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor

from rlhf.config import InputError, PPOStageConfig
from rlhf.functional import (
    explained_variance,
    gae,
    kl_estimate,
    masked_mean,
    policy_loss,
    shape_rewards,
    token_entropy,
    value_loss,
    whiten,
)
from rlhf.rollout import Actors, CollectSettings, Rollout, collect, critic_values, policy_logprobs


class PPOTrainer:
    """Trains a policy and a critic against a scorer; `step()` makes one update.

    Attributes:
        actors: unwrapped models; `policy` and `critic` are trained in place.
        optimizers: `policy` and `critic`, AdamW without weight decay and with eps 1e-5 (N, N+).
        update: number of finished updates.
    """

    def __init__(
        self,
        config: PPOStageConfig,
        actors: Actors,
        prompts: Sequence[dict[str, Any]],
        settings: CollectSettings,
        accelerator: Accelerator,
        directory: Path,
    ):
        """Prepare models and optimisers.

        Args:
            prompts: encoded prompts (`prompt`, `input_ids`), the same on every process.
            directory: where a batch with a non-finite loss is saved.
        """
        self.config, self.actors, self.prompts, self.settings = config, actors, prompts, settings
        self.accelerator, self.directory, self.update = accelerator, directory, 0
        policy, critic = _trainable(actors.policy), _trainable(actors.critic)
        knobs: dict[str, Any] = {"eps": config.ppo.adam_epsilon, "weight_decay": 0.0}
        self.optimizers = {
            "policy": torch.optim.AdamW(policy, lr=config.ppo.learning_rate, **knobs),
            "critic": torch.optim.AdamW(critic, lr=config.critic.learning_rate, **knobs),
        }
        self.policy = accelerator.prepare_model(actors.policy)
        self.critic = accelerator.prepare_model(actors.critic)

    def step(self) -> dict[str, float]:
        """Make one PPO update and return its metrics (names of `metrics.METRICS`)."""
        began = time.perf_counter()
        rollout = self.collect()
        collected = time.perf_counter()
        kl, rewards = self.shape_rewards(rollout)
        metrics = self.estimate_advantages(rollout, rewards)
        metrics |= self.optimize(rollout)
        self.update += 1
        ended = time.perf_counter()
        metrics |= {
            "kl_coef": self.config.ppo.kl_coef,
            "collect_seconds": collected - began,
            "optimize_seconds": ended - collected,
            "tokens_per_second": float(rollout.response_mask.sum()) / (ended - began),
        }
        return rollout_metrics(rollout, kl, rewards) | metrics

    def collect(self) -> Rollout:
        """Sample this update's prompts and evaluate the responses."""
        numbers = range(
            self.update * self.config.ppo.batch_size, (self.update + 1) * self.config.ppo.batch_size
        )
        prompts = [
            self.prompts[i] for i in prompt_rows(numbers, len(self.prompts), self.config.seed)
        ]
        return collect(
            self.actors, prompts, (self.config.seed, self.update), self.settings, self.accelerator
        )

    def shape_rewards(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Put the KL penalty on every token and the score on the last (Z, S, IG, N, N+).

        Returns:
            kl (B, T), by `ppo.kl_estimator`, and rewards (B, T).
        """
        kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs, self.config.ppo.kl_estimator)
        return kl, shape_rewards(rollout.scores, kl, rollout.response_mask, self.config.ppo.kl_coef)

    def estimate_advantages(self, rollout: Rollout, rewards: Tensor) -> dict[str, float]:
        """Fill in advantages (whitened over all tokens of the rollout, N) and returns."""
        ppo, mask = self.config.ppo, rollout.response_mask
        advantages, returns = gae(rewards, rollout.values, mask, ppo.gamma, ppo.lam)
        rollout.advantages = whiten(advantages, mask) if ppo.whiten_advantages else advantages
        rollout.returns = returns
        return {
            "value": float(masked_mean(rollout.values, mask)),
            "return": float(masked_mean(returns, mask)),
            "explained_variance": float(explained_variance(rollout.values, returns, mask)),
            "advantage_std": float(advantages[mask].std(unbiased=False)),
        }

    def optimize(self, rollout: Rollout) -> dict[str, float]:
        """Make epochs x minibatches optimiser steps, fewer when `target_kl` is passed.

        Every process holds the whole rollout and takes its share of each minibatch, so that all
        make the same number of collective calls.
        """
        ppo = self.config.ppo
        rates = self._set_learning_rates()
        all_stats: list[dict[str, float]] = []
        for epoch in range(ppo.num_ppo_epochs):
            order = torch.from_numpy(
                np.random.default_rng([self.config.seed, self.update, epoch]).permutation(
                    len(rollout)
                )
            ).to(rollout.scores.device)
            for minibatch in order.chunk(ppo.num_mini_batches):
                stats = self._accumulate(rollout, minibatch)
                if ppo.target_kl is not None and stats["approx_kl"] > ppo.target_kl:
                    self._zero_grad()
                    return rates | _summary(
                        all_stats or [stats], len(all_stats), ppo.num_ppo_epochs - epoch
                    )
                all_stats.append(stats | self._optimizer_step())
        return rates | _summary(all_stats, len(all_stats), 0)

    def _accumulate(self, rollout: Rollout, minibatch: Tensor) -> dict[str, float]:
        """Accumulate the gradients of one minibatch over micro-batches and processes."""
        ppo, world = self.config.ppo, self.accelerator.num_processes
        share = rollout.select(minibatch[self.accelerator.process_index :: world])
        num_tokens = float(rollout.response_mask[minibatch].sum())
        sums: dict[str, Tensor] = {}
        parts = list(share.micro_batches(ppo.micro_batch_size))
        for number, (_, part) in enumerate(parts):
            last = number == len(parts) - 1
            for name, value in self._micro_batch(part, num_tokens / world, sync=last).items():
                combine = torch.maximum if name == "ratio_max_dev" else torch.add
                sums[name] = combine(sums[name], value) if name in sums else value
        return self._reduce(sums, num_tokens, share)

    def _micro_batch(self, part: Rollout, denominator: float, sync: bool) -> dict[str, Tensor]:
        """Forward and backward of one micro-batch; distributed wrappers average, hence the
        denominator."""
        ppo, mask = self.config.ppo, part.response_mask
        stats: dict[str, Tensor] = {}
        with nullcontext() if sync else self.accelerator.no_sync(self.critic):
            values = critic_values(self.critic, part)
            loss, value_stats = value_loss(
                values,
                part.values,
                part.returns,
                mask,
                ppo.cliprange_value,
                denominator=denominator,
            )
            self.accelerator.backward(ppo.vf_coef * loss)
            stats |= {
                "value_loss": loss.detach(),
                "value_clip_fraction": value_stats["value_clip_fraction"],
            }
        with nullcontext() if sync else self.accelerator.no_sync(self.policy):
            logprobs, logits = policy_logprobs(self.policy, part, self.settings.sampling)
            loss, policy_stats = policy_loss(
                logprobs,
                part.logprobs,
                part.advantages,
                mask,
                ppo.cliprange,
                denominator=denominator,
            )
            self.accelerator.backward(loss)
        with torch.no_grad():
            entropy = token_entropy(logits.detach(), ppo.temperature)
        stats |= {"policy_loss": loss.detach(), "entropy": entropy.where(mask, 0.0).sum()}
        stats |= {
            name: policy_stats[name]
            for name in ("approx_kl", "clip_fraction", "ratio", "ratio_max_dev")
        }
        return stats

    def _reduce(
        self, sums: dict[str, Tensor], num_tokens: float, share: Rollout
    ) -> dict[str, float]:
        """Turn this process's sums into means over the whole minibatch; stop the run if one is
        not finite."""
        names = [name for name in sums if name != "ratio_max_dev"]
        totals = self.accelerator.reduce(
            torch.stack([sums[name].float() for name in names]), reduction="sum"
        )
        world = self.accelerator.num_processes
        largest = self.accelerator.gather(sums["ratio_max_dev"].float()[None]).max()
        per_token = dict(zip(names, totals.tolist(), strict=True))
        # the losses are already divided by their denominator (tokens / processes)
        means = {
            name: total / world if name.endswith("_loss") else total / num_tokens
            for name, total in per_token.items()
        }
        if not all(math.isfinite(value) for value in means.values()):
            file = self.directory / f"non_finite_batch_{self.accelerator.process_index}.safetensors"
            save_file({k: v.contiguous() for k, v in vars(share).items()}, file)
            bad = [name for name, value in means.items() if not math.isfinite(value)]
            raise InputError(
                f"{', '.join(bad)} is not finite in update {self.update + 1}; nothing was updated "
                f"with it and the batch is in {file}. Lower ppo.learning_rate or "
                "critic.learning_rate, or use precision=float32; resume=true continues from the "
                "last checkpoint"
            )
        return means | {"ratio_max_dev": float(largest)}

    def _optimizer_step(self) -> dict[str, float]:
        """Clip and step both models; the policy waits while the critic warms up."""
        ppo, norms = self.config.ppo, {}
        for name, model in (("critic", self.critic), ("policy", self.policy)):
            norm = self.accelerator.clip_grad_norm_(_trainable(model), ppo.max_grad_norm)
            norms["grad_norm" if name == "policy" else "critic_grad_norm"] = float(norm)
            if name == "critic" or self.update >= self.config.critic.warmup_updates:
                self.optimizers[name].step()
        self._zero_grad()
        return norms

    def _zero_grad(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    def _set_learning_rates(self) -> dict[str, float]:
        """Linear decay to zero over the run (N, N+), or constant; a function of the update
        alone."""
        ppo = self.config.ppo
        factor = 1.0 - self.update / ppo.num_updates if ppo.lr_schedule == "linear" else 1.0
        for name, rate in (
            ("policy", ppo.learning_rate),
            ("critic", self.config.critic.learning_rate),
        ):
            for group in self.optimizers[name].param_groups:
                group["lr"] = rate * factor
        return {"learning_rate": ppo.learning_rate * factor, "critic_learning_rate": rate * factor}


def prompt_rows(numbers: Sequence[int], num_prompts: int, seed: int) -> list[int]:
    """Rows of the prompts with these numbers in an endless stream, shuffled anew in every pass.

    A function of its arguments alone: a resumed run needs no saved data position.
    """
    passes = {number // num_prompts for number in numbers}
    orders = {p: np.random.default_rng([seed, p]).permutation(num_prompts) for p in passes}
    return [int(orders[number // num_prompts][number % num_prompts]) for number in numbers]


def rollout_metrics(rollout: Rollout, kl: Tensor, rewards: Tensor) -> dict[str, float]:
    """Metrics of a rollout; KL is summed over tokens and averaged over sequences, nats per
    sequence."""
    mask = rollout.response_mask

    def per_sequence(x: Tensor) -> float:
        return float(x.where(mask, 0.0).sum(dim=1).mean())

    gap = (rollout.sampler_logprobs - rollout.logprobs).abs().where(mask, 0.0)
    return {
        "score": float(rollout.scores.mean()),
        "score_std": float(rollout.scores.std(unbiased=False)),
        "reward": per_sequence(rewards),
        "kl": per_sequence(kl_estimate(rollout.logprobs, rollout.ref_logprobs, "k1")),
        "kl_k3": per_sequence(kl_estimate(rollout.logprobs, rollout.ref_logprobs, "k3")),
        "response_length": float(rollout.lengths.float().mean()),
        "response_length_max": int(rollout.lengths.max()),
        "eos_rate": float(rollout.finished.float().mean()),
        "sampler_gap": float(gap.max()),
    }


def _summary(stats: list[dict[str, float]], steps: int, abandoned: int) -> dict[str, float]:
    """Mean over the optimiser steps of an update."""
    names = [name for name in stats[0] if name != "ratio_max_dev"]
    result = {name: sum(s[name] for s in stats) / len(stats) for name in names}
    result |= {"first_ratio_deviation": stats[0]["ratio_max_dev"]}
    return result | {"optimizer_steps": steps, "abandoned_epochs": abandoned}


def _trainable(model: Any) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]
