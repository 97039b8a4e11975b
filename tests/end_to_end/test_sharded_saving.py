"""Two processes of FSDP2 write a checkpoint together, or refuse it together.

Run: python -m pytest tests/end_to_end/test_sharded_saving.py
"""

from __future__ import annotations

import errno

import pytest
import torch
from accelerate import PartialState
from helpers.sharded import in_group, text_of
from helpers.tiny import tiny_model, tiny_tokenizer

from rlhf.checkpoint import NonFiniteError, tensor_files
from rlhf.checkpoint.saving import CheckpointWriter
from rlhf.checkpoint.state import save_training_state
from rlhf.checkpoint.tensor_files import stored_tensors
from rlhf.config import CheckpointConfig, InputError, PeftConfig, StageConfig
from rlhf.console import rank
from rlhf.distributed import local, make_accelerator
from rlhf.models import shard, what_to_save


def sharded_model():
    make_accelerator("float32")
    model = tiny_model("llama", tiny_tokenizer())
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    shard(model)
    return model, expected


def save(folder, step, model):
    parts = {"policy": model}, {}, {"update": step}, StageConfig()
    save_training_state(folder / f"checkpoint-{step}", *parts)
    PartialState().wait_for_everyone()


def assert_holds(checkpoint, expected):
    with stored_tensors(checkpoint, "policy") as stored:
        assert set(stored.keys()) == set(expected)
        for name, tensor in expected.items():
            assert torch.equal(stored.get_tensor(name), tensor), name


def write_and_refuse(folder):
    """Of two processes, the second has a number that is not finite, then a full disk."""
    model, expected = sharded_model()
    save(folder, 1, model)
    assert_holds(folder / "checkpoint-1", expected)
    assert len([*(folder / "checkpoint-1/policy").iterdir()]) == 2

    gather = tensor_files.gather_object
    tensor_files.gather_object = lambda values: gather([False])  # as if the disk were not shared
    save(folder, 2, model)
    tensor_files.gather_object = gather
    assert_holds(folder / "checkpoint-2", expected)
    assert (folder / "checkpoint-2/policy.safetensors").is_file()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    write, first = tensor_files.write_tensors, rank() == 0
    tensor_files.write_tensors = write if first else full
    config = StageConfig(checkpoint=CheckpointConfig(keep_last=9))
    writer = CheckpointWriter(config, in_background=True)
    writer.save(folder / "checkpoint-3", {"policy": model}, {}, {"update": 3}, None)
    kind, problem = (
        (InputError, "rank 1: OSError: .*No space left") if first else (OSError, "space")
    )
    with pytest.raises(kind, match=problem):
        writer.finish()
    tensor_files.write_tensors = write

    if not first:
        next(local(p).data for p in model.parameters() if p.dim() == 2)[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="checkpoint-4 was not written: .* holds nan"):
        save(folder, 4, model)
    with pytest.raises(NonFiniteError, match="the result was not written: .* holds nan"):
        what_to_save(model, PeftConfig(), None, folder=folder)


def test_processes_write_their_slices_together_and_refuse_together(tmp_path):
    runs, log = tmp_path / "runs", tmp_path / "log"
    runs.mkdir()
    assert in_group(write_and_refuse, runs, log=log) == [0, 0], text_of(log)
    assert sorted(path.name for path in runs.iterdir()) == ["checkpoint-1", "checkpoint-2"]
