"""Memory that a function takes, by torch's own record of its allocations on a CPU."""

from __future__ import annotations

import numpy as np
import torch


def most_allocated(function):
    """Bytes that a function holds at most at once, by torch's own record of its allocations."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(profile_memory=True, activities=kinds) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return int(held.max())
