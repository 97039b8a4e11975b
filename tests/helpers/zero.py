"""Processes of a run that DeepSpeed shards on the CPU, over gloo; it runs there as on GPUs."""

from __future__ import annotations

import dataclasses
import os
import shutil

import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from helpers.runs import directory_of
from helpers.sharded import in_group, read, text_of, train_all

from rlhf.config import CONF_DIR


def told(name):
    """What accelerate launch tells the processes of a file."""
    file = str(CONF_DIR / "accelerate" / f"{name}.yaml")
    given = ["--config_file", file, "--main_process_port", "0", "script.py"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(given))
    args.deepspeed_fields_from_accelerate_config = ""
    _, variables = prepare_deepspeed_cmd_env(args)
    return {k: v for k, v in variables.items() if k.startswith("ACCELERATE_")}


def train_under(variables, *configs):
    """Train several runs in a process that accelerate launch told so."""
    os.environ.pop("ACCELERATE_USE_CPU", None)
    os.environ.update(variables)
    train_all(*configs)


def in_zero(name, log, *configs, seconds=500):
    """Train in two processes under a launch file, and require that they succeed."""
    codes = in_group(train_under, told(name), *configs, log=log, shards=False, seconds=seconds)
    assert codes == [0, 0], text_of(log)


def go_back(config, runs_dir):
    """Copy a finished run, as it was after its second step; return its configuration there."""
    copy = dataclasses.replace(config, runs_dir=str(runs_dir), resume=True)
    shutil.copytree(directory_of(config), directory_of(copy))
    for name in ("final", "checkpoint-3"):
        shutil.rmtree(directory_of(copy) / name)
    return copy


def assert_equal(first, second, *files):
    """Two runs have the same tensors in files of their directory, to the last bit."""
    for file in ("final/model.safetensors", *files):
        ours, theirs = (read(directory_of(config) / file) for config in (first, second))
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), (file, name)
