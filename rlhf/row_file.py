"""The JSONL file that `rlhf.score` and `rlhf.generate` write row by row.

A stopped command continues when it is given again, and ends with the same bytes: until all rows are
written, they are in `<out>.partial`, and `<out>.partial.json` says what they were made from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf.config import InputError
from rlhf.console import progress_bar, say

CHUNK = 8  # batches between two writes
NUM_SHOWN = 10  # bad rows


@contextmanager
def new_file(out: Path) -> Iterator[None]:
    """Make the folder of `out`, and keep other processes from writing the file.

    Raises:
        InputError: the file exists, another process writes it, or the disk is full.
    """
    from rlhf.checkpoint import disk_errors, locked

    with disk_errors(out.parent, "give the same command again"):
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(f"out={out}: {error.filename} is not a directory") from error
        lock, fix = out.with_name(f".{out.name}.lock"), "wait, or give another out=<file>"
        with locked(lock, f"out={out}", fix):
            if os.path.lexists(out):
                raise InputError(f"out={out} exists already; delete it, or give another out=<file>")
            yield


class RowFile:
    """The rows of an output file; a stopped command may have written some of them.

    Attributes:
        rows: those that are written, in order.
    """

    def __init__(self, out: Path, made_from: dict[str, Any]):
        """Read what a stopped command left; an incomplete last line is removed.

        Args:
            made_from: everything that the rows depend on; it must be as it was.
        """
        self.out, self.made_from = out, made_from
        self._partial = out.with_name(f"{out.name}.partial")
        self._identity = out.with_name(f"{out.name}.partial.json")
        self.rows: list[dict[str, Any]] = []
        if not self._partial.exists():
            return
        if not self._partial.stat().st_size:
            self._partial.unlink()  # nothing was made, so that nothing binds the next command
            return
        fix = f"delete {self._partial} to start afresh"
        try:
            before = json.loads(self._identity.read_text(encoding="utf-8"))
            data = self._partial.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            self.rows = [json.loads(line) for line in whole.split(b"\n")[:-1]]
        except (OSError, ValueError) as error:
            what = f"{self._partial} cannot be continued ({error})"
            raise InputError(f"{what}; {fix}") from error
        changed = {name: value for name, value in made_from.items() if before.get(name) != value}
        if changed:
            listed = "\n  ".join(f"{n}: {before.get(n)} -> {changed[n]}" for n in changed)
            raise InputError(f"{self._partial} was begun with other values; {fix}:\n  {listed}")
        os.truncate(self._partial, len(whole))

    def write(
        self,
        chunks: Iterable[range],
        make: Callable[[range], Iterable[dict[str, Any]]],
        num_rows: int,
        unit: str,
    ) -> list[dict[str, Any]]:
        """Make the rows that are missing, chunk by chunk, and give the file its name.

        Args:
            make: returns the rows of a chunk.
            unit: what a row is, for the progress bar.
        """
        if not self._partial.exists():
            text = json.dumps(self.made_from, indent=2) + "\n"
            self._identity.write_text(text, encoding="utf-8")
        done = len(self.rows)
        if done:
            say(f"continuing {self._partial} after {done} of {num_rows} rows")
        bar = progress_bar(num_rows, done, unit)
        with bar, self._partial.open("a", encoding="utf-8") as stream:
            for chunk in chunks:
                if chunk.stop <= done:
                    continue
                # the whole chunk is made again, so that a stopped command ends with the same bytes
                for i, row in zip(chunk, make(chunk), strict=True):
                    if i >= done:
                        stream.write(json.dumps(row, ensure_ascii=False) + "\n")
                        self.rows.append(row)
                        bar.update(1)
                stream.flush()
            os.fsync(stream.fileno())
        os.replace(self._partial, self.out)
        self._identity.unlink()
        return self.rows


def chunks_of(sizes: Sequence[int], batch_size: int) -> Iterator[range]:
    """Cut rows, each with its number of responses, into chunks of at least `CHUNK` batches."""
    start, count = 0, 0
    for i, size in enumerate(sizes):
        count += size
        if count >= CHUNK * batch_size or i == len(sizes) - 1:
            yield range(start, i + 1)
            start, count = i + 1, 0


def refuse_rows(problems: Sequence[str], what: str) -> None:
    """Raise InputError with the first problems, if there are any."""
    if problems:
        more = [f"... and {len(problems) - NUM_SHOWN} more"] if len(problems) > NUM_SHOWN else []
        listed = "\n  ".join([*problems[:NUM_SHOWN], *more])
        raise InputError(f"{what}:\n  {listed}")
