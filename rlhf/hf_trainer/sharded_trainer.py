"""A transformers Trainer whose model FSDP2 shards as in PPO: the same units, float32 throughout.

Its checkpoints hold whole weights and optimiser states, written by the main process, as those of
one process do. Left out: everything that is the same without sharding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from rlhf.distributed import gather_tensors, is_sharded, load_optimizer, share, whole_state
from rlhf.models import read_weights, shard


class ShardedTrainer(Trainer):
    """A Trainer that shards its model, if it is whole yet, where the launcher asks for FSDP2."""

    model: Any
    lr_scheduler: Any
    checkpoint: Path | None = None  # whose weights a sharded model gets
    _has_weights = False  # those, and autocast

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Shard the model, give it the weights of a checkpoint, and make the optimiser."""
        if self.accelerator.is_fsdp2 and not self._has_weights:
            if not is_sharded(self.model):
                shard(self.model)
            if self.checkpoint is not None:
                read_weights(self.model, self.checkpoint)
            share(self.model, self.accelerator)
            self._has_weights = True
        return super().create_optimizer(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write whole weights; all processes gather them."""
        if not is_sharded(self.model):
            super().save_model(output_dir, _internal_call)
            return
        state = gather_tensors(self.model.state_dict())
        if self.args.should_save:
            self._save(output_dir, state_dict=state)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = whole_state(self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, checkpoint: str, model: nn.Module | None = None) -> None:
        if not is_sharded(self.model):  # else `create_optimizer` has done it
            super()._load_from_checkpoint(checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_sharded(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state, schedule = (
            torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True)
            for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
        )
        load_optimizer(self.optimizer, state)
        self.lr_scheduler.load_state_dict(schedule)
