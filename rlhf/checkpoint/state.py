"""The content of a PPO checkpoint: weights, optimiser states, random numbers, plain values."""

from __future__ import annotations

import json
import random
import secrets
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlhf.checkpoint.disk import complete_or_nothing, disk_errors
from rlhf.checkpoint.finite import NonFiniteError, find_non_finite, find_non_finite_on_any
from rlhf.checkpoint.lock import POLL_SECONDS, on_main_process
from rlhf.checkpoint.ownership import facts_of_run, refuse_taken_steps, seal, step_of
from rlhf.checkpoint.tensor_files import Part, divide, in_slices, stored_tensors, write_parts
from rlhf.config import CONFIG_FILE, InputError, StageConfig, save_config
from rlhf.console import is_main_process, num_processes, rank
from rlhf.distributed import detached
from rlhf.failures import leave_word, read_word
from rlhf.slices import read_stored
from rlhf.zero import Scattered, SlicedOptimizer, put, shape_of, written_weights


class Incomplete(Exception):
    """Another process did not write its part of a checkpoint; its own error says why."""


@dataclass
class TakenState:
    """The state of a run at one moment, to be written.

    Attributes:
        directory: `<stage directory>/checkpoint-<step>`.
        temporary: where it is written until it is complete.
        opened: what gives it its name then, on the main process.
        tensors: name of a file or folder -> what this process writes there.
        slices: the names that are folders: each process writes its own slices into them.
        values: name of a JSON file -> its content.
        facts: of the manifest.
        token: with it, processes leave word that they have written their slices.
    """

    directory: Path
    config: StageConfig
    temporary: Path
    opened: ExitStack
    tensors: dict[str, dict[str, Part]]
    slices: list[str]
    values: dict[str, str]
    facts: dict[str, Any]
    token: str

    @property
    def gathers(self) -> bool:
        """True if the processes must write it together: DeepSpeed has its slices, or they share no
        disk."""
        parts = (part for parts in self.tensors.values() for part in parts.values())
        return any(isinstance(part.tensor, DTensor | Scattered) for part in parts)

    def write(self, go_on: Callable[[], None] = lambda: None) -> None:
        """Write it, complete or not at all, as safetensors and JSON; nothing is pickled. All
        processes call this.

        Args:
            go_on: called again and again; raises to end the writing.
        """
        with self.opened:
            try:
                write_parts(self.temporary, self.tensors, self.slices, go_on)
            except BaseException as error:
                self._leave_word(repr(error))
                raise
            self._leave_word("")
            if is_main_process():
                self._await_others(go_on)
                for name, text in self.values.items():
                    (self.temporary / f"{name}.json").write_text(text, encoding="utf-8")
                save_config(self.config, self.temporary / CONFIG_FILE)
                seal(self.temporary, self.directory.parent, self.facts)

    def _leave_word(self, word: str) -> None:
        if self.slices and not is_main_process():
            leave_word(f"{self.token}/{rank()}", word)

    def _await_others(self, go_on: Callable[[], None]) -> None:
        limit = self.config.distributed_timeout
        until = time.monotonic() + limit
        for other in range(1, num_processes() if self.slices else 1):
            while (word := read_word(f"{self.token}/{other}")) is None:
                go_on()
                if time.monotonic() > until:
                    word = f"no word for distributed_timeout={limit} seconds"
                    break
                time.sleep(POLL_SECONDS)
            if word:
                raise Incomplete(f"rank {other} did not write its part of {self.directory}: {word}")


def take_state(
    directory: Path,
    modules: dict[str, Any],
    optimizers: dict[str, Any],
    state: dict[str, Any],
    config: StageConfig,
    random_numbers: dict[str, Any] | None = None,
    copies: bool = False,
) -> TakenState:
    """Take the state of a run for a checkpoint; all processes call this together.

    The main process writes what it has whole. What is in slices, each process writes itself, where
    all see the directory; any number of processes can read that.

    Args:
        directory: `<stage directory>/checkpoint-<step>`.
        modules: name -> module (only its trainable parameters are written) or dict of tensors.
        state: JSON values, e.g. the number of finished updates. `state["best"]["update"]`, if
            present, names the best checkpoint so far, which is kept together with this one.
        random_numbers: `random_state` at the moment that is saved; None for now. A user's scorer
            may draw from these generators.
        copies: take copies in main memory, so that training can go on.

    Raises:
        InputError: on all processes, if the directory cannot be written to.
        NonFiniteError: on all processes, if a number that they would write is not finite.
    """
    files = {name: trained(module) for name, module in modules.items()}
    files |= {f"optimizer_{name}": moments(one) for name, one in optimizers.items()}
    if copies or in_slices(files):  # else the files are searched before they get their name
        every = ((n, key, t) for n, ts in files.items() for key, t in ts.items())
        named = ((f"{n}.safetensors: {key}", t) for n, key, t in every if isinstance(t, Tensor))
        if problem := find_non_finite_on_any(named):
            raise NonFiniteError(f"{directory} was not written: {problem}")
    opened = ExitStack()
    temporary, token = on_main_process(partial(_begin, directory, opened))
    files = {name: written_weights(own) for name, own in files.items()}
    tensors, slices = divide(temporary, files, copies)
    values = {"state": state, "random": random_numbers or random_state()}
    texts = {name: json.dumps(value, indent=2) for name, value in values.items()}
    facts = facts_of_run(directory.parent, (state.get("best") or {}).get("update"))
    place = directory, config, temporary, opened
    return TakenState(*place, tensors, slices, texts, facts, token)


def _begin(directory: Path, opened: ExitStack) -> tuple[Path, str]:
    """Make the temporary directory of a checkpoint; return it, and a token."""
    refuse_taken_steps(directory.parent, [step_of(directory)])
    with disk_errors(directory.parent, "continue with resume=auto"):
        return opened.enter_context(complete_or_nothing(directory)), secrets.token_hex(8)


def save_training_state(*arguments: Any, **options: Any) -> None:
    """Write a checkpoint at once; the arguments are those of `take_state`."""
    take_state(*arguments, **options).write()


def load_training_state(
    directory: Path, modules: dict[str, Any], optimizers: dict[str, Any]
) -> dict[str, Any]:
    """Load what `save_training_state` wrote, in place, and return the JSON values."""
    load_modules(directory, modules)
    for name, optimizer in optimizers.items():
        load_moments(directory, f"optimizer_{name}", optimizer)
    restore_random_state(json.loads((directory / "random.json").read_text(encoding="utf-8")))
    return json.loads((directory / "state.json").read_text(encoding="utf-8"))


def load_moments(directory: Path, name: str, optimizer: Any) -> None:
    """Give an optimiser the state that a checkpoint has under a name."""
    file = directory / f"{name}.safetensors"
    if isinstance(optimizer, SlicedOptimizer):
        with stored_tensors(directory, name) as saved:
            optimizer.put(saved.keys(), partial(read_finite, file, saved))
        return
    content = optimizer.state_dict()
    content["state"] = {}
    own = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    with stored_tensors(directory, name) as saved:
        for key in saved.keys():
            index, _, entry = key.partition(".")
            value = read_finite(file, saved, key, own[int(index)])
            content["state"].setdefault(int(index), {})[entry] = value
    optimizer.load_state_dict(content)


def load_modules(directory: Path, modules: dict[str, Any]) -> None:
    """Load only the named modules of a checkpoint, in place.

    Raises:
        InputError: the checkpoint belongs to another model, or a tensor in it is not finite.
    """
    for name, module in modules.items():
        file, own = directory / f"{name}.safetensors", trained(module)
        with stored_tensors(directory, name) as saved, torch.no_grad():
            shapes = {key: saved.get_slice(key).get_shape() for key in saved.keys()}
            if shapes != {key: [*shape_of(value)] for key, value in own.items()}:
                what = "belong to another model or adapter configuration"
                raise InputError(f"{directory}: the {name} weights there {what}")
            for key, value in own.items():
                put(value, read_finite(file, saved, key, value))


def read_finite(file: Path, saved: Any, key: str, own: Tensor) -> Tensor:
    """Read a tensor; an older version may have written non-finite numbers."""
    value = read_stored(saved, key, own)
    if problem := find_non_finite([(key, value)]):
        fix = f"delete {file.parent}, and resume=auto goes on from the one before"
        raise InputError(f"{file}: {problem}; {fix}")
    return value


def trained(module: Any) -> dict[str, Tensor]:
    """The parameters of a module that train, by name; a dict of tensors is given back."""
    if isinstance(module, dict):
        return module
    return {name: detached(p) for name, p in module.named_parameters() if p.requires_grad}


def moments(optimizer: Any) -> dict[str, Any]:
    """The tensors of an optimiser's state: "3.exp_avg"."""
    if isinstance(optimizer, SlicedOptimizer):
        return optimizer.written()
    return {
        f"{index}.{key}": torch.as_tensor(value)
        for index, values in optimizer.state_dict()["state"].items()
        for key, value in values.items()
    }


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
