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
    """Logits by which the better score should lead; a row's own `margin` is added (null: 0)."""
    margin_scale: float = knob(0.0, ge=0)
    """Adds this x (better - worse of the row's field `scores`) to the margin."""
    label_smoothing: float = knob(0.0, ge=0, lt=0.5)
    """Probability that a label is wrong, also a soft one (field `probability`); pairwise only."""
    center_coef: float = knob(0.0, ge=0)
    """Weight of (better + worse)^2, keeps scores around 0, e.g. 0.01 (Eisenstein et al. 2023)."""
    tokens_per_batch: int | None = knob(None, ge=1)
    """Most tokens with padding per process and forward pass, in batches of whole prompts of similar
    length; replaces trainer.per_device_*_batch_size (null: off). The largest prompt must fit: K x
    its longest response. A step of short prompts holds more; accumulation evens that out."""
    num_normalization_prompts: int = knob(256, ge=1)
    """Most prompts whose completions `normalization` scores."""


@knobs
class NormalizationConfig:
    """The completions whose scores get mean 0 in PPO (scorer.normalize); the mean and standard
    deviation of their scores are stored with the weights."""

    completions: str = knob("samples", choices=("samples", "demonstrations", "ranked"))
    """samples: finished answers of the SFT policy to training prompts, so that a typical answer
    starts PPO at 0; demonstrations: the answers that SFT trained on (Stiennon et al. 2020,
    InstructGPT); ranked: the ranked responses."""
    path: str | None = None
    """demonstrations: rows of the SFT stage, read like dataset.path."""
    split: str = "train"
    """demonstrations: split of a Hub name."""
    format: str | None = None
    """demonstrations: format of the rows, as in dataset.format."""
    response_length: int = knob(128, ge=1)
    """samples: longest answer, tokens; at most half of the model's context."""


@knobs
class RewardTrainerDefaults(TrainerDefaults):
    """Arguments of transformers.TrainingArguments; any other of them may be set here too."""

    num_train_epochs: float = 1
    """Passes over the training rows."""
    learning_rate: float | None = None
    """Peak learning rate (null: 9e-6, with LoRA adapters 1e-4)."""
    per_device_train_batch_size: int = 4
    """Prompts per process and forward pass; each brings all its responses."""
    logging_steps: float = 10
    """Optimiser steps between two entries of metrics.jsonl."""
    eval_steps: float = 200
    """Optimiser steps between two evaluations."""
    load_best_model_at_end: bool = False
    """Write the step with the best trainer.metric_for_best_model (eval_accuracy or eval_margin) to
    final/, not the last; each new best evaluation then writes a checkpoint."""


@knobs
class RewardStageConfig(StageConfig):
    """Reward model from ranked responses and this run's SFT stage (python -m rlhf.reward)."""

    reward: RewardConfig = group(RewardConfig)
    normalization: NormalizationConfig = group(NormalizationConfig)
    batch_size: int | None = knob(None, ge=1)
    """Prompts per optimiser step over all processes; sets trainer.gradient_accumulation_steps to
    batch_size / (trainer.per_device_train_batch_size x processes), a whole number (null: off).
    A pass has fewer rows where a process's share of batch_size is less."""
    micro_batch_tokens: int | None = knob(None, ge=1)
    """Tokens per forward pass and process: a batch that has more is read in several passes, whose
    gradients add up, so that the step is the same; the responses of a prompt stay together (null:
    in one pass)."""
    trainer: dict[str, Any] = group(RewardTrainerDefaults, free=True)
