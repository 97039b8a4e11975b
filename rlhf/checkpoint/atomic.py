"""Directories that are written whole or not at all, and how damage to them is found.

A checkpoint ends with `manifest.json`: the run that wrote it, size and SHA-256 of every other file,
and a seal, the SHA-256 of all that. `checkpoint-N` is intact if and only if everything matches.
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
UNSEALED = ".trainer"  # in a stage directory: where the transformers Trainer writes its checkpoints


@contextmanager
def complete_or_nothing(directory: Path) -> Iterator[Path]:
    """Yield a temporary directory that takes the name of `directory` when the block ends without
    an error, and is deleted when it does not.

    Raises:
        NonFiniteError: weights or optimiser states in it are not finite.
    """
    directory = Path(os.path.realpath(directory))  # what a link points to is replaced, not the link
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
    except BaseException:  # on a full disk, what is left of it would be in the way of what follows
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def hidden_names(path: Path) -> tuple[Path, Path]:
    """Names that a directory has while it is written and while it is deleted; nobody else takes
    them."""
    return path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")


def remove_directory(directory: Path) -> None:
    """Delete a directory such that a kill leaves nothing of it under its name."""
    _, old = hidden_names(directory)
    shutil.rmtree(old, ignore_errors=True)
    os.replace(directory, old)
    shutil.rmtree(old)


def write_manifest(directory: Path, facts: dict[str, Any]) -> None:
    """Seal a directory whose other files are all written.

    Args:
        facts: JSON values that stand in the manifest beside the files.
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
    """Read what `write_manifest` wrote; None where there is none, or where it is damaged itself."""
    try:
        content = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        sealed = content.pop("seal")
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return None
    return content if sealed == _seal(content) else None


def find_damage(directory: Path, names: Iterable[str] | None = None) -> str | None:
    """Say what is wrong with the first file that is not as the manifest says; None if intact.

    Args:
        names: look at these files only, instead of at all.
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
            return f"the content of {name} has changed (its SHA-256 is another)"
    return None


def files_of(directory: Path) -> list[Path]:
    """Every file below a directory, in a fixed order."""
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _seal(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Have the disk keep a file, or the names in a directory, before what follows is written."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
