"""Knobs of the reward model's training."""

from __future__ import annotations

from typing import Any

from rlhf.config.fields import group, knob, knobs
from rlhf.config.knobs.shared import StageConfig, TrainerDefaults


@knobs
class RewardConfig:
    """The ranking loss, its batches, and what is stored with the reward model."""

    loss: str = knob("pairwise", choices=("pairwise", "plackett_luce"))
    """pairwise: all pairs of a prompt's responses, weighted 1/C(K,2) (InstructGPT eq. 1);
    plackett_luce: likelihood of the whole ranking."""
    margin: float | None = knob(None, ge=0)
    """Logits by which the better response's score should lead (null: 0). A row's own `margin` and
    the term of margin_scale are added to it."""
    margin_scale: float = knob(0.0, ge=0)
    """In rows with `scores`, adds margin_scale x (score of the better - score of the worse) to the
    margin."""
    label_smoothing: float = knob(0.0, ge=0, lt=0.5)
    """Probability that a label is wrong, also for soft labels (rows with `probability`). Pairwise
    loss only."""
    center_coef: float = knob(0.0, ge=0)
    """Weight of (better + worse)^2, averaged over pairs, which keeps scores around 0, e.g. 0.01
    (Eisenstein et al. 2023)."""
    tokens_per_batch: int | None = knob(None, ge=1)
    """Most tokens with padding (responses x the longest) per process and forward pass; batches hold
    whole prompts of similar length and replace trainer.per_device_*_batch_size (null: off). It must
    hold the largest prompt: K x its longest response. The loss of a step is the mean over its
    prompts, so prompts weigh the same within a step, but a step of short ones holds more of them;
    more accumulation evens that out."""
    num_normalization_prompts: int = knob(256, ge=1)
    """Most prompts whose completions `normalization` scores."""


@knobs
class NormalizationConfig:
    """The completions whose scores get mean 0 in PPO (scorer.normalize); the mean and standard
    deviation of their scores are stored with the weights."""

    completions: str = knob("samples", choices=("samples", "demonstrations", "ranked"))
    """samples: answers of the SFT policy to training prompts that end with a stop token, so that a
    typical answer starts PPO at 0; demonstrations: the answers that SFT trained on (Stiennon et al.
    2020, InstructGPT); ranked: the ranked responses."""
    path: str | None = None
    """demonstrations: rows of the SFT stage, read like dataset.path."""
    split: str = "train"
    """demonstrations: split of a Hub name."""
    format: str = "messages"
    """demonstrations: format of the rows, as in dataset.format."""
    response_length: int = knob(128, ge=1)
    """samples: longest answer, tokens; at most half of the model's context."""


@knobs
class RewardTrainerDefaults(TrainerDefaults):
    """Arguments of transformers.TrainingArguments; any other of them may be set here too."""

    num_train_epochs: float = 1
    """Passes over the training rows."""
    learning_rate: float = 9e-6
    """Peak learning rate."""
    per_device_train_batch_size: int = 4
    """Prompts per process and forward pass; each brings all its responses."""
    per_device_eval_batch_size: int = 8
    """Prompts per process and forward pass in evaluations."""
    logging_steps: float = 10
    """Optimiser steps between two entries of metrics.jsonl."""
    eval_steps: float = 200
    """Optimiser steps between two evaluations."""
    load_best_model_at_end: bool = False
    """Write the evaluation with the best trainer.metric_for_best_model (eval_accuracy or
    eval_margin) to final/, not the last step. Each new best evaluation then writes a checkpoint,
    which is kept until there is a better one."""


@knobs
class RewardStageConfig(StageConfig):
    """Reward model from ranked responses, starting from this run's SFT stage (python -m
    rlhf.reward)."""

    reward: RewardConfig = group(RewardConfig)
    normalization: NormalizationConfig = group(NormalizationConfig)
    batch_size: int | None = knob(None, ge=1)
    """Prompts per optimiser step over all processes; sets trainer.gradient_accumulation_steps to
    batch_size / (trainer.per_device_train_batch_size x processes), which must be a whole number
    (null: leave that setting alone)."""
    trainer: dict[str, Any] = group(RewardTrainerDefaults, free=True)
