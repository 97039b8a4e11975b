"""Disks that are full or read-only, for a while."""

from __future__ import annotations

import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond `size` bytes inside the block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def mounted(disk: Path) -> Iterator[Callable[[int], Path]]:
    """Yield a function that mounts a tmpfs of a size in bytes in `disk`, and returns the folder;
    the test is skipped where it cannot. `remount` makes it read-only, for example."""
    disk.mkdir()

    def mount(size: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no tmpfs can be mounted here")
        return disk

    yield mount
    subprocess.run(["umount", "-l", str(disk)], capture_output=True)


def remount(disk: Path, options: str) -> None:
    """Change a mounted disk, such as ro or size=1g."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)
