"""Tensors that several processes wrote in slices are read by any number of them, and by torch.

Run: python -m pytest tests/checkpoint/test_tensor_files.py
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageReader

from rlhf.checkpoint.tensor_files import Part, slice_file, stored_tensors, write_tensors


def tensors():
    """Tables, a vector, one row, a scalar, and three types."""
    torch.manual_seed(0)
    numbers = {"table": torch.randn(5, 3), "vector": torch.randn(7), "row": torch.randn(1, 4)}
    rest = {"half": torch.randn(6, 2).bfloat16(), "ids": torch.arange(9)}
    return numbers | rest | {"0.step": torch.tensor(3.0), "deep": torch.randn(4, 2, 3)}


def write_in_slices(folder, world):
    """Write as FSDP2 cuts: equal numbers of rows, the last processes have fewer or none; what is no
    slice is the first one's."""
    folder.mkdir()
    for rank in range(world):
        parts = {}
        for name, tensor in tensors().items():
            each = -(-len(tensor) // world) if tensor.dim() else 0
            rows = tensor[each * rank : each * (rank + 1)] if tensor.dim() else tensor
            if rows.numel() if tensor.dim() else rank == 0:
                parts[name] = Part(rows, each * rank)
        write_tensors(slice_file(folder, rank), parts, lambda: None)


def assert_equal(found, expected):
    assert found.dtype == expected.dtype and torch.equal(found, expected)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_slices_are_read_whole_and_row_by_row(world, tmp_path):
    write_in_slices(tmp_path / "policy", world)
    with stored_tensors(tmp_path, "policy") as stored:
        assert sorted(stored.keys()) == sorted(tensors())
        for name, expected in tensors().items():
            assert_equal(stored.get_tensor(name), expected)
            assert stored.get_slice(name).get_shape() == [*expected.shape]
            for first in range(len(expected) if expected.dim() else 0):
                for end in range(first, len(expected) + 1):
                    assert_equal(stored.get_slice(name)[first:end], expected[first:end])


def test_one_file_of_whole_tensors_is_read_in_the_same_way(tmp_path):
    parts = {name: Part(tensor) for name, tensor in tensors().items()}
    write_tensors(tmp_path / "policy.safetensors", parts, lambda: None)
    loaded = load_file(tmp_path / "policy.safetensors")
    with stored_tensors(tmp_path, "policy") as stored:
        for name, expected in tensors().items():
            assert_equal(stored.get_tensor(name), expected)
            assert_equal(loaded[name], expected)


@pytest.mark.filterwarnings("ignore")
def test_torch_reads_the_slices_and_there_is_no_pickle(tmp_path):
    write_in_slices(tmp_path / "policy", 3)
    found = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
    reader = HuggingFaceStorageReader(str(tmp_path / "policy"))
    dcp.load(found, storage_reader=reader, no_dist=True)
    for name, expected in tensors().items():
        assert_equal(found[name], expected)
    assert {file.suffix for file in (tmp_path / "policy").iterdir()} == {".safetensors"}
