"""What a stage takes from `trainer:` and what it refuses, before models and data load.

Run: python -m pytest tests/config/test_trainer_settings.py
"""

import dataclasses
from typing import Any

import pytest
import torch
from transformers import TrainingArguments
from trl import SFTConfig

from rlhf.config import InputError, RewardStageConfig, SFTStageConfig
from rlhf.config.trainer_values import UNUSABLE, UNUSABLE_REWARD
from rlhf.hf_trainer import trainer_arguments

STAGES: dict[str, Any] = {
    "sft": (SFTConfig, SFTStageConfig),
    "reward": (TrainingArguments, RewardStageConfig),
}
# Arguments that are passed on: an argument of a new version belongs here or in UNUSABLE.
PASSED_ON = """
per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
optim_target_modules gradient_accumulation_steps average_tokens_across_devices max_grad_norm
label_smoothing_factor fp16 tf32 torch_compile torch_compile_backend torch_compile_mode
use_liger_kernel liger_kernel_config neftune_noise_alpha torch_empty_cache_steps logging_strategy
logging_steps logging_first_step log_level log_level_replica eval_strategy eval_steps eval_delay
per_device_eval_batch_size eval_on_start eval_accumulation_steps load_best_model_at_end
metric_for_best_model greater_is_better full_determinism dataloader_num_workers
dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
dataloader_multiprocessing_context dataloader_in_order train_sampling_strategy length_column_name
ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend
router_aux_loss_coef dataset_num_proc shuffle_dataset packing packing_strategy padding_free
pad_to_multiple_of loss_type activation_offloading
""".split()


def build(stage: str, **trainer: Any) -> Any:
    factory, config_class = STAGES[stage]
    config = config_class()
    config.trainer |= trainer
    return trainer_arguments(factory, config, stage)


def test_every_argument_is_passed_on_or_refused_with_what_to_use_instead():
    names = {f.name for f in dataclasses.fields(SFTConfig)}
    assert not set(PASSED_ON) & UNUSABLE.keys()
    assert names == set(PASSED_ON) | UNUSABLE.keys()
    assert UNUSABLE_REWARD.keys() <= set(PASSED_ON)


def test_every_unusable_argument_is_refused():
    for stage, table in (("sft", UNUSABLE), ("reward", UNUSABLE | UNUSABLE_REWARD)):
        for name, instead in table.items():
            with pytest.raises(InputError) as caught:
                build(stage, **{name: None})
            assert str(caught.value) == f"trainer.{name} cannot be set: {instead}; remove it"


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "trainer, message",
    [
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be >= 1, got 0"),
        ({"per_device_train_batch_size": 2.5}, "must be a whole number, got 2.5"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be >= 1, got 0"),
        ({"learning_rate": "fast"}, "trainer.learning_rate must be a number, got 'fast'"),
        ({"learning_rate": -1.0}, "trainer.learning_rate must be >= 0, got -1.0"),
        ({"weight_decay": -1.0}, "trainer.weight_decay must be >= 0, got -1.0"),
        ({"max_grad_norm": -1.0}, "trainer.max_grad_norm must be >= 0, got -1.0"),
        ({"adam_beta1": 2.0}, r"trainer.adam_beta1 must lie in \[0, 1\), got 2.0"),
        ({"logging_steps": -1}, "trainer.logging_steps must be > 0, got -1"),
        ({"logging_steps": 0}, "trainer.logging_steps must be > 0, got 0"),
        ({"eval_steps": 0}, "trainer.eval_steps must be > 0, got 0"),
        ({"eval_delay": -1}, "trainer.eval_delay must be >= 0, got -1"),
        ({"max_steps": 0}, "max_steps must be >= 1, or -1 for trainer.num_train_epochs, got 0"),
        ({"num_train_epochs": 0}, "trainer.num_train_epochs must be > 0, got 0"),
        ({"torch_compile": "yes"}, "trainer.torch_compile must be true or false, got 'yes'"),
        ({"greater_is_better": "x"}, "trainer.greater_is_better must be true or false or null"),
        ({"optim": "adam"}, "adam is not a valid OptimizerNames"),
        ({"optim": "adamw_anyprecision"}, "optim=adamw_anyprecision cannot be used .*torchdistx"),
        ({"optim": "galore_adamw"}, "optim=galore_adamw cannot be used .*galore_torch.*; install"),
        ({"optim": "lomo"}, "optim=lomo changes weights before .* set trainer.optim=adafactor"),
        ({"lr_scheduler_type": "cos"}, "cos is not a valid SchedulerType"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "decay cannot be used .*num_decay_steps"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "cosine_with_min_lr cannot .*min_lr_rate"),
        ({"lr_scheduler_kwargs": {"a": 1}}, "=cosine cannot .*'a'.*trainer.lr_scheduler_kwargs"),
        ({"dataloader_persistent_workers": True}, "dataloader_.*correct .*dataloader_num_workers"),
        ({"dataloader_multiprocessing_context": "x"}, "dataloader_.*num_workers > 0"),
        ({"eval_strategy": "no", "lr_scheduler_type": "greedy"}, "=greedy needs evaluations"),
    ],
)
def test_a_value_that_does_not_work_is_refused(stage, trainer, message):
    with pytest.raises(InputError, match=message):
        build(stage, **trainer)


@pytest.mark.parametrize(
    "stage, trainer, message",
    [
        ("sft", {"loss_type": "no"}, "trainer.loss_type must be one of nll, dft, got 'no'"),
        ("sft", {"packing_strategy": "x"}, "must be one of bfd, bfd_split, wrapped, got 'x'"),
        ("sft", {"pad_to_multiple_of": 0}, "trainer.pad_to_multiple_of must be >= 1, got 0"),
        ("reward", {"train_sampling_strategy": "group_by_length"}, "set reward.tokens_per_batch"),
    ],
)
def test_a_value_that_one_stage_cannot_use_is_refused(stage, trainer, message):
    with pytest.raises(InputError, match=message):
        build(stage, **trainer)


def test_what_is_not_installed_or_has_no_gpu_is_named(monkeypatch):
    monkeypatch.setattr("rlhf.hf_trainer.trial.find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs liger-kernel, .* pip install liger-kernel, or"):
        build("sft", use_liger_kernel=True)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="trainer.activation_offloading=true needs a GPU"):
            build("sft", activation_offloading=True)


def test_all_problems_are_named_at_once():
    with pytest.raises(InputError, match="eval_steps must .*\ntrainer.bf16 cannot .*precision="):
        build("sft", bf16=True, eval_steps=0)


@pytest.mark.parametrize("stage", STAGES)
def test_values_that_work_are_passed_on_and_no_random_number_is_drawn(stage):
    before = torch.get_rng_state()
    for trainer in (
        {"optim": "adafactor", "lr_scheduler_type": "polynomial", "warmup_steps": 5},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        {"max_steps": -1, "num_train_epochs": 1, "learning_rate": 1, "eval_steps": None},
        {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
    ):
        args = build(stage, **trainer)
        assert all(getattr(args, name) == value for name, value in trainer.items() if value)
    assert torch.equal(torch.get_rng_state(), before)
    metric = {"sft": "eval_loss", "reward": "eval_accuracy"}[stage]
    assert build(stage, lr_scheduler_type="greedy").metric_for_best_model == metric


def test_fp16_and_bfloat16_exclude_each_other():
    config = SFTStageConfig(precision="bfloat16")
    config.trainer["fp16"] = True
    with pytest.raises(InputError, match="fp16=true and precision=bfloat16 .*precision=float32"):
        trainer_arguments(SFTConfig, config, "sft")
