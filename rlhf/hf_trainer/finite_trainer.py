"""A transformers Trainer that trains on, saves and continues from finite numbers alone."""

from __future__ import annotations

import itertools
import math
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import Trainer

from rlhf.checkpoint import NonFiniteError, find_non_finite_on_any, optimizer_tensors
from rlhf.failures import phase
from rlhf.hf_trainer.sharded_trainer import ShardedTrainer
from rlhf.hf_trainer.token_batches import SharedBatches, WithWeightlessRow, split_batch

MAX_SKIPPED = 20  # a loss scaler starts at 2^16 and halves: it has passed through 2^-4 by then


class FiniteTrainer(ShardedTrainer):
    """A Trainer that stops on all processes before a loss or gradient that is not finite reaches
    the weights, and saves no weight or optimiser state that is not finite.

    With a loss scaler (trainer.fp16), such gradients are part of the search for the scale, and
    their steps are skipped; training stops after `MAX_SKIPPED` skipped steps in a row.
    """

    micro_batch_tokens: int | None = None  # None: one pass for a batch
    _step_loss: Tensor | float = 0.0  # of this step so far
    _num_skipped = 0  # steps in a row

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train for an epoch, or not at all after the last step: a run that was killed before it
        wrote `final/` continues there."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def row_lengths(self) -> list[int] | None:
        """Tokens of each training row; None if the rows are not texts."""
        return None

    def weightless_row(self) -> dict[str, Any]:
        """A row that adds nothing to the loss."""
        raise NotImplementedError

    def get_train_dataloader(self) -> DataLoader:
        """Read training rows; several processes read each row once, and have similar numbers of
        tokens in a step."""
        rows: Any = self.train_dataset
        lengths = self.row_lengths() if self.accelerator.num_processes > 1 else None
        if lengths is None:
            return super().get_train_dataloader()
        self.train_dataset = WithWeightlessRow(rows, self.weightless_row())
        loader = super().get_train_dataloader()
        self.train_dataset = rows
        shard = loader.batch_sampler
        assert isinstance(shard, BatchSamplerShard)
        shard.batch_sampler = SharedBatches(shard.batch_sampler, lengths, shard.num_processes)
        shard.even_batches = False  # it would repeat rows
        return loader

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Make the forward and backward passes of a batch, and remember its loss.

        The loss of a pass is its share of the mean over `num_items_in_batch`, so that shares add
        up. Processes exchange gradients in the last pass.
        """
        parts: list[Any] = [inputs]
        if self.micro_batch_tokens is not None:
            parts = split_batch(inputs, self.micro_batch_tokens)
        total: Tensor | float = 0.0
        for number, part in enumerate(parts, start=1):
            is_last = number == len(parts)
            syncs = nullcontext() if is_last else self.accelerator.no_sync(model)
            with phase("training"), syncs:
                total = total + super().training_step(model, part, num_items_in_batch)
        loss = torch.as_tensor(total)
        self._step_loss = self._step_loss + loss.detach()
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """Check the step; the Trainer asks for the norm right before the optimiser steps."""
        norm = super()._get_grad_norm(*args, **kwargs)
        if self.is_deepspeed_enabled and self.accelerator.optimizer_step_was_skipped:
            norm = math.nan  # DeepSpeed, which has stepped already, gives that of the step before
        numbers = [[float(self._step_loss), 0.0 if norm is None else float(norm)]]
        with phase("training"):
            everywhere = self.accelerator.gather(torch.tensor(numbers, device=self.args.device))
        self._step_loss = 0.0
        names, step = ("loss", "gradient norm"), self.state.global_step + 1
        bad = [
            f"the {name} is {value}"
            for row in everywhere.tolist()
            for name, value in zip(names, row, strict=True)
            if not math.isfinite(value)
        ]
        self._num_skipped = self._num_skipped + 1 if bad else 0
        if bad and self.accelerator.scaler is None:
            raise NonFiniteError(f"{bad[0]} in step {step}; nothing was updated with it")
        if self._num_skipped >= MAX_SKIPPED:
            raise NonFiniteError(
                f"{bad[0]} in step {step}, and the loss scaler of trainer.fp16 has skipped "
                f"{MAX_SKIPPED} steps in a row"
            )
        return norm

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with phase("evaluation"):
            return super()._evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with phase("saving a checkpoint"):
            super()._save_checkpoint(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Save a checkpoint; none where it would hold a number that is not finite."""
        problem = find_non_finite_state(self)
        if problem is not None:
            raise NonFiniteError(f"checkpoint-{self.state.global_step} was not written: {problem}")
        super().save_model(*args, **kwargs)


def find_non_finite_state(trainer: Trainer) -> str | None:
    """As `find_non_finite`, in the weights and optimiser states of a Trainer on all processes."""
    weights = trainer.accelerator.unwrap_model(trainer.model).state_dict(keep_vars=True)
    tensors = itertools.chain(weights.items(), optimizer_tensors(trainer.optimizer))
    return find_non_finite_on_any(tensors)


def set_learning_rate(trainer: Trainer) -> None:
    """Use the learning rate and warm-up of the configuration. The Trainer restored those of the
    checkpoint, which differ if a run that met such a number goes on with a lower rate."""
    schedule: Any = trainer.lr_scheduler
    if not isinstance(schedule, LambdaLR):
        return
    rate = trainer.args.learning_rate
    schedule.base_lrs = [rate for _ in schedule.base_lrs]
    schedule._last_lr = [rate * factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
    for group, now in zip(schedule.optimizer.param_groups, schedule._last_lr, strict=True):
        group["initial_lr"], group["lr"] = rate, now
