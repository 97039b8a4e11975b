"""Stopping a run: SIGTERM, SIGHUP and the first Ctrl-C let the step end and a checkpoint be saved;
a number that is not finite ends it with a command that goes on from before."""

from __future__ import annotations

import os
import select
import signal
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from rlhf.checkpoint.finite import write_stop
from rlhf.checkpoint.ownership import complete_checkpoints, latest_checkpoint, step_of
from rlhf.config import InputError, PPOStageConfig, RewardStageConfig, SFTStageConfig, StageConfig
from rlhf.console import is_main_process

REPEAT_SECONDS = 5.0  # an exception raised while Python destroys an object is lost: raise it again


class GracefulStop:
    """Turns SIGTERM, SIGHUP or the first Ctrl-C into a flag, so that a loop can save; a second
    Ctrl-C interrupts at once. SIGHUP stays ignored where it was, as under nohup.

    Use as a context manager; read `requested()` at the end of each step, on every rank alike. When
    the block has not ended `grace_seconds` after the signal, it is left by SystemExit: a save that
    is under way then is cut off, which leaves no checkpoint of that name.

    Attributes:
        signal: number of the signal that asked to stop; None as long as there is none.
    """

    def __init__(self, grace_seconds: float, directory: Path):
        """Take the seconds that the step and the save may take, and the stage directory."""
        self.signal: int | None = None
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
            from accelerate.utils import gather

            own = torch.tensor([self.signal or 0], device=state.device)
            self.signal = int(gather(own).max()) or None
        if self.signal is not None:
            _drop_closed_outputs()
        return self.signal is not None


def explain_stop(
    config: StageConfig,
    directory: Path,
    error: InputError,
    step: int,
    spoilt: bool,
    dtype: torch.dtype,
) -> InputError:
    """Note in the stage directory that a run ends as a number is not finite, and add to the error
    how to go on.

    Args:
        step: optimiser step or update that was not finished.
        spoilt: the weights after the step before gave the number, so that it would come again.
        dtype: of the weights.
    """
    if is_main_process():
        write_stop(directory, step, str(error))
    checkpoints = complete_checkpoints(directory)
    usable = [path for path in checkpoints if step_of(path) < step - spoilt]
    if not usable:
        way = "No checkpoint is from before: start again with the same command, overwrite=true and"
    else:
        newer = ", ".join(str(path) for path in checkpoints if path not in usable)
        delete = f"delete {newer}, whose weights gave it, then " if newer else ""
        runs_dir = "" if config.runs_dir == StageConfig.runs_dir else f" runs_dir={config.runs_dir}"
        command = (
            f"python -m rlhf.{directory.name} resume=true run_name={config.run_name}{runs_dir}"
        )
        way = f"To go on from {usable[-1]}: {delete}{command}"
    lower = [f"{name}={rate / 10:g}" for name, rate in _learning_rates(config).items()]
    remedy = "model.dtype=float32" if dtype == torch.float16 else " ".join(lower)
    mixed = config.precision != "float32" and (
        torch.cuda.is_available() or config.precision != "auto"
    )
    also = "; precision=float32 may help too" if mixed else ""
    return InputError(f"{error}. {way} {remedy}{also}")


def _learning_rates(config: StageConfig) -> dict[str, float]:
    """The learning rates that a stage trains with, none of them absurdly high."""
    rates: dict[str, float] = {}
    if isinstance(config, SFTStageConfig | RewardStageConfig):
        rates["trainer.learning_rate"] = float(config.trainer.get("learning_rate", 5e-5))
    if isinstance(config, PPOStageConfig):
        rates["ppo.learning_rate"] = config.ppo.learning_rate
        if config.ppo.advantage == "gae":
            rates["critic.learning_rate"] = config.critic.learning_rate
    return {name: min(rate, 1e-2) for name, rate in rates.items()}


def _write(text: str) -> None:
    """Write to stderr past Python's buffers, which the signal may have interrupted."""
    if is_main_process():
        with suppress(OSError):  # nobody may be there to read it
            os.write(2, text.encode())


def _drop_closed_outputs() -> None:
    """Let stdout and stderr lead nowhere once their terminal is gone, or the program that they are
    piped into: writing to them would end the run before it has saved."""
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    for descriptor, event in poll.poll(0):
        if event & (select.POLLERR | select.POLLHUP):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
