"""Writing to a disk: whole directories or nothing, damage in them, and disks that refuse.

A checkpoint's `manifest.json` is written last. It holds the run, the size and SHA-256 of every
other file, and a seal, the SHA-256 of all that. `checkpoint-N` is intact if all of it matches.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from rlhf.checkpoint.finite import NonFiniteError, find_non_finite_in
from rlhf.config import InputError

MANIFEST = "manifest.json"
UNSEALED = ".trainer"  # in a stage directory: the transformers Trainer writes checkpoints there
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
} | dict.fromkeys(
    (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP),
    "move what is in the way",
)
TORCH = ("PytorchStreamWriter", "inline_container.cc", "iostream error", "Parent directory")


@contextmanager
def complete_or_nothing(directory: Path) -> Iterator[Path]:
    """Yield a temporary directory; rename it to `directory` if the block succeeds, else delete it.

    Raises:
        NonFiniteError: weights or optimiser states in it are not finite.
    """
    directory = Path(os.path.realpath(directory))  # replace the target of a link, not the link
    temporary, old = hidden_names(directory)
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        problem = find_non_finite_in(temporary)
        if problem is not None:
            raise NonFiniteError(f"{directory} was not written: {problem}")
        for file in files_of(temporary):
            _sync(file)
        if directory.is_dir():
            os.replace(directory, old)
        os.replace(temporary, directory)
    except BaseException:  # leave no remains: the disk may be full
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_whole(file: Path, text: str) -> None:
    """Write a file that has its name only when it is complete."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        _sync(temporary)
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def hidden_names(path: Path) -> tuple[Path, Path]:
    """Return the reserved names of a directory while it is written and while it is deleted."""
    return path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")


def remove_directory(directory: Path) -> None:
    """Delete a directory; after a kill half-way, nothing is left under its name."""
    _, old = hidden_names(directory)
    shutil.rmtree(old, ignore_errors=True)
    os.replace(directory, old)
    shutil.rmtree(old)


def write_manifest(directory: Path, facts: dict[str, Any]) -> None:
    """Seal a directory whose other files are all written; `facts` are further JSON values."""
    files = {}
    for file in files_of(directory):
        _sync(file)
        name = file.relative_to(directory).as_posix()
        files[name] = {"size": file.stat().st_size, "sha256": _sha256(file)}
    content = facts | {"files": files}
    text = json.dumps({"seal": _seal(content)} | content, indent=2)
    write_whole(directory / MANIFEST, text)
    _sync(directory)


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """Read what `write_manifest` wrote; None if it is missing or damaged."""
    try:
        content = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        sealed = content.pop("seal")
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return None
    return content if sealed == _seal(content) else None


def find_damage(directory: Path, names: Iterable[str] | None = None) -> str | None:
    """Describe the first file, of all or of `names`, that differs from the manifest; None if the
    directory is intact."""
    manifest = read_manifest(directory)
    if manifest is None:
        found = (directory / MANIFEST).is_file()
        return f"{MANIFEST} is {'damaged itself' if found else 'missing: its writing was cut off'}"
    for name in manifest["files"] if names is None else names:
        expected, file = manifest["files"][name], directory / name
        if not file.is_file():
            return f"{name} is missing"
        size = file.stat().st_size
        if size != expected["size"]:
            return f"{name} has {size} bytes instead of {expected['size']}"
        if _sha256(file) != expected["sha256"]:
            return f"the content of {name} has changed (its SHA-256 differs)"
    return None


def files_of(directory: Path) -> list[Path]:
    """Return every file below a directory, in a fixed order."""
    return sorted(path for path in directory.rglob("*") if path.is_file())


def holds_tensors(checkpoint: Path, name: str) -> bool:
    """True if a PPO checkpoint has tensors of this name, such as "policy"."""
    return (checkpoint / f"{name}.safetensors").is_file() or (checkpoint / name).is_dir()


def _seal(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Have a file, or the names in a directory, on the disk before anything else is written."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- Disks that refuse ----------------------------------------------------------------------------


@contextmanager
def disk_errors(directory: Path, then: str) -> Iterator[None]:
    """Turn a failure to write into a directory, such as a full disk, into an InputError.

    `then` says what to do after the remedy, e.g. "continue with resume=true".
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
    """Return the error number and the path concerned; None for an error of another kind."""
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
