"""SHA-256 of a model's weights, by which one stage recognises the result of another."""

from __future__ import annotations

import hashlib
import sys
from functools import cache
from pathlib import Path

from rlhf.console import is_main_process

ANNOUNCED_BYTES = 1_000_000_000  # reading more than this takes seconds, so a line says so


def hash_weights(directory: Path) -> str:
    """SHA-256 over a directory's safetensors files; unchanged files are read once per process."""
    files = sorted(directory.resolve().glob("*.safetensors"))
    states = [(file, file.stat()) for file in files]
    facts = [(f, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for f, s in states]
    return _hash_files(tuple(facts))


@cache
def _hash_files(facts: tuple[tuple[Path, int, int, int, int], ...]) -> str:
    """SHA-256 over the content of files; the facts about a file change whenever it changes."""
    size = sum(num_bytes for _, _, num_bytes, *_ in facts)
    if size > ANNOUNCED_BYTES and is_main_process():
        where = facts[0][0].parent
        # to stderr, because stdout may hold a model's answers
        print(f"reading {size / 1e9:.1f} GB in {where} for their SHA-256", file=sys.stderr)
    digest = hashlib.sha256()
    for file, *_ in facts:
        with file.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()
