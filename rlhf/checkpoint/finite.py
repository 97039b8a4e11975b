"""Finding non-finite numbers (nan, inf) in tensors, files and optimiser states."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from rlhf.config import InputError

if TYPE_CHECKING:  # commands import this room before they need torch
    from torch import Tensor


class NonFiniteError(InputError):
    """A loss, gradient, metric or weight of a run is not finite."""


def find_non_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Find the first floating-point tensor with a non-finite number.

    Returns:
        Its name and that number, e.g. "lm_head.weight holds nan"; None if all are finite.
    """
    from rlhf.distributed import local

    for name, tensor in tensors:
        held = local(tensor)
        if not held.is_floating_point() or held.dtype.itemsize == 1 or not held.numel():
            continue
        # one pass and no copy, unlike isfinite(); with a nan, both minimum and maximum are nan
        for value in map(float, held.detach().aminmax()):
            if not math.isfinite(value):
                return f"{name} holds {value}"
    return None


def find_non_finite_on_any(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """As `find_non_finite`, in what all processes have; they call this together."""
    from accelerate.utils import gather_object

    return next(filter(None, gather_object([find_non_finite(tensors)])), None)


def find_non_finite_in(directory: Path) -> str | None:
    """Search every safetensors file below a directory; the result names the file too."""
    for file in sorted(directory.rglob("*.safetensors")):
        with safe_open(file, framework="pt") as content:
            problem = find_non_finite((name, content.get_tensor(name)) for name in content.keys())
        if problem is not None:
            return f"{file.name}: {problem}"
    return None


def optimizer_tensors(optimizer: Any) -> Iterable[tuple[str, Tensor]]:
    """Name the tensors of an optimiser's state, e.g. "optimiser state 3.exp_avg"."""
    from torch import Tensor

    for index, state in enumerate(getattr(optimizer, "state", {}).values()):
        for key, value in state.items():
            if isinstance(value, Tensor):
                yield f"optimiser state {index}.{key}", value
