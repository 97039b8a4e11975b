"""Which arguments of the transformers Trainer and of TRL a stage takes from `trainer:`, and a trial
of their values before models and data load.

Tables hold the arguments that a stage cannot use, and what to do instead; all others are passed on.
Types and ranges are tested first. Then the optimiser, its schedule and the data loader are built
once, on a model of four weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, get_args

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import SchedulerType, Trainer, TrainingArguments, get_scheduler
from transformers.training_args import OptimizerNames

from rlhf.config import InputError, one_line
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
LIMITS = {
    "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps "
    "eval_accumulation_steps torch_empty_cache_steps pad_to_multiple_of ddp_timeout": Limits(ge=1),
    "learning_rate weight_decay max_grad_norm warmup_steps eval_delay dataloader_num_workers "
    "neftune_noise_alpha": Limits(ge=0),
    "logging_steps eval_steps num_train_epochs adam_epsilon": Limits(gt=0),
    "adam_beta1 adam_beta2 label_smoothing_factor": Limits(ge=0, lt=1),
    "loss_type": Limits(choices=("nll", "dft")),
    "packing_strategy": Limits(choices=("bfd", "bfd_split", "wrapped")),
    "train_sampling_strategy": Limits(choices=("random", "sequential", "group_by_length")),
}
NOT_TRIED = ("galore_", "apollo_")  # they need the layers of the model itself
EARLY = ("lomo", "adalomo")  # they change weights before the gradients have been checked


def check_trainer_values(factory: Any, values: Mapping[str, Any], stage: str) -> None:
    """Check what is set under `trainer:`.

    Args:
        factory: `trl.SFTConfig` or `transformers.TrainingArguments`.
        stage: "sft" or "reward".

    Raises:
        InputError: names every value at once that the stage cannot use, with what to use instead.
    """
    kinds = {f.name: f.type for f in dataclasses.fields(factory)}
    unusable = UNUSABLE | (UNUSABLE_REWARD if stage == "reward" else {})
    problems = []
    for name, value in values.items():
        if name in unusable:
            problems.append(f"trainer.{name} cannot be set: {unusable[name]}; remove it")
            continue
        problem = _type_problem(value, kinds.get(name)) or _range_problem(name, value)
        if problem is not None:
            problems.append(f"trainer.{name} {problem}, got {value!r}")
    if stage == "reward" and values.get("train_sampling_strategy") == "group_by_length":
        problems.append(
            "trainer.train_sampling_strategy=group_by_length measures rows, but the reward stage "
            "reads several responses per row; set reward.tokens_per_batch instead"
        )
    if values.get("use_liger_kernel") and find_spec("liger_kernel") is None:
        problems.append(
            "trainer.use_liger_kernel=true needs liger-kernel, which is not installed: pip install "
            "liger-kernel, or set trainer.use_liger_kernel=false"
        )
    if values.get("activation_offloading") and not torch.cuda.is_available():
        problems.append(
            "trainer.activation_offloading=true needs a GPU, and there is none; set it to false"
        )
    if problems:
        raise InputError("\n".join(problems))


def _type_problem(value: Any, kind: Any) -> str | None:
    """Name the types that a value should have; None where it has one, or the library converts."""
    kinds = get_args(kind) or (kind,)
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    if any(k not in (*names, type(None)) for k in kinds):
        return None
    if isinstance(value, bool):
        fits = bool in kinds
    else:
        fits = isinstance(value, (*kinds, int) if float in kinds else kinds)
    words = [names[k] for k in kinds if k in names] + ["null"] * (type(None) in kinds)
    return None if fits else f"must be {' or '.join(words)}"


def _range_problem(name: str, value: Any) -> str | None:
    """Name the range or the choices of a value; None where it is one of them."""
    if name == "max_steps" and value < 1 and value != -1:
        return "must be >= 1, or -1 for trainer.num_train_epochs"
    limits = next((limits for names, limits in LIMITS.items() if name in names.split()), None)
    if limits is None or (isinstance(value, str) and not limits.choices):
        return None  # pad_to_multiple_of takes text too
    return None if limits.allow(value) else str(limits)


def try_out(args: TrainingArguments) -> None:
    """Build the optimiser, its schedule and the data loader once, on a model of four weights.

    Raises:
        InputError: one of them cannot be built.
    """
    optim = OptimizerNames(args.optim).value
    schedule = SchedulerType(args.lr_scheduler_type).value
    if optim in EARLY or optim.endswith("_layerwise"):
        raise InputError(
            f"trainer.optim={optim} changes weights before all gradients are checked to be finite; "
            "set trainer.optim=adafactor, which needs little memory too"
        )
    fix = "install what it needs, correct trainer.optim_args, or set trainer.optim=adamw_torch"
    with _refused(f"trainer.optim={optim}", fix):
        optimizer = _try_optimizer(args, optim)
    fix = (
        "correct trainer.lr_scheduler_kwargs, or set trainer.lr_scheduler_type=cosine without them"
    )
    with _refused(f"trainer.lr_scheduler_type={schedule}", fix):
        kwargs: Any = args.lr_scheduler_kwargs
        get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(10), 10, kwargs)
    fix = "correct trainer.dataloader_num_workers or remove the others"
    with _refused("trainer.dataloader_*", fix):
        rows: Any = [0]
        DataLoader(
            rows,
            num_workers=args.dataloader_num_workers,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
        )


def _try_optimizer(args: TrainingArguments, optim: str) -> torch.optim.Optimizer:
    model: Any = nn.Module()
    model.weight = nn.Parameter(torch.zeros(2, 2))
    try:
        kind, values = Trainer.get_optimizer_cls_and_kwargs(args, model)
        return kind(model.parameters(), **values)
    except (ValueError, TypeError):
        if not optim.startswith(NOT_TRIED):
            raise
        return torch.optim.SGD(model.parameters(), lr=args.learning_rate)


@contextmanager
def _refused(setting: str, fix: str) -> Iterator[None]:
    """Turn what a library raises at a setting into an InputError."""
    try:
        yield
    except (ImportError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise InputError(f"{setting} cannot be used ({one_line(error)}); {fix}") from error
