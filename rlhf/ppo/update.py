"""The optimiser steps of one PPO update: epochs x minibatches x micro-batches.

`rollout.py` and the advantages of `trainer.py` come before; `loop.py` comes after.

The loss of a minibatch is a sum over its tokens divided by their number. So neither micro-batches
nor processes change it. No step is made with a number that is not finite.

Sources: N = "The N implementation details of RLHF with PPO" (ICLR blog track 2024), N+ = arXiv
2403.17031, IG = InstructGPT (2203.02155).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor

from rlhf.checkpoint import NonFiniteError
from rlhf.config import PPOStageConfig, learning_rates
from rlhf.distributed import backward, clip_gradients, offloads, sharding, share, syncing, to_write
from rlhf.functional import (
    Stats,
    importance_weights,
    kl_estimate,
    learning_rate_factor,
    masked_sum,
    policy_loss,
    value_loss,
)
from rlhf.models import slices_of
from rlhf.ppo.actors import Actors
from rlhf.ppo.optimizer import make_optimizer
from rlhf.ppo.passes import critic_values, policy_outputs, text_loss
from rlhf.ppo.rollout import Experience, Rollout, micro_batches, minibatches, stream_rows
from rlhf.ppo.sampler_gap import require_sampler
from rlhf.sampling import Sampling
from rlhf.zero import SlicedOptimizer, like_weight, make_engine

PTX_STREAM = 1  # keeps the order of the ptx texts apart from that of the prompts
PREFIX = {"policy": "", "critic": "critic_"}  # of a model's metrics
LOSSES = ("value_loss", "policy_loss")  # already divided by the number of tokens
# these statistics of the parts of a minibatch combine as extremes, all others as sums
EXTREMES: dict[str, Callable[..., Tensor]] = {"ratio_max": torch.max, "ratio_min": torch.min}


class Updater:
    """Policy and critic with their optimisers; `run` makes the steps of one update.

    Attributes:
        optimizers: of `policy` and, with a critic, of `critic`.
        num_steps: optimiser steps made in an unfinished update; 0 between updates.
        clips_values: whether `ppo.cliprange_value` holds; a critic that does not steer may learn
            as fast as it can.
        averages: exponential moving averages of the policy's trainable weights; None if off.
        policy, critic: as the processes share them; the critic is None for estimators without one.
        texts: token ids of the PPO-ptx texts.
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
        """Prepare models and optimisers; the arguments are those of `PPOTrainer`."""
        self.config, self.sampling, self.texts = config, sampling, texts
        self.accelerator, self.directory = accelerator, directory
        self.num_steps, self.clips_values = 0, True
        rates = learning_rates(config)
        self.rates = {"policy": rates["ppo.learning_rate"]}
        if actors.critic is not None:
            self.rates["critic"] = rates["critic.learning_rate"]
        self.trainable: dict[str, dict[str, torch.nn.Parameter]] = {}
        self.optimizers: dict[str, Any] = {}
        for model, rate in self.rates.items():
            named = getattr(actors, model).named_parameters()
            self.trainable[model] = {name: p for name, p in named if p.requires_grad}
            self.optimizers[model] = make_optimizer(
                self.trainable[model].values(), rate, config.ppo
            )
        self.shares_trunk, self.critic = actors.shares_trunk, None
        self.policy = self._share("policy", actors.reader)
        if actors.critic is not None and not actors.shares_trunk:
            self.critic = self._share("critic", actors.critic)
        self.averages: dict[str, Tensor] | None = None
        if config.ppo.ema_decay is not None:
            self.averages = {n: like_weight(p) for n, p in self.trainable["policy"].items()}

    def _share(self, name: str, model: Any) -> Any:
        """Let all processes train a model together; DeepSpeed has an optimiser of its own, which
        replaces ours."""
        shared = share(model, self.accelerator)
        if sharding() != "DeepSpeed" or slices_of(model) is not None:
            return shared
        parts = self.optimizers[name], self.config.ppo.max_grad_norm, offloads()
        shared, self.optimizers[name] = make_engine(shared, *parts)
        return shared

    def run(
        self, batch: Experience, update: int, kl_coef: float, has_logprobs: bool = True
    ) -> dict[str, float]:
        """Make epochs x minibatches optimiser steps: fewer if `target_kl` is passed, and none for a
        minibatch without a token that counts. Return metrics, means over the steps.

        Args:
            update: number of finished updates.
            kl_coef: weight of the KL penalty, used if it is in the loss.
            has_logprobs: false if the first minibatch, which is then the whole batch, fills in
                `batch.logprobs`.
        """
        ppo, metrics = self.config.ppo, self._set_learning_rates(update)
        steps: list[dict[str, float]] = []
        skipped = abandoned_epochs = 0
        epochs = [
            minibatches(ppo, (self.config.seed, update, epoch), self.accelerator.device)
            for epoch in range(ppo.num_ppo_epochs)
        ]
        for number, rows in enumerate(chain(*epochs)):
            if not batch.loss_mask[rows].any():
                skipped += 1
                continue
            fills_in = number == 0 and not has_logprobs
            stats = self.accumulate(batch, rows, update, kl_coef, fills_in)
            if fills_in:
                require_sampler(batch, self.config, update)
            if ppo.target_kl is not None and stats.get("approx_kl", 0.0) > ppo.target_kl:
                abandoned_epochs = ppo.num_ppo_epochs - number // ppo.num_mini_batches
                # the minibatch that went too far belongs to the record
                steps.append({n: stats[n] for n in (*EXTREMES, "approx_kl", "clip_fraction")})
                self._zero_grad()
                break
            minibatch = batch.select(rows)
            stats |= self.accumulate_ptx(minibatch, number, update)
            steps.append(stats | self._step(minibatch, update))
            self.num_steps += 1
        if ppo.mask_truncated:
            metrics["skipped_minibatches"] = skipped
        metrics |= over_steps(steps)
        metrics |= {"optimizer_steps": self.num_steps, "abandoned_epochs": abandoned_epochs}
        self.num_steps = 0
        return metrics

    def trains_policy(self, update: int) -> bool:
        """False while the critic warms up and the policy waits."""
        return update >= self.config.critic.warmup_updates

    def accumulate(
        self, batch: Experience, rows: Tensor, update: int, kl_coef: float, fills_in: bool = False
    ) -> dict[str, float]:
        """Accumulate the gradients of the minibatch `rows` over micro-batches and processes, first
        of the critic, then of the policy; return its statistics, all finite. `fills_in`: set
        `batch.logprobs` to what the policy gives."""
        num_tokens = float(batch.loss_mask[rows].sum())
        denominator = num_tokens / self.accelerator.num_processes  # distributed wrappers average
        passes = micro_batches(batch, rows, self.config.ppo, self.accelerator)
        stats: Stats = {}
        found = torch.zeros_like(batch.logprobs)
        last = len(passes) - 1
        if self.critic is not None:
            for number, part in enumerate(map(batch.select, passes)):
                with syncing(self.critic, number == last, self.accelerator):
                    stats = add_stats(stats, self.critic_backward(part, denominator))
        trains = self.trains_policy(update)
        read = passes if trains or self.shares_trunk else []
        for number, part in enumerate(map(batch.select, read)):
            # with ptx the last of its micro-batches synchronises the processes
            syncs = number == last and not (self.texts and trains)
            with syncing(self.policy, syncs, self.accelerator):
                if trains:
                    new = self.policy_backward(part, denominator, kl_coef, fills_in)
                else:
                    new = self.head_backward(part, denominator)
                stats = add_stats(stats, new)
            found[passes[number], : part.logprobs.shape[1]] = part.logprobs
        if fills_in:  # the rows of the other processes are 0 here
            batch.logprobs.copy_(self.accelerator.reduce(found, reduction="sum"))
        values = reduce_stats(stats, self.accelerator, num_tokens)
        self.require_finite(values, batch.select(torch.cat(passes)), update)
        return values

    def critic_backward(self, part: Experience, denominator: float) -> Stats:
        """Accumulate the gradient of the value loss of one micro-batch."""
        loss, stats = self.scaled_value_loss(critic_values(self.critic, part), part, denominator)
        backward(self.critic, loss, self.accelerator)
        return stats

    def head_backward(self, part: Experience, denominator: float) -> Stats:
        """As `critic_backward`, for a value head on the trunk of a policy that waits. The gradients
        of the policy are dropped; several processes need one for each weight."""
        logprobs, _, values = policy_outputs(self.policy, part, self.sampling)
        loss, stats = self.scaled_value_loss(values, part, denominator)
        backward(self.policy, loss + 0.0 * logprobs.sum(), self.accelerator)
        return stats

    def scaled_value_loss(
        self, values: Tensor, part: Experience, denominator: float
    ) -> tuple[Tensor, Stats]:
        """`ppo.vf_coef` x the value loss of one micro-batch, and its statistics."""
        ppo = self.config.ppo
        clip = ppo.cliprange_value if self.clips_values else None
        loss, stats = value_loss(
            values, part.values, part.returns, part.loss_mask, clip, denominator=denominator
        )
        clipped = stats["value_clip_fraction"]
        return ppo.vf_coef * loss, {"value_loss": loss.detach(), "value_clip_fraction": clipped}

    def policy_backward(
        self, part: Experience, denominator: float, kl_coef: float, fills_in: bool = False
    ) -> Stats:
        """Accumulate the gradient of the clipped surrogate of one micro-batch, with the entropy
        bonus and the KL penalty if they are in the loss. `fills_in`: first set `part.logprobs`."""
        ppo, mask = self.config.ppo, part.loss_mask
        logprobs, entropy, values = policy_outputs(
            self.policy, part, self.sampling, with_entropy=True
        )
        if fills_in:
            part.logprobs.copy_(logprobs.detach())
        advantages, more = part.advantages, {}
        if ppo.importance_correction is not None:
            two = part.logprobs, part.sampler_logprobs
            weights = importance_weights(*two, mask, ppo.importance_cap)
            advantages, more["importance_weight"] = advantages * weights, weights.sum()
        loss, stats = policy_loss(
            logprobs,
            part.logprobs,
            advantages,
            mask,
            ppo.cliprange,
            dual_clip=ppo.dual_clip,
            denominator=denominator,
        )
        total = loss
        if ppo.entropy_coef:
            total = total - ppo.entropy_coef * masked_sum(entropy, mask, denominator)
        if ppo.kl_in == "loss":
            # zeroed where masked, or the gradient of exp(garbage) is nan
            difference = (logprobs - part.ref_logprobs).where(mask, 0.0)
            kl = kl_estimate(difference, torch.zeros_like(difference), ppo.kl_estimator)
            total = total + kl_coef * masked_sum(kl, mask, denominator)
        if self.shares_trunk:
            loss_of_values, of_values = self.scaled_value_loss(values, part, denominator)
            total, more = total + loss_of_values, more | of_values
        backward(self.policy, total, self.accelerator)
        del stats["num_tokens"]
        stats["entropy"] = entropy.detach().where(mask, 0.0).sum()
        return {"policy_loss": loss.detach(), **stats, **more}

    def accumulate_ptx(self, batch: Experience, step: int, update: int) -> dict[str, float]:
        """Accumulate the gradient of `ptx.coef` x the mean loss per token of this step's texts.

        InstructGPT (eq. 2) adds 27.8 x the mean log-likelihood of the pretraining text to its
        objective. Here the mean is over tokens: every token of the texts but the first of each.
        """
        ptx, ppo = self.config.ptx, self.config.ppo
        if not self.texts or not self.trains_policy(update):
            return {}
        first = (update * ppo.num_ppo_epochs * ppo.num_mini_batches + step) * ptx.batch_size
        numbers = range(first, first + ptx.batch_size)
        rows = stream_rows(numbers, len(self.texts), (self.config.seed, PTX_STREAM))
        num_tokens = sum(len(self.texts[row]) - 1 for row in rows)
        process, world = self.accelerator.process_index, self.accelerator.num_processes
        mine = [self.texts[row] for row in rows[process::world]]
        total = torch.zeros((), device=self.accelerator.device)
        size = ppo.rows_of(ptx.max_length)
        starts = range(0, len(mine), size)
        for start in starts:
            part = mine[start : start + size]
            with syncing(self.policy, start == starts[-1], self.accelerator):
                loss = text_loss(self.policy, part, num_tokens / world)
                backward(self.policy, ptx.coef * loss, self.accelerator)
            total += loss.detach()
        mean = self.accelerator.reduce(total, reduction="sum") / world
        stats = {"ptx_loss": float(mean)}
        self.require_finite(stats, batch, update)
        return stats

    def require_finite(self, values: dict[str, float], batch: Rollout, update: int) -> None:
        """Stop the run if a value is not finite, and save the batch that made it."""
        bad = {name: value for name, value in values.items() if not math.isfinite(value)}
        if not bad:
            return
        file = self.directory / f"non_finite_batch_{self.accelerator.process_index}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in batch.tensors().items()}, file)
        raise NonFiniteError(
            f"{', '.join(bad)} is not finite in update {update + 1}; got "
            f"{', '.join(map(str, bad.values()))}, nothing was updated with it, and the batch is "
            f"in {file}"
        )

    def _step(self, minibatch: Experience, update: int) -> dict[str, float]:
        """Clip and step both models; the policy waits while the critic warms up."""
        trains = {"critic": "critic" in self.optimizers, "policy": self.trains_policy(update)}
        models = [model for model in trains if trains[model]]
        norms = {}
        for model in models:
            optimizer, limit = self.optimizers[model], self.config.ppo.max_grad_norm
            if isinstance(optimizer, SlicedOptimizer):
                norm = optimizer.norm()
            else:
                norm = clip_gradients(self.trainable[model].values(), limit, self.accelerator)
            norms[f"{PREFIX[model]}grad_norm"] = norm
        self.require_finite(norms, minibatch, update)
        for model in models:
            self.optimizers[model].step()
        if self.averages is not None and self.trains_policy(update):
            weight = 1.0 - (self.config.ppo.ema_decay or 0.0)
            for name, parameter in self.trainable["policy"].items():
                to_write(self.averages[name]).lerp_(to_write(parameter), weight)
        self._zero_grad()
        return norms

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Give the policy the averaged weights inside the block, if there are any."""
        if self.averages is None:
            yield
            return
        weights = self.trainable["policy"]
        kept = {name: to_write(p).clone() for name, p in weights.items()}
        averaged = {name: to_write(average) for name, average in self.averages.items()}
        try:
            self._set_policy(averaged)
            yield
        finally:
            self._set_policy(kept)

    @torch.no_grad()
    def _set_policy(self, numbers: dict[str, Tensor]) -> None:
        for name, parameter in self.trainable["policy"].items():
            to_write(parameter).copy_(numbers[name])

    def _zero_grad(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    def _set_learning_rates(self, update: int) -> dict[str, float]:
        ppo = self.config.ppo
        factor = learning_rate_factor(
            update, ppo.num_updates, ppo.lr_schedule, ppo.lr_warmup_updates, ppo.lr_warmup_start
        )
        rates = {}
        for model, rate in self.rates.items():
            rates[f"{PREFIX[model]}learning_rate"] = rate * factor
            for group in self.optimizers[model].param_groups:
                group["lr"] = rate * factor
        return rates


# --- Statistics ---------------------------------------------------------------------------------


def add_stats(one: Stats, two: Stats) -> Stats:
    """Statistics of two parts of a minibatch together."""
    shared = one.keys() & two.keys()
    joined = {name: EXTREMES.get(name, torch.add)(one[name], two[name]) for name in shared}
    return one | two | joined


def reduce_stats(stats: Stats, accelerator: Accelerator, num_tokens: float) -> dict[str, float]:
    """Means over the tokens, and extremes, of the minibatch on all processes."""
    mine = torch.stack([x.float() for x in stats.values()])
    everywhere = accelerator.gather(mine[None]).cpu()  # (processes, statistics)
    values = {}
    for name, column in zip(stats, everywhere.unbind(1), strict=True):
        if name in EXTREMES:
            values[name] = float(EXTREMES[name](column))
        elif name in LOSSES:  # every process divided them by its share of the tokens
            values[name] = float(column.sum()) / accelerator.num_processes
        else:
            values[name] = float(column.sum()) / num_tokens
    return values


def over_steps(steps: list[dict[str, float]]) -> dict[str, float]:
    """Metrics of an update from the statistics of its steps: means, and extremes of the ratio."""
    names = dict.fromkeys(name for stats in steps for name in stats)
    columns = {name: [stats[name] for stats in steps if name in stats] for name in names}
    result = {name: sum(values) / len(values) for name, values in columns.items()}
    if "ratio_max" in result:
        most, least = columns["ratio_max"], columns["ratio_min"]
        result |= {"ratio_max": max(most), "ratio_min": min(least)}
        result["first_ratio_deviation"] = max(most[0] - 1, 1 - least[0])
    return result
