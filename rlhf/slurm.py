"""Slurm: tasks of one `srun` are the processes of one run, as those of torchrun are.

    srun --ntasks-per-node 8 python -m rlhf.ppo distributed=fsdp2 ...

Left out: what is submitted, and how (`examples/clusters/slurm.sbatch`, or Hydra's launcher).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

FIRST_PORT, NUM_PORTS = 15000, 10000


def group_of_tasks(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that torchrun would set, if srun started several tasks; else nothing.

    A batch script sees the variables of its allocation; only srun sets those of a step. So
    `python -m rlhf.sft` in a script of eight tasks, without srun, is one process.

    Args:
        environment: variables of this process. Those that a launcher set stay as they are.
    """
    num_tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if num_tasks == 1 or "RANK" in environment or "WORLD_SIZE" in environment:
        return {}
    step = int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])
    host = first_host(environment["SLURM_STEP_NODELIST"])
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(num_tasks),
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "MASTER_ADDR": environment.get("MASTER_ADDR", host),
        # of its own for each step, and the same on all tasks
        "MASTER_PORT": environment.get("MASTER_PORT", str(FIRST_PORT + step % NUM_PORTS)),
    }


def first_host(nodes: str) -> str:
    """Return the first of a list of hosts: `gpu[003-005,9]-ib,cpu1` begins with `gpu003-ib`."""
    first = re.match(r"(?:[^,[]|\[[^]]*\])+", nodes)
    assert first is not None, nodes
    return re.sub(r"\[(\d+)[^]]*\]", r"\1", first[0])
