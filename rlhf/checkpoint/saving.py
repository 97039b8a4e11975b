"""When the checkpoints of a PPO run are written: at once, or in a thread while the next rollout
samples. What they hold is in `state.py`.

A thread writes from a copy of the state in main memory. So training goes on, and a run that is
killed at any moment keeps the checkpoint before.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from rlhf.checkpoint.ownership import prune_checkpoints
from rlhf.checkpoint.state import Incomplete, TakenState, take_state
from rlhf.config import InputError, StageConfig, one_line
from rlhf.console import is_main_process, num_processes, rank, warn
from rlhf.failures import GO_ON
from rlhf.zero import SlicedOptimizer

STOP_SECONDS = 5.0  # that a thread may need to end after it is asked to


def in_background(config: StageConfig, optimizers: dict[str, Any], on_gpu: bool) -> bool:
    """Whether a thread writes the checkpoints, from a copy. DeepSpeed's slices are gathered, which
    a thread cannot do while the processes sample."""
    if any(isinstance(optimizer, SlicedOptimizer) for optimizer in optimizers.values()):
        return False
    given = config.checkpoint.background
    return on_gpu if given is None else given


class CheckpointWriter:
    """Writes the checkpoints of a run, one after the other; all processes call it together.

    Attributes:
        failed: True once a checkpoint could not be written.
    """

    def __init__(self, config: StageConfig, in_background: bool):
        self.config, self.in_background, self.failed = config, in_background, False
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._abandoned = threading.Event()

    def save(
        self,
        checkpoint: Path,
        modules: dict[str, Any],
        optimizers: dict[str, Any],
        state: dict[str, Any],
        random_numbers: dict[str, Any] | None,
    ) -> None:
        """Begin to write a checkpoint, once the one before is complete; the arguments are those of
        `take_state`."""
        self.finish()
        parts = checkpoint, modules, optimizers, state, self.config, random_numbers
        taken = take_state(*parts, copies=self.in_background)
        if self.in_background and not taken.gathers:
            self._thread = threading.Thread(target=self._write, args=(taken,), daemon=True)
            self._thread.start()
        else:
            self._write(taken)
            self.finish()

    def finish(self) -> None:
        """Wait until the checkpoint that is being written is complete.

        Raises:
            OSError, InputError: on all processes, if one could not write its part.
        """
        if self._thread is not None:
            self._thread.join()
        self._thread, own, self._error = None, self._error, None
        if num_processes() > 1:
            knows = own is not None and not isinstance(own, Incomplete)  # the cause
            told = gather_object([f"rank {rank()}: {one_line(own)}" if own and knows else None])
            cause = next(filter(None, told), own)
            if cause and not knows:
                own = InputError(f"a checkpoint was not written: {cause}; {GO_ON}")
        if own is not None:
            self.failed = True
            raise own

    def abandon(self, wait_seconds: float = 0.0) -> None:
        """Stop writing, because the run ends; a checkpoint that is complete in time stays."""
        if self._thread is None or self._abandoned.is_set():
            return
        self._thread.join(wait_seconds)
        self._abandoned.set()
        self._thread.join(STOP_SECONDS)
        if self._error is not None:
            error = self._error
            why = str(error) if isinstance(error, InputError) else one_line(error)
            warn(f"the last checkpoint was not written: {why}")

    def _write(self, taken: TakenState) -> None:
        try:
            taken.write(self._go_on)
            if is_main_process():
                prune_checkpoints(taken.directory.parent, self.config.checkpoint.keep_last)
        except Exception as error:  # `finish` raises it
            self._error = error

    def _go_on(self) -> None:
        if self._abandoned.is_set():
            raise InputError("the run ended first")
