"""Failures to write to a disk, explained in one line."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from rlhf.config import InputError

REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of the quota",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
    errno.EROFS: "make it writable",
    errno.EIO: "check the disk",
    errno.ESTALE: "check the network disk",
}
# Only for files inside the directory that is written; elsewhere they can mean anything.
LOCAL_REMEDIES = {
    errno.ENOENT: "it was deleted or moved while it was in use",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
    errno.ENAMETOOLONG: "choose a shorter name",
}
for _number in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP):
    LOCAL_REMEDIES[_number] = "move what is in the way"
TORCH = ("PytorchStreamWriter", "inline_container.cc", "iostream error", "Parent directory")


@contextmanager
def disk_errors(directory: Path, then: str) -> Iterator[None]:
    """Turn a failure to write into a directory into an InputError.

    Args:
        directory: where the block writes.
        then: what to do after the remedy, e.g. "continue with resume=true".

    Raises:
        InputError: the disk is full, read-only, out of reach, or a limit is reached.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        found = _read(error, directory)
        if found is None:
            raise
        number, path = found
        remedy = (REMEDIES | LOCAL_REMEDIES)[number]
        raise InputError(
            f"cannot write {path}: {os.strerror(number)}; {remedy}, then {then}"
        ) from error


def _read(error: Exception, directory: Path) -> tuple[int, Path] | None:
    """Return the error number and the path concerned; None for any other error."""
    path = directory
    if isinstance(error, OSError):
        number = error.errno
        if isinstance(error.filename, str | bytes):
            path = Path(os.fsdecode(error.filename))
    elif isinstance(error, SafetensorError):
        match = re.search(r"os error (\d+)", str(error))
        number = int(match[1]) if match else None
    else:
        number = _reason(directory) if any(text in str(error) for text in TORCH) else None
    if number in LOCAL_REMEDIES:
        inside = Path(os.path.abspath(path)).is_relative_to(os.path.abspath(directory))
        return (number, path) if inside else None
    return (number, path) if number in REMEDIES else None


def _reason(directory: Path) -> int:
    """Find out why torch.save failed: its error does not tell."""
    import resource

    if not directory.is_dir():
        return errno.ENOENT
    if shutil.disk_usage(directory).free < 1 << 20:
        return errno.ENOSPC
    limited = resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY
    return errno.EFBIG if limited else errno.EIO
