"""Knobs of supervised fine-tuning."""

from __future__ import annotations

from typing import Any

from rlhf.config.fields import group, knob, knobs
from rlhf.config.knobs.shared import StageConfig, TrainerDefaults


@knobs
class MixConfig:
    """Plain text to train on too, with loss on every token (Falcon-Instruct: 5 % RefinedWeb)."""

    path: str | None = None
    """File, directory, Hub name or python:module.function (null: no such text)."""
    split: str = "train"
    """Split of a Hub name."""
    format: str | None = None
    """Format of the text's rows, as in dataset.format."""
    fraction: float = knob(0.0, ge=0, le=0.9)
    """Share of this text in all training tokens, in the whole set, not in each batch. The seed
    orders the texts, which are cut into pieces of dataset.max_length tokens; none are held out."""


@knobs
class SFTTrainerDefaults(TrainerDefaults):
    """Arguments of trl.SFTConfig; any other of its arguments may be set here too."""

    packing: bool = False
    """Put rows, which must not see each other (measured), together up to dataset.max_length."""
    logging_steps: float = 10
    """Optimiser steps between two entries of metrics.jsonl."""
    eval_steps: float = 200
    """Optimiser steps between two evaluations."""
    load_best_model_at_end: bool = False
    """Write the step with the best eval_loss or eval_mean_token_accuracy
    (trainer.metric_for_best_model) to final/, not the last; each new best one writes a
    checkpoint."""


@knobs
class SFTStageConfig(StageConfig):
    """Supervised fine-tuning on demonstrations (python -m rlhf.sft)."""

    train_on_prompt: bool = False
    """Also put loss on prompts and user turns (false: only on assistant turns and their EOS)."""
    batch_size: int | None = knob(None, ge=1)
    """Rows (with packing: sequences) per optimiser step over all processes;
    trainer.gradient_accumulation_steps becomes batch_size / (trainer.per_device_train_batch_size x
    processes), a whole number (null: off). A pass has fewer rows where a process's share of
    batch_size is less."""
    micro_batch_tokens: int | None = knob(None, ge=1)
    """Tokens per forward pass and process: a batch that has more is read in several passes, whose
    gradients add up, so that the step is the same (null: in one pass)."""
    mix: MixConfig = group(MixConfig)
    num_samples: int = knob(32, ge=0)
    """Held-out prompts that are answered after training; shown, and counted for eos_rate."""
    response_length: int = knob(128, ge=1)
    """Longest sampled answer, tokens."""
    temperature: float = knob(1.0, gt=0)
    """Divides the logits when sampling."""
    top_p: float = knob(1.0, gt=0, le=1)
    """Sample from the most probable tokens that together reach this probability (1.0: from all)."""
    trainer: dict[str, Any] = group(SFTTrainerDefaults, free=True)
