"""Devices and processes: the default device, the Accelerator of a stage, errors in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object

from rlhf.config import InputError
from rlhf.models import use_bfloat16

Result = TypeVar("Result")


def default_device() -> str:
    """Return "cuda" if there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def make_accelerator(precision: str) -> Accelerator:
    """Make the Accelerator of a stage, also after other stages in the same process.

    accelerate keeps one state per process and refuses a different precision or device. The models
    of earlier stages no longer need it, so it is reset; the process group is kept.

    Raises:
        InputError: one of several processes was on a different device before.
    """
    cpu = not torch.cuda.is_available()
    state = PartialState._shared_state
    other_device = bool(state) and cpu != (state["device"].type == "cpu")
    if other_device and state["num_processes"] > 1:
        raise InputError(
            f"this process was in a group of {state['num_processes']} on {state['device']}, and a "
            f"stage on {'the CPU' if cpu else 'a GPU'} cannot join it; run that stage by itself"
        )
    AcceleratorState._reset_state(reset_partial_state=other_device)
    return Accelerator(cpu=cpu, mixed_precision="bf16" if use_bfloat16(precision) else "no")


def on_every_process(task: Callable[[], Result], accelerator: Accelerator) -> Result:
    """Run a task; bad input that ends it on one process ends it on all of them.

    Otherwise the other processes would wait for the failed one, and none could save.

    Raises:
        InputError: that of the first process that failed, with its number.
    """
    if accelerator.num_processes == 1:
        return task()
    error: InputError | None = None
    try:
        result = task()
    except InputError as caught:
        error = caught
    messages = gather_object([None if error is None else str(error)])
    for rank, message in enumerate(messages):
        if message is not None:
            raise InputError(f"rank {rank}: {message}") from error
    return result
