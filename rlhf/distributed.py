"""What differs between one process and many: the Accelerator of a stage."""

from __future__ import annotations

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState

from rlhf.config import InputError
from rlhf.models import use_bfloat16


def make_accelerator(precision: str) -> Accelerator:
    """Make the Accelerator of a stage, also after other stages in the same process.

    accelerate keeps one state for each process and refuses another precision or device. The models
    of the stages before are done with theirs, so it is made anew, and the process group stays.

    Args:
        precision: "float32", "bfloat16", or "auto" (bfloat16 on a GPU that has it).

    Raises:
        InputError: one of several processes was on another device before.
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
