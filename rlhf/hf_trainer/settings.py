"""Which arguments of the transformers Trainer and of TRL a stage takes from `trainer:`, and a trial
of their values before models and data load.

A table holds every argument that a stage cannot use, and what to set instead; all others are passed
on. Types and bounds are tested first; then the optimiser, its schedule and the data loader
are built once, on a model of four weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, get_args

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import SchedulerType, Trainer, TrainingArguments, get_scheduler
from transformers.training_args import OptimizerNames

from rlhf.config import InputError
from rlhf.hub import one_line

_CHECKPOINTS = "set checkpoint.every and checkpoint.keep_last instead"
_HUB = "upload final/ after training, with `hf upload`"
_REPORT = "the stage logs its own metrics, to metrics.jsonl and the tracker"
_SHARDED = "choose it with `accelerate config`, and start the stage with `accelerate launch`"
_RESUME = "a resumed run ends as if it had never stopped; set resume=true instead"
_ROWS = "rows are read and encoded by `dataset:`"
_LOSS = "set train_on_prompt instead, which says what carries loss"
_OURS = "set model.gradient_checkpointing instead"
_EVALUATION = "the stage evaluates in its own way"
_OWN_LOSS = "the reward stage computes its own loss, see `reward:`"

# argument -> what to do instead; for both stages
UNUSABLE = {
    "output_dir": "set runs_dir and run_name instead",
    "run_name": "set run_name instead",
    "seed": "set seed instead",
    "data_seed": "set seed instead",
    "report_to": "set tracker=wandb instead",
    "project": "set tracker.project instead",
    "bf16": "set precision=bfloat16 instead",
    "bf16_full_eval": "evaluations have the precision of training; set precision instead",
    "fp16_full_eval": "evaluations have the precision of training; set precision instead",
    "use_cpu": "hide the GPUs instead, with CUDA_VISIBLE_DEVICES= in the environment",
    "disable_tqdm": "the stage shows its own progress bar",
    "use_cache": "training reads no cache",
    "auto_find_batch_size": "set batch_size and trainer.per_device_train_batch_size instead",
    "dataloader_drop_last": "it leaves out rows without a count; no row is left out here",
    "debug": "the stage stops at the first number that is not finite, and names it",
    "enable_jit_checkpoint": "the stage saves on SIGTERM already; see checkpoint.grace_seconds",
    "fsdp": _SHARDED,
    "fsdp_config": _SHARDED,
    "deepspeed": _SHARDED,
    "parallelism_config": _SHARDED,
    "accelerator_config": _SHARDED,
    "local_rank": "start the stage with torchrun or `accelerate launch`",
    "remove_unused_columns": _ROWS,
    "label_names": _ROWS,
    "ddp_find_unused_parameters": "every parameter that is trained is used in every step",
    "logging_nan_inf_filter": "the stage stops at the first number that is not finite",
    **dict.fromkeys(["save_strategy", "save_steps", "save_total_limit"], _CHECKPOINTS),
    **dict.fromkeys(["save_only_model", "save_on_each_node"], _CHECKPOINTS),
    **dict.fromkeys(["trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"], _REPORT),
    **dict.fromkeys(["log_on_each_node", "include_num_input_tokens_seen"], _REPORT),
    **dict.fromkeys(["skip_memory_metrics", "include_for_metrics"], _REPORT),
    **dict.fromkeys(["prediction_loss_only", "eval_do_concat_batches"], _EVALUATION),
    **dict.fromkeys(["eval_use_gather_object", "batch_eval_metrics"], _EVALUATION),
    **dict.fromkeys(["push_to_hub", "hub_token", "hub_private_repo", "hub_model_id"], _HUB),
    **dict.fromkeys(["hub_strategy", "hub_always_push", "hub_revision"], _HUB),
    **dict.fromkeys(["resume_from_checkpoint", "ignore_data_skip"], _RESUME),
    "restore_callback_states_from_checkpoint": _RESUME,
    **dict.fromkeys(["do_train", "do_eval", "do_predict"], "the stage trains and evaluates"),
    **dict.fromkeys(["activation_checkpointing", "activation_checkpointing_kwargs"], _OURS),
    **dict.fromkeys(["gradient_checkpointing", "gradient_checkpointing_kwargs"], _OURS),
    # of SFTConfig
    "model_init_kwargs": "set model.* instead",
    "trust_remote_code": "set model.trust_remote_code instead",
    "chat_template_path": "set model.chat_template instead",
    "eos_token": "set model.eos_token instead",
    "pad_token": "set model.pad_token instead",
    "max_length": "set dataset.max_length instead",
    "truncation_mode": "rows longer than dataset.max_length are dropped and counted",
    "eval_packing": "held-out rows are never packed",
    **dict.fromkeys(["dataset_text_field", "dataset_kwargs"], _ROWS),
    **dict.fromkeys(["completion_only_loss", "assistant_only_loss"], _LOSS),
}
# and these for the reward stage
UNUSABLE_REWARD = {
    "label_smoothing_factor": "set reward.label_smoothing instead",
    "average_tokens_across_devices": _OWN_LOSS,
    "neftune_noise_alpha": "the reward stage adds no noise to embeddings",
    "use_liger_kernel": "its kernels are for language models",
    "liger_kernel_config": "its kernels are for language models",
    "eval_accumulation_steps": _EVALUATION,
    "length_column_name": "set reward.tokens_per_batch instead",
    **dict.fromkeys(["packing", "packing_strategy", "padding_free"], "reward models pack no rows"),
}
AT_LEAST = {
    **dict.fromkeys(["per_device_train_batch_size", "per_device_eval_batch_size"], 1),
    **dict.fromkeys(["gradient_accumulation_steps", "eval_accumulation_steps"], 1),
    **dict.fromkeys(["torch_empty_cache_steps", "pad_to_multiple_of", "ddp_timeout"], 1),
    **dict.fromkeys(["learning_rate", "weight_decay", "max_grad_norm", "warmup_steps"], 0),
    **dict.fromkeys(["eval_delay", "dataloader_num_workers", "neftune_noise_alpha"], 0),
    **dict.fromkeys(["adam_beta1", "adam_beta2", "label_smoothing_factor"], 0),
}
ABOVE_0 = ("logging_steps", "eval_steps", "num_train_epochs", "adam_epsilon")
BELOW_1 = ("adam_beta1", "adam_beta2", "label_smoothing_factor")
CHOICES = {
    "loss_type": ("nll", "dft"),
    "packing_strategy": ("bfd", "bfd_split", "wrapped"),
    "train_sampling_strategy": ("random", "sequential", "group_by_length"),
}
# what needs the layers of the model itself, or steps before the gradients have been checked
NOT_TRIED = ("galore_", "apollo_")
EARLY = ("lomo", "adalomo")


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
        expected = _type_problem(value, kinds.get(name)) or _bound_problem(name, value)
        if expected is not None:
            problems.append(f"trainer.{name} must be {expected}, got {value!r}")
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
    """The type that a value should have; None where it has it, or where the library converts."""
    kinds = get_args(kind) or (kind,)
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    if any(k not in (*names, type(None)) for k in kinds):
        return None
    if isinstance(value, bool):
        fits = bool in kinds
    else:
        fits = isinstance(value, (*kinds, int) if float in kinds else kinds)
    words = [names[k] for k in kinds if k in names]
    return None if fits else " or ".join(words + ["null"] * (type(None) in kinds))


def _bound_problem(name: str, value: Any) -> str | None:
    """The range or choice that a value should come from; None where it does."""
    if name in CHOICES and value not in CHOICES[name]:
        return f"one of {', '.join(CHOICES[name])}"
    if not isinstance(value, int | float):
        return None
    if name == "max_steps" and value < 1 and value != -1:
        return ">= 1, or -1 for trainer.num_train_epochs"
    if name in AT_LEAST and value < AT_LEAST[name]:
        return f">= {AT_LEAST[name]}"
    if name in ABOVE_0 and value <= 0:
        return "> 0"
    return "< 1" if name in BELOW_1 and value >= 1 else None


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
    model: Any = nn.Module()
    model.weight = nn.Parameter(torch.zeros(2, 2))
    name = "optim"
    try:
        try:
            kind, values = Trainer.get_optimizer_cls_and_kwargs(args, model)
            optimizer = kind(model.parameters(), **values)
        except (ValueError, TypeError) as error:
            if not optim.startswith(NOT_TRIED):
                raise error
            optimizer = torch.optim.SGD(model.parameters(), lr=args.learning_rate)
        name = "lr_scheduler_type"
        get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            args.get_warmup_steps(10),
            10,
            args.lr_scheduler_kwargs,  # type: ignore[arg-type]
        )
    except (ImportError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        fix = {
            "optim": (
                optim,
                "install what it needs, correct trainer.optim_args, or set "
                "trainer.optim=adamw_torch",
            ),
            "lr_scheduler_type": (
                schedule,
                "correct trainer.lr_scheduler_kwargs, or set "
                "trainer.lr_scheduler_type=cosine without them",
            ),
        }[name]
        raise InputError(
            f"trainer.{name}={fix[0]} cannot be used ({one_line(error)}); {fix[1]}"
        ) from error
    _try_loader(args)


def _try_loader(args: TrainingArguments) -> None:
    try:
        DataLoader(
            [0],  # type: ignore[arg-type]
            num_workers=args.dataloader_num_workers,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
        )
    except (ValueError, TypeError) as error:
        raise InputError(
            f"trainer.dataloader_*: no data loader takes these values ({one_line(error)}); correct "
            "trainer.dataloader_num_workers or remove the others"
        ) from error
