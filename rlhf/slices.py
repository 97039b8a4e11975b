"""Tensors in slices on the processes, FSDP2's or DeepSpeed's: which rows are here, reading those
from files, and copies.

Who holds which weights is decided in `distributed.py`.
"""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from rlhf.distributed import local
from rlhf.zero import is_zero, shape_of, unit_numel


def own_rows(tensor: Tensor) -> tuple[int, int]:
    """First and last + 1 of the rows of a tensor that this process holds.

    5 rows over 4 processes: 0 to 2, 2 to 4, 4 to 5, 5 to 5
    """
    if not isinstance(tensor, DTensor):
        return 0, len(tensor)
    mesh = tensor.device_mesh
    each = -(-len(tensor) // mesh.size())
    first, end = (min(each * (mesh.get_local_rank() + i), len(tensor)) for i in (0, 1))
    return first, end


def read_rows(target: Tensor, stored: Any) -> None:
    """Copy this process's rows of a stored tensor, in place. Rows that a table has beyond those of
    its file are their mean.

    Args:
        target: a parameter, in slices or whole.
        stored: a tensor, or of `safe_open(...).get_slice`.
    """
    first, end = own_rows(target)
    mine = local(target)
    rows = len(stored) if isinstance(stored, Tensor) else stored.get_shape()[0]
    known = max(0, min(end, rows) - first)
    if known:
        mine[:known] = stored[first : first + known].to(mine)
    if known < end - first:
        mine[known:] = stored[:].to(mine).mean(dim=0)


def read_stored(file: Any, name: str, other: Tensor) -> Tensor:
    """A tensor in a safetensors file, or this process's slice of it, if `other` is a slice of a
    tensor of that shape.

    Args:
        file: of `safe_open`.
    """
    if not isinstance(other, DTensor) or [*other.shape] != file.get_slice(name).get_shape():
        return file.get_tensor(name)
    result = torch.empty_like(other)
    read_rows(result, file.get_slice(name))
    return result


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, which every process has, as `other` is: whole, or this process's slice."""
    if not isinstance(other, DTensor):
        return tensor
    tensor = tensor.to(other.device, other.dtype)
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def load_optimizer(optimizer: Any, content: dict[str, Any]) -> None:
    """Give an optimiser a state with whole tensors; its weights may be in slices."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in content["state"].items():
        own = parameters[int(index)]
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == own.shape:
                values[name] = like(value, own)
    optimizer.load_state_dict(content)


def in_file(tensor: Tensor, folder: Path | None) -> Tensor:
    """A copy of a tensor that takes no main memory: it is mapped from a file in a folder, which has
    no name and ends with the copy."""
    if not tensor.numel():
        return tensor.cpu()
    with TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, tensor.nbytes)  # a full disk is an error here
        path, kind = f"/proc/self/fd/{file.fileno()}", tensor.dtype
        copy = torch.from_file(path, shared=True, size=tensor.numel(), dtype=kind)
    return copy.view(tensor.shape).copy_(tensor)


def gathered_bytes(model: nn.Module) -> int:
    """Bytes of the largest unit of a sharded model, whose weights are whole while it runs."""
    if any(map(is_zero, model.parameters())):
        return (
            torch.float32.itemsize * 2 * unit_numel(model)
        )  # one is used, and one is gathered ahead
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    inner = {id(p) for unit in units if unit is not model for p in unit.parameters()}
    rest = sum(p.nbytes for p in model.parameters() if id(p) not in inner)
    sizes = [sum(p.nbytes for p in unit.parameters()) for unit in units if unit is not model]
    return max([rest, *sizes])


def sliced_bytes(model: nn.Module) -> int:
    """Bytes of the weights of a model that are in slices, all slices together: what each process
    gathers in a pass."""
    weights = [p for p in model.parameters() if isinstance(p, DTensor) or is_zero(p)]
    return sum(shape_of(weight).numel() * weight.itemsize for weight in weights)
