"""Training with the transformers Trainer: start or resume, stop cleanly, end with an evaluation."""

from __future__ import annotations

import pickle
from pathlib import Path

from transformers import PrinterCallback, ProgressCallback, Trainer

from rlhf.checkpoint import GracefulStop, NonFiniteError, checkpoint_to_resume, explain_stop, run_id
from rlhf.config import InputError, RewardStageConfig, SFTStageConfig
from rlhf.console import say
from rlhf.hf_trainer.callbacks import CheckpointCallback, MetricsCallback, StopCallback, best_step
from rlhf.hf_trainer.finite_trainer import find_non_finite_state
from rlhf.metrics import MetricsWriter


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
        metrics, stopping = MetricsCallback(writer), StopCallback(stop)
        checkpoints = CheckpointCallback(trainer, config, directory, checkpoint)
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        for callback in (metrics, checkpoints, stopping):
            trainer.add_callback(callback)
        try:
            _train(trainer, checkpoint)
            if not stopping.interrupted and trainer.state.global_step not in _evaluated(trainer):
                trainer.evaluate()
            problem = find_non_finite_state(trainer)
            if problem is not None:
                raise NonFiniteError(f"{problem} after step {trainer.state.global_step}")
        except NonFiniteError as error:
            metrics.close_bar()
            assert trainer.model is not None
            dtype = next(trainer.model.parameters()).dtype
            step = trainer.state.global_step + 1
            raise explain_stop(config, directory, error, step, True, dtype) from error
        finally:
            writer.close()
    if not stopping.interrupted:
        _say_best(trainer)
        return None
    say(
        f"stopped after step {trainer.state.global_step}; continue with resume=true "
        f"run_name={config.run_name}"
    )
    return stop.signal


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
