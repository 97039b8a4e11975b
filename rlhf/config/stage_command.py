"""The command of a stage, started as this process was: alone, or as one of several.

Left out: which commands come after a stage (`next_commands.py`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

UNKNOWN = "<launcher>"
# what accelerate launch says about DeepSpeed: its stage, offload of the optimiser and of weights ->
# the value of `distributed` with which torchrun does the same
ZERO: dict[tuple[str, ...], str] = {
    ("2", "none", "none"): "zero2",
    ("3", "none", "none"): "zero3",
    ("3", "cpu", "cpu"): "zero3_offload",
}


def stage_command(stage: str, overrides: Sequence[str], distributed: str | None = None) -> str:
    """Return the command of a stage, with as many processes as this one was started with.

    It begins with `UNKNOWN` where a process cannot tell how it was started: on several hosts, by
    srun, or by accelerate with settings of DeepSpeed that no value of `distributed` has.

    Args:
        overrides: quoted as a shell needs them.
        distributed: the setting of this process.
    """
    number = os.environ.get("WORLD_SIZE", "1")
    asked = distributed or _asked(os.environ)
    if number == "1":  # DeepSpeed offloads with one process, too
        start = UNKNOWN if _flag(os.environ, "ACCELERATE_USE_DEEPSPEED") else "python"
    elif os.environ.get("LOCAL_WORLD_SIZE") == number and asked != UNKNOWN:  # torchrun's, one host
        start = f"torchrun --nproc-per-node {number}"
        if asked is not None and not any(o.startswith("distributed=") for o in overrides):
            overrides = [*overrides, f"distributed={asked}"]
    else:
        start = UNKNOWN
    return " ".join([f"{start} -m rlhf.{stage}", *overrides])


def _asked(environment: Mapping[str, str]) -> str | None:
    """The value of `distributed` that does what the launcher asked for; None for whole models."""
    if _flag(environment, "ACCELERATE_USE_DEEPSPEED"):
        get, prefix = environment.get, "ACCELERATE_DEEPSPEED"
        devices = (get(f"{prefix}_OFFLOAD_{n}_DEVICE", "none") for n in ("OPTIMIZER", "PARAM"))
        return ZERO.get((get(f"{prefix}_ZERO_STAGE", "2"), *devices), UNKNOWN)
    if _flag(environment, "ACCELERATE_USE_FSDP"):
        return "fsdp2_offload" if _flag(environment, "FSDP_OFFLOAD_PARAMS") else "fsdp2"
    return None


def _flag(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() == "true"
