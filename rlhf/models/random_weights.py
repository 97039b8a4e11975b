"""New models whose random weights are drawn one by one, so that each process keeps only its slices.

transformers builds the model as always, but what it allocates has no memory, and what fills that is
noted, with the state of the random numbers. Later each weight is filled again, by itself. So its
numbers are those of one process with the same seed. Left out: weights that are computed from other
weights; such a model is made whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf.models.unread import UNREAD, Unread

ALLOCATE = torch.ops.aten.empty.memory_format
DRAWS = torch.Tag.nondeterministic_seeded


def new_in_slices(build: Callable[[], Any]) -> Any:
    """Return the model that a function makes, without weights, for `shard`; None if it must be made
    whole, with the random numbers as before."""
    before, noted = torch.get_rng_state(), Noted()
    with noted:
        model = build()
    names = {name: p for name, p in model.named_parameters() if p.is_meta}
    complete = all(_key(p) in noted.fills for p in names.values())
    if noted.failed or not complete or any(buffer.is_meta for buffer in model.buffers()):
        torch.set_rng_state(before)
        return None
    fills = {name: noted.fills[_key(p)] for name, p in names.items()}
    kinds = {name: (p.shape, p.dtype) for name, p in names.items()}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        state = torch.get_rng_state()
        for name, (shape, dtype) in kinds.items():
            yield name, _fill(torch.empty(shape, dtype=dtype), fills[name])
        torch.set_rng_state(state)

    setattr(model, UNREAD, Unread(names, tensors))
    return model


class Noted(TorchDispatchMode):
    """Allocates without memory, and notes what fills it.

    Attributes:
        fills: storage -> operations on it.
        failed: an operation cannot be repeated by itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fills: dict[int, list[tuple[Any, ...]]] = {}
        self.failed = False
        self._kept: list[Tensor] = []  # a storage that is freed would lend its number to another

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is ALLOCATE and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            kwargs = kwargs | {"device": "meta", "pin_memory": None}
            self._kept.append(func(*args, **kwargs))
            return self._kept[-1]
        if args and isinstance(args[0], Tensor) and args[0].is_meta and func._schema.is_mutable:
            self._note(func, args[0], args[1:], kwargs)
        return func(*args, **kwargs)

    def _note(self, func: Any, target: Tensor, rest: tuple[Any, ...], kwargs: Any) -> None:
        self.failed |= any(isinstance(value, Tensor) for value in (*rest, *kwargs.values()))
        view = target.shape, target.stride(), target.storage_offset()
        state = torch.get_rng_state() if DRAWS in func.tags else None
        self.fills.setdefault(_key(target), []).append((func, view, rest, kwargs, state))
        if state is not None:  # the random numbers go on as if they had been drawn
            like = torch.empty_strided(*view[:2], dtype=target.dtype, device="cpu")
            func(like, *rest, **kwargs)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _fill(tensor: Tensor, operations: list[tuple[Any, ...]]) -> Tensor:
    """Repeat operations on the memory of a tensor, in place; return it."""
    for func, view, rest, kwargs, state in operations:
        if state is not None:
            torch.set_rng_state(state)
        func(tensor.as_strided(*view), *rest, **kwargs)
    return tensor
