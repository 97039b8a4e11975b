"""The tensors of a checkpoint as safetensors: whole in one file, or each process's slices in a file
of its own, in a folder. Both are read in the same way, by any number of processes.

Slices have the names and metadata of `HuggingFaceStorageWriter` in torch.distributed.checkpoint,
and its `HuggingFaceStorageReader` reads them. The writer itself is left out: it plans with all
processes, which a thread cannot do while these sample; it holds each file twice in memory; and what
joins its slices writes zeros for scalars.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlhf.console import is_main_process, rank
from rlhf.distributed import local, whole
from rlhf.slices import own_rows
from rlhf.zero import Scattered

SLICES = "DCP_SHARDING_INFO"  # in the metadata: name of a tensor -> where the slice begins
# Names of types in the header of a safetensors file.
TYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Part(NamedTuple):
    """What is written of a tensor: all of it, or rows of it from the row `first` on."""

    tensor: Tensor
    first: int = 0


# --- Writing --------------------------------------------------------------------------------------


def divide(
    directory: Path, files: dict[str, dict[str, Tensor]], copies: bool = False
) -> tuple[dict[str, dict[str, Part]], list[str]]:
    """Say what this process writes of the tensors of some files; all processes call this.

    Returns:
        Name of a file -> the parts; and the names that become folders with each process's slices.
        Where processes share no disk, there are none: all gather the tensors together.
    """
    slices = in_slices(files)
    if slices:
        for name in slices if is_main_process() else ():
            (directory / name).mkdir(parents=True, exist_ok=True)
        PartialState().wait_for_everyone()
        if not all(gather_object([(directory / slices[0]).is_dir()])):
            for name in slices if is_main_process() else ():
                (directory / name).rmdir()
            return {name: {n: Part(t) for n, t in own.items()} for name, own in files.items()}, []
    return {name: _own_parts(own, copies) for name, own in files.items()}, slices


def in_slices(files: dict[str, dict[str, Any]]) -> list[str]:
    """The names of the files whose tensors are in slices on the processes."""
    return [n for n, ts in files.items() if any(isinstance(t, DTensor) for t in ts.values())]


def _own_parts(tensors: Mapping[str, Tensor], copies: bool) -> dict[str, Part]:
    """What this process writes: its slices, and on the main process what is whole. What DeepSpeed
    has in slices, all gather together."""
    parts = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Scattered):
            parts[name] = Part(tensor)
            continue
        is_slice, held = isinstance(tensor, DTensor), local(tensor).detach()
        if held.numel() if is_slice else is_main_process():
            first = own_rows(tensor)[0] if is_slice else 0
            parts[name] = Part(held.to("cpu", copy=True) if copies else held, first)
    return parts


def write_parts(
    directory: Path,
    tensors: dict[str, dict[str, Part]],
    slices: list[str],
    go_on: Callable[[], None] = lambda: None,
) -> None:
    """Write what `divide` has returned; it is taken out of `tensors`, to free a copy's memory."""
    for name in list(tensors):
        file: Path | None = directory / f"{name}.safetensors"
        if name in slices:
            file = slice_file(directory / name, rank())
        elif not is_main_process():
            file = None
        write_tensors(file, tensors.pop(name), go_on)


def slice_file(folder: Path, number: int) -> Path:
    """The file of a process: `policy/shard-00002-model-00001-of-00001.safetensors` for rank 1."""
    return folder / f"shard-{number + 1:05d}-model-00001-of-00001.safetensors"


def write_tensors(file: Path | None, parts: Mapping[str, Part], go_on: Callable[[], None]) -> None:
    """Write tensors one after the other. Those that are in slices on the processes are gathered:
    then all call this, the main one with a file, and no process holds more than one.

    Python threads go on meanwhile, unlike with `safetensors.torch.save_file`.

    Args:
        go_on: called before each tensor; raises to end the writing.
    """
    ordered = sorted(parts.items(), key=lambda item: -item[1].tensor.itemsize)  # for alignment
    firsts = {n: [part.first, *[0] * part.tensor.dim()][: part.tensor.dim()] for n, part in ordered}
    slices = json.dumps({name: {"saved_offsets": first} for name, first in firsts.items()})
    header: dict[str, Any] = {
        "__metadata__": {"format": "pt", "DCP_VERSION": "1.0", SLICES: slices}
    }
    end = 0
    for name, (tensor, _) in ordered:
        begin, end = end, end + tensor.numel() * tensor.itemsize
        shape, kind = [*tensor.shape], TYPES[tensor.dtype]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with nullcontext() if file is None else open(file, "wb") as stream:
        if stream is not None:
            stream.write(len(text).to_bytes(8, "little") + text)
        for _, (tensor, _) in ordered:
            go_on()
            numbers = whole(tensor)
            if stream is not None:
                numbers = numbers.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                stream.write(numbers.numpy().data)
        if stream is not None:
            stream.flush()
            os.fsync(stream.fileno())


# --- Reading --------------------------------------------------------------------------------------


class Stored:
    """Tensors of one file, or joined from the slices in several; `safe_open`'s way of reading."""

    def __init__(self, files: list[Any]):
        """Take files of `safe_open`."""
        self._rows: dict[str, list[tuple[int, Any]]] = {}  # name -> first row, file
        for file in files:
            slices = json.loads((file.metadata() or {}).get(SLICES, "{}"))
            for name in file.keys():
                first = slices[name]["saved_offsets"] if name in slices else []
                self._rows.setdefault(name, []).append((first[0] if first else 0, file))

    def keys(self) -> list[str]:
        """The names of the tensors."""
        return list(self._rows)

    def get_tensor(self, name: str) -> Tensor:
        """The whole tensor."""
        files = [file for _, file in self._rows[name]]
        return files[0].get_tensor(name) if len(files) == 1 else self.get_slice(name)[:]

    def get_slice(self, name: str) -> Any:
        """What has `get_shape()`, and gives rows by `[first:end]`."""
        rows = sorted(self._rows[name], key=lambda row: row[0])
        parts = [file.get_slice(name) for _, file in rows]
        return parts[0] if len(parts) == 1 else _Joined(parts)


class _Joined:
    """Slices of a tensor, one after the other."""

    def __init__(self, parts: list[Any]):
        self._parts = parts

    def get_shape(self) -> list[int]:
        _, *others = self._parts[0].get_shape()
        return [sum(part.get_shape()[0] for part in self._parts), *others]

    def __getitem__(self, rows: slice) -> Tensor:
        first, end, _ = rows.indices(self.get_shape()[0])
        found, begin = [], 0
        for part in self._parts:
            number = part.get_shape()[0]
            own_first, own_end = max(first - begin, 0), min(end - begin, number)
            if own_first < own_end:
                found.append(part[own_first:own_end])
            begin += number
        return torch.cat(found or [self._parts[0][:0]])


@contextmanager
def stored_tensors(directory: Path, name: str) -> Iterator[Stored]:
    """Open the tensors of this name in a checkpoint."""
    files = sorted((directory / name).glob("*.safetensors"))
    with ExitStack() as stack:
        opened = [
            stack.enter_context(safe_open(file, framework="pt"))
            for file in files or [directory / f"{name}.safetensors"]
        ]
        yield Stored(opened)
