"""Writing directories completely or not at all, and finding damage in them.

A checkpoint's `manifest.json` is written last. It holds the run, the size and SHA-256 of every
other file, and a seal, the SHA-256 of all that. `checkpoint-N` is intact if and only if all of it
matches.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf.checkpoint.finite import NonFiniteError, find_non_finite_in

MANIFEST = "manifest.json"
UNSEALED = (
    ".trainer"  # folder in a stage directory: the transformers Trainer writes checkpoints here
)


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
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)


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
    """Seal a directory whose other files are all written.

    Args:
        facts: further JSON values for the manifest.
    """
    files = {}
    for file in files_of(directory):
        _sync(file)
        name = file.relative_to(directory).as_posix()
        files[name] = {"size": file.stat().st_size, "sha256": _sha256(file)}
    content = facts | {"files": files}
    temporary = directory / (MANIFEST + ".tmp")
    text = json.dumps({"seal": _seal(content)} | content, indent=2)
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    os.replace(temporary, directory / MANIFEST)
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
    """Describe the first file that differs from the manifest; None if the directory is intact.

    Args:
        names: the files to compare; None for all.
    """
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
