"""Processes of a run that FSDP2 shards on the CPU.

accelerate leaves FSDP out on a CPU, and a stage refuses that. Here it takes the group of CPU
processes for one of GPUs, and then does everything else as on GPUs, over gloo.
"""

from __future__ import annotations

import os
import runpy
import socket
import sys
from pathlib import Path

from helpers.processes import FORKS

from rlhf.distributed import launch_environment


def join(rank: int, world: int, port: int, shards: bool) -> None:
    """Make this process one of a group."""
    os.environ |= {"WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world), "ACCELERATE_USE_CPU": "true"}
    if not shards:
        return
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    plain = PartialState.__init__

    def init(self, *arguments, **options):
        plain(self, *arguments, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = init
    os.environ |= launch_environment("fsdp2")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _run(rank: int, world: int, port: int, shards: bool, log: Path, work, arguments) -> None:
    with open(f"{log}-{rank}", "a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    join(rank, world, port, shards)
    work(*arguments)


def command(stage: str, arguments: list[str], folder: Path) -> None:
    """Run the command of a stage in this process: work for `in_group`."""
    os.chdir(folder)
    sys.argv = [f"rlhf.{stage}", *arguments]
    runpy.run_module(f"rlhf.{stage}", run_name="__main__", alter_sys=True)


def text_of(log: Path) -> str:
    """What the processes have printed, the end of it."""
    files = sorted(log.parent.glob(f"{log.name}-*"))
    return "\n".join(f"{file.name}: {file.read_text()[-5000:]}" for file in files)


def in_group(work, *arguments, log: Path, world: int = 2, shards: bool = True, seconds=240):
    """Call `work(*arguments)` in each of several processes; return their exit codes."""
    port = free_port()
    ranks = [
        FORKS.Process(target=_run, args=(rank, world, port, shards, log, work, arguments))
        for rank in range(world)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(seconds)
    for rank in ranks:
        if rank.is_alive():
            rank.kill()
    return [rank.exitcode for rank in ranks]
