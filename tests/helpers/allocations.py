"""Memory that a function takes, by torch's own record of its allocations on a CPU."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode


def most_allocated(function):
    """Bytes that a function holds at most at once, by torch's own record of its allocations."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(profile_memory=True, activities=kinds) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return int(held.max())


class Rounded(TorchDispatchMode):
    """Counts the numbers that are rounded to bfloat16."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if function is torch.ops.aten._to_copy.default and result.dtype == torch.bfloat16:
            self.count += result.numel()
        return result
