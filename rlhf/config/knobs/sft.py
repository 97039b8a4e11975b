"""Knobs of supervised fine-tuning."""

from __future__ import annotations

from typing import Any

from rlhf.config.fields import group, knob, knobs
from rlhf.config.knobs.shared import StageConfig, TrainerDefaults


@knobs
class MixConfig:
    """Plain text to train on in addition to the rows, with loss on every token (Falcon-Instruct:
    5 % of RefinedWeb)."""

    path: str | None = None
    """File, directory, Hub name or python:module.function (null: no such text)."""
    split: str = "train"
    """Split of a Hub name."""
    format: str = "text"
    """Format of the text's rows, as in dataset.format."""
    fraction: float = knob(0.0, ge=0, le=0.9)
    """Share of this text in all training tokens. As many texts as needed are taken in an order that
    the seed decides, and cut into pieces of dataset.max_length tokens. The share holds for the
    whole set, not for each batch, because the Trainer shuffles. No such text is held out."""


@knobs
class SFTTrainerDefaults(TrainerDefaults):
    """Arguments of trl.SFTConfig; any other of its arguments may be set here too."""

    packing: bool = False
    """Put several rows into one sequence of dataset.max_length tokens; rows do not see each other,
    which is measured before training."""
    logging_steps: float = 10
    """Optimiser steps between two entries of metrics.jsonl."""
    eval_steps: float = 200
    """Optimiser steps between two evaluations."""
    load_best_model_at_end: bool = False
    """Write the evaluation with the best trainer.metric_for_best_model (eval_loss or
    eval_mean_token_accuracy) to final/, not the last step. Each new best evaluation then writes a
    checkpoint, which is kept until there is a better one."""


@knobs
class SFTStageConfig(StageConfig):
    """Supervised fine-tuning on demonstrations (python -m rlhf.sft)."""

    train_on_prompt: bool = False
    """Also put loss on the prompt and on user turns (false: only on assistant turns and their
    EOS)."""
    batch_size: int | None = knob(None, ge=1)
    """Rows (with packing: sequences) per optimiser step over all processes; sets
    trainer.gradient_accumulation_steps to batch_size / (trainer.per_device_train_batch_size x
    processes), which must be a whole number (null: leave that setting alone)."""
    mix: MixConfig = group(MixConfig)
    num_samples: int = knob(32, ge=0)
    """Held-out prompts that are answered after training; the answers are shown and counted for
    eos_rate."""
    response_length: int = knob(128, ge=1)
    """Longest sampled answer, tokens."""
    temperature: float = knob(1.0, gt=0)
    """Divides the logits when sampling."""
    top_p: float = knob(1.0, gt=0, le=1)
    """Sample from the most probable tokens that together reach this probability (1.0: from all)."""
    trainer: dict[str, Any] = group(SFTTrainerDefaults, free=True)
