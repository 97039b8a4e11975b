"""One execution of a stage in its run directory: how every stage begins and ends (`open_run`).

What a stage loads, trains and writes in between is in its own `stage.py`; `resume.py` finds the
checkpoint that a stopped run continues from.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState

from rlhf.checkpoint.atomic import find_damage, write_whole
from rlhf.checkpoint.cleanup import clear, refuse_to_clear, remove_unfinished
from rlhf.checkpoint.config_changes import refuse_changes, refuse_changes_since_finish
from rlhf.checkpoint.lock import one_writer
from rlhf.checkpoint.ownership import (
    IDENTITY,
    latest_checkpoint,
    refuse_blocked_names,
    step_of,
    write_identity,
)
from rlhf.checkpoint.record import StageRecord, read_record
from rlhf.checkpoint.resume import refuse_another_run
from rlhf.config import CONFIG_FILE, InputError, StageConfig, check, config_text, nothing_to_resume
from rlhf.console import quiet_libraries, say


@dataclass
class StageRun:
    """One execution of a stage.

    Attributes:
        directory: the stage directory, `runs/<run_name>/<stage>`.
        finished: the record of `final/` if the run to resume is finished already.
        has_begun: True once the directory exists and the stage may write into it.
    """

    config: StageConfig
    stage: str
    directory: Path
    finished: StageRecord | None = None
    has_begun: bool = False

    def begin(self) -> Path:
        """Create the stage directory and return it; call this right before training, when
        everything else is known to be good."""
        prepare_run_directory(self.config, self.stage)
        self.has_begun = True
        return self.directory


@contextmanager
def open_run(config: StageConfig, stage: str, writes: bool = True) -> Iterator[StageRun]:
    """Check the configuration and the stage directory, and keep other runs out of the directory.

    At the end, every process waits until the main one has written its files.

    Args:
        writes: False for a run that writes nothing; its directory is neither examined nor locked.

    Raises:
        InputError: the configuration is bad, another process writes to the directory, or
            `refuse_used_directory` refuses it.
    """
    check(config)
    run = StageRun(config, stage, config.stage_dir(stage))
    with one_writer(config, stage) if writes else nullcontext():
        quiet_libraries()
        if writes:
            run.finished = finished_run(config, stage)
            if run.finished is None:
                refuse_used_directory(config, stage)
        yield run
        if run.has_begun:
            PartialState().wait_for_everyone()


def refuse_used_directory(config: StageConfig, stage: str) -> None:
    """Refuse a directory that holds a run, unless told to resume or to overwrite; change nothing.

    Raises:
        InputError: the directory is in use, there is nothing to resume, the newest checkpoint is
            one that `checkpoint_to_resume` will refuse, or something of the user is in the way.
    """
    directory = config.stage_dir(stage)
    is_finished = (directory / "final").is_dir()
    if config.resume and config.overwrite:
        raise InputError(
            f"resume={str(config.resume).lower()} and overwrite=true contradict each other; give "
            "one of them"
        )
    if _is_used(directory) and not (config.resume or config.overwrite):
        raise InputError(
            f"{directory} already holds {'a finished' if is_finished else 'an unfinished'} run; "
            "use another run_name, resume=true to continue it, or overwrite=true to delete it"
        )
    refuse_blocked_names(directory)
    if config.overwrite:
        refuse_to_clear(directory)
    if not config.resume:
        return
    if is_finished:
        raise InputError(
            f"{directory} is finished: there is nothing to resume; use another run_name"
        )
    newest = latest_checkpoint(directory)
    refuse_another_run(directory, step_of(newest))
    if config.resume is True and newest is None:
        raise nothing_to_resume(config, stage)
    if newest and find_damage(newest, (CONFIG_FILE,)) is None:
        refuse_changes(config, newest)


def finished_run(config: StageConfig, stage: str) -> StageRecord | None:
    """If the run to resume is finished, say so and return its record.

    Raises:
        InputError: it ran with a different configuration.
    """
    final = config.stage_dir(stage) / "final"
    record = read_record(final) if config.resume and not config.overwrite else None
    if record is not None:
        refuse_changes_since_finish(config, final)
        say(f"{final.parent} is finished: nothing to do")
    return record


def prepare_run_directory(config: StageConfig, stage: str) -> Path:
    """Create the stage's directory and return it; with `overwrite=true`, first delete what a run
    wrote there.

    `config.yaml` then holds what the run was started with. If there is a checkpoint to resume from,
    `checkpoint_to_resume` writes that file instead, once it has accepted the configuration.
    """
    state, directory = PartialState(), config.stage_dir(stage)
    refuse_used_directory(config, stage)
    state.wait_for_everyone()
    if state.is_main_process:
        if config.overwrite:
            clear(directory)
        directory.mkdir(parents=True, exist_ok=True)
        remove_unfinished(directory)
        write_identity(directory, stage)
        if latest_checkpoint(directory) is None:
            write_whole(directory / CONFIG_FILE, config_text(config))
    state.wait_for_everyone()
    return directory


def _is_used(directory: Path) -> bool:
    """True unless the directory holds only hidden files, such as the lock, and what a run writes
    before it trains."""
    beginning = (IDENTITY, CONFIG_FILE)
    return directory.is_dir() and any(
        path.name not in beginning and not path.name.startswith(".") for path in directory.iterdir()
    )
