"""Errors of one of several processes: all end together, and the first process says which one
failed, in which phase, and why.

A process that fails leaves its error in the store of the group. One that loses the others looks for
it there. Left out: ending processes that do not notice; launchers, and the timeout of the group
(`distributed_timeout`), do that.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from threading import Event, Thread, current_thread, main_thread
from types import FrameType
from typing import Any, TypeVar, cast

import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.distributed.distributed_c10d import _get_default_store

from rlhf.config import InputError, one_line, show
from rlhf.console import is_main_process, local_rank, num_processes, rank

Result = TypeVar("Result")
Rows = TypeVar("Rows")  # `rlhf.data.Splits`
NOTE = "phase: "  # begins the notes of an exception that say what the process did
MEETING = "meeting"  # name of the thread that watches it
PATIENCE_SECONDS = 30.0  # after which a process says for whom it waits
WORD_SECONDS = 5.0  # in which a process that fails says so
ADVICE = ". This is typically caused by a remote worker"  # gloo's, after its error
GO_ON = "the same command with resume=auto goes on from the newest checkpoint"


# --- Meeting --------------------------------------------------------------------------------------


@contextmanager
def meeting(timeout_seconds: float) -> Iterator[None]:
    """Inside the block, this process joins the others. It says for whom it waits, and ends in one
    line if they do not come. torch waits too, but without end where another program answers.

    Raises:
        InputError: torch has given up.
    """
    place = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    others = f"the others of {num_processes()} processes at {place}"
    failed = f"rank {rank()}: did not meet {others}"
    fix = (
        f"start all {num_processes()} processes, with MASTER_ADDR and MASTER_PORT an address of "
        "rank 0's host and a port that is open there"
    )
    met = Event()

    def watch() -> None:
        if not met.wait(PATIENCE_SECONDS):
            limit = f"for up to distributed_timeout={timeout_seconds:g} seconds"
            line = f"rank {rank()}: waiting for {others}, {limit}: {fix}"
            print(line, file=sys.stderr, flush=True)
        if not met.wait(2 * timeout_seconds):  # torch may try twice
            print(f"error: {failed}; {fix}", file=sys.stderr, flush=True)
            os._exit(2)

    Thread(target=watch, name=MEETING, daemon=True).start()
    try:
        yield
    except Exception as error:
        if not lost_the_others(error):
            raise
        if "EADDRINUSE" in str(error):
            fix = "another program has this port: choose another MASTER_PORT"
        raise InputError(f"{failed} ({one_line(error).rstrip('.')}); {fix}") from error
    finally:
        met.set()


# --- The same on all ------------------------------------------------------------------------------


def require_equal(values: Mapping[str, Any]) -> None:
    """Require that all processes have the same values.

    Args:
        values: setting or file -> what each process has of it.

    Raises:
        InputError: on all processes; names what differs, with the two ranks.
    """
    if num_processes() == 1:
        return
    everyone = gather_object([dict(values)])
    lines = []
    for name in dict.fromkeys(name for own in everyone for name in own):
        given = [own.get(name) for own in everyone]
        other = next((rank for rank, value in enumerate(given) if value != given[0]), None)
        if other is not None:
            both = f"{show(given[0])} on rank 0, {show(given[other])} on rank {other}"
            lines.append(f"{name}: {both}")
    if lines:
        listed = "\n  ".join(lines)
        raise InputError(
            f"the processes were not started alike:\n  {listed}\n"
            "Give all of them the same command, settings and files"
        )


def once_per_host(task: Callable[[], Result]) -> Result:
    """Do a task on the first process of each host; return its result on all of that host."""
    results = gather_object([None if local_rank() else task()])
    return cast(Result, results[rank() - local_rank()])


def same_rows(splits: Rows) -> Rows:
    """Require that all processes have read the same rows of `dataset:`; return them."""
    found: Any = splits
    if num_processes() > 1:
        given = {"rows of dataset.path": found.train, "held-out rows": found.eval}
        require_equal({name: fingerprint(rows) for name, rows in given.items()})
    return splits


def fingerprint(rows: list[Any]) -> str:
    """Number and hash of rows."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, skipkeys=True, default=_without_address).encode())
    return f"{len(rows)} with SHA-256 {digest.hexdigest()[:12]}..."


def _without_address(value: Any) -> str:
    """A value that JSON lacks, as a text that is the same in each process."""
    return re.sub(" at 0x[0-9a-f]+", "", repr(value))


# --- Who failed -----------------------------------------------------------------------------------


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Say in an exception what the process did in this block, such as "scoring"."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        error.add_note(f"{NOTE}{name}")
        raise


def phase_of(error: BaseException) -> str:
    """What the process did when the exception was raised: "scoring, update 3"."""
    notes = [note for note in getattr(error, "__notes__", []) if note.startswith(NOTE)]
    return ", ".join(note.removeprefix(NOTE) for note in notes) or "before training"


def on_every_process(task: Callable[[], Result], accelerator: Any) -> Result:
    """Run a task; bad input that ends it on one process ends it on all of them.

    Otherwise the other processes would wait for the failed one, and none could save.

    Raises:
        InputError: that of the first process that failed, with its number.
    """
    if accelerator.num_processes == 1:
        return task()
    error: InputError | None = None
    try:
        result = task()
    except InputError as caught:
        error = caught
    messages = gather_object([None if error is None else str(error)])
    for number, message in enumerate(messages):
        if message is not None:
            raise InputError(f"rank {number}: {message}") from error
    return result


def on_main_process(task: Callable[[], Result]) -> Result:
    """Run a task on the main process; all processes get its result, or the InputError that ended
    it."""
    if num_processes() == 1:
        return task()
    result = on_every_process(lambda: task() if is_main_process() else None, PartialState())
    return cast(Result, gather_object([result])[0])


def lost_the_others(error: BaseException) -> bool:
    """True if an exception says that another process does not answer: gloo has no type for it."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def outlive_launcher() -> None:
    """Let the first process say which other one it lost. A launcher sends SIGTERM to all as soon as
    one has died, often before the first has told, and gives them time to end."""
    before = signal.getsignal(signal.SIGTERM)
    in_main_thread = current_thread() is main_thread()
    if not (is_main_process() and in_main_thread) or before in (signal.SIG_IGN, None):
        return

    def handle(number: int, frame: FrameType | None) -> None:
        error = sys.exc_info()[1]
        if error is not None and lost_the_others(error):
            return
        signal.signal(number, before)
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, handle)


def report(error: BaseException) -> str:
    """Leave the error of this process where the first one looks for it; return it in one line."""
    rank = int(os.environ.get("RANK", "0"))
    what = str(error) if isinstance(error, InputError) else one_line(error)
    what = what.partition(ADVICE)[0].rstrip(": ")  # an interrupt has no text
    text = f"rank {rank} ({phase_of(error)}): {what}"
    if dist.is_initialized():
        with suppress(Exception):  # the process that holds the store may have gone
            _get_default_store().set(_key(rank), f"{lost_the_others(error):d}{text}")
    return text


def blame(error: Exception) -> str:
    """What a process that lost the others prints last: on the first process, the error of the one
    that failed, if it left one. The others say only whether the first one is gone."""
    own = report(error)
    others = range(1, num_processes()) if is_main_process() else [0]
    words = _words_of(others)
    if not is_main_process() and words:
        return f"{own}; another process failed, was killed or cannot be reached"
    causes = [word[1:] for _, word in sorted(words.items()) if word[0] == "0"]
    silent = [str(rank) for rank in others if rank not in words]
    if causes:
        return f"{causes[0]}; {GO_ON}"
    if not silent:
        return f"{own}; {GO_ON}"
    return (
        f"no word from rank {', '.join(silent)}: killed (main memory may have run out), hanging, "
        f"or on a host that cannot be reached; {own}; {GO_ON}"
    )


def leave_word(name: str, word: str) -> None:
    """Tell the other processes something, also from a thread; `read_word` finds it by its name."""
    _get_default_store().set(f"rlhf/word/{name}", word)


def read_word(name: str) -> str | None:
    """What another process has told under a name; None if it has not yet."""
    store, key = _get_default_store(), f"rlhf/word/{name}"
    return store.get(key).decode() if store.check([key]) else None


def _key(rank: int) -> str:
    return f"rlhf/failed/{rank}"


def _words_of(ranks: Collection[int]) -> dict[int, str]:
    """What other processes have left, by rank, as soon as one of them names a cause."""
    words: dict[int, str] = {}

    def look() -> None:
        deadline = time.monotonic() + WORD_SECONDS
        with suppress(Exception):
            store = _get_default_store()
            while True:
                for rank in ranks:
                    if rank not in words and store.check([_key(rank)]):
                        words[rank] = store.get(_key(rank)).decode()
                is_known = any(word[0] == "0" for word in words.values())
                if is_known or len(words) == len(ranks) or time.monotonic() > deadline:
                    break
                time.sleep(0.1)

    # a store on a host that cannot be reached does not answer, and would block this process
    thread = Thread(target=look, daemon=True)
    thread.start()
    thread.join(WORD_SECONDS + 1)
    return dict(words)
