"""What is wrong under `trainer:`, as far as this can be said without transformers and TRL.

Tables hold the arguments that a stage cannot use, with what to do instead, and types and ranges;
all others are passed on. `rlhf.hf_trainer.trial` asks the libraries about the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from rlhf.config.fields import Limits


def _by_name(table: str) -> dict[str, str]:
    """Read rows "name name: what to do instead"; an indented line continues the row above."""
    rows = [row.split(": ", 1) for row in table.strip().replace("\n  ", " ").splitlines()]
    return {name: instead for names, instead in rows for name in names.split()}


# for both stages
UNUSABLE = _by_name("""
output_dir: set runs_dir and run_name instead
run_name: set run_name instead
seed data_seed: set seed instead
report_to: set tracker=wandb instead
project: set tracker.project instead
bf16: set precision=bfloat16 instead
bf16_full_eval fp16_full_eval: evaluations have the precision of training; set precision instead
use_cpu: hide the GPUs instead, with CUDA_VISIBLE_DEVICES= in the environment
disable_tqdm: the stage shows its own progress bar
use_cache: training reads no cache
auto_find_batch_size: set batch_size and trainer.per_device_train_batch_size instead
dataloader_drop_last: it leaves out rows without a count; no row is left out here
debug logging_nan_inf_filter: the stage stops at the first number that is not finite, and names it
enable_jit_checkpoint: the stage saves on SIGTERM already; see checkpoint.grace_seconds
fsdp fsdp_config deepspeed parallelism_config accelerator_config: choose it with
  `accelerate config`, and start the stage with `accelerate launch`
local_rank: start the stage with torchrun or `accelerate launch`
ddp_timeout: set distributed_timeout instead
ddp_find_unused_parameters: every parameter that is trained is used in every step
save_strategy save_steps save_total_limit save_only_model save_on_each_node: set checkpoint.every
  and checkpoint.keep_last instead
trackio_space_id trackio_bucket_id trackio_static_space_id log_on_each_node skip_memory_metrics
  include_num_input_tokens_seen include_for_metrics: the stage logs its own metrics, to
  metrics.jsonl and the tracker
prediction_loss_only eval_do_concat_batches eval_use_gather_object batch_eval_metrics: the stage
  evaluates in its own way
push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision:
  upload final/ after training, with `hf upload`
resume_from_checkpoint ignore_data_skip restore_callback_states_from_checkpoint: a resumed run ends
  as if it had never stopped; set resume=true instead
do_train do_eval do_predict: the stage trains and evaluates
activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing
  gradient_checkpointing_kwargs: set model.gradient_checkpointing instead
remove_unused_columns label_names dataset_text_field dataset_kwargs: rows are read and encoded by
  `dataset:`
model_init_kwargs: set model.* instead
trust_remote_code: set model.trust_remote_code instead
chat_template_path: set model.chat_template instead
eos_token: set model.eos_token instead
pad_token: set model.pad_token instead
max_length: set dataset.max_length instead
truncation_mode: rows longer than dataset.max_length are dropped and counted
eval_packing: held-out rows are never packed
completion_only_loss assistant_only_loss: set train_on_prompt instead, which says what carries loss
""")
# and these for the reward stage
UNUSABLE_REWARD = _by_name("""
label_smoothing_factor: set reward.label_smoothing instead
average_tokens_across_devices: the reward stage computes its own loss, see `reward:`
neftune_noise_alpha: the reward stage adds no noise to embeddings
use_liger_kernel liger_kernel_config: its kernels are for language models
eval_accumulation_steps: the stage evaluates in its own way
length_column_name: set reward.tokens_per_batch instead
packing packing_strategy padding_free: reward models pack no rows
""")
# name -> type and range; null is left to the libraries
_RANGES: list[tuple[type, Limits, str]] = [
    (
        int,
        Limits(ge=1),
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps "
        "eval_accumulation_steps torch_empty_cache_steps pad_to_multiple_of",
    ),
    (int, Limits(ge=0), "dataloader_num_workers"),
    (int, Limits(), "max_steps"),
    (
        float,
        Limits(ge=0),
        "learning_rate weight_decay max_grad_norm warmup_steps eval_delay neftune_noise_alpha",
    ),
    (float, Limits(gt=0), "logging_steps eval_steps num_train_epochs adam_epsilon"),
    (float, Limits(ge=0, lt=1), "adam_beta1 adam_beta2 label_smoothing_factor"),
    (str, Limits(choices=("nll", "dft")), "loss_type"),
    (str, Limits(choices=("bfd", "bfd_split", "wrapped")), "packing_strategy"),
    (str, Limits(choices=("random", "sequential", "group_by_length")), "train_sampling_strategy"),
    (bool, Limits(), "packing load_best_model_at_end"),
]
RANGES = {name: (kind, limits) for kind, limits, names in _RANGES for name in names.split()}
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def unusable_in(stage: str) -> dict[str, str]:
    """The arguments that a stage, "sft" or "reward", cannot use -> what to do instead."""
    return UNUSABLE | (UNUSABLE_REWARD if stage == "reward" else {})


def trainer_problems(values: Mapping[str, Any], stage: str) -> Iterator[str]:
    """Yield a message for each value under `trainer:` that a stage cannot use."""
    unusable = unusable_in(stage)
    for name, value in values.items():
        if name in unusable:
            yield f"trainer.{name} cannot be set: {unusable[name]}; remove it"
        elif isinstance(value, float) and not math.isfinite(value):
            continue  # refused in every place
        elif name in RANGES and value is not None:
            kind, limits = RANGES[name]
            fits = isinstance(value, (kind, int) if kind is float else kind)
            if not fits or (isinstance(value, bool) and kind is not bool):
                yield f"trainer.{name} must be {KINDS[kind]}, got {value!r}"
            elif name == "max_steps" and value < 1 and value != -1:
                yield (
                    "trainer.max_steps must be >= 1, or -1 for trainer.num_train_epochs, got "
                    f"{value}"
                )
            elif not limits.allow(value):
                yield f"trainer.{name} {limits}, got {value!r}"
    if stage == "reward" and values.get("train_sampling_strategy") == "group_by_length":
        yield (
            "trainer.train_sampling_strategy=group_by_length measures rows, but the reward stage "
            "reads several responses per row; set reward.tokens_per_batch instead"
        )
