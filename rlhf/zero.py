"""Weights and optimiser states that DeepSpeed keeps in slices: dividing, gathering, saving them.

Under ZeRO-2, each process has whole weights and a slice of the optimiser's states. Under ZeRO-3, a
weight is an empty tensor to everybody but DeepSpeed, and its slice is `ds_tensor`. Left out: passes
and steps, which are DeepSpeed's own. DeepSpeed is imported only in a run that uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf.console import is_main_process, num_processes, rank


def is_zero(tensor: Any) -> bool:
    """True for a weight that DeepSpeed keeps in slices."""
    return hasattr(tensor, "ds_id")


def shape_of(tensor: Any) -> torch.Size:
    """The shape of a weight, whole or in slices."""
    return getattr(tensor, "ds_shape", tensor.shape)


def own_numbers(weight: Any) -> Tensor:
    """This process's slice of a weight, (N,), without the padding at its end."""
    held = weight.ds_tensor
    left = weight.ds_numel - held.numel() * weight.ds_zero_partition_rank
    return held[: max(0, min(left, held.numel()))]


def divide_weights(weights: Iterable[nn.Parameter], on_cpu: bool) -> None:
    """Give each process its slice of weights that all have whole, one after the other, in place.

    Args:
        on_cpu: slices wait in main memory.
    """
    from deepspeed import zero

    place = {"remote_device": "cpu" if on_cpu else None, "mem_efficient_linear": False}
    for weight in weights:
        if not is_zero(weight):
            zero.Init(module=nn.ParameterList([weight]), dtype=torch.float32, **place)


@contextmanager
def gathering(weights: Iterable[Any]) -> Iterator[None]:
    """Inside the block, weights are whole; all processes call this together."""
    divided = [weight for weight in weights if is_zero(weight)]
    if not divided:
        yield
        return
    from deepspeed import zero

    with zero.GatheredParameters(divided):
        yield


def gathered(weight: Any) -> Tensor:
    """A whole copy of a weight in slices; all processes call this together."""
    if weight.shape == weight.ds_shape:  # gathered at the moment
        return weight.detach().clone()
    with gathering([weight]):
        return weight.detach().clone()


@torch.no_grad()
def put(weight: Any, value: Tensor) -> None:
    """Give a weight the numbers of a whole tensor, which every process has, in place."""
    if not is_zero(weight):
        weight.copy_(value)
        return
    from deepspeed import zero

    with zero.GatheredParameters([weight], modifier_rank=0):
        if is_main_process():
            weight.copy_(value)


@contextmanager
def runnable(model: Any, on_cpu: bool) -> Iterator[None]:
    """Inside the block, a model whose weights are in slices can be run; a Trainer's engine, which
    does that later, needs an optimiser."""
    if not any(map(is_zero, model.parameters())):
        yield
        return
    import deepspeed

    zero: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    if on_cpu:
        zero["offload_param"] = {"device": "cpu"}
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    try:
        yield
    finally:
        engine.empty_partition_cache()  # of passes whose gradients nobody asked for
        engine.destroy()


# --- Checkpoints ----------------------------------------------------------------------------------


class Scattered:
    """A weight, or what the optimiser keeps for it, as a tensor that is written; it is gathered
    only then."""

    def __init__(self, weight: Any, gather: Callable[[], Tensor]):
        self.shape, self.dtype, self.full_tensor = shape_of(weight), torch.float32, gather
        self.itemsize = self.dtype.itemsize

    def numel(self) -> int:
        return self.shape.numel()

    def dim(self) -> int:
        return len(self.shape)


def written_weights(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Weights for a checkpoint, which all processes write together."""
    return {
        name: Scattered(weight, partial(gathered, weight)) if is_zero(weight) else weight
        for name, weight in weights.items()
    }


def written_moments(optimizer: Any, weights: list[Any]) -> dict[str, Any]:
    """The states of DeepSpeed's optimiser for a checkpoint: "3.exp_avg", as torch names those of
    `weights`, in the optimiser's order."""
    from deepspeed.utils import safe_get_full_optimizer_state as get

    found: dict[str, Any] = {}
    _link_states(optimizer.optimizer)
    for key, value in next(iter(optimizer.state.values()), {}).items():
        for index, weight in enumerate(weights):
            if isinstance(value, Tensor) and value.dim():
                found[f"{index}.{key}"] = Scattered(weight, partial(get, weight, key))
            else:  # steps
                found[f"{index}.{key}"] = torch.tensor(float(value))
    return found


def put_moments(optimizer: Any, weights: list[Any], read: Callable[[str, Any], Tensor]) -> None:
    """Give DeepSpeed's optimiser, which has not made a step, states from a checkpoint.

    Args:
        read: name of a state, and its weight -> the whole tensor.
    """
    zero = optimizer.optimizer  # of accelerate's wrapper
    inner = zero.optimizer  # torch's, or DeepSpeed's own on the CPU
    stage3 = hasattr(zero, "fp32_partitioned_groups_flat")
    flat = zero.fp32_partitioned_groups_flat if stage3 else zero.single_partition_of_fp32_groups
    steps = read("0.step", None)
    for numbers in flat:
        states = {key: torch.zeros_like(numbers) for key in ("exp_avg", "exp_avg_sq")}
        counts = isinstance(inner, torch.optim.AdamW)
        inner.state[numbers] = {"step": steps.clone() if counts else int(steps)} | states
    _link_states(zero)
    for index, weight in enumerate(weights):
        for key in ("exp_avg", "exp_avg_sq"):
            _put_moment(weight, key, read(f"{index}.{key}", weight), stage3)


def _link_states(zero: Any) -> None:
    """Let the weights of ZeRO-2 know their states. DeepSpeed does so after the step of the first
    group of weights, when the others have no states yet (0.19.8)."""
    from deepspeed.utils import lazy_init_hp_params_optimizer_state as link

    groups = getattr(zero, "bit16_groups", [])
    for group, numbers in zip(
        groups, getattr(zero, "single_partition_of_fp32_groups", []), strict=True
    ):
        link(group, numbers, zero.optimizer.state)


def _put_moment(weight: Any, key: str, value: Tensor, stage3: bool) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if not stage3:
        safe_set_full_optimizer_state(weight, value, key)
        return
    each = weight.ds_tensor.numel()
    padded = F.pad(value.flatten(), (0, each * num_processes() - value.numel()))
    safe_set_local_optimizer_state(weight, padded[each * rank() :][:each], key)
