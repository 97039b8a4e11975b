"""Devices and processes: the default device, and the Accelerator of a stage."""

from __future__ import annotations

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState

from rlhf.config import InputError
from rlhf.models import use_bfloat16


def default_device() -> str:
    """Return "cuda" if there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def make_accelerator(precision: str) -> Accelerator:
    """Make the Accelerator of a stage, also after other stages in the same process.

    accelerate keeps one state per process and refuses a different precision or device. The models
    of earlier stages no longer need it, so it is reset; the process group is kept.

    Args:
        precision: "float32", "bfloat16", or "auto" (bfloat16 on a GPU that has it).

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
