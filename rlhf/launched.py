"""What a launcher tells a process of a run: refused where it cannot be, switched off where a stage
decides.

Left out: sharding (`distributed.py`), and what excludes it (`sharding_settings.py`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping

from rlhf.config import InputError
from rlhf.console import launched_with, say

MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # accelerate takes them
NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # next to WORLD_SIZE

# What the file of accelerate launch may not ask for -> variable that says so, what to do instead.
REFUSED = {
    "fsdp_activation_checkpointing": (
        "FSDP_ACTIVATION_CHECKPOINTING",
        "set it to false there, and model.gradient_checkpointing=true",
    ),
    "parallelism_config": (
        "ACCELERATE_USE_PARALLELISM_CONFIG",
        "leave it out there: all processes share the rows, and FSDP2 divides a model among them",
    ),
    "megatron_lm_config": (
        "ACCELERATE_USE_MEGATRON_LM",
        "take conf/accelerate/fsdp2.yaml, which divides any model",
    ),
}


def require_whole_group(environment: MutableMapping[str, str]) -> None:
    """Require all variables that make this process one of several, or none of them.

    Raises:
        InputError: some are missing or empty, or RANK or MASTER_PORT is no possible number.
    """
    world, rank = (environment.get(name, str(i)) for name, i in (("WORLD_SIZE", 1), ("RANK", 0)))
    if not (world.isdecimal() and rank.isdecimal()) or int(rank) >= int(world):
        raise InputError(
            f"RANK={rank} must be a number from 0 to WORLD_SIZE - 1, and WORLD_SIZE is {world}; "
            "unset both for one process, or let torchrun set them"
        )
    started_by_mpi = next((name for name in MPI if int(environment.get(name, "1")) > 1), None)
    if started_by_mpi and "WORLD_SIZE" not in environment:
        number = environment[started_by_mpi]
        raise InputError(
            f"{started_by_mpi}={number}: mpirun started this process, and stages do not read its "
            f"variables; start them with torchrun --nproc-per-node {number} -m rlhf.<stage> ..."
        )
    missing = [name for name in NEEDED if not environment.get(name)]
    if int(world) > 1 and missing:
        raise InputError(
            f"WORLD_SIZE={world} makes this process one of {world}, but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set; unset WORLD_SIZE for one process, or "
            f"let torchrun set all: torchrun --nproc-per-node {world} -m rlhf.<stage> ..."
        )
    port = environment["MASTER_PORT"] if int(world) > 1 else "1"
    if not (port.isdecimal() and 0 < int(port) < 2**16):
        raise InputError(f"MASTER_PORT={port} must be a number from 1 to 65535, on all processes")


def require_one_process(environment: Mapping[str, str]) -> None:
    """Require that no launcher started this process as one of several: each of them would do all of
    the work, and write the same files."""
    counts = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", *MPI)
    name = next((name for name in counts if environment.get(name, "1") != "1"), None)
    if name is not None:
        raise InputError(
            f"{name}={environment[name]}: only rlhf.sft, rlhf.reward and rlhf.ppo run in several "
            f"processes; start this command without a launcher, or unset {name}"
        )


def refuse_other_ways(environment: MutableMapping[str, str]) -> None:
    """Refuse what no stage does, and what would fail in its middle."""
    for setting, (variable, instead) in REFUSED.items():
        if environment.get(variable, "false").lower() == "true":
            raise InputError(f"{setting} of accelerate launch is not supported; {instead}")


def leave_to_the_stage(environment: MutableMapping[str, str]) -> None:
    """Switch off what the file of accelerate launch may ask for and the stage decides; say so."""
    compiler = environment.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if compiler.lower() != "no":
        say(
            f"dynamo_backend: {compiler} of accelerate launch is off: it would compile whole "
            "models, unchecked; PPO has compile=true"
        )
        environment["ACCELERATE_DYNAMO_BACKEND"] = "no"
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no" and not launched_with("DeepSpeed"):  # which refuses it
        say(
            f"mixed_precision: {precision} of accelerate launch is off: `precision` of the stage "
            "decides (auto: bfloat16 on a GPU that has it, else float32)"
        )
        environment["ACCELERATE_MIXED_PRECISION"] = "no"


def settle_launch() -> None:
    """Check the variables of this process, before it joins others."""
    require_whole_group(os.environ)
    refuse_other_ways(os.environ)
    leave_to_the_stage(os.environ)
