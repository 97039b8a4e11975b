"""Runs that two processes make under DeepSpeed on the CPU, over gloo; see helpers/sharded.py."""

from __future__ import annotations

import dataclasses
import shutil

import torch
from helpers.runs import directory_of
from helpers.sharded import in_group, read, text_of, train_all


def in_zero(name, log, *configs, seconds=500):
    """Train in two processes under a launch file, and require that they succeed."""
    codes = in_group(train_all, *configs, log=log, shards=name, seconds=seconds)
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
