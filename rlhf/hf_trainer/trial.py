"""A trial of the values under `trainer:` before models and data load.

`rlhf.config.trainer_values` says what it can without the libraries. Here come types, as the
libraries declare them; then the optimiser, its schedule and the data loader are built once, on a
model of four weights.
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
from rlhf.config.trainer_values import KINDS, RANGES, trainer_problems, unusable_in

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
    problems = list(trainer_problems(values, stage))
    kinds = {f.name: f.type for f in dataclasses.fields(factory)}
    for name, value in values.items():
        if name in unusable_in(stage) or (name in RANGES and value is not None):
            continue  # judged already
        if problem := _type_problem(value, kinds.get(name)):
            problems.append(f"trainer.{name} {problem}, got {value!r}")
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
    if any(k not in (*KINDS, type(None)) for k in kinds):
        return None
    if isinstance(value, bool):
        fits = bool in kinds
    else:
        fits = isinstance(value, (*kinds, int) if float in kinds else kinds)
    words = [KINDS[k] for k in kinds if k in KINDS] + ["null"] * (type(None) in kinds)
    return None if fits else f"must be {' or '.join(words)}"


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
