"""One writer at a time: a lock that ends with the process that holds it.

`flock` decides. Host and process in the lock file are for messages only. Children that are forked,
such as the workers of a DataLoader, do not hold the lock: they may outlive the run. The file is
deleted when the lock is released; what a kill leaves of it locks nothing.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from rlhf.checkpoint.atomic import UNSEALED
from rlhf.checkpoint.disk import disk_errors
from rlhf.config import InputError, StageConfig
from rlhf.console import is_main_process, say, warn

LOCK = ".lock"
POLL_SECONDS = 0.1
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
# Nothing can be written there, by anybody: what tries to says why.
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)

_held: dict[int, Path] = {}  # open file of each lock of this process -> its name


def _close_in_child() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)

# --- The lock of a stage directory ----------------------------------------------------------------


@contextmanager
def one_writer(config: StageConfig, stage: str) -> Iterator[None]:
    """Keep other runs out of a stage's directory for as long as the block takes.

    The first process takes the lock; the others learn whether it did. `resume=auto` waits for it as
    long as the run before, if it was asked to stop, may take to save. In the block, a disk that
    does not take what is written is an InputError.

    Raises:
        InputError: another process holds the lock.
    """
    directory, then = config.stage_dir(stage), "continue with resume=auto"
    with ExitStack() as stack:
        refusal = None
        # without a directory there is nothing to continue: the stage says so
        if is_main_process() and (config.resume is not True or directory.is_dir()):
            wait = config.checkpoint.grace_seconds if config.resume == "auto" else 0.0
            try:
                with disk_errors(directory, then):
                    stack.enter_context(_locked_directory(directory, wait))
            except InputError as error:
                refusal = error
        refusal = _tell_all(refusal, config)
        if refusal is not None:
            raise refusal
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
        for path in missing:  # a run that did not begin leaves nothing
            try:
                path.rmdir()
            except OSError:
                break


def _tell_all(refusal: InputError | None, config: StageConfig) -> InputError | None:
    """Give all processes what the first one found."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return refusal
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    # the first use of the processes' group, which the Trainer would make with this value
    seconds = getattr(config, "trainer", {}).get("ddp_timeout")
    limit: dict[str, Any] = {} if seconds is None else {"timeout": timedelta(seconds=seconds)}
    PartialState(cpu=not torch.cuda.is_available(), **limit)
    return broadcast_object_list([refusal])[0]


def require_held(directory: Path) -> None:
    """Check that a directory that this process has locked is still the one that it locked.

    Raises:
        InputError: it was deleted, moved, or made anew by somebody else.
    """
    for descriptor, file in _held.items():
        if file == directory / LOCK and not _is_current(descriptor, file):
            raise InputError(
                f"{directory} was deleted, moved or replaced while the run was going on; if it is "
                "elsewhere, move it back and continue with resume=auto"
            )


# --- Any lock -------------------------------------------------------------------------------------


@contextmanager
def locked(file: Path, what: str, fix: str, wait_seconds: float = 0.0) -> Iterator[None]:
    """Hold a lock for as long as the block takes.

    Where nothing can be written, or where the file system has no locks, the block runs without one.

    Args:
        file: made for this purpose and deleted afterwards.
        what, fix: for the message where another process holds it.
        wait_seconds: how long to wait for that process.

    Raises:
        InputError: another process holds it.
    """
    descriptor = _acquire(file, what, fix, wait_seconds)
    try:
        yield
    finally:
        if descriptor in _held:  # not in a child that was forked in the block
            del _held[descriptor]
            if _is_current(descriptor, file):
                file.unlink()
            os.close(descriptor)


def _acquire(file: Path, what: str, fix: str, wait_seconds: float) -> int | None:
    """Return the open, locked file; None where there can be no lock."""
    began, waits = time.monotonic(), False
    while True:
        descriptor = _open(file)
        if descriptor is None:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read_holder(descriptor)
            os.close(descriptor)
        except OSError as error:
            os.close(descriptor)
            if error.errno not in NO_LOCKS:
                raise
            warn(
                f"the file system of {what} has no locks ({error.strerror}): nothing keeps a "
                "second process from writing there at the same time, so do not start one"
            )
            return None
        else:
            if _is_current(descriptor, file):
                _held[descriptor] = file
                _write_holder(descriptor)
                return descriptor
            os.close(descriptor)  # its holder has deleted it: try the new one
            continue
        if time.monotonic() - began >= wait_seconds:
            waited = f" after {wait_seconds:g} seconds (checkpoint.grace_seconds)" if waits else ""
            raise InputError(f"{what} is in use{waited}, by {holder}; {fix}")
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
            raise InputError(f"{file} is in the way of a lock of that name; delete it") from error
        if error.errno not in NOT_WRITABLE:
            raise
    try:
        return os.open(file, os.O_RDONLY | os.O_NOFOLLOW)  # the holder may be another user
    except OSError:
        return None


def _is_current(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file, follow_symlinks=False))
    except OSError:
        return False


def _write_holder(descriptor: int) -> None:
    text = json.dumps({"host": socket.gethostname(), "pid": os.getpid()})
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)
    except OSError:  # a full disk, or another user's file: it would only serve the message
        pass


def _read_holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, LookupError, TypeError):
        return "another process"
