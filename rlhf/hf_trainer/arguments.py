"""The arguments of a transformers Trainer: from `trainer:`, and what the stage itself decides."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from rlhf.checkpoint import UNSEALED
from rlhf.config import (
    InputError,
    RewardStageConfig,
    SFTStageConfig,
    build_arguments,
    learning_rates,
)
from rlhf.distributed import is_sharded, offloads, sharding, use_bfloat16, use_deepspeed_on_cpu
from rlhf.hf_trainer.trial import check_trainer_values, try_out
from rlhf.sharding_settings import (
    OF_TORCH,
    mixes_types,
    refuse_under_deepspeed,
    refuse_under_sharding,
)
from rlhf.zero import runnable

DEFAULT_LENGTH = 1024  # tokens of a row
BEST_METRICS = {
    "sft": ("eval_loss", "eval_mean_token_accuracy"),
    "reward": ("eval_accuracy", "eval_margin"),
}


def trainer_arguments(
    factory: Any, config: SFTStageConfig | RewardStageConfig, stage: str, **reserved: Any
) -> Any:
    """Build the argument object of a Trainer from `trainer:`, with what the stage itself decides.

    Args:
        factory: `trl.SFTConfig` or `transformers.TrainingArguments`.
        reserved: further values of the stage.

    Raises:
        InputError: the stage cannot use a value.
    """
    optim = config.trainer.get("optim", OF_TORCH[0])
    others = sharding() == "FSDP" and optim not in OF_TORCH  # they read rows, or make own tensors
    refuse_under_sharding(
        {
            f"trainer.optim={optim}": others,
            f"micro_batch_tokens={config.micro_batch_tokens}": config.micro_batch_tokens,
            f"model.quantization={config.model.quantization}": config.model.quantization,
            f"model.dtype={config.model.dtype}": mixes_types(config, stage == "reward"),
            "trainer.load_best_model_at_end=true": config.trainer.get("load_best_model_at_end"),
        }
    )
    refuse_under_deepspeed(config)
    given = config.trainer | {"learning_rate": learning_rates(config)["trainer.learning_rate"]}
    check_trainer_values(factory, given, stage)
    if given.get("fp16") and use_bfloat16(config.precision):
        raise InputError(
            f"trainer.fp16=true and precision={config.precision} (bfloat16 here) exclude each "
            "other; set precision=float32, or trainer.fp16=false"
        )
    values = {"eval_strategy": "steps"} | given
    load_best = _pop_load_best(values, stage)
    decided = _decided_by_stage(factory, config, stage, bool(values.get("fp16")))
    args = build_arguments(factory, values, decided | reserved)
    if sharding() == "DeepSpeed":
        use_deepspeed_on_cpu()
        unset_hf_deepspeed_config()  # models come in slices in our own way
    try_out(args)
    # set after the fact: as an argument it would want evaluations at every checkpoint, and we add a
    # checkpoint to every evaluation that is the best
    args.load_best_model_at_end = load_best
    if config.batch_size is not None:
        args.per_device_train_batch_size = rows_of_a_pass(
            config.batch_size, args.per_device_train_batch_size, args.world_size
        )
        rows = args.train_batch_size * args.world_size
        args.gradient_accumulation_steps = accumulation_steps(config.batch_size, rows)
    return args


def _decided_by_stage(
    factory: Any, config: SFTStageConfig | RewardStageConfig, stage: str, has_loss_scaler: bool
) -> dict[str, Any]:
    """Arguments that a stage decides, and that `trainer:` may not hold."""
    # Checkpointing is set on the model; transformers 5.23 renames the argument.
    is_renamed = "activation_checkpointing" in {f.name for f in dataclasses.fields(factory)}
    return {
        "output_dir": str(config.stage_dir(stage) / UNSEALED),
        "seed": config.seed,
        "data_seed": config.seed,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": use_bfloat16(config.precision) and sharding() != "DeepSpeed",  # see ShardedTrainer
        "activation_checkpointing" if is_renamed else "gradient_checkpointing": False,
        "remove_unused_columns": False,
        # it would replace a nan in the logged loss; a loss scaler skips such steps
        "logging_nan_inf_filter": has_loss_scaler,
        "ddp_find_unused_parameters": False,
        "ddp_timeout": config.distributed_timeout,
        "save_strategy": "steps",
        "save_steps": config.checkpoint_every,
        "save_total_limit": None,  # it would delete by name, whoever wrote it
        "save_only_model": False,
    }


def rows_of_a_pass(batch_size: int, per_device: int, num_processes: int) -> int:
    """Rows of a forward pass on a process: less than `per_device` where the processes have an equal
    share of `batch_size` that is less."""
    share, rest = divmod(batch_size, num_processes)
    return per_device if rest or not share else min(per_device, share)


def accumulation_steps(batch_size: int, rows: int) -> int:
    """Forward passes of an optimiser step, of so many rows over all processes, that make
    `batch_size`; refuse a batch size that is no multiple of the rows."""
    steps, rest = divmod(batch_size, rows)
    if rest:
        nearest = [str(rows * number) for number in (steps, steps + 1) if number]
        raise InputError(
            f"batch_size={batch_size} is not a multiple of the {rows} rows of a forward pass "
            "(trainer.per_device_train_batch_size x processes); set it to "
            f"{' or '.join(nearest)}, or change trainer.per_device_train_batch_size"
        )
    return steps


def _pop_load_best(values: dict[str, Any], stage: str) -> bool:
    """Take load_best_model_at_end out of `trainer:`. It needs evaluations and the name of a metric,
    and so do the schedules that follow a metric."""
    load_best = bool(values.pop("load_best_model_at_end", False))
    schedule = values.get("lr_scheduler_type")
    if not load_best and schedule not in ("reduce_lr_on_plateau", "greedy"):
        return False
    metric = values.setdefault("metric_for_best_model", BEST_METRICS[stage][0])
    if metric not in BEST_METRICS[stage]:
        raise InputError(
            f"trainer.metric_for_best_model={metric!r} must be one of "
            f"{', '.join(BEST_METRICS[stage])}"
        )
    if values["eval_strategy"] == "no":
        field = "load_best_model_at_end=true" if load_best else f"lr_scheduler_type={schedule}"
        raise InputError(
            f"trainer.{field} needs evaluations, but trainer.eval_strategy=no; set "
            "trainer.eval_strategy to steps or epoch"
        )
    return load_best


@contextmanager
def as_in_training(
    model: Any, config: SFTStageConfig | RewardStageConfig, args: TrainingArguments
) -> Iterator[None]:
    """Put a model where the Trainer will have it, and read it in the precision of training."""
    if config.model.quantization is None and not is_sharded(model):  # else it is there already
        model.to(args.device)
    is_cast = use_bfloat16(config.precision)
    with (
        runnable(model, offloads()),
        torch.autocast(args.device.type, torch.bfloat16, enabled=is_cast),
    ):
        yield


def row_length(config: SFTStageConfig | RewardStageConfig, context: int) -> int:
    """Longest row, tokens: `dataset.max_length`, which may not exceed the model's context; by
    default the context, at most `DEFAULT_LENGTH`."""
    length = config.dataset.max_length
    if length is None:
        return min(context, DEFAULT_LENGTH)
    if length > context:
        raise InputError(
            f"dataset.max_length={length} exceeds the model's context of {context} tokens; set "
            "dataset.max_length to at most that"
        )
    return length


def describe_batches(args: TrainingArguments, num_rows: int, unit: str) -> str:
    """Spell out the batch arithmetic before training."""
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps_per_epoch = max(1, -(-num_rows // rows))
    steps = args.max_steps if args.max_steps > 0 else int(steps_per_epoch * args.num_train_epochs)
    return (
        f"{num_rows} {unit}; {args.per_device_train_batch_size} per device x "
        f"{args.gradient_accumulation_steps} accumulated x {args.world_size} "
        f"process{'es' * (args.world_size > 1)} = {rows} {unit} a step; {steps} optimiser steps"
    )
