"""DeepSpeed's Adam for main memory, which torch compiles at its first use and keeps.

A process that compiles has the file `lock` open, in the folder of what it builds. If it is killed,
the file stays, and torch waits for ever.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from glob import iglob
from pathlib import Path

from rlhf.config import InputError, one_line
from rlhf.console import say

DEAD_SECONDS = 600.0  # both files of a build took 3 to 7 minutes on two busy cores
LOOK_SECONDS = 1.0


def build_adam() -> None:
    """Build it, or wait for the process that does, before anything loads.

    Raises:
        InputError: it cannot be built, or a build that was killed is in the way.
    """
    from deepspeed.ops.op_builder import CPUAdamBuilder
    from torch.utils.cpp_extension import _get_build_directory as get_build_directory

    wait_for_build(Path(get_build_directory(CPUAdamBuilder.NAME, False)) / "lock")
    try:
        CPUAdamBuilder().load(verbose=False)
    except Exception as error:  # compilers and their absence raise anything
        raise InputError(
            "offload_optimizer_device: cpu: DeepSpeed cannot build its Adam for main memory "
            f"({one_line(error)}); install g++ and ninja, or set offload_optimizer_device: none"
        ) from error


def wait_for_build(lock: Path) -> None:
    """Wait until no process builds, as long as one may be alive.

    A process of this machine that holds the lock is alive, even if it is slow. One of another
    machine, which shares the folder, or of another user, can be known only by the files it writes.
    """
    if lock.exists():
        say(f"waiting for the process that builds DeepSpeed's Adam for main memory ({lock})")
    while (age := _newest_age(lock)) is not None:
        # the last look is for a build that ended during the others
        if age > DEAD_SECONDS and not _is_open(lock) and (_newest_age(lock) or 0) > DEAD_SECONDS:
            raise InputError(
                f"{lock} is from a build of DeepSpeed's Adam that was killed: nothing in its "
                f"folder has changed for {age / 60:.0f} minutes, and no process of this machine "
                "has it open; delete it"
            )
        time.sleep(LOOK_SECONDS)


def _newest_age(lock: Path) -> float | None:
    """Seconds since a file in the folder of a lock has changed; None without the lock."""
    if not lock.exists():
        return None
    newest = 0.0
    for file in lock.parent.iterdir():
        with suppress(FileNotFoundError):  # a compiler's own
            newest = max(newest, file.stat().st_mtime)
    return time.time() - newest


def _is_open(file: Path) -> bool:
    """True if a process of this machine that this user may look at has a file open."""
    target = str(file.resolve())
    for entry in iglob("/proc/[0-9]*/fd/*"):  # skips other users' processes, and ended ones
        with suppress(OSError):  # it was closed since
            if os.readlink(entry) == target:
                return True
    return False
