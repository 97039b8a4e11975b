"""Training with the transformers Trainer: start or resume, stop cleanly, end with an evaluation.

Two callbacks add to its loop:

event           what the Trainer does next          what we do, and why now
on_train_begin  trains; it has loaded a checkpoint  restore the sums and the learning rate
on_step_end     logs, evaluates, saves or stops as  evaluate at the end of an epoch and of the
                `control` asks, in this order       run, because on_epoch_end comes after the
                                                    checkpoint; save and stop after a signal
on_epoch_end    logs, evaluates, saves again        take back an evaluation that is done already
on_log          compares an evaluation with the     write metrics, stop at a number that is not
                best, then saves                    finite, ask for a checkpoint of the best
on_save         goes on with the next step          add what the Trainer leaves out, and give its
                                                    hidden folder the checkpoint's name
on_train_end    loads the best checkpoint           close the progress bar

The last step has a checkpoint too, so that a longer run can continue from there.
"""

from __future__ import annotations

import json
import math
import pickle
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from transformers import (
    IntervalStrategy,
    PrinterCallback,
    ProgressCallback,
    SchedulerType,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from rlhf.checkpoint import (
    GracefulStop,
    NonFiniteError,
    checkpoint_to_resume,
    collect_from_hosts,
    copy_to_all_hosts,
    explain_stop,
    prune_checkpoints,
    publish,
    refuse_taken_steps,
    run_id,
)
from rlhf.config import InputError, RewardStageConfig, SFTStageConfig, resume_overrides, save_config
from rlhf.console import is_main_process, num_processes, progress_bar, rank, say
from rlhf.curves import write_curves
from rlhf.distributed import describe_sharding, use_bfloat16
from rlhf.failures import NOTE
from rlhf.hf_trainer.finite_trainer import find_non_finite_state, set_learning_rate
from rlhf.hf_trainer.sharded_trainer import ShardedTrainer
from rlhf.metrics import METRICS, MetricsWriter

SHOWN = ("loss", "accuracy", "eval_loss", "eval_accuracy")
# Sums since the last log, of transformers', TRL's and our Trainer, and TRL's count of tokens. None
# of them is in a checkpoint; without it the first log after a resume would differ.
SUMS = ("_tr_loss", "_globalstep_last_logged", "_metrics", "_total_train_tokens", "_sums")


def run_trainer(
    trainer: Trainer, config: SFTStageConfig | RewardStageConfig, directory: Path, stage: str
) -> int | None:
    """Train or continue; return the number of the signal that stopped the training, or None.

    Raises:
        InputError: a number is not finite, or the checkpoint does not fit the run.
    """
    checkpoint = checkpoint_to_resume(config, directory)
    writer = MetricsWriter(directory, config, stage, run_id(directory))
    cast(ShardedTrainer, trainer).in_bfloat16 = use_bfloat16(config.precision)
    if shards := describe_sharding(trainer.accelerator):
        say(f"sharding: {shards}")
    with GracefulStop(config.checkpoint.grace_seconds, directory) as stop:
        metrics = MetricsCallback(writer)
        checkpoints = CheckpointCallback(trainer, config, directory, checkpoint, stop)
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(metrics)
        trainer.add_callback(checkpoints)
        try:
            _train(trainer, checkpoint)
            unset_hf_deepspeed_config()  # models that are made now are whole
            problem = find_non_finite_state(trainer)
            if problem is not None:
                raise NonFiniteError(f"{problem} after step {trainer.state.global_step}")
        except NonFiniteError as error:
            metrics.close_bar()
            assert trainer.model is not None
            dtype = next(trainer.model.parameters()).dtype
            step = trainer.state.global_step + 1
            raise explain_stop(config, directory, error, step, True, dtype) from error
        except Exception as error:
            metrics.close_bar()
            error.add_note(f"{NOTE}step {trainer.state.global_step + 1}")
            raise
        finally:
            writer.close()
            write_curves(directory, stage, config.run_name)
    if not checkpoints.interrupted:
        best, name = best_step(trainer.args, trainer.state), trainer.args.metric_for_best_model
        if best is not None:
            value = f"{trainer.state.best_metric:.4g}"
            say(f"taking step {best} of {trainer.state.global_step}, with the best {name}: {value}")
        return None
    say(f"stopped after step {trainer.state.global_step}; continue with {resume_overrides(config)}")
    return stop.signal


def _train(trainer: Trainer, checkpoint: Path | None) -> None:
    """Train, from a checkpoint where there is one; refuse one that holds pickles."""
    if checkpoint is None:
        trainer.train()
        return
    fix = f"delete {checkpoint}; resume=auto goes on from the one before it"
    pickled = [file.name for file in checkpoint.glob("*_model*.bin*")]
    if pickled:
        raise InputError(
            f"{checkpoint} holds pickled weights ({', '.join(sorted(pickled))}), which no run of "
            f"ours writes; {fix}"
        )
    if isinstance(trainer, ShardedTrainer):
        trainer.checkpoint = checkpoint
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    except (pickle.UnpicklingError, EOFError) as error:
        raise InputError(
            f"{checkpoint}: a state in its .pt or .pth files is damaged, or is no tensors but a "
            f"pickle that could run code ({type(error).__name__}); {fix}"
        ) from error


class MetricsCallback(TrainerCallback):
    """Writes metrics, shows a progress bar, and stops at a number that is not finite."""

    def __init__(self, writer: MetricsWriter):
        self.writer = writer
        self._began = time.perf_counter()
        self._bar: Any = None
        self._shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar = progress_bar(state.max_steps, state.global_step, "step")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar.update(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        values = {name: value for name, value in (logs or {}).items() if name in METRICS}
        # The Trainer's last log has averages over the steps since the one before, without a loss.
        if not values.keys() - {"epoch"} or "train_runtime" in logs:
            return
        bad = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        if bad and not args.fp16:  # its loss scaler skips such steps
            raise NonFiniteError(f"{bad[0]} after step {state.global_step}")
        seconds = time.perf_counter() - self._began
        self.writer.write(state.global_step, values | {"seconds": seconds})
        self._shown |= {name: f"{value:.4g}" for name, value in values.items() if name in SHOWN}
        if self._bar is not None:
            self._bar.set_postfix(self._shown, refresh=False)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.close_bar()

    def close_bar(self) -> None:
        """End the line of the progress bar."""
        if self._bar is not None:
            self._bar.close()


class CheckpointCallback(TrainerCallback):
    """Decides when to evaluate, save and stop, and completes the checkpoints of the Trainer."""

    def __init__(
        self,
        trainer: Trainer,
        config: SFTStageConfig | RewardStageConfig,
        directory: Path,
        checkpoint: Path | None,
        stop: GracefulStop,
    ):
        self.trainer, self.config, self.stop = trainer, config, stop
        self.directory = directory  # of the stage
        self.checkpoint = checkpoint  # where training continues from; None at the start of a run
        self.interrupted = False  # by a signal, before the last step
        self._evaluated = -1  # last step of an epoch or of the run, evaluated at that step

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        every = self.config.checkpoint_every
        state.save_steps = every  # the checkpoint may hold another one
        if args.load_best_model_at_end and state.best_global_step:
            best = self.directory / f"checkpoint-{state.best_global_step}"
            state.best_model_checkpoint = str(best)  # the run may have been moved since
        planned = range(every * (state.global_step // every + 1), state.max_steps, every)
        refuse_taken_steps(self.directory, [*planned, state.max_steps])
        if self.checkpoint is not None:
            load_sums(self.trainer, self.checkpoint)
            problem = find_non_finite_state(self.trainer)
            if problem is not None:
                raise InputError(
                    f"{self.checkpoint}: {problem}; delete it, and "
                    f"{resume_overrides(self.config, 'auto')} goes on from the one before it"
                )
            before = learning_rate(self.trainer)
            set_learning_rate(self.trainer)
            say_new_schedule(self.trainer, self.checkpoint, before)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        epoch = state.epoch or 0.0
        is_last = state.global_step >= state.max_steps
        ends_epoch = args.eval_strategy == IntervalStrategy.EPOCH and epoch == int(epoch)
        if is_last or (ends_epoch and epoch >= args.eval_delay):
            control.should_evaluate = True
            self._evaluated = state.global_step
        is_asked = self.stop.requested()  # every process asks, at every step
        if is_asked and not is_last:
            self.interrupted = True
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # The reward stage's Trainer does not take back what the last step asked for.
        if args.eval_strategy != IntervalStrategy.EPOCH or state.global_step == self._evaluated:
            control.should_evaluate = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Have the Trainer save an evaluation that is better than all before it.

        At the end it loads the best checkpoint that it saved.
        """
        name, before = str(args.metric_for_best_model), state.best_metric
        if not args.load_best_model_at_end or name not in (logs or {}):
            return
        sign = 1 if args.greater_is_better else -1
        if before is None or sign * logs[name] > sign * before:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        written = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        best = best_step(args, state)
        save_sums(self.trainer, written)
        PartialState().wait_for_everyone()  # every process has written its part
        collect_from_hosts(written)
        if is_main_process():
            save_config(self.config, written / "config.yaml")
            publish(written, self.directory / written.name, best)
            prune_checkpoints(self.directory, self.config.checkpoint.keep_last)
        if best is not None:
            state.best_model_checkpoint = str(self.directory / f"checkpoint-{best}")
        PartialState().wait_for_everyone()  # the checkpoint has its name
        if best == state.global_step:  # all processes load it at the end
            copy_to_all_hosts(self.directory / written.name)


def learning_rate(trainer: Trainer) -> float:
    """The learning rate of the next step."""
    optimizer: Any = trainer.optimizer
    return optimizer.param_groups[0]["lr"]


def say_new_schedule(trainer: Trainer, checkpoint: Path, before: float) -> None:
    """Say how the learning rate goes on where a run becomes longer or shorter; `before` is that of
    the next step as the checkpoint has it."""
    schedule = SchedulerType(trainer.args.lr_scheduler_type).value
    old = json.loads((checkpoint / "trainer_state.json").read_text())["max_steps"]
    new, now = trainer.state.max_steps, learning_rate(trainer)
    if new != old and "constant" not in schedule:
        say(
            f"learning rate: the {schedule} schedule now ends at step {new} instead of {old}; the "
            f"next step has {now:.3g} instead of {before:.3g}"
        )


def best_step(args: TrainingArguments, state: TrainerState) -> int | None:
    """Step of the best evaluation so far where training is to end with it; else None."""
    return state.best_global_step if args.load_best_model_at_end else None


def save_sums(trainer: Trainer, checkpoint: Path) -> None:
    """Write what a Trainer has summed up since its last log, on each process its own."""
    sums = {name: getattr(trainer, name) for name in SUMS if hasattr(trainer, name)}
    file = checkpoint / f"sums_{PartialState().process_index}.json"
    file.write_text(json.dumps(sums, default=torch.Tensor.tolist))


def load_sums(trainer: Trainer, checkpoint: Path) -> None:
    """Restore what `save_sums` wrote."""
    for name, value in own_sums(checkpoint).items():
        own = getattr(trainer, name)
        if isinstance(own, torch.Tensor):
            value = torch.tensor(value, dtype=own.dtype, device=own.device)
        elif isinstance(own, dict):  # of dicts that make a list for a new name
            value = {mode: defaultdict(list, lists) for mode, lists in value.items()}
        setattr(trainer, name, value)


def own_sums(checkpoint: Path) -> dict[str, Any]:
    """The sums of this process; of another number of processes, its share of theirs: processes log
    the mean of `_tr_loss` and the sum of `_sums`, and have the rest in common."""
    number, own = num_processes(), checkpoint / f"sums_{rank()}.json"
    everyone = [json.loads(file.read_text()) for file in checkpoint.glob("sums_*.json")]
    if len(everyone) == number:
        return json.loads(own.read_text())
    for name, divisor in {"_tr_loss": len(everyone), "_sums": number}.items():
        if name in everyone[0]:
            shares = torch.tensor([sums[name] for sums in everyone], dtype=torch.float64)
            everyone[0][name] = (shares.sum(dim=0) / divisor).tolist()
    return everyone[0]
