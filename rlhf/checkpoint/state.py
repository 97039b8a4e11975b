"""The content of a PPO checkpoint: weights, optimiser states, random numbers, plain values."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlhf.checkpoint.disk import complete_or_nothing
from rlhf.checkpoint.finite import find_non_finite
from rlhf.checkpoint.ownership import refuse_taken_steps, seal, step_of
from rlhf.config import CONFIG_FILE, InputError, StageConfig, save_config
from rlhf.console import is_main_process
from rlhf.distributed import read_stored, whole

# Names of types in the header of a safetensors file.
TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def save_training_state(
    directory: Path,
    modules: dict[str, Any],
    optimizers: dict[str, Any],
    state: dict[str, Any],
    config: StageConfig,
    random_numbers: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint, complete or not at all, as safetensors and JSON; nothing is pickled.

    The main process writes. Where the processes shard the weights, all of them call this, and the
    files hold whole tensors, gathered one after the other: any number of processes can read them.

    Args:
        directory: `<stage directory>/checkpoint-<step>`.
        modules: name -> module (only its trainable parameters are written) or dict of tensors.
        state: JSON values, e.g. the number of finished updates. `state["best"]["update"]`, if
            present, names the best checkpoint so far, which is kept together with this one.
        random_numbers: `random_state` at the moment that is saved; None for now. A user's scorer
            may draw from these generators.
    """
    files = {name: _tensors(module) for name, module in modules.items()}
    for name, optimizer in optimizers.items():
        files[f"optimizer_{name}"] = {
            f"{index}.{key}": torch.as_tensor(value)
            for index, values in optimizer.state_dict()["state"].items()
            for key, value in values.items()
        }
    if not is_main_process():
        for tensors in files.values():
            _save_tensors(tensors, None)
        return
    refuse_taken_steps(directory.parent, [step_of(directory)])
    with complete_or_nothing(directory) as temporary:
        for name, tensors in files.items():
            _save_tensors(tensors, temporary / f"{name}.safetensors")
        values = {"state": state, "random": random_numbers or random_state()}
        for name, value in values.items():
            text = json.dumps(value, indent=2)
            (temporary / f"{name}.json").write_text(text, encoding="utf-8")
        save_config(config, temporary / CONFIG_FILE)
        seal(temporary, directory.parent, (state.get("best") or {}).get("update"))


def _save_tensors(tensors: Mapping[str, Tensor], file: Path | None) -> None:
    """Write whole tensors as safetensors. Sharded ones are gathered and written one after the
    other: all processes call this, the main one with a file, and it holds one of them at a time."""
    if not any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        if file is not None:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
        return
    header, end = {}, 0
    for name, tensor in tensors.items():
        kind, begin = TYPES[tensor.dtype], end
        end += tensor.numel() * tensor.itemsize
        header[name] = {"dtype": kind, "shape": [*tensor.shape], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with nullcontext() if file is None else open(file, "wb") as stream:
        if stream is not None:
            stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            gathered = whole(tensor)
            if stream is not None:
                numbers = gathered.detach().cpu().reshape(-1).view(torch.uint8)
                stream.write(numbers.numpy().data)


def load_training_state(
    directory: Path, modules: dict[str, Any], optimizers: dict[str, Any]
) -> dict[str, Any]:
    """Load what `save_training_state` wrote, in place, and return the JSON values."""
    load_modules(directory, modules)
    for name, optimizer in optimizers.items():
        content = optimizer.state_dict()
        content["state"] = {}
        own = [p.detach() for group in optimizer.param_groups for p in group["params"]]
        file = directory / f"optimizer_{name}.safetensors"
        with safe_open(file, framework="pt") as saved:
            for key in saved.keys():
                index, _, entry = key.partition(".")
                value = _read_finite(file, saved, key, own[int(index)])
                content["state"].setdefault(int(index), {})[entry] = value
        optimizer.load_state_dict(content)
    restore_random_state(json.loads((directory / "random.json").read_text(encoding="utf-8")))
    return json.loads((directory / "state.json").read_text(encoding="utf-8"))


def load_modules(directory: Path, modules: dict[str, Any]) -> None:
    """Load only the named modules of a checkpoint, in place.

    Raises:
        InputError: the checkpoint belongs to another model, or a tensor in it is not finite.
    """
    for name, module in modules.items():
        file, own = directory / f"{name}.safetensors", _tensors(module)
        with safe_open(file, framework="pt") as saved, torch.no_grad():
            shapes = {key: saved.get_slice(key).get_shape() for key in saved.keys()}
            if shapes != {key: [*value.shape] for key, value in own.items()}:
                what = "belong to another model or adapter configuration"
                raise InputError(f"{directory}: the {name} weights there {what}")
            for key, value in own.items():
                value.copy_(_read_finite(file, saved, key, value))


def _read_finite(file: Path, saved: Any, key: str, own: Tensor) -> Tensor:
    """Read a tensor; an older version may have written non-finite numbers."""
    value = read_stored(saved, key, own)
    if problem := find_non_finite([(key, value)]):
        fix = f"delete {file.parent}, and resume=auto goes on from the one before"
        raise InputError(f"{file}: {problem}; {fix}")
    return value


def _tensors(module: Any) -> dict[str, Tensor]:
    if isinstance(module, dict):
        return module
    return {name: p.data for name, p in module.named_parameters() if p.requires_grad}


def random_state() -> dict[str, Any]:
    """Return the states of this process's global random number generators, as JSON values."""
    numpy_state = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": random.getstate(),
        "numpy": numpy_state,
        "torch": torch.get_rng_state().tolist(),
        "cuda": [generator.tolist() for generator in cuda],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([torch.tensor(s, dtype=torch.uint8) for s in state["cuda"]])
