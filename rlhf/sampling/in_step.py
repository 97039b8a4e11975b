"""Sampling from a model in slices: all processes make equally many passes.

A pass gathers the weights layer by layer, which takes all processes. One whose responses have all
ended reads a token of no response until those of the others have ended too. Before each pass, the
processes count those that still sample; that is one number, next to all weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf.config import InputError
from rlhf.console import num_processes
from rlhf.distributed import compute_device, is_sharded
from rlhf.models import unwrap_peft
from rlhf.sampling.cache import roomy_cache
from rlhf.sampling.token_loop import prefill


@contextmanager
def in_step(model: Any) -> Iterator[None]:
    """Let each process make its own number of passes through a model inside the block, if that is
    in slices. The block ends on all processes together, also after bad input on one of them, which
    `on_every_process` tells the others."""
    if num_processes() == 1 or not is_sharded(model):
        yield
        return
    device, failure = compute_device(model), None

    def count(*_: Any) -> None:
        _count(True, device)

    with _rounding_anew(model):
        hook = model.register_forward_pre_hook(count, prepend=True)  # before any layer is gathered
        try:
            yield
        except InputError as error:
            failure = error
        finally:
            hook.remove()
        _wait(model, device)
    if failure is not None:
        raise failure


@contextmanager
def _rounding_anew(model: Any) -> Iterator[None]:
    """Inside the block, autocast keeps no rounded copies of weights: those of all layers would take
    as much memory as a copy of the model. accelerate's own autocast, around `model.forward`, would
    switch that on again."""

    def keep_none(*_: Any) -> None:
        torch.set_autocast_cache_enabled(False)

    keeps = torch.is_autocast_cache_enabled()
    hook = unwrap_peft(model).base_model.register_forward_pre_hook(keep_none)
    try:
        yield
    finally:
        hook.remove()
        torch.set_autocast_cache_enabled(keeps)


def _wait(model: Any, device: torch.device) -> None:
    """Take part in the passes of the processes that still sample."""
    while _count(False, device).item():
        prefill(model, [[0]], roomy_cache(unwrap_peft(model).config))


def _count(samples: bool, device: torch.device) -> Tensor:
    """Number of processes that sample, this one included or not, (); only `item` waits for it."""
    number = torch.full((), float(samples), device=device)
    dist.all_reduce(number)
    return number
