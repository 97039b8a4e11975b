"""The range of every knob: a value outside is refused with the range, whatever the knob.

Run: python -m pytest tests/config/test_ranges.py
"""

import dataclasses
import math

import pytest
from helpers.configs import several, valid_config

from rlhf.config import STAGES, InputError, check
from rlhf.config.knobs.shared import TRACKERS

# stage, knob, a bad value, what the value must do
BAD_VALUES = [
    ("sft", "model.dtype", "fp16", "be one of auto, float32, bfloat16, float16"),
    ("sft", "model.quantization", "int8", "be one of 8bit, 4bit, null"),
    ("sft", "model.dropout", 1.0, "lie in [0, 1)"),
    ("sft", "precision", "fp16", "be one of auto, float32, bfloat16"),
    ("sft", "resume", "yes", "be one of true, false, auto"),
    (
        "sft",
        "distributed",
        "fsdp",
        "be one of fsdp2, fsdp2_offload, zero2, zero3, zero3_offload, null",
    ),
    ("ppo", "distributed_timeout", 0, "be >= 1"),
    ("sft", "checkpoint.every", 0, "be >= 1"),
    ("sft", "checkpoint.keep_last", 0, "be >= 1"),
    ("sft", "checkpoint.grace_seconds", 0.0, "lie in (0, 31536000]"),
    ("ppo", "checkpoint.grace_seconds", math.nan, "be a finite number"),
    ("sft", "checkpoint.grace_seconds", 1000000000.0, "lie in (0, 31536000]"),
    ("sft", "tracker.names", ["wand"], f"be one of {', '.join(TRACKERS)}"),
    ("sft", "tracker.mode", "off", "be one of online, offline, disabled, null"),
    ("sft", "dataset.eval_fraction", 1.0, "lie in [0, 0.9]"),
    ("sft", "dataset.max_length", 1, "be >= 2"),
    ("sft", "dataset.max_rows", 0, "be >= 1"),
    ("sft", "dataset.max_eval_rows", 0, "be >= 1"),
    ("sft", "peft.r", 0, "be >= 1"),
    ("sft", "peft.dropout", 1.1, "lie in [0, 1]"),
    ("sft", "peft.train_new_tokens", "maybe", "be one of true, false, auto"),
    ("sft", "peft.save", "weights", "be one of merged, adapter, both"),
    ("sft", "num_samples", -1, "be >= 0"),
    ("sft", "response_length", 0, "be >= 1"),
    ("sft", "temperature", 0.0, "be > 0"),
    ("sft", "top_p", 0.0, "lie in (0, 1]"),
    ("sft", "mix.fraction", -0.1, "lie in [0, 0.9]"),
    ("sft", "batch_size", 0, "be >= 1"),
    ("reward", "reward.loss", "hinge", "be one of pairwise, plackett_luce"),
    ("reward", "reward.num_normalization_prompts", 0, "be >= 1"),
    ("reward", "normalization.completions", "best", "be one of samples, demonstrations, ranked"),
    ("reward", "normalization.response_length", 0, "be >= 1"),
    ("reward", "reward.tokens_per_batch", 0, "be >= 1"),
    ("reward", "reward.margin", -1.0, "be >= 0"),
    ("reward", "reward.margin_scale", -1.0, "be >= 0"),
    ("reward", "reward.center_coef", -0.1, "be >= 0"),
    ("reward", "reward.label_smoothing", 0.5, "lie in [0, 0.5)"),
    ("reward", "peft.r", 0, "be >= 1"),
    ("ppo", "ppo.save_rollouts", 0, "be >= 1"),
    ("ppo", "ppo.num_updates", 0, "be >= 1"),
    ("ppo", "ppo.num_ppo_epochs", 0, "be >= 1"),
    ("ppo", "ppo.batch_size", 0, "be >= 1"),
    ("ppo", "ppo.num_mini_batches", 0, "be >= 1"),
    ("ppo", "ppo.micro_batch_size", 0, "be >= 1"),
    ("ppo", "ppo.chunk_tokens", 0, "be >= 1"),
    ("ppo", "ppo.importance_correction", "sequence", "be one of truncated, null"),
    ("ppo", "ppo.importance_cap", 0.5, "be >= 1"),
    ("sft", "micro_batch_tokens", 0, "be >= 1"),
    ("reward", "micro_batch_tokens", 0, "be >= 1"),
    ("ppo", "ppo.rollout_batch_size", 0, "be >= 1"),
    ("ppo", "sampling.engine", "graphs", "be one of auto, loop, graph, vllm"),
    ("ppo", "ppo.base", "alone", "be one of merged, stacked"),
    ("ppo", "sampling.check_every", 0, "be >= 1"),
    ("ppo", "sampling.gather", "whole", "be one of auto, copy, layers"),
    ("ppo", "sampling.weights", "lora", "be one of auto, files, adapter, nccl"),
    ("ppo", "sampling.dtype", "float16", "be one of float32, bfloat16, null"),
    ("ppo", "ppo.response_length", 0, "be >= 1"),
    ("ppo", "ppo.max_prompt_length", 0, "be >= 1"),
    ("ppo", "scorer.batch_size", 0, "be >= 1"),
    ("ppo", "evaluation.every", 0, "be >= 1"),
    ("ppo", "ppo.samples_per_prompt", 0, "be >= 1"),
    ("ppo", "ppo.kl_horizon", 0, "be >= 1"),
    ("sft", "dataset.on_bad_row", "skip", "be one of drop, stop"),
    ("ppo", "ptx.batch_size", 0, "be >= 1"),
    ("ppo", "ptx.max_length", 1, "be >= 2"),
    ("ppo", "ptx.coef", -1.0, "be >= 0"),
    ("ppo", "ppo.entropy_coef", -1.0, "be >= 0"),
    ("ppo", "evaluation.select_kl_coef", -1.0, "be >= 0"),
    ("ppo", "ppo.weight_decay", -0.1, "be >= 0"),
    ("ppo", "ppo.lr_warmup_updates", -1, "be >= 0"),
    ("ppo", "ppo.lr_warmup_start", 1.5, "lie in [0, 1]"),
    ("ppo", "ppo.kl_target", 0.0, "be > 0"),
    ("ppo", "ppo.clip_scores", 0.0, "be > 0"),
    ("ppo", "ppo.dual_clip", 1.0, "be > 1"),
    ("ppo", "ppo.ema_decay", 1.0, "lie in (0, 1)"),
    ("ppo", "preflight", "maybe", "be one of true, false, only"),
    ("ppo", "ppo.kl_in", "score", "be one of reward, loss"),
    ("ppo", "ppo.advantage", "vtrace", "be one of gae, rloo, grpo, reinforce_pp"),
    ("ppo", "evaluation.select", "best", "be one of score_minus_kl, independent_score, last"),
    ("ppo", "watchdog.first_ratio", 0.0, "be > 0"),
    ("ppo", "watchdog.negative_kl", -1.0, "be > 0"),
    ("ppo", "watchdog.kl_budget", 0.0, "be > 0"),
    ("ppo", "watchdog.score_std", 0.0, "be > 0"),
    ("ppo", "watchdog.grad_norm", 0.0, "be > 0"),
    ("ppo", "sampling.max_gap", 0.0, "be > 0"),
    ("ppo", "watchdog.sampler_gap", 0.0, "be > 0"),
    ("ppo", "watchdog.ratio", 1.0, "be > 1"),
    ("ppo", "watchdog.length_drift", 0.5, "be > 1"),
    ("ppo", "watchdog.clip_fraction", 1.5, "lie in [0, 1]"),
    ("ppo", "watchdog.entropy_drop", -1.0, "lie in [0, 1]"),
    ("ppo", "watchdog.eos_rate", 1.1, "lie in [0, 1]"),
    ("ppo", "watchdog.explained_variance", 1.0, "be < 1"),
    ("ppo", "ppo.kl_coef", -0.1, "be >= 0"),
    ("ppo", "ppo.kl_coef", math.nan, "be a finite number"),
    ("ppo", "ppo.top_k", -1, "be >= 0"),
    ("ppo", "ppo.vf_coef", -1.0, "be >= 0"),
    ("ppo", "ppo.learning_rate", -1e-06, "be >= 0"),
    ("ppo", "critic.learning_rate", -1.0, "be >= 0"),
    ("ppo", "critic.warmup_updates", -1, "be >= 0"),
    ("ppo", "critic.trunk_coef", -0.5, "be >= 0"),
    ("ppo", "evaluation.num_prompts", -1, "be >= 0"),
    ("sft", "model.forward", "packed", "be one of auto, padding_free, padded"),
    ("ppo", "ppo.temperature", 0.0, "be > 0"),
    ("ppo", "ppo.adam_epsilon", 0.0, "be > 0"),
    ("ppo", "ppo.max_grad_norm", 0.0, "be > 0"),
    ("ppo", "ppo.cliprange", 0.0, "be > 0"),
    ("ppo", "ppo.cliprange_value", -0.2, "be > 0"),
    ("ppo", "ppo.target_kl", 0.0, "be > 0"),
    ("ppo", "ppo.gamma", 1.5, "lie in [0, 1]"),
    ("ppo", "ppo.top_p", 0.0, "lie in (0, 1]"),
    ("ppo", "ppo.lam", -0.5, "lie in [0, 1]"),
    ("ppo", "ppo.kl_estimator", "k4", "be one of k1, k2, k3"),
    ("ppo", "ppo.lr_schedule", "cosine", "be one of linear, constant"),
    ("ppo", "scorer.normalize", "shift", "be one of demo_mean_zero, standardise, none"),
    ("ppo", "scorer.combine", "median", "be one of weighted_sum, mean, min, mean_minus_std"),
    ("ppo", "scorer.endpoint.timeout", 0.0, "be > 0"),
    ("ppo", "scorer.endpoint.retries", -1, "be >= 0"),
    ("ppo", "scorer.endpoint.num_requests", 0, "be >= 1"),
    ("ppo", "scorer.endpoint.max_tokens", 0, "be >= 1"),
    ("ppo", "scorer.endpoint.max_unreadable", 1.5, "lie in [0, 1]"),
    ("ppo", "scorer.std_coef", -1.0, "be >= 0"),
]


@pytest.mark.parametrize("stage, knob, value, rule", BAD_VALUES, ids=lambda x: str(x)[:40])
def test_value_out_of_range_is_refused_with_the_range(stage, knob, value, rule):
    with pytest.raises(InputError) as caught:
        check(valid_config(stage, {knob: value}))
    if isinstance(value, list):  # each item of a list is named by its place
        knob, value = f"{knob}[0]", value[0]
    assert f"{knob} must {rule}, got {value!r}" in str(caught.value).splitlines()


@pytest.mark.parametrize(
    "component, message",
    [
        ({"gate": 15.0}, "scorer.components[1].gate must lie in (0, 1), got 15.0"),
        (
            {"normalize": "zero"},
            "scorer.components[1].normalize must be one of demo_mean_zero, standardise, none, "
            "null, got 'zero'",
        ),
    ],
)
def test_range_in_a_list_of_groups_is_refused_with_the_place(component, message):
    with pytest.raises(InputError) as caught:
        check(valid_config("ppo", several({"path": "a"}, {"path": "b"} | component)))
    assert str(caught.value) == message


def knobs_with_limits(config_class, prefix=""):
    for field in dataclasses.fields(config_class):
        if "group" in field.metadata:
            yield from knobs_with_limits(field.metadata["group"], f"{prefix}{field.name}.")
        elif str(field.metadata.get("limits", "")):
            yield prefix + field.name


def test_every_range_is_in_the_table():
    knobs = {knob for stage in STAGES.values() for knob in knobs_with_limits(stage)}
    assert len(knobs) > 75
    assert knobs - {knob for _, knob, _, _ in BAD_VALUES} == set()


def test_all_bad_values_are_reported_at_once():
    with pytest.raises(InputError) as caught:
        check(valid_config("ppo", {"ppo.kl_coef": -1.0, "ppo.gamma": 2.0, "peft.r": 0}))
    lines = str(caught.value).splitlines()
    assert [line.split()[0] for line in lines] == ["peft.r", "ppo.kl_coef", "ppo.gamma"]
