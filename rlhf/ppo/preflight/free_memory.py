"""What memory there is, and how its end shows."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def free_bytes(device: torch.device) -> int:
    """Memory that this process can still get: of its GPU, else of this machine's RAM."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    available = read_kilobytes("/proc/meminfo", "MemAvailable")
    return available or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def read_kilobytes(file: str, name: str) -> int | None:
    """Bytes under a name in a file of /proc; None where there is no such file, as on macOS."""
    path = Path(file)
    lines = path.read_text().splitlines() if path.is_file() else []
    found = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(found[0]) * 1024 if found else None


def is_out_of_memory(error: BaseException) -> bool:
    """True for the exceptions that torch and Python raise when memory ends."""
    # the CPU allocator raises a plain RuntimeError
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "DefaultCPUAllocator" in str(error)
