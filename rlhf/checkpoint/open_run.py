"""How every stage begins and ends: one execution of a stage, with its directory locked.

What a stage loads, trains and writes in between is in its own `stage.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState

from rlhf.checkpoint.lock import one_writer
from rlhf.checkpoint.run_directory import (
    check_run_directory,
    finished_run,
    prepare_run_directory,
)
from rlhf.checkpoint.stage_directory import StageRecord
from rlhf.config import StageConfig, check
from rlhf.console import quiet_libraries


@dataclass
class StageRun:
    """One execution of a stage.

    Attributes:
        directory: the stage directory, `runs/<run_name>/<stage>`.
        finished: the record of `final/` when the run to resume is finished already.
        has_begun: True once the directory exists and training may write into it.
    """

    config: StageConfig
    stage: str
    directory: Path
    finished: StageRecord | None = None
    has_begun: bool = False

    def begin(self) -> Path:
        """Create the stage directory and return it; call this when everything else is known to be
        good, right before training."""
        prepare_run_directory(self.config, self.stage)
        self.has_begun = True
        return self.directory


@contextmanager
def open_run(config: StageConfig, stage: str, writes: bool = True) -> Iterator[StageRun]:
    """Check the configuration and the stage directory, and keep other runs out of the directory.

    At the end, every process waits until the main one has written its files.

    Args:
        writes: False for a run that writes nothing; its directory is neither checked nor locked.

    Raises:
        InputError: the configuration is bad, another process writes to the directory, or
            `check_run_directory` refuses it.
    """
    check(config)
    run = StageRun(config, stage, config.stage_dir(stage))
    with one_writer(config, stage) if writes else nullcontext():
        quiet_libraries()
        if writes:
            run.finished = finished_run(config, stage)
            if run.finished is None:
                check_run_directory(config, stage)
        yield run
        if run.has_begun:
            PartialState().wait_for_everyone()
