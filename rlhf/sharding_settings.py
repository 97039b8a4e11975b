"""Settings that exclude sharding, and settings of DeepSpeed that a stage does not take: one line
each, before anything loads."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from rlhf.config import CONF_DIR, InputError, PPOStageConfig, StageConfig
from rlhf.cpu_adam import build_adam
from rlhf.distributed import sharding, zero_stage

OPTIMISERS = ("adamw_torch", "adamw_torch_fused")  # under DeepSpeed
OF_TORCH = (*OPTIMISERS, "sgd", "adagrad", "rmsprop")  # under FSDP2: each number by itself
# What accelerate launch says about its file: setting there -> variable, values that a stage takes,
# what to do instead.
TAKEN = {
    "deepspeed_config_file": (
        "ACCELERATE_DEEPSPEED_CONFIG_FILE",
        ("none",),
        f"write its settings as in {CONF_DIR / 'accelerate' / 'zero3.yaml'}",
    ),
    "zero_stage": ("ACCELERATE_DEEPSPEED_ZERO_STAGE", ("2", "3"), "set it to 2 or 3"),
    "offload_optimizer_device": (
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
        ("none", "cpu"),
        "set it to cpu or none",
    ),
    "offload_param_device": (
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
        ("none", "cpu"),
        "set it to cpu or none",
    ),
    "gradient_clipping": (
        "ACCELERATE_GRADIENT_CLIPPING",
        ("auto",),
        "leave it out there, and set {norm}",
    ),
    "gradient_accumulation_steps": (
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
        ("auto",),
        "leave it out there, and set {batch}",
    ),
    "mixed_precision": (
        "ACCELERATE_MIXED_PRECISION",
        ("no",),
        "set it to 'no' there, and set precision",
    ),
}


def refuse_under_sharding(options: Mapping[str, Any]) -> None:
    """Refuse what sharded training does not do yet.

    Args:
        options: setting as it is typed -> whether it is set.
    """
    bad = [option for option, is_set in options.items() if is_set]
    if sharding() and bad:
        raise InputError(
            f"{', '.join(bad)}: not supported under {sharding()} yet; leave "
            f"{'it' if len(bad) == 1 else 'them'} out, or start without sharding: accelerate "
            f"launch --config_file {CONF_DIR / 'accelerate' / 'ddp.yaml'} -m rlhf.<stage> ..."
        )


def mixes_types(config: StageConfig, has_head: bool) -> bool:
    """True if FSDP2 would have to shard a float32 head together with layers of another type, which
    all train; it takes weights of one type."""
    in_full = sharding() == "FSDP" and not config.peft.enabled
    return in_full and has_head and config.model.dtype != "float32"


def refuse_under_deepspeed(config: StageConfig) -> None:
    """Refuse what does not go together with DeepSpeed, if the launcher asks for it."""
    if sharding() != "DeepSpeed":
        return
    if problems := [*_of_launcher(config), *_of_stage(config)]:
        raise InputError("\n".join(problems))
    if os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE") == "cpu":
        build_adam()


def _of_launcher(config: StageConfig) -> Iterator[str]:
    is_ppo = isinstance(config, PPOStageConfig)
    own = {"norm": "ppo.max_grad_norm", "batch": "ppo.batch_size"}
    names = own if is_ppo else {"norm": "trainer.max_grad_norm", "batch": "batch_size"}
    for setting, (variable, taken, instead) in TAKEN.items():
        value = os.environ.get(variable, taken[0])
        if value not in taken:
            place = f"{setting}: {value} in the file of accelerate launch"
            yield f"{place} is not supported; {instead.format(**names)}"
    if os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE") == "cpu" and zero_stage() == 2:
        yield "offload_param_device: cpu needs zero_stage: 3, which divides the weights; set it so"


def _of_stage(config: StageConfig) -> Iterator[str]:
    trainer: Mapping[str, Any] = getattr(config, "trainer", {})  # PPO has its own loop
    optim = trainer.get("optim", OPTIMISERS[0])
    if optim not in OPTIMISERS:
        yield (
            f"trainer.optim={optim}: DeepSpeed gets slices that know no rows and layers; set "
            f"trainer.optim={OPTIMISERS[0]}"
        )
    if trainer.get("fp16"):
        yield "trainer.fp16=true is not supported under DeepSpeed; set precision=bfloat16 instead"
    if config.model.dtype != "float32":
        yield (
            f"model.dtype={config.model.dtype}: under DeepSpeed, weights are float32; set "
            "model.dtype=float32 (precision=bfloat16 is for passes)"
        )
