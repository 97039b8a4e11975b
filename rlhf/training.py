"""What the SFT and reward stages share around the transformers Trainer: arguments, progress,
metrics, interruption."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from rlhf.checkpoint import GracefulStop, checkpoint_to_resume, step_of
from rlhf.config import InputError, RewardStageConfig, SFTStageConfig, build_arguments, save_config
from rlhf.generation import context_length
from rlhf.metrics import METRICS, MetricsWriter, is_main_process, progress_bar, say
from rlhf.models import use_bfloat16

SHOWN = ("loss", "accuracy", "eval_loss", "eval_accuracy")


def trainer_arguments(
    factory: Any,
    config: SFTStageConfig | RewardStageConfig,
    stage: str,
    **reserved: Any,
) -> Any:
    """Build the argument object of a Trainer from `trainer:`, with what the stage itself decides.

    Args:
        factory: `trl.SFTConfig` or `transformers.TrainingArguments`.
        reserved: further values of the stage.
    """
    on_gpu = torch.cuda.is_available()
    names = [f.name for f in dataclasses.fields(factory)]
    # renamed in transformers 5.23; checkpointing is set on the model, by
    # model.gradient_checkpointing
    checkpointing = next(
        n for n in ("activation_checkpointing", "gradient_checkpointing") if n in names
    )
    values = {"eval_strategy": "steps", "save_strategy": "steps"} | dict(config.trainer)
    return build_arguments(
        factory,
        values,
        {
            "output_dir": str(config.stage_dir(stage)),
            "seed": config.seed,
            "data_seed": config.seed,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": not on_gpu,
            "bf16": use_bfloat16(config.precision),
            checkpointing: False,
            "remove_unused_columns": False,
            "ddp_find_unused_parameters": False,
        }
        | reserved,
    )


def check_max_length(config: SFTStageConfig | RewardStageConfig, model: Any) -> None:
    """Refuse rows longer than the model's context before any are encoded."""
    if config.dataset.max_length > context_length(model):
        raise InputError(
            f"dataset.max_length={config.dataset.max_length} exceeds the model's context of "
            f"{context_length(model)} tokens; set dataset.max_length to at most that"
        )


class StageCallback(TrainerCallback):
    """Writes metrics, shows a progress bar with the numbers that matter, and saves before it
    stops on Ctrl-C."""

    def __init__(
        self,
        config: SFTStageConfig | RewardStageConfig,
        writer: MetricsWriter,
        stop: GracefulStop,
    ):
        self.config, self.writer, self.stop = config, writer, stop
        self.interrupted = False
        self._began = time.perf_counter()
        self._bar: Any = None
        self._shown: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._bar = progress_bar(state.max_steps, state.global_step, "step")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        assert self._bar is not None
        self._bar.update(1)
        if self.stop.requested():
            self.interrupted = state.global_step < state.max_steps
            control.should_save = control.should_training_stop = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if is_main_process():
            checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            save_config(self.config, checkpoint / "config.yaml")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Any = None,
        **_: Any,
    ) -> None:
        values = {name: value for name, value in (logs or {}).items() if name in METRICS}
        if not values.keys() - {"epoch"}:
            return
        if not torch.isfinite(torch.tensor(float(values.get("loss", 0.0)))):
            raise InputError(
                f"the loss is {values['loss']} at step {state.global_step}; lower "
                "trainer.learning_rate, or use precision=float32. The last checkpoint is from "
                "before"
            )
        self.writer.write(
            state.global_step, values | {"seconds": time.perf_counter() - self._began}
        )
        self._shown |= {name: f"{value:.4g}" for name, value in values.items() if name in SHOWN}
        if self._bar is not None:
            self._bar.set_postfix(self._shown, refresh=False)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        assert self._bar is not None
        self._bar.close()


def run_trainer(
    trainer: Trainer, config: SFTStageConfig | RewardStageConfig, directory: Path, stage: str
) -> bool:
    """Train (or continue) with our callback.

    Returns:
        True when training came to its end, False when Ctrl-C stopped it after saving a checkpoint.

    Raises:
        InputError: the loss is not finite.
    """
    checkpoint = checkpoint_to_resume(config, directory)
    writer = MetricsWriter(directory, config, stage, step_of(checkpoint) if config.resume else None)
    with GracefulStop() as stop:
        callback = StageCallback(config, writer, stop)
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        evaluated = [
            row["step"]
            for row in trainer.state.log_history
            if "eval_loss" in row or "eval_accuracy" in row
        ]
        if not callback.interrupted and trainer.state.global_step not in evaluated:
            trainer.evaluate()
    writer.close()
    if callback.interrupted:
        say(f"stopped after step {trainer.state.global_step}; continue with resume=true")
    return not callback.interrupted


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
