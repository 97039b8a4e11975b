"""Processes of a run that FSDP2 shards on the CPU.

accelerate leaves FSDP out on a CPU, and a stage refuses that. Here it takes the group of CPU
processes for one of GPUs, and then does everything else as on GPUs, over gloo.
"""

from __future__ import annotations

import dataclasses
import os
import runpy
import sys
from pathlib import Path

import pytest
from helpers.ports import held_port
from helpers.processes import Fork
from helpers.runs import directory_of, train
from safetensors.torch import load_file
from torch.testing import assert_close

from rlhf.checkpoint.tensor_files import stored_tensors
from rlhf.distributed import ZERO, launch_environment
from rlhf.metrics import read_jsonl

CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # after three steps
# Metrics that differ between one process and two: the clock and rounding; in SFT also TRL's means
# over passes, not over tokens.
LOOSE = ("seconds", "tokens_per_second", "sampler_gap")
LOOSE_IN_SFT = ("entropy", "mean_token_accuracy")


def train_all(*configs):
    """Train several runs in one process."""
    for config in configs:
        train(config)


def train_with_little_memory(*configs):
    """As `train_all`; the second process has nearly no memory left."""
    from rlhf.ppo.preflight import examine

    if os.environ["RANK"] == "1":
        examine.free_bytes = lambda device: 1000
    train_all(*configs)


def in_two(config, **values):
    """The same run in the folder of the two processes."""
    values = {"runs_dir": config.runs_dir.replace("/one", "/two")} | values
    return dataclasses.replace(config, **values)


def read(file: Path):
    """The tensors of a file, or of a folder of its name without the ending, in slices."""
    if file.is_file():
        return load_file(file)
    with stored_tensors(file.parent, file.stem) as stored:
        return {name: stored.get_tensor(name) for name in stored.keys()}


def tensors(one, two, *files: str):
    """Each tensor of final/, critic/ and other files of two runs, as (name, first, second)."""
    directory = directory_of(one)
    results = [f for name in ("final", "critic") for f in (directory / name).rglob("*.safetensors")]
    for file in [*files, *(str(found.relative_to(directory)) for found in results)]:
        first, second = (read(directory_of(config) / file) for config in (one, two))
        assert first.keys() == second.keys()
        for name in first:
            yield f"{file} {name}", first[name], second[name]


def metrics(one, two):
    """Each metric of two runs that the number of processes does not change."""
    rows = (read_jsonl(directory_of(config) / "metrics.jsonl") for config in (one, two))
    in_training = LOOSE_IN_SFT * (directory_of(one).name == "sft")
    for first, second in zip(*rows, strict=True):
        assert first.keys() == second.keys()
        for name in first:
            if name not in in_training and not name.endswith(LOOSE):
                yield name, first[name], second[name]


def assert_same(one, two, *files: str) -> None:
    """Two runs have the same results, metrics, and tensors in other files of their directory."""
    for name, first, second in tensors(one, two, *files):
        assert_close(second, first, **CLOSE, msg=lambda m, name=name: f"{name}: {m}")
    for name, first, second in metrics(one, two):
        bound = 1e-4 if name.startswith("sampler_gap") else 1e-5  # a gap is itself rounding
        assert second == pytest.approx(first, rel=1e-4, abs=bound), name


def join(rank: int, world: int, port: int, shards: bool | str) -> None:
    """Make this process one of a group; `shards` may name a file of `conf/accelerate/`. DeepSpeed
    itself runs on a CPU."""
    os.environ |= {"WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world), "ACCELERATE_USE_CPU": "true"}
    if not shards:
        return
    if shards in ZERO:
        del os.environ["ACCELERATE_USE_CPU"]
        os.environ |= launch_environment(shards)
        return
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    plain = PartialState.__init__

    def init(self, *arguments, **options):
        plain(self, *arguments, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = init
    os.environ |= launch_environment("fsdp2" if shards is True else shards)


def _run(rank: int, world: int, port: int, shards: bool | str, log: Path, work, arguments) -> None:
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


def in_group(work, *arguments, log: Path, world: int = 2, shards: bool | str = True, seconds=900):
    """Call `work(*arguments)` in each of several processes; return their exit codes."""
    with held_port() as port:
        ranks = [
            Fork(target=_run, args=(rank, world, port, shards, log, work, arguments))
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
