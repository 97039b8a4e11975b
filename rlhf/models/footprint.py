"""Memory of one model: weights, gradients, Adam states, and what autograd keeps of a forward pass.

All of it can be counted on a model without weights, too (`torch._subclasses.FakeTensorMode`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf.console import num_processes
from rlhf.distributed import is_sharded, local, zero_stage
from rlhf.models.roles import own_parameters
from rlhf.models.shared_slices import slices_of
from rlhf.slices import gathered_bytes
from rlhf.zero import unit_numel


@dataclass
class ModelMemory:
    """Bytes of one model on this process."""

    weights: int
    gradients: int = 0
    adam: int = 0
    activations: int = 0  # of one micro-batch


def model_memory(model: Any, distributed: bool = False, besides: Any = None) -> ModelMemory:
    """Count weights, gradients and Adam states (two moments, without the step counters).

    Weights that `model.quantization` has packed count at their packed size. 8bit: 1 byte a number,
    without the scales (one a row). 4bit: half a byte, and a byte of scale for each 64 numbers.

    Args:
        distributed: the buckets of DistributedDataParallel hold the gradients a second time. Of a
            sharded model, a slice is here, and the largest unit and its gradient are whole at once.
            DeepSpeed has a second copy of weights that train, and of their gradients in a step.
        besides: a model whose weights are counted already: with `ppo.share_base` the policy.
    """
    named = model.named_parameters() if besides is None else own_parameters(model, besides).items()
    parameters = [parameter for _, parameter in named]
    weights = sum(local(p).nbytes for p in parameters)
    packed = (getattr(p, "quant_state", None) for p in parameters)
    weights += sum(state.absmax.nbytes for state in packed if state is not None)
    trained = sum(local(p).nbytes for p in parameters if p.requires_grad)
    if (slices := slices_of(model)) is not None:  # what trains is whole, and averaged in one tensor
        unit = gathered_bytes(slices) if besides is None else 0
        return ModelMemory(weights + unit, 2 * trained, 2 * trained)
    if is_sharded(model):
        unit = gathered_bytes(model)
        own = trained * (zero_stage() > 0)  # DeepSpeed steps a copy, and joins gradients for that
        return ModelMemory(weights + unit + own, trained + unit * (trained > 0) + own, 2 * trained)
    if zero_stage() == 2 and trained:
        own, bucket = trained // num_processes(), torch.float32.itemsize * unit_numel(model)
        return ModelMemory(weights + own, 2 * own + bucket, 2 * own)
    return ModelMemory(weights, trained * (1 + distributed), 2 * trained)


def kept_bytes(forward: Callable[[], object], model: Any) -> int:
    """Bytes that a forward pass keeps for the backward pass, without the model's own weights."""

    def name(tensor: Tensor) -> int:
        return local(tensor).untyped_storage()._cdata  # a model without weights has no data_ptr

    own = {name(parameter) for parameter in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> None:
        # an operation that got its own result back would keep it, and itself, for ever
        if name(tensor) not in own:
            saved[name(tensor)] = tensor.untyped_storage()  # views of one storage count once

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
        forward()
    return sum(storage.nbytes() for storage in saved.values())


def passing_bytes(forward: Callable[[], object]) -> int:
    """Most bytes that a pass without gradients holds at once, beyond what is there."""
    with torch.no_grad(), _NewTensors() as new:
        forward()
    return new.most


class _NewTensors(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.most = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **kwargs or {})
        given = {local(x).untyped_storage()._cdata for x in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            storage = local(tensor).untyped_storage()
            if storage._cdata not in given:  # a view makes none
                self._count(storage.nbytes())
                weakref.finalize(storage, self._count, -storage.nbytes())
        return result

    def _count(self, change: int) -> None:
        self.held += change
        self.most = max(self.most, self.held)


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def cache_numbers(cache: Any) -> int:
    """Numbers in the keys and values of a cache of transformers."""
    return sum(tensor.numel() for tensor in _keys_and_values(cache))


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values in a cache of transformers."""
    return sum(tensor.nbytes for tensor in _keys_and_values(cache))


def _keys_and_values(cache: Any) -> list[Tensor]:
    tensors = [t for layer in cache.layers for t in vars(layer).values() if torch.is_tensor(t)]
    return [tensor for tensor in tensors if tensor.is_floating_point()]
