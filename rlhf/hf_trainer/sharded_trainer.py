"""A transformers Trainer whose model FSDP2 shards as in PPO: the same units, float32 throughout; or
whose model, or optimiser, DeepSpeed divides.

Its checkpoints hold the slices of weights and optimiser states that each process has, as those of
PPO do, and JSON; nothing is pickled. Under DeepSpeed they hold whole tensors, gathered one by one.
Any number of processes continues from them, however they shard, one too, and from what one process
wrote. Left out: everything that is the same without sharding.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import nn
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from rlhf.checkpoint.state import (
    load_modules,
    load_moments,
    moments,
    random_state,
    read_finite,
    restore_random_state,
    trained,
)
from rlhf.checkpoint.tensor_files import Part, divide, stored_tensors, write_parts
from rlhf.console import is_main_process, rank
from rlhf.distributed import is_sharded, share, zero_stage
from rlhf.models import read_weights, shard
from rlhf.slices import load_optimizer
from rlhf.zero import SlicedOptimizer, written_weights

MODEL, OPTIMIZER = "model", "optimizer"  # folders of slices
SCHEDULE = "scheduler.json"


class ShardedTrainer(Trainer):
    """A Trainer that shards its model, if it is whole yet, where the launcher asks for that."""

    model: Any
    optimizer: Any
    lr_scheduler: Any
    checkpoint: Path | None = None  # whose weights a sharded model gets
    in_bfloat16 = False  # passes under DeepSpeed, which `args.bf16` would give bfloat16 weights
    _has_weights = False  # those, and autocast
    _trained: list[Any]  # weights in the order of the optimiser, which DeepSpeed makes flat

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Shard the model, give it the weights of a checkpoint, and make the optimiser."""
        if (self.accelerator.is_fsdp2 or self.is_deepspeed_enabled) and not self._has_weights:
            if not is_sharded(self.model) and zero_stage() != 2:
                shard(self.model)
            if self.checkpoint is not None and holds_slices(self.checkpoint):
                load_modules(self.checkpoint, {MODEL: self.model})
            elif self.checkpoint is not None:
                read_weights(self.model, self.checkpoint)
            if self.accelerator.is_fsdp2:
                share(self.model, self.accelerator)
            elif self.in_bfloat16:
                cast = torch.autocast(self.args.device.type, torch.bfloat16)
                self.model.forward = convert_outputs_to_fp32(cast(self.model.forward))
            self._has_weights = True
        optimizer = super().create_optimizer(*args, **kwargs)
        if not hasattr(self, "_trained"):  # DeepSpeed's groups come later
            self._trained = [p for group in optimizer.param_groups for p in group["params"]]
        return optimizer

    def _prepare_for_training(self, max_steps: int, loader: Any, checkpoint: Any) -> Any:
        """As the Trainer, which would read a checkpoint of DeepSpeed, a pickle."""
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, loader, checkpoint)
        prepared = super()._prepare_for_training(max_steps, loader, None)
        self._load_optimizer_and_scheduler(checkpoint)
        return prepared

    @property
    def _saves_itself(self) -> bool:
        return is_sharded(self.model) or self.is_deepspeed_enabled

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the slices of the weights that train."""
        if self._saves_itself:
            self._write(output_dir, MODEL, trained(self.model))
        else:
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._saves_itself:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if self.is_deepspeed_enabled:
            self._write(output_dir, OPTIMIZER, self._divided().written())
        else:
            self._write(output_dir, OPTIMIZER, moments(self.optimizer))
        if is_main_process():
            schedule = json.dumps(self.lr_scheduler.state_dict())
            (Path(output_dir) / SCHEDULE).write_text(schedule, encoding="utf-8")

    def _save_rng_state(self, output_dir: str) -> None:
        if not self._saves_itself:
            super()._save_rng_state(output_dir)
            return
        Path(output_dir).mkdir(parents=True, exist_ok=True)  # the main process made it on its disk
        _random_file(output_dir).write_text(json.dumps(random_state()), encoding="utf-8")

    def _write(self, directory: str | None, name: str, tensors: dict[str, torch.Tensor]) -> None:
        place = Path(str(directory))
        if not self.is_deepspeed_enabled:
            write_parts(place, *divide(place, {name: tensors}))
            return
        if is_main_process():
            place.mkdir(parents=True, exist_ok=True)
        parts = {key: Part(tensor) for key, tensor in written_weights(tensors).items()}
        write_parts(place, {name: parts}, [])

    def _load_from_checkpoint(self, checkpoint: str, model: nn.Module | None = None) -> None:
        if is_sharded(self.model):
            return  # `create_optimizer` has done it
        if holds_slices(checkpoint):
            load_modules(Path(checkpoint), {MODEL: self.model})
        else:
            super()._load_from_checkpoint(checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and holds_slices(checkpoint):
            if self.is_deepspeed_enabled:
                self._put_moments(Path(checkpoint))
            else:
                load_moments(Path(checkpoint), OPTIMIZER, self.optimizer)
            schedule = (Path(checkpoint) / SCHEDULE).read_text(encoding="utf-8")
            self._load_schedule(json.loads(schedule))
        elif checkpoint is not None and self._saves_itself:
            state, schedule = (
                torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True)
                for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
            )
            if self.is_deepspeed_enabled:
                known = {f"{i}.{k}": v for i, vs in state["state"].items() for k, v in vs.items()}
                self._divided().put(known, lambda name, _: known[name])
            else:
                load_optimizer(self.optimizer, state)
            self._load_schedule(schedule)
        else:
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_schedule(self, state: dict[str, Any]) -> None:
        """Load the state of the schedule. DeepSpeed leaves out groups of weights that are empty, so
        that other launches have more; all have one rate."""
        number = len(self.optimizer.param_groups)
        names = {"base_lrs", "_last_lr", "lr_lambdas"} & state.keys()
        rates = {name: (state[name] * number)[:number] for name in names}
        self.lr_scheduler.load_state_dict(state | rates)

    def _put_moments(self, checkpoint: Path) -> None:
        file = checkpoint / f"{OPTIMIZER}.safetensors"
        with stored_tensors(checkpoint, OPTIMIZER) as saved:
            self._divided().put(saved.keys(), partial(read_finite, file, saved))

    def _divided(self) -> SlicedOptimizer:
        """DeepSpeed's optimiser, which accelerate has wrapped."""
        return SlicedOptimizer(self.optimizer.optimizer, self._trained)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None or not holds_slices(checkpoint):
            super()._load_rng_state(checkpoint)
        elif _random_file(checkpoint).is_file():  # else there are more processes now
            restore_random_state(json.loads(_random_file(checkpoint).read_text()))


def holds_slices(checkpoint: str | Path) -> bool:
    """True for a checkpoint that processes wrote together, under FSDP2 or DeepSpeed."""
    return (Path(checkpoint) / SCHEDULE).is_file()


def _random_file(checkpoint: str | Path) -> Path:
    return Path(checkpoint) / f"random_{rank()}.json"
