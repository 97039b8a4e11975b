"""Stage directories and checkpoints with one weight, for tests of what is written and deleted."""

import os
import shutil

import torch
from safetensors.torch import save_file
from transformers import PretrainedConfig

from rlhf.checkpoint import make_record, write_stage
from rlhf.checkpoint.ownership import facts_of_run, latest_checkpoint, seal
from rlhf.config import SFTStageConfig, save_config


class Model:
    """Saves one weight, as a transformers model does; `fails` after half of the work."""

    dtype, config, base_model = torch.float32, PretrainedConfig(), None

    def __init__(self, weight=1.0, fails=False):
        self.weight, self.fails = weight, fails

    def save_pretrained(self, directory):
        save_file({"weight": torch.tensor([self.weight])}, directory / "model.safetensors")
        if self.fails:
            raise OSError("disk full")
        (directory / "config.json").write_text("{}")


def write(directory, tokenizer, stage="sft", config=None, **model):
    config = config or SFTStageConfig(seed=5)
    record = make_record(stage, config, None, tokenizer)
    write_stage(directory, Model(**model), tokenizer, config, record)
    return record


def config_of(tmp_path, **changes):
    return SFTStageConfig(runs_dir=str(tmp_path), run_name="mine", **changes)


def make_checkpoint(directory, step, config=None, best=None, weight=1.0):
    """A sealed checkpoint with one weight."""
    checkpoint = directory / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    save_file({"weight": torch.tensor([weight])}, checkpoint / "policy.safetensors")
    save_config(config or SFTStageConfig(), checkpoint / "config.yaml")
    seal(checkpoint, directory, facts_of_run(directory, best))
    return checkpoint


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def take_back_end(directory):
    """Leave of a finished run what it was before its last checkpoint and its result."""
    shutil.rmtree(directory / "final")
    shutil.rmtree(latest_checkpoint(directory))


def snapshot(paths):
    """Everything below some paths, as it must stay."""
    found = {}
    for path in paths:
        if path.is_symlink():
            found[path] = os.readlink(path)
            continue
        for inner in [path, *sorted(path.rglob("*"))]:
            found[inner] = inner.read_bytes() if inner.is_file() else inner.is_dir()
    return found
