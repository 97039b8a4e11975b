"""The optimiser steps of one PPO update: epochs x minibatches, whatever the micro-batches.

The accumulation loop is ours: a minibatch's loss is a sum over its tokens divided by their number,
so that neither micro-batches nor processes change it, and every process makes the same number of
collective calls. Nothing is stepped with a number that is not finite.

Sources: N = "The N implementation details of RLHF with PPO" (ICLR blog track 2024), N+ = arXiv
2403.17031, IG = InstructGPT (2203.02155).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor

from rlhf.checkpoint import NonFiniteError
from rlhf.config import PPOConfig, PPOStageConfig
from rlhf.data import pad
from rlhf.functional import (
    kl_estimate,
    learning_rate_factor,
    masked_sum,
    policy_loss,
    token_entropy,
    token_logprobs,
    value_loss,
)
from rlhf.models import forward_inputs
from rlhf.ppo.rollout import Actors, Rollout, critic_values, policy_logprobs, share_of
from rlhf.sampling import Sampling

# how a statistic is combined over micro-batches, processes and steps; the others are sums
EXTREMES: dict[str, Any] = {
    "ratio_max_dev": torch.maximum,
    "ratio_max": torch.maximum,
    "ratio_min": torch.minimum,
}
PTX_STREAM = 1  # keeps the order of the ptx texts apart from that of the prompts


class Optimization:
    """Policy and critic with their optimisers; `run` makes the steps of one update.

    Attributes:
        optimizers: `policy` and, with a critic, `critic`: AdamW, by default with eps 1e-5 and
            without weight decay (N, N+).
        num_steps: optimiser steps made in this update so far.
        averages: exponential moving averages of the policy's trainable weights, None when off.
    """

    def __init__(
        self,
        config: PPOStageConfig,
        actors: Actors,
        sampling: Sampling,
        accelerator: Accelerator,
        directory: Path,
        texts: Sequence[Sequence[int]] = (),
    ):
        """Prepare models and optimisers.

        Args:
            directory: where a batch with a number that is not finite is saved.
            texts: token ids of the PPO-ptx texts.
        """
        self.config, self.sampling, self.texts = config, sampling, texts
        self.accelerator, self.directory, self.update = accelerator, directory, 0
        self.num_steps = 0
        self.kl_coef = config.ppo.kl_coef  # where the penalty stands in the loss
        self.has_critic = actors.critic is not None
        rates = {"policy": config.ppo.learning_rate}
        if self.has_critic:
            rates["critic"] = config.critic.learning_rate
        self.rates = rates
        self.trainable = {name: trainable(getattr(actors, name)) for name in rates}
        self.optimizers = {
            name: make_optimizer(self.trainable[name].values(), rate, config.ppo)
            for name, rate in rates.items()
        }
        self.averages: dict[str, Tensor] | None = None
        if config.ppo.ema_decay is not None:
            self.averages = {n: p.detach().clone() for n, p in self.trainable["policy"].items()}
        self.policy = accelerator.prepare_model(actors.policy)
        self.critic = accelerator.prepare_model(actors.critic) if self.has_critic else None

    def minibatches(self, epoch: int, num_rows: int) -> list[Tensor]:
        """Rows of each minibatch of an epoch: a permutation keyed by (seed, update, epoch)."""
        generator = np.random.default_rng([self.config.seed, self.update, epoch])
        order = torch.from_numpy(generator.permutation(num_rows)).to(self.accelerator.device)
        return list(order.chunk(self.config.ppo.num_mini_batches))

    def run(self, rollout: Rollout, update: int, kl_coef: float) -> dict[str, float]:
        """Make epochs x minibatches optimiser steps, fewer when `target_kl` is passed, and none in
        a minibatch of which no token counts.

        Args:
            update: number of finished updates.
            kl_coef: weight of the KL penalty where it stands in the loss.

        Returns:
            Metrics, means over the steps made.
        """
        ppo, self.update, self.kl_coef = self.config.ppo, update, kl_coef
        rates = self._set_learning_rates()
        all_stats: list[dict[str, float]] = []
        skipped = 0
        for epoch in range(ppo.num_ppo_epochs):
            for number, minibatch in enumerate(self.minibatches(epoch, len(rollout))):
                if not rollout.loss_mask[minibatch].any():
                    skipped += 1
                    continue
                stats = self.accumulate(rollout, minibatch)
                if ppo.target_kl is not None and stats.get("approx_kl", 0.0) > ppo.target_kl:
                    self._zero_grad()
                    # the statistics of the minibatch that went too far belong to the record
                    stats = {n: stats[n] for n in (*EXTREMES, "approx_kl", "clip_fraction")}
                    all_stats.append(stats)
                    return rates | _summary(all_stats, ppo.num_ppo_epochs - epoch)
                batch = rollout.select(minibatch)
                if self.texts:
                    stats |= self._accumulate_ptx(epoch * ppo.num_mini_batches + number, batch)
                all_stats.append(stats | self._step(batch))
                self.num_steps += 1
        if ppo.mask_truncated:
            rates["skipped_minibatches"] = skipped
        return rates | _summary(all_stats, 0)

    @property
    def warming_up(self) -> bool:
        """True while the critic trains and the policy waits."""
        return self.update < self.config.critic.warmup_updates

    def accumulate(self, rollout: Rollout, minibatch: Tensor) -> dict[str, float]:
        """Accumulate the gradients of one minibatch over micro-batches and processes."""
        world = self.accelerator.num_processes
        share = rollout.select(share_of(minibatch, self.accelerator))
        num_tokens = float(rollout.loss_mask[minibatch].sum())
        sums: dict[str, Tensor] = {}
        parts = [part for _, part in share.micro_batches(self.config.ppo.micro_batch_size)]
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            stats: dict[str, Tensor] = {}
            if self.has_critic:
                with nullcontext() if last else self.accelerator.no_sync(self.critic):
                    stats |= self.critic_backward(part, num_tokens / world)
            if not self.warming_up:
                # with ptx the last of its micro-batches synchronises the processes
                sync = last and not self.texts
                with nullcontext() if sync else self.accelerator.no_sync(self.policy):
                    stats |= self.policy_backward(part, num_tokens / world)
            for name, value in stats.items():
                combine = EXTREMES.get(name, torch.add)
                sums[name] = combine(sums[name], value) if name in sums else value
        return self._reduce(sums, num_tokens, share)

    def critic_backward(self, part: Rollout, denominator: float) -> dict[str, Tensor]:
        """Value loss of one micro-batch; distributed wrappers average, hence the denominator."""
        ppo = self.config.ppo
        values = critic_values(self.critic, part)
        loss, stats = value_loss(
            values,
            part.values,
            part.returns,
            part.loss_mask,
            ppo.cliprange_value,
            denominator=denominator,
        )
        self.accelerator.backward(ppo.vf_coef * loss)
        return {
            "value_loss": loss.detach(),
            "value_clip_fraction": stats["value_clip_fraction"],
        }

    def policy_backward(self, part: Rollout, denominator: float) -> dict[str, Tensor]:
        """Clipped surrogate of one micro-batch, with entropy bonus and KL penalty where asked."""
        ppo, mask = self.config.ppo, part.loss_mask
        logprobs, logits = policy_logprobs(self.policy, part, self.sampling)
        loss, stats = policy_loss(
            logprobs,
            part.logprobs,
            part.advantages,
            mask,
            ppo.cliprange,
            dual_clip=ppo.dual_clip,
            denominator=denominator,
        )
        total = loss
        with nullcontext() if ppo.entropy_coef else torch.no_grad():
            entropy = token_entropy(logits, ppo.temperature)
        if ppo.entropy_coef:
            total = total - ppo.entropy_coef * masked_sum(entropy, mask, denominator)
        if ppo.kl_in == "loss":
            # zeroed where masked, or the gradient of exp(garbage) is nan
            difference = (logprobs - part.ref_logprobs).where(mask, 0.0)
            kl = kl_estimate(difference, torch.zeros_like(difference), ppo.kl_estimator)
            total = total + self.kl_coef * masked_sum(kl, mask, denominator)
        self.accelerator.backward(total)
        return {
            "policy_loss": loss.detach(),
            "entropy": entropy.detach().where(mask, 0.0).sum(),
            **{name: value for name, value in stats.items() if name != "num_tokens"},
        }

    def _accumulate_ptx(self, step: int, batch: Rollout) -> dict[str, float]:
        """Accumulate the gradient of `ptx.coef` x the mean loss per token over this step's texts.

        InstructGPT (eq. 2) adds 27.8 x the mean log-likelihood of the pretraining text to the
        reward objective. Both means are over tokens here: of the minibatch's responses for PPO, of
        the step's texts (every token but the first) for ptx.
        """
        ptx, ppo = self.config.ptx, self.config.ppo
        if self.warming_up:
            return {}
        first = (self.update * ppo.num_ppo_epochs * ppo.num_mini_batches + step) * ptx.batch_size
        numbers = range(first, first + ptx.batch_size)
        rows = stream_rows(numbers, len(self.texts), (self.config.seed, PTX_STREAM))
        num_tokens = sum(len(self.texts[row]) - 1 for row in rows)
        process, world = self.accelerator.process_index, self.accelerator.num_processes
        mine = [self.texts[row] for row in rows[process::world]]
        total = torch.zeros((), device=self.accelerator.device)
        starts = range(0, len(mine), ppo.micro_batch_size)
        for start in starts:
            part, sync = mine[start : start + ppo.micro_batch_size], start == starts[-1]
            with nullcontext() if sync else self.accelerator.no_sync(self.policy):
                loss = text_loss(self.policy, part, num_tokens / world)
                self.accelerator.backward(ptx.coef * loss)
            total += loss.detach()
        mean = self.accelerator.reduce(total, reduction="sum") / world
        stats = {"ptx_loss": float(mean)}
        self.require_finite(stats, batch)
        return stats

    def _reduce(
        self, sums: dict[str, Tensor], num_tokens: float, share: Rollout
    ) -> dict[str, float]:
        """Turn this process's sums into means over the whole minibatch; stop the run if one is
        not finite."""
        names = [name for name in sums if name not in EXTREMES]
        totals = self.accelerator.reduce(
            torch.stack([sums[name].float() for name in names]), reduction="sum"
        )
        world = self.accelerator.num_processes
        per_token = dict(zip(names, totals.tolist(), strict=True))
        # the losses are already divided by their denominator (tokens / processes)
        means = {
            name: total / world if name.endswith("_loss") else total / num_tokens
            for name, total in per_token.items()
        }
        for name in (n for n in sums if n in EXTREMES):
            everywhere = self.accelerator.gather(sums[name].float()[None])
            means[name] = float(everywhere.min() if name == "ratio_min" else everywhere.max())
        self.require_finite(means, share)
        return means

    def require_finite(self, values: dict[str, float], batch: Rollout) -> None:
        """Stop the run if a value is not finite, with the batch that made it saved.

        Raises:
            NonFiniteError: names the values, the update and the file.
        """
        bad = {name: value for name, value in values.items() if not math.isfinite(value)}
        if not bad:
            return
        file = self.directory / f"non_finite_batch_{self.accelerator.process_index}.safetensors"
        save_file({k: v.contiguous() for k, v in vars(batch).items()}, file)
        raise NonFiniteError(
            f"{', '.join(bad)} is not finite in update {self.update + 1}; got "
            f"{', '.join(map(str, bad.values()))}, nothing was updated with it, and the batch is "
            f"in {file}"
        )

    def _step(self, minibatch: Rollout) -> dict[str, float]:
        """Clip and step both models; the policy waits while the critic warms up."""
        names = {"critic": "critic_grad_norm"} if self.has_critic else {}
        if not self.warming_up:
            names["policy"] = "grad_norm"
        norms = {}
        for model, metric in names.items():
            norm = self.accelerator.clip_grad_norm_(
                list(self.trainable[model].values()), self.config.ppo.max_grad_norm
            )
            norms[metric] = float(norm)
        self.require_finite(norms, minibatch)
        for model in names:
            self.optimizers[model].step()
        if self.averages is not None and not self.warming_up:
            weight = 1.0 - (self.config.ppo.ema_decay or 0.0)
            for name, parameter in self.trainable["policy"].items():
                self.averages[name].lerp_(parameter.detach(), weight)
        self._zero_grad()
        return norms

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Put the averaged weights in the policy's place inside the block, where there are any."""
        if self.averages is None:
            yield
            return
        parameters = self.trainable["policy"]
        kept = {name: p.detach().clone() for name, p in parameters.items()}
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(self.averages[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(kept[name])

    def _zero_grad(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    def _set_learning_rates(self) -> dict[str, float]:
        ppo = self.config.ppo
        factor = learning_rate_factor(
            self.update,
            ppo.num_updates,
            ppo.lr_schedule,
            ppo.lr_warmup_updates,
            ppo.lr_warmup_start,
        )
        for name, rate in self.rates.items():
            for group in self.optimizers[name].param_groups:
                group["lr"] = rate * factor
        names = {"policy": "learning_rate", "critic": "critic_learning_rate"}
        return {names[name]: rate * factor for name, rate in self.rates.items()}


def make_optimizer(parameters: Iterable[Tensor], rate: float, ppo: PPOConfig) -> torch.optim.AdamW:
    """Make the optimiser of a model.

    Weight decay is of matrices only: weights of linear layers (the scalar head's and LoRA's too)
    and embeddings. Biases and norms, which have one dimension, have none, as in transformers.

    Source: eps 1e-5, no decay: N, N+. Betas 0.9, 0.95: IG; with decay 0.1: Llama 2 (2307.09288).
    """
    parameters = list(parameters)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": ppo.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1]},
    ]
    betas = (ppo.adam_betas[0], ppo.adam_betas[1])
    return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=ppo.adam_epsilon, weight_decay=0.0)


def text_loss(model: Any, texts: Sequence[Sequence[int]], denominator: float) -> Tensor:
    """Sum over the tokens of some texts, but the first of each, of -log p, over `denominator`.

    Args:
        model: a causal LM, possibly wrapped.
        texts: token ids, at least two each.

    Returns:
        0-d float32, nats.
    """
    device = next(model.parameters()).device
    ids = pad(texts, 0, device=device)
    mask = pad([[True] * len(text) for text in texts], False, device=device)
    logits = model(**forward_inputs(model, ids, mask), use_cache=False).logits[:, :-1]
    return masked_sum(-token_logprobs(logits, ids[:, 1:]), mask[:, 1:], denominator)


def stream_rows(numbers: Sequence[int], num_rows: int, key: Sequence[int]) -> list[int]:
    """Rows with these numbers in an endless stream, shuffled anew in every pass.

    A function of its arguments alone: a resumed run needs no saved data position.
    """
    passes = {number // num_rows for number in numbers}
    orders = {p: np.random.default_rng([*key, p]).permutation(num_rows) for p in passes}
    return [int(orders[number // num_rows][number % num_rows]) for number in numbers]


def _summary(stats: list[dict[str, float]], abandoned: int) -> dict[str, float]:
    """Mean over the steps of an update, or their extreme; the last of an abandoned update was not
    stepped."""
    result: dict[str, float] = {}
    for name in dict.fromkeys(name for s in stats for name in s):
        values = [s[name] for s in stats if name in s]
        if name not in EXTREMES:
            result[name] = sum(values) / len(values)
        elif name == "ratio_min":
            result[name] = min(values)
        elif name == "ratio_max":
            result[name] = max(values)
    if stats and "ratio_max_dev" in stats[0]:
        result["first_ratio_deviation"] = stats[0]["ratio_max_dev"]
    return result | {
        "optimizer_steps": len(stats) - bool(abandoned),
        "abandoned_epochs": abandoned,
    }


def trainable(model: Any) -> dict[str, torch.nn.Parameter]:
    """The parameters of a model that train, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
