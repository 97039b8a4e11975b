"""Everything that differs between one process and many: their group, and errors in common.

Weights are sharded by PyTorch FSDP2, through accelerate. A parameter is then a `DTensor`, of which
each process holds a slice.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, gather_object

from rlhf.config import CONF_DIR, InputError, read_yaml
from rlhf.console import num_processes, say

Result = TypeVar("Result")
RAM_EFFICIENT = "FSDP_CPU_RAM_EFFICIENT_LOADING"


def default_device() -> str:
    """Return "cuda" if there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def use_bfloat16(precision: str) -> bool:
    """Decide whether forward passes run under bfloat16 autocast; "auto": if the GPU supports it."""
    if precision == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return precision == "bfloat16"


# --- The group of processes -----------------------------------------------------------------------


def launch_environment(name: str) -> dict[str, str]:
    """What `accelerate launch` would tell the processes of `conf/accelerate/<name>.yaml`, an FSDP
    file, about sharding."""
    settings = read_yaml(CONF_DIR / "accelerate" / f"{name}.yaml")["fsdp_config"]
    values = {key.upper(): str(value) for key, value in settings.items()}
    values = {k: v.lower() if v in ("True", "False") else v for k, v in values.items()}
    return {"ACCELERATE_USE_FSDP": "true"} | values


def sharding() -> str | None:
    """What the launcher asked to shard the weights with: "FSDP", "DeepSpeed" or None."""
    for name in ("FSDP", "DeepSpeed"):
        if os.environ.get(f"ACCELERATE_USE_{name.upper()}", "false").lower() == "true":
            return name if num_processes() > 1 else None
    return None


def join_processes(launch: str | None = None, timeout_seconds: float | None = None) -> None:
    """Join the group of the processes that a launcher started.

    Args:
        launch: a file of `conf/accelerate/`, for a launcher that says nothing about sharding.

    Raises:
        InputError: accelerate would leave out the sharding without a word, or there is only one
            process, or the processes shard in a way that no stage supports.
    """
    if launch is not None:
        if num_processes() == 1:
            raise InputError(
                f"distributed={launch} shards a model over several processes, but there is one; "
                "start them with torchrun --nproc-per-node <GPUs> -m rlhf.<stage> ..., or set "
                "distributed=null"
            )
        os.environ.update(launch_environment(launch))
    if sharding() == "FSDP" and os.environ.get("FSDP_VERSION", "1") != "2":
        raise InputError(
            "fsdp_version: 1 is not supported; set fsdp_version: 2 in the file of accelerate "
            f"launch, or take {CONF_DIR / 'accelerate' / 'fsdp2.yaml'}"
        )
    if sharding() == "FSDP" and os.environ.get(RAM_EFFICIENT, "false").lower() == "true":
        say("fsdp_cpu_ram_efficient_loading: off; each process checks the weights that it loads")
        os.environ[RAM_EFFICIENT] = "false"
    limit: dict[str, Any] = {}
    if timeout_seconds is not None:
        limit["timeout"] = timedelta(seconds=timeout_seconds)
    state = PartialState(cpu=not torch.cuda.is_available(), **limit)
    if sharding() and state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        why = "use_cpu: true" if torch.cuda.is_available() else "no GPU is visible"
        raise InputError(
            f"{sharding()} shards over GPUs, but these {num_processes()} processes are on the CPU "
            f"({why}), where accelerate leaves it out without a word; start on a machine with GPUs "
            "and with use_cpu: false, or without sharding: accelerate launch --multi_gpu "
            f"--num_processes {num_processes()} -m rlhf.<stage> ..."
        )


def make_accelerator(precision: str) -> Accelerator:
    """Make the Accelerator of a stage, also after other stages in the same process.

    accelerate keeps one state per process and refuses a different precision or device. The models
    of earlier stages no longer need it, so it is reset; the process group is kept.

    Raises:
        InputError: one of several processes was on a different device before, or PPO cannot shard
            as the launcher asks.
    """
    if sharding() is not None:
        raise InputError(
            f"PPO does not run under {sharding()} yet; start it without: accelerate launch "
            f"--config_file {CONF_DIR / 'accelerate' / 'ddp.yaml'} -m rlhf.ppo ..."
        )
    cpu = not torch.cuda.is_available()
    state = PartialState._shared_state
    other_device = bool(state) and cpu != (state["device"].type == "cpu")
    if other_device and state["num_processes"] > 1:
        raise InputError(
            f"this process was in a group of {state['num_processes']} on {state['device']}, and a "
            f"stage on {'the CPU' if cpu else 'a GPU'} cannot join it; run that stage by itself"
        )
    AcceleratorState._reset_state(reset_partial_state=other_device)
    return Accelerator(cpu=cpu, mixed_precision="bf16" if use_bfloat16(precision) else "no")


def on_every_process(task: Callable[[], Result], accelerator: Accelerator) -> Result:
    """Run a task; bad input that ends it on one process ends it on all of them.

    Otherwise the other processes would wait for the failed one, and none could save.

    Raises:
        InputError: that of the first process that failed, with its number.
    """
    if accelerator.num_processes == 1:
        return task()
    error: InputError | None = None
    try:
        result = task()
    except InputError as caught:
        error = caught
    messages = gather_object([None if error is None else str(error)])
    for rank, message in enumerate(messages):
        if message is not None:
            raise InputError(f"rank {rank}: {message}") from error
    return result
