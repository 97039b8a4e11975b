"""What the SFT and reward stages share around the transformers Trainer: arguments, progress,
metrics, checkpoints, interruption.

The Trainer writes its checkpoints itself, into a hidden folder; we add what it forgets (the
averages since the last log) and the manifest, and give them their names. The last step has no
checkpoint: `final/` follows it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import (
    IntervalStrategy,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from rlhf.checkpoint import (
    UNSEALED,
    GracefulStop,
    NonFiniteError,
    checkpoint_to_resume,
    explain_stop,
    prune_checkpoints,
    publish,
    refuse_taken_steps,
    run_id,
)
from rlhf.config import InputError, RewardStageConfig, SFTStageConfig, build_arguments, save_config
from rlhf.console import is_main_process, progress_bar, say
from rlhf.hf_trainer.finite import find_non_finite_state, set_learning_rate
from rlhf.hf_trainer.settings import check_trainer_values, try_out
from rlhf.metrics import METRICS, MetricsWriter
from rlhf.models import use_bfloat16
from rlhf.sampling import context_length

BEST_METRICS = {
    "sft": ("eval_loss", "eval_mean_token_accuracy"),
    "reward": ("eval_accuracy", "eval_margin"),
}
SHOWN = ("loss", "accuracy", "eval_loss", "eval_accuracy")
# What a Trainer, TRL's and ours have summed up since the last log, and TRL's count of tokens; none
# of them save it, and without it the first log after a resume would be another.
SUMS = ("_tr_loss", "_globalstep_last_logged", "_metrics", "_total_train_tokens", "_sums")


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

    Raises:
        InputError: a value that the stage cannot use, or that does not work.
    """
    check_trainer_values(factory, config.trainer, stage)
    _check_half_precision(config)
    on_gpu = torch.cuda.is_available()
    names = [f.name for f in dataclasses.fields(factory)]
    # renamed in transformers 5.23; checkpointing is set on the model, by
    # model.gradient_checkpointing
    checkpointing = next(
        n for n in ("activation_checkpointing", "gradient_checkpointing") if n in names
    )
    values = {"eval_strategy": "steps"} | dict(config.trainer)
    load_best = _pop_load_best(values, stage)
    args = build_arguments(
        factory,
        values,
        {
            "output_dir": str(config.stage_dir(stage) / UNSEALED),
            "seed": config.seed,
            "data_seed": config.seed,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": not on_gpu,
            "bf16": use_bfloat16(config.precision),
            checkpointing: False,
            "remove_unused_columns": False,
            # it would replace a nan in the logged loss; under a loss scaler such steps are skipped
            "logging_nan_inf_filter": bool(values.get("fp16")),
            "ddp_find_unused_parameters": False,
            "save_strategy": "steps",
            "save_steps": config.checkpoint.every,
            "save_total_limit": None,  # it would delete by name, whoever wrote it
            "save_only_model": False,
        }
        | reserved,
    )
    try_out(args)
    # not given above: it would want evaluations at every checkpoint, and we add a checkpoint to
    # every evaluation that is the best
    args.load_best_model_at_end = load_best
    if config.batch_size is not None:
        rows = args.train_batch_size * args.world_size
        args.gradient_accumulation_steps = accumulation_steps(config.batch_size, rows)
    return args


def _check_half_precision(config: SFTStageConfig | RewardStageConfig) -> None:
    if config.trainer.get("fp16") and use_bfloat16(config.precision):
        raise InputError(
            f"trainer.fp16=true and precision={config.precision} (bfloat16 here) exclude each "
            "other; set precision=float32, or trainer.fp16=false"
        )


def accumulation_steps(batch_size: int, rows: int) -> int:
    """Forward passes of an optimiser step that make `batch_size`.

    Args:
        rows: of one forward pass, over all processes.

    Raises:
        InputError: `batch_size` is no multiple of `rows`.
    """
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
    """Take load_best_model_at_end out of `trainer:`; name the metric that it, or a schedule that
    follows one, reads, and check what they need."""
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


def is_sharded(args: TrainingArguments) -> bool:
    """True if the Trainer will spread the weights of a model over the processes."""
    flags = (os.environ.get(f"ACCELERATE_USE_{name}") for name in ("FSDP", "DEEPSPEED"))
    return bool(args.fsdp or args.deepspeed) or "true" in flags


@contextmanager
def as_in_training(
    model: Any, config: SFTStageConfig | RewardStageConfig, args: TrainingArguments
) -> Iterator[None]:
    """Put a model where the Trainer will have it, and read it in the precision of training."""
    if config.model.quantization is None:  # else it is there already
        model.to(args.device)
    with torch.autocast(args.device.type, torch.bfloat16, enabled=bool(args.bf16)):
        yield


def check_max_length(config: SFTStageConfig | RewardStageConfig, model: Any) -> None:
    """Refuse rows longer than the model's context before any are encoded."""
    if config.dataset.max_length > context_length(model):
        raise InputError(
            f"dataset.max_length={config.dataset.max_length} exceeds the model's context of "
            f"{context_length(model)} tokens; set dataset.max_length to at most that"
        )


class StageCallback(TrainerCallback):
    """Writes metrics, shows a progress bar with the numbers that matter, completes checkpoints, and
    saves before it stops on SIGTERM or Ctrl-C."""

    def __init__(
        self,
        trainer: Trainer,
        config: SFTStageConfig | RewardStageConfig,
        writer: MetricsWriter,
        stop: GracefulStop,
        directory: Path,
        checkpoint: Path | None,
    ):
        self.trainer, self.config, self.writer, self.stop = trainer, config, writer, stop
        self.directory = directory  # of the stage
        self.checkpoint = checkpoint  # that training continues from
        self.interrupted = False
        self._evaluated = -1  # last step of an epoch that was evaluated at that step
        self._began = time.perf_counter()
        self._bar: Any = None
        self._shown: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._bar = progress_bar(state.max_steps, state.global_step, "step")
        state.save_steps = self.config.checkpoint.every  # else the Trainer takes the checkpoint's
        if args.load_best_model_at_end and state.best_global_step:
            # where it is now, should the run have been moved
            best = self.directory / f"checkpoint-{state.best_global_step}"
            state.best_model_checkpoint = str(best)
        every = self.config.checkpoint.every
        planned = range(every * (state.global_step // every + 1), state.max_steps, every)
        refuse_taken_steps(self.directory, planned)
        if self.checkpoint is not None:
            load_sums(self.trainer, self.checkpoint)
            problem = find_non_finite_state(self.trainer)
            if problem is not None:
                raise InputError(
                    f"{self.checkpoint}: {problem}; delete it, and resume=true continues from the "
                    "one before"
                )
            set_learning_rate(self.trainer)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        assert self._bar is not None
        self._bar.update(1)
        epoch = state.epoch or 0.0
        if args.eval_strategy == IntervalStrategy.EPOCH and epoch == int(epoch) >= args.eval_delay:
            # not at the end of the epoch, which comes after the checkpoint of this step
            control.should_evaluate = True
            self._evaluated = state.global_step
        asked = self.stop.requested()
        if state.global_step >= state.max_steps:
            control.should_save = False
        elif asked:
            self.interrupted = True
            control.should_save = control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # asked for by the last step, and done: the reward stage's Trainer does not take it back
        if args.eval_strategy != IntervalStrategy.EPOCH or state.global_step == self._evaluated:
            control.should_evaluate = False

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        written = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        best = best_step(args, state)
        save_sums(self.trainer, written)
        PartialState().wait_for_everyone()  # every process has written its part
        if is_main_process():
            save_config(self.config, written / "config.yaml")
            publish(written, self.directory / written.name, best)
            prune_checkpoints(self.directory, self.config.checkpoint.keep_last)
        if best is not None:
            state.best_model_checkpoint = str(self.directory / f"checkpoint-{best}")
        PartialState().wait_for_everyone()  # it has its name

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Any = None,
        **_: Any,
    ) -> None:
        values = {name: value for name, value in (logs or {}).items() if name in METRICS}
        # the Trainer's last words hold averages over the steps since the last log, without a loss
        if not values.keys() - {"epoch"} or "train_runtime" in (logs or {}):
            return
        bad = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        if bad and not args.fp16:  # whose loss scaler skips such steps
            raise NonFiniteError(f"{bad[0]} after step {state.global_step}")
        self.writer.write(
            state.global_step, values | {"seconds": time.perf_counter() - self._began}
        )
        if args.load_best_model_at_end:
            self._keep_if_best(args, state, control, values)
        self._shown |= {name: f"{value:.4g}" for name, value in values.items() if name in SHOWN}
        if self._bar is not None:
            self._bar.set_postfix(self._shown, refresh=False)

    def _keep_if_best(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        values: dict[str, float],
    ) -> None:
        """Have the Trainer save an evaluation that is better than all before it.

        What it saves last as the best it loads at the end. The weights of the last step are there
        already: without a best checkpoint they stay.
        """
        name = str(args.metric_for_best_model)
        sign, before = 1 if args.greater_is_better else -1, state.best_metric
        if name not in values or not (before is None or sign * values[name] > sign * before):
            return
        if state.global_step < state.max_steps:
            control.should_save = True
        else:
            state.best_model_checkpoint = None

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.close_bar()

    def close_bar(self) -> None:
        """End the line of the progress bar."""
        if self._bar is not None:
            self._bar.close()


def best_step(args: TrainingArguments, state: TrainerState) -> int | None:
    """Step of the best evaluation so far where training is to end with it; else None."""
    return state.best_global_step if args.load_best_model_at_end else None


def save_sums(trainer: Trainer, checkpoint: Path) -> None:
    """Write what a Trainer has summed up since its last log, on each process its own."""
    sums = {name: getattr(trainer, name) for name in SUMS if hasattr(trainer, name)}
    _sums_file(checkpoint).write_text(json.dumps(sums, default=torch.Tensor.tolist))


def load_sums(trainer: Trainer, checkpoint: Path) -> None:
    """Restore what `save_sums` wrote."""
    for name, value in json.loads(_sums_file(checkpoint).read_text()).items():
        own = getattr(trainer, name)
        if isinstance(own, torch.Tensor):
            value = torch.tensor(value, dtype=own.dtype, device=own.device)
        elif isinstance(own, dict):  # of dicts that make a list for a new name
            value = {mode: defaultdict(list, lists) for mode, lists in value.items()}
        setattr(trainer, name, value)


def _sums_file(checkpoint: Path) -> Path:
    return checkpoint / f"sums_{PartialState().process_index}.json"


def _train(trainer: Trainer, checkpoint: Path | None) -> None:
    """Have a Trainer train, from a checkpoint where there is one.

    Raises:
        InputError: the checkpoint holds pickled weights, or states that are no tensors.
    """
    if checkpoint is None:
        trainer.train()
        return
    fix = f"delete {checkpoint} to go on from the checkpoint before it"
    pickled = [file.name for file in checkpoint.glob("*_model*.bin*")]
    if pickled:
        raise InputError(
            f"{checkpoint} holds pickled weights ({', '.join(sorted(pickled))}), which no run of "
            f"ours writes; {fix}"
        )
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    except (pickle.UnpicklingError, EOFError) as error:
        raise InputError(
            f"{checkpoint}: a state in its .pt or .pth files is damaged, or is no tensors but a "
            f"pickle that could run code ({type(error).__name__}); {fix}"
        ) from error


def run_trainer(
    trainer: Trainer, config: SFTStageConfig | RewardStageConfig, directory: Path, stage: str
) -> int | None:
    """Train (or continue) with our callback.

    Returns:
        None when training came to its end; the number of the signal that stopped it after a
        checkpoint was saved.

    Raises:
        InputError: a number is not finite, or the checkpoint does not fit the run.
    """
    checkpoint = checkpoint_to_resume(config, directory)
    writer = MetricsWriter(directory, config, stage, run_id(directory))
    with GracefulStop(config.checkpoint.grace_seconds, directory) as stop:
        callback = StageCallback(trainer, config, writer, stop, directory, checkpoint)
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(callback)
        try:
            _train(trainer, checkpoint)
            if not callback.interrupted and trainer.state.global_step not in _evaluated(trainer):
                trainer.evaluate()
            problem = find_non_finite_state(trainer)
            if problem is not None:
                raise NonFiniteError(f"{problem} after step {trainer.state.global_step}")
        except NonFiniteError as error:
            callback.close_bar()
            assert trainer.model is not None
            dtype = next(trainer.model.parameters()).dtype
            step = trainer.state.global_step + 1
            raise explain_stop(config, directory, error, step, True, dtype) from error
        finally:
            writer.close()
    if not callback.interrupted:
        _say_best(trainer)
        return None
    say(
        f"stopped after step {trainer.state.global_step}; continue with resume=true "
        f"run_name={config.run_name}"
    )
    return stop.signal


def _evaluated(trainer: Trainer) -> list[float]:
    """Steps after which the held-out rows were evaluated."""
    history = trainer.state.log_history
    return [row["step"] for row in history if "eval_loss" in row or "eval_accuracy" in row]


def _say_best(trainer: Trainer) -> None:
    state, best = trainer.state, best_step(trainer.args, trainer.state)
    if best is not None:
        name = trainer.args.metric_for_best_model
        say(
            f"taking step {best} of {state.global_step}, with the best {name}: "
            f"{state.best_metric:.4g}"
        )


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
