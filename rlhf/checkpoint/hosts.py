"""Stage directories of hosts that share no file system: the first host writes, and the others get
copies of what they read.

On a shared file system nobody misses a file, and nothing is copied.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf.checkpoint.disk import MANIFEST, files_of
from rlhf.checkpoint.record import RECORD
from rlhf.console import is_main_process, local_rank, num_processes, say

CHUNK = 2**26  # bytes that are sent at once


def copy_to_all_hosts(directory: Path) -> None:
    """Give each host the files of a directory that the main process has and the host has not; all
    processes call this."""
    if num_processes() == 1:
        return
    from accelerate.utils import broadcast_object_list, gather_object

    own = _marks(directory)
    listed: list[Any] = [own if is_main_process() else None]
    broadcast_object_list(listed)
    marks: dict[str, tuple[int, str]] = listed[0]
    missing = [name for name, mark in marks.items() if own.get(name) != mark]
    wanted = set(gather_object(missing))
    if wanted:
        say(f"{directory} is not on all hosts: sending {len(wanted)} files to the others")
    writes = local_rank() == 0  # one process of each host
    for name in sorted(wanted):
        _receive(directory / name, marks[name][0], writes and name in missing)


def collect_from_hosts(directory: Path) -> None:
    """Give the main process the small files of a directory that it has not, from other hosts; all
    processes call this."""
    if num_processes() == 1:
        return
    from accelerate.utils import broadcast_object_list, gather_object

    own = [*_visible(directory)]
    listed: list[Any] = [own if is_main_process() else None]
    broadcast_object_list(listed)
    names = [name for name in own if name not in listed[0]]
    for name, content in gather_object([(n, (directory / n).read_bytes()) for n in names]):
        if is_main_process():
            _write(directory / name, iter([content]))


def _visible(directory: Path) -> dict[str, Path]:
    """The files of a directory by their names in it, without hidden ones such as the lock."""
    names = {file.relative_to(directory): file for file in files_of(directory)}
    return {
        name.as_posix(): file
        for name, file in names.items()
        if not any(part.startswith(".") for part in name.parts)
    }


def _marks(directory: Path) -> dict[str, tuple[int, str]]:
    """Of each visible file of a directory: its bytes, and the hash of the file of its checkpoint or
    `final/` that holds the hashes of all others. A checkpoint of an earlier run has other content
    in files of the same size."""
    files = _visible(directory)
    seals: dict[str, str] = {}
    for name, file in files.items():
        folder, _, own = name.rpartition("/")
        if "/" not in folder and own in (MANIFEST, RECORD):
            seals[folder] = hashlib.sha256(file.read_bytes()).hexdigest()
    whole = seals.get("", "")
    return {
        name: (file.stat().st_size, seals.get(name.partition("/")[0], whole))
        for name, file in files.items()
    }


def _receive(file: Path, size: int, writes: bool) -> None:
    """Broadcast a file of the main process; `writes`: keep it here."""
    from accelerate.utils import broadcast_object_list

    def chunks() -> Iterator[bytes]:
        stream = file.open("rb") if is_main_process() else None
        for _ in range(0, max(size, 1), CHUNK):
            chunk: list[Any] = [stream.read(CHUNK) if stream else None]
            broadcast_object_list(chunk)
            yield chunk[0]
        if stream:
            stream.close()

    if writes:
        _write(file, chunks())
    else:
        for _ in chunks():
            pass


def _write(file: Path, chunks: Iterator[bytes]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with temporary.open("wb") as stream:
        stream.writelines(chunks)
    os.replace(temporary, file)
