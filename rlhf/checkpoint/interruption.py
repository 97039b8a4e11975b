"""Signals: SIGTERM, SIGHUP and the first Ctrl-C let the step end and save a checkpoint."""

from __future__ import annotations

import os
import select
import signal
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from rlhf.checkpoint.ownership import latest_checkpoint
from rlhf.console import is_main_process

REPEAT_SECONDS = 5.0  # an exception raised while Python destroys an object is lost: raise it again


class GracefulStop:
    """Turns SIGTERM, SIGHUP or the first Ctrl-C into a flag, `signal`, so that a loop can save.

    A second Ctrl-C interrupts at once. SIGHUP stays ignored if it was before, as under nohup.

    Use it as a context manager, and read `requested()` at the end of each step, on every rank. If
    the block has not ended `grace_seconds` after the signal, SystemExit ends it. That cuts off a
    save that is going on, which then leaves no checkpoint.
    """

    def __init__(self, grace_seconds: float, directory: Path):
        """Take the seconds that the step and the save may take, and the stage directory."""
        self.signal: int | None = None  # that asked to stop
        self._grace_seconds, self._directory = grace_seconds, directory
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> GracefulStop:
        handlers = {signal.SIGINT: self._ask, signal.SIGTERM: self._ask, signal.SIGALRM: self._end}
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            handlers[signal.SIGHUP] = self._ask
        for number, handler in handlers.items():
            self._previous[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = number
            _drop_closed_outputs()
            signal.setitimer(signal.ITIMER_REAL, self._grace_seconds, REPEAT_SECONDS)
            name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
            _write(
                f"\n{name}: finishing this step, then saving a checkpoint, for at most "
                f"{self._grace_seconds:g} seconds (Ctrl-C: stop at once)\n"
            )
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    def _end(self, number: int, frame: FrameType | None) -> None:
        assert self.signal is not None
        kept = latest_checkpoint(self._directory)
        _write(
            f"the step was not finished after checkpoint.grace_seconds={self._grace_seconds:g}: "
            f"exiting without saving; {f'{kept} remains' if kept else 'there is no checkpoint'}\n"
        )
        raise SystemExit(128 + self.signal)

    def requested(self) -> bool:
        """True on every rank as soon as any rank was asked to stop."""
        from accelerate import PartialState

        state = PartialState()
        if state.num_processes > 1:
            import torch
            from accelerate.utils import gather

            own = torch.tensor([self.signal or 0], device=state.device)
            self.signal = int(gather(own).max()) or None
        if self.signal is not None:
            _drop_closed_outputs()
        return self.signal is not None


def _write(text: str) -> None:
    """Write to stderr without Python's buffers, which the signal may have interrupted."""
    if is_main_process():
        with suppress(OSError):  # nobody may be there to read it
            os.write(2, text.encode())


def _drop_closed_outputs() -> None:
    """Send stdout and stderr to /dev/null once their terminal or pipe is closed: writing to them
    would end the run before it has saved."""
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    for descriptor, event in poll.poll(0):
        if event & (select.POLLERR | select.POLLHUP):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
