"""One PPO update: collect, shape rewards, estimate advantages, update, report.

`stage.py` comes before: it loads what the trainer needs. `rollout.py` and `update.py` come next:
they collect and update. `loop.py` calls `step` until the run ends. The formulas are in
`rlhf.functional`.

To add an advantage estimator, add a row to `ESTIMATORS` below and its name to the choices of
`PPOConfig.advantage`.

Decisions and sources: Z = Ziegler et al. 2019 (arXiv 1909.08593), S = Stiennon et al. 2020
(2009.01325), IG = InstructGPT (2203.02155), N = "The N implementation details of RLHF with PPO"
(ICLR blog track 2024), N+ = 2403.17031, Sec = "Secrets of RLHF in LLMs I" (2307.04964), L = Llama 2
(2307.09288).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from rlhf.checkpoint.disk import write_whole
from rlhf.config import InputError, PPOConfig, PPOStageConfig
from rlhf.console import say
from rlhf.failures import phase
from rlhf.functional import (
    Moments,
    adaptive_kl_coef,
    explained_variance,
    gae,
    grpo,
    kl_estimate,
    masked_mean,
    reinforce_pp,
    returns_minus_mean,
    rloo,
    shape_rewards,
    update_moments,
    whiten,
)
from rlhf.ppo.actors import Actors
from rlhf.ppo.rollout import (
    Experience,
    Rollout,
    collect,
    component_scores,
    cut_metric,
    minibatches,
    stream_rows,
)
from rlhf.ppo.sampler_gap import require_sampler, sampler_gaps
from rlhf.ppo.scoring import scorer_counts
from rlhf.ppo.update import Updater
from rlhf.sampling import sampling_for
from rlhf.scorers import CombinedScorer, Scorer
from rlhf.tokenizer import response_text

SAVED_PER_TOKEN = ("response_ids", "logprobs", "ref_logprobs", "values", "advantages", "returns")
Estimator = Callable[[Rollout, Tensor, PPOConfig], tuple[Tensor, Tensor]]


class PPOTrainer:
    """Trains a policy, and a critic if the estimator has one, against a scorer.

    Attributes:
        actors: unwrapped models; `policy` and `critic` are trained in place.
        sampling: how responses are sampled.
        update: number of finished updates.
        kl_coef: weight of the KL penalty now; changes with `ppo.kl_target` only.
        score_moments: of all scores so far; used with `ppo.scale_scores`.
        collected_at: `time.perf_counter()` at the end of the latest `collect`.
        scorer_counts: what judges and remote scorers were asked in it.
        steers: whether the latest advantages used the critic; None without `critic.must_explain`.
    """

    def __init__(
        self,
        config: PPOStageConfig,
        actors: Actors,
        prompts: Sequence[dict[str, Any]],
        accelerator: Accelerator,
        directory: Path,
        texts: Sequence[Sequence[int]] = (),
    ):
        """Prepare models and optimisers.

        Args:
            prompts: encoded prompts (`prompt`, `input_ids`), the same on every process.
            directory: a batch with a number that is not finite is saved here.
            texts: token ids of the PPO-ptx texts, at least two per text.
        """
        self.config, self.actors, self.prompts = config, actors, prompts
        self.accelerator, self.directory = accelerator, directory
        ppo = config.ppo
        choice = ppo.temperature, ppo.top_p, ppo.top_k
        self.sampling = sampling_for(actors.policy, actors.tokenizer, ppo.response_length, *choice)
        self.updater = Updater(config, actors, self.sampling, accelerator, directory, texts)
        self.update = 0
        self.kl_coef = ppo.kl_coef
        self.score_moments = Moments()
        self.collected_at = 0.0
        self.scorer_counts: dict[str, float] = {}
        self.steers: bool | None = None

    def step(self) -> dict[str, float]:
        """Make one PPO update and return its metrics (names of `metrics.METRICS`)."""
        with phase(f"update {self.update + 1}"):
            rollout = self.collect()
            kl, rewards = self.shape_rewards(rollout)
            batch = self.estimate_advantages(rollout, kl, rewards)
            with phase("training"):
                stats = self.updater.run(batch, self.update, self.kl_coef, self.reads_policy())
            return self.report(batch, stats)

    def collect(self) -> Rollout:
        """Sample `samples_per_prompt` responses to each of this update's prompts and score them."""
        ppo, key = self.config.ppo, (self.config.seed, self.update)
        with scorer_counts([self.actors.scorer], self.accelerator) as self.scorer_counts:
            rollout = collect(
                *(self.actors, self.prompts_of_update(), key, self.sampling, ppo, self.accelerator),
                minibatches(ppo, (*key, 0), self.accelerator.device),
                with_logprobs=self.reads_policy(),
            )
        self.require_finite(rollout, "logprobs", "ref_logprobs", "values", "scores")
        if self.reads_policy():
            require_sampler(rollout, self.config, self.update)
        self.collected_at = time.perf_counter()
        return rollout

    def reads_policy(self) -> bool:
        """False if the first epoch's own forward pass gives the old log-probs of this update."""
        waits = not self.updater.trains_policy(self.update) or self.actors.shares_trunk
        return waits or self.saves_rollout() or not self.config.ppo.first_epoch_reads

    def require_finite(self, rollout: Rollout, *names: str, **others: Tensor) -> None:
        """Stop the run if fields of a rollout, or tensors computed from it, are not finite."""
        tensors = {name: getattr(rollout, name) for name in names} | others
        sums = {name: float(tensor.sum()) for name, tensor in tensors.items()}
        self.updater.require_finite(sums, rollout, self.update)

    def prompts_of_update(self) -> list[dict[str, Any]]:
        """The encoded prompt of each response of this update, over all processes."""
        ppo = self.config.ppo
        num_prompts = ppo.batch_size // ppo.samples_per_prompt
        numbers = range(self.update * num_prompts, (self.update + 1) * num_prompts)
        rows = stream_rows(numbers, len(self.prompts), (self.config.seed,))
        return [self.prompts[row] for row in rows for _ in range(ppo.samples_per_prompt)]

    def shape_rewards(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Put the KL penalty on every token and the score on the last (Z, S, IG, N, N+).

        A scorer's rewards per token stay at their tokens; the last token gets the rest of the
        score. Options first divide both by the running standard deviation of the scores (Sec), or
        whiten the scores (L), and then clip the scores (Sec). So without KL, the rewards of a
        response add up to its score.

        Returns:
            kl (B, T), by `ppo.kl_estimator`, and rewards (B, T).
        """
        ppo, dense = self.config.ppo, rollout.dense_rewards
        if ppo.whiten_scores and dense.any():
            raise InputError(
                "ppo.whiten_scores=true whitens one score per response, but the scorer gives "
                "rewards per token; set it to false (ppo.scale_scores=true scales both)"
            )
        scores = rollout.final_scores(self.config.eos_penalty, ppo.whiten_scores)
        if ppo.scale_scores:
            counted = rollout.loss_mask.any(dim=1)
            self.score_moments = update_moments(self.score_moments, scores[counted])
            std = self.score_moments.std or 1.0
            scores, dense = scores / std, dense / std
        if ppo.clip_scores is not None:
            scores = scores.clamp(-ppo.clip_scores, ppo.clip_scores)
        kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs, ppo.kl_estimator)
        at_end, kl_coef = scores - dense.sum(dim=1), self.kl_coef if ppo.kl_in == "reward" else 0.0
        rewards = shape_rewards(at_end, kl, rollout.response_mask, kl_coef) + dense
        if ppo.whiten_rewards:  # N: scaled, but not shifted
            rewards = whiten(rewards, rollout.loss_mask, center=False)
        self.require_finite(rollout, rewards=rewards)
        return kl, rewards

    def estimate_advantages(self, rollout: Rollout, kl: Tensor, rewards: Tensor) -> Experience:
        """Add advantages, whitened over all tokens of the rollout (N), and returns; then save the
        rollout, if asked: the update may fail."""
        ppo = self.config.ppo
        steers = self.updater.clips_values = self.critic_steers(rollout, rewards)
        raw, returns = (ESTIMATORS[ppo.advantage] if steers else no_critic)(rollout, rewards, ppo)
        by_default = ppo.advantage in WHITENED
        whitens = by_default if ppo.whiten_advantages is None else ppo.whiten_advantages
        advantages = whiten(raw, rollout.loss_mask) if whitens else raw
        estimates = {"raw_advantages": raw, "advantages": advantages, "returns": returns}
        batch = Experience(**rollout.tensors(), kl=kl, rewards=rewards, **estimates)
        self.require_finite(batch, "advantages", "returns")
        self.save_rollout(batch)
        return batch

    def critic_steers(self, rollout: Rollout, rewards: Tensor) -> bool:
        """False while `critic.must_explain` and the critic explains none of what the responses
        earned: its explained variance of the rewards to go, which no value is part of, is not above
        0. Say it when that changes. A function of the rollout: a resumed run decides the same.
        """
        if not self.config.critic_must_explain:
            return True
        returns = reinforce_pp(rewards, rollout.response_mask, self.config.ppo.gamma)
        explained = float(explained_variance(rollout.values, returns, rollout.loss_mask))
        steers = explained > 0
        if steers != self.steers:
            number = f"update {self.update + 1}: the critic explains {explained:.1%}"
            say(f"{number} of the variance of the returns: {STEERING[steers]}")
        self.steers = steers
        return steers

    def report(self, batch: Experience, stats: dict[str, float]) -> dict[str, float]:
        """Return the metrics, move `kl_coef` towards `ppo.kl_target` (Z), and count the update."""
        ppo = self.config.ppo
        metrics = (
            advantage_metrics(batch, self.actors.critic is not None)
            | stats
            | component_metrics(batch, self.actors.scorer)
            | cut_metric("", batch.cut, self.actors, self.actors.scorer)
            | rollout_metrics(batch, self.reported_scores(batch))
            | self.scorer_counts
            | {"kl_coef": self.kl_coef}
            | ({} if self.steers is None else {"critic_steers": float(self.steers)})
        )
        if ppo.kl_target is not None:
            self.kl_coef = adaptive_kl_coef(
                self.kl_coef, metrics["kl"], ppo.kl_target, ppo.kl_horizon, ppo.batch_size
            )
        self.update += 1
        return metrics

    def reported_scores(self, rollout: Rollout) -> Tensor:
        """(B,) scores with the penalty for a missing EOS, if it is on the scale of the scores."""
        ppo = self.config.ppo
        return rollout.final_scores(None if ppo.whiten_scores else self.config.eos_penalty)

    def saves_rollout(self) -> bool:
        """True if this update's rollout is written to a file."""
        every = self.config.ppo.save_rollouts
        return every is not None and (self.update + 1) % every == 0

    def save_rollout(self, batch: Experience) -> None:
        """Write this update's rollout, a row per response, if `ppo.save_rollouts` asks for it."""
        if not self.saves_rollout() or not self.accelerator.is_main_process:
            return
        number = self.update + 1
        file = self.directory / "rollouts" / f"update-{number:06d}.jsonl"
        file.parent.mkdir(exist_ok=True)
        prompts = [row["prompt"] for row in self.prompts_of_update()]
        scores = self.reported_scores(batch)
        # a column of a table has one type: next to texts, conversations are written as JSON text
        mixed = len({type(prompt) for prompt in prompts}) > 1
        tensors = {name: getattr(batch, name) for name in SAVED_PER_TOKEN}
        tensors |= {"token_kl": batch.kl, "rewards": batch.rewards}
        lines = []
        for i, prompt in enumerate(prompts):
            length = int(batch.lengths[i])
            tokens = {name: tensor[i, :length].tolist() for name, tensor in tensors.items()}
            row = {
                "update": number,
                "prompt": json.dumps(prompt) if mixed and not isinstance(prompt, str) else prompt,
                "response": response_text(tokens["response_ids"], self.actors.tokenizer),
                "finished": bool(batch.finished[i]),
                "score": float(scores[i]),
                "kl": sum(tokens["token_kl"]),  # nats
                "response_length": length,
            }
            lines.append(json.dumps(row | tokens) + "\n")
        write_whole(file, "".join(lines))

    def state(self) -> dict[str, Any]:
        """What resuming needs besides weights and optimisers, as JSON values."""
        moments = list(self.score_moments)
        return {"update": self.update, "kl_coef": self.kl_coef, "score_moments": moments}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.update, self.kl_coef = state["update"], state["kl_coef"]
        self.score_moments = Moments(*state["score_moments"])


# --- Advantage estimators -----------------------------------------------------------------------


def per_response(formula: Callable[[Tensor], Tensor]) -> Estimator:
    """Make an estimator that gives every token of a response the same advantage.

    The loss stays the mean over the tokens of the minibatch, not first over each response.

    Args:
        formula: (P, K) summed rewards of K responses to each of P prompts -> (P, K) advantages.
    """

    def estimate(rollout: Rollout, rewards: Tensor, ppo: PPOConfig) -> tuple[Tensor, Tensor]:
        totals = rewards.sum(dim=1)  # (B,); rewards are 0 at masked positions
        advantages = formula(totals.view(-1, ppo.samples_per_prompt)).view(-1, 1)  # (B, 1)
        mask = rollout.response_mask
        return advantages.where(mask, 0.0), totals[:, None].where(mask, 0.0)

    return estimate


def no_critic(rollout: Rollout, rewards: Tensor, ppo: PPOConfig) -> tuple[Tensor, Tensor]:
    """Rewards to go minus their mean, for a critic that explains nothing yet; it learns them."""
    returns = reinforce_pp(rewards, rollout.response_mask, ppo.gamma)
    return returns_minus_mean(returns, rollout.loss_mask), returns


def reward_to_go(rollout: Rollout, rewards: Tensor, ppo: PPOConfig) -> tuple[Tensor, Tensor]:
    """REINFORCE++: its advantages before whitening are also its returns."""
    returns = reinforce_pp(rewards, rollout.response_mask, ppo.gamma)
    return returns, returns


# name -> (rollout, rewards (B, T), settings) -> advantages, returns (B, T), 0 where masked
ESTIMATORS: dict[str, Estimator] = {
    "gae": lambda rollout, rewards, ppo: gae(
        rewards, rollout.values, rollout.response_mask, ppo.gamma, ppo.lam
    ),
    "rloo": per_response(rloo),
    "grpo": per_response(grpo),
    "reinforce_pp": reward_to_go,
}
# Whitened over the rollout, unless `ppo.whiten_advantages` says otherwise.
WHITENED = ("gae", "reinforce_pp")


# What `critic.must_explain` does, by whether the critic explains anything.
STEERING = {
    False: "advantages are returns minus their mean until it explains more",
    True: "advantages use it now",
}


# --- Metrics ------------------------------------------------------------------------------------


def advantage_metrics(batch: Experience, has_critic: bool) -> dict[str, float]:
    """Metrics over the tokens that the losses count."""
    mask, returns = batch.loss_mask, batch.returns
    metrics = {"return": float(masked_mean(returns, mask))}
    if mask.any():
        metrics["advantage_std"] = float(batch.raw_advantages[mask].std(unbiased=False))
    if has_critic:
        metrics["value"] = float(masked_mean(batch.values, mask))
        metrics["explained_variance"] = float(explained_variance(batch.values, returns, mask))
    return metrics


def component_metrics(rollout: Rollout, scorer: Scorer) -> dict[str, float]:
    """Mean raw score of each component, and the share of gated responses."""
    scores = component_scores(rollout, scorer)
    metrics = {name: float(values.mean()) for name, values in scores.items()}
    if isinstance(scorer, CombinedScorer):
        gated = scorer.gated(rollout.component_scores.T.cpu())
        if gated is not None:
            metrics["gated_rate"] = float(gated.float().mean())
    return metrics


def rollout_metrics(batch: Experience, scores: Tensor) -> dict[str, float]:
    """Metrics over all responses; KL is in nats per sequence.

    Args:
        scores: (B,), see `reported_scores`.
    """
    mask, finished = batch.response_mask, batch.finished

    def per_sequence(x: Tensor) -> Tensor:
        return x.where(mask, 0.0).sum(dim=1)  # (B,)

    k1 = per_sequence(kl_estimate(batch.logprobs, batch.ref_logprobs, "k1"))
    k3 = per_sequence(kl_estimate(batch.logprobs, batch.ref_logprobs, "k3"))
    metrics = {
        "score": float(scores.mean()),
        "score_std": float(scores.std(unbiased=False)),
        "reward": float(per_sequence(batch.rewards).mean()),
        "kl": float(k1.mean()),
        "kl_std": float(k1.std(unbiased=False)),
        "kl_k3": float(k3.mean()),
        "response_length": float(batch.lengths.float().mean()),
        "response_length_max": int(batch.lengths.max()),
        "eos_rate": float(finished.float().mean()),
        **sampler_gaps(batch),
    }
    if finished.any():
        metrics["finished_score"] = float(batch.scores[finished].mean())
    return metrics
