"""One writer at a time: a lock that ends with the process that holds it.

The lock is `flock`; host and process in the file only serve the messages. Forked children, such as
DataLoader workers, do not hold it, because they may outlive the run. Releasing the lock deletes the
file; a file that a killed process left behind locks nothing.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from rlhf.checkpoint.disk import UNSEALED, disk_errors
from rlhf.config import InputError, StageConfig, refused_file
from rlhf.console import is_main_process, num_processes, say, warn

LOCK = ".lock"
POLL_SECONDS = 0.1
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
# Nobody can write there: the first file that is written fails and gives the reason.
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)

Result = TypeVar("Result")
_held: dict[int, Path] = {}  # open file of each lock of this process -> its name


def _close_in_child() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)

# --- The lock of a stage directory ----------------------------------------------------------------


@contextmanager
def one_writer(config: StageConfig, stage: str) -> Iterator[None]:
    """Keep other runs out of a stage's directory during the block.

    `resume=auto` waits for as long as the previous run may need to save. In the block, a failure to
    write to the directory becomes an InputError.
    """
    directory, then = config.stage_dir(stage), "continue with resume=auto"
    wait = config.checkpoint.grace_seconds if config.resume == "auto" else 0.0
    with ExitStack() as stack:

        def lock() -> None:
            # without a directory there is nothing to resume: the stage refuses that itself
            if config.resume is not True or directory.is_dir():
                with disk_errors(directory, then):
                    stack.enter_context(_locked_directory(directory, wait))

        on_main_process(lock)
        with disk_errors(directory, then):
            yield


@contextmanager
def _locked_directory(directory: Path, wait_seconds: float) -> Iterator[None]:
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    fix = "wait until it has ended, or use another run_name"
    try:
        with locked(directory / LOCK, str(directory), fix, wait_seconds):
            try:
                yield
            finally:
                shutil.rmtree(directory / UNSEALED, ignore_errors=True)
    finally:
        with suppress(OSError):  # a run that did not begin leaves no empty directory
            for path in missing:
                path.rmdir()


def on_main_process(task: Callable[[], Result]) -> Result:
    """Do a task on the main process; give its result, or its InputError, to all processes."""
    outcome: list[Any] = [None]
    if is_main_process():
        try:
            outcome = [task()]
        except InputError as error:  # raised on all processes, or the others would wait for ever
            outcome = [error]
    if num_processes() > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(outcome)
    if isinstance(outcome[0], InputError):
        raise outcome[0]
    return outcome[0]


def require_held(directory: Path) -> None:
    """Require that a directory is still the one that this process has locked."""
    for descriptor, file in _held.items():
        if file == directory / LOCK and not _is_current(descriptor, file):
            raise InputError(
                f"{directory} was deleted, moved or replaced during the run; if it still exists "
                "elsewhere, move it back and continue with resume=auto"
            )


# --- Any lock -------------------------------------------------------------------------------------


@contextmanager
def locked(file: Path, what: str, fix: str, wait_seconds: float = 0.0) -> Iterator[None]:
    """Hold a lock during the block.

    If the place is not writable, or the file system has no locks, the block runs without one.

    Args:
        file: the lock file; it is created and deleted here.
        what: name of what is locked, for messages.
        fix: what to do if another process holds the lock after `wait_seconds`.

    Raises:
        InputError: another process holds it.
    """
    descriptor = _acquire(file, what, fix, wait_seconds)
    try:
        yield
    finally:
        if descriptor in _held:  # False in a child that was forked inside the block
            del _held[descriptor]
            if _is_current(descriptor, file):
                file.unlink()
            os.close(descriptor)


def _acquire(file: Path, what: str, fix: str, wait_seconds: float) -> int | None:
    """Return the open, locked file; None if there can be no lock."""
    began, waits = time.monotonic(), False
    while True:
        descriptor = _open(file)
        if descriptor is None:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace") or "another process"
            os.close(descriptor)
        except OSError as error:
            os.close(descriptor)
            if error.errno not in NO_LOCKS:
                raise
            warn(
                f"the file system of {what} has no locks ({error.strerror}): nothing stops a "
                "second process from writing there at the same time, so do not start one"
            )
            return None
        else:
            if _is_current(descriptor, file):
                _held[descriptor] = file
                with suppress(OSError):  # a full disk or another user's file; only for messages
                    os.ftruncate(descriptor, 0)
                    name = f"process {os.getpid()} on {socket.gethostname()}"
                    os.pwrite(descriptor, name.encode(), 0)
                return descriptor
            os.close(descriptor)  # its holder deleted it in the meantime: try the new file
            continue
        if time.monotonic() - began >= wait_seconds:
            waited = f" after {wait_seconds:g} seconds (checkpoint.grace_seconds)"
            raise InputError(f"{what} is in use{waited * (wait_seconds > 0)}, by {holder}; {fix}")
        if not waits:
            say(f"{what} is in use, by {holder}: waiting for at most {wait_seconds:g} seconds")
        waits = True
        time.sleep(min(POLL_SECONDS, wait_seconds))


def _open(file: Path) -> int | None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR):
            raise InputError(f"{file} is in the way of a lock file; delete it") from error
        if error.errno not in NOT_WRITABLE:
            raise InputError(refused_file(error)) from error
    try:
        return os.open(file, os.O_RDONLY | os.O_NOFOLLOW)  # the holder may be another user
    except OSError:
        return None


def _is_current(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file, follow_symlinks=False))
    except OSError:
        return False
