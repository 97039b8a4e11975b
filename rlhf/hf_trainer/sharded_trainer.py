"""A transformers Trainer whose model FSDP2 shards as in PPO: the same units, float32 throughout.

Its checkpoints hold the slices of weights and optimiser states that each process has, as those of
PPO do, and JSON; nothing is pickled. Any number of processes continues from them, one too, and from
what one process wrote. Left out: everything that is the same without sharding.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from rlhf.checkpoint.state import (
    load_modules,
    load_moments,
    moments,
    random_state,
    restore_random_state,
    trained,
)
from rlhf.checkpoint.tensor_files import divide, write_parts
from rlhf.console import is_main_process, rank
from rlhf.distributed import is_sharded, load_optimizer, share
from rlhf.models import read_weights, shard

MODEL, OPTIMIZER = "model", "optimizer"  # folders of slices
SCHEDULE = "scheduler.json"


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
            if self.checkpoint is not None and holds_slices(self.checkpoint):
                load_modules(self.checkpoint, {MODEL: self.model})
            elif self.checkpoint is not None:
                read_weights(self.model, self.checkpoint)
            share(self.model, self.accelerator)
            self._has_weights = True
        return super().create_optimizer(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the slices of the weights that train."""
        if is_sharded(self.model):
            self._write(output_dir, MODEL, trained(self.model))
        else:
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        self._write(output_dir, OPTIMIZER, moments(self.optimizer))
        if is_main_process():
            schedule = json.dumps(self.lr_scheduler.state_dict())
            (Path(output_dir) / SCHEDULE).write_text(schedule, encoding="utf-8")

    def _save_rng_state(self, output_dir: str) -> None:
        if not is_sharded(self.model):
            super()._save_rng_state(output_dir)
            return
        Path(output_dir).mkdir(parents=True, exist_ok=True)  # the main process made it on its disk
        _random_file(output_dir).write_text(json.dumps(random_state()), encoding="utf-8")

    def _write(self, directory: str | None, name: str, tensors: dict[str, torch.Tensor]) -> None:
        place = Path(str(directory))
        write_parts(place, *divide(place, {name: tensors}))

    def _load_from_checkpoint(self, checkpoint: str, model: nn.Module | None = None) -> None:
        if is_sharded(self.model):
            return  # `create_optimizer` has done it
        if holds_slices(checkpoint):
            load_modules(Path(checkpoint), {MODEL: self.model})
        else:
            super()._load_from_checkpoint(checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and holds_slices(checkpoint):
            load_moments(Path(checkpoint), OPTIMIZER, self.optimizer)
            schedule = (Path(checkpoint) / SCHEDULE).read_text(encoding="utf-8")
            self.lr_scheduler.load_state_dict(json.loads(schedule))
        elif checkpoint is not None and is_sharded(self.model):
            state, schedule = (
                torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True)
                for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
            )
            load_optimizer(self.optimizer, state)
            self.lr_scheduler.load_state_dict(schedule)
        else:
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None or not holds_slices(checkpoint):
            super()._load_rng_state(checkpoint)
        elif _random_file(checkpoint).is_file():  # else there are more processes now
            restore_random_state(json.loads(_random_file(checkpoint).read_text()))


def holds_slices(checkpoint: str | Path) -> bool:
    """True for a checkpoint that processes of FSDP2 wrote together."""
    return (Path(checkpoint) / SCHEDULE).is_file()


def _random_file(checkpoint: str | Path) -> Path:
    return Path(checkpoint) / f"random_{rank()}.json"
