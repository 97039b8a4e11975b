"""One execution of a stage in its run directory: how it begins, continues and ends (`open_run`).

What a stage loads, trains and writes in between is in its own `stage.py`. A checkpoint's manifest
holds the sizes that the `*.jsonl` logs had, so a resumed run drops exactly what was written later.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.checkpoint.config_changes import LENGTH, SERVED, is_harmless, length_of, refuse_changes
from rlhf.checkpoint.disk import find_damage, read_manifest, write_whole
from rlhf.checkpoint.hosts import copy_to_all_hosts
from rlhf.checkpoint.lock import on_main_process, one_writer
from rlhf.checkpoint.output import OUTPUT, OutputLog, kept_output
from rlhf.checkpoint.ownership import (
    IDENTITY,
    INPUTS,
    LOGS,
    clear,
    latest_checkpoint,
    manifest_of,
    others_checkpoints,
    own_checkpoints,
    read_identity,
    refuse_blocked_names,
    refuse_to_clear,
    remove_unfinished,
    set_aside,
    step_of,
    write_identity,
)
from rlhf.checkpoint.record import CHANGES, RECORD, StageRecord, read_record, versions
from rlhf.checkpoint.started_from import note_inputs, require_same_models
from rlhf.config import (
    CONFIG_FILE,
    InputError,
    StageConfig,
    check,
    config_file_of_run,
    config_text,
    dotted,
    load_config,
    nothing_to_resume,
    plain_values,
    refused_file,
    resume_overrides,
)
from rlhf.console import launched_with, num_processes, quiet_libraries, say, warn
from rlhf.launched import settle_launch
from rlhf.metrics import append_jsonl, cut_jsonl


@dataclass
class StageRun:
    """One execution of a stage.

    Attributes:
        directory: the stage directory, `runs/<run_name>/<stage>`.
        output: keeps what the terminal shows.
        finished: the record of `final/` if the run to resume is finished already.
        has_begun: True once the directory exists and the stage may write into it.
    """

    config: StageConfig
    stage: str
    directory: Path
    output: OutputLog
    finished: StageRecord | None = None
    has_begun: bool = False

    def begin(self, train: list[Any], heldout: list[Any]) -> Path:
        """Create the stage directory and return it; call this right before training, when
        everything else is known to be good.

        Args:
            train, heldout: the rows to train on, and those that are held out.
        """
        require_same_models(self.config)
        prepare_run_directory(self.config, self.stage)
        rows = {"rows of dataset.path": train, "held-out rows": heldout}
        note_inputs(self.directory, self.config, rows)
        self.output.begin(self.directory)
        self.has_begun = True
        return self.directory


@contextmanager
def open_run(config: StageConfig, stage: str, writes: bool = True) -> Iterator[StageRun]:
    """Check the configuration and the stage directory, and keep other runs out of the directory.

    At the end, every process waits until the main one has written its files.

    Args:
        writes: False for a run that writes nothing; its directory is neither examined nor locked.
    """
    check(config)
    join_group(config)
    lock = one_writer(config, stage) if writes else nullcontext()
    with lock, kept_output() as output:
        run = StageRun(config, stage, config.stage_dir(stage), output)
        quiet_libraries()
        if writes:
            copy_to_all_hosts(run.directory)
            run.finished = finished_run(config, stage)
            if run.finished is None:
                refuse_used_directory(config, stage)
            else:
                say_finished(config, run.directory)
        yield run
        if run.has_begun:
            from accelerate import PartialState

            PartialState().wait_for_everyone()


def join_group(config: StageConfig) -> None:
    """Join the group of processes, if there are several, and require that all have the same
    configuration and packages."""
    settle_launch()
    if num_processes() == 1 and config.distributed is None and not launched_with("DeepSpeed"):
        return
    from rlhf.distributed import join_processes
    from rlhf.failures import meeting, outlive_launcher, require_equal

    with meeting(config.distributed_timeout):
        join_processes(config.distributed, config.distributed_timeout)
    outlive_launcher()
    require_equal(dotted(plain_values(config)) | versions())


def refuse_used_directory(config: StageConfig, stage: str) -> None:
    """Refuse a directory that holds a run, unless the run may be resumed or overwritten."""
    directory = config.stage_dir(stage)
    is_finished = (directory / "final").is_dir()
    if config.resume and config.overwrite:
        resume = f"resume={str(config.resume).lower()}"
        raise InputError(f"{resume} and overwrite=true contradict each other; give one of them")
    # the lock and other hidden files, and what a run writes before it trains, may be there
    beginning = (IDENTITY, INPUTS, CONFIG_FILE, OUTPUT)
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    is_used = any(name not in beginning and not name.startswith(".") for name in names)
    if is_used and not (config.resume or config.overwrite):
        raise InputError(
            f"{directory} already holds {'a finished' if is_finished else 'an unfinished'} run; "
            f"use another run_name, {_way_on(config, directory)}overwrite=true to delete it"
        )
    refuse_blocked_names(directory)
    if config.overwrite:
        refuse_to_clear(directory)
    if not config.resume:
        return
    if is_finished and not (directory / "final" / RECORD).is_file():
        raise InputError(f"{directory / 'final'} is in the way: no stage wrote it; move it")
    newest = latest_checkpoint(directory)
    refuse_another_run(directory, step_of(newest))
    if is_finished and newest is None:
        raise _only_the_result(directory)
    if config.resume is True and newest is None:
        raise nothing_to_resume(config, stage)
    if newest and find_damage(newest, (CONFIG_FILE,)) is None:
        refuse_changes(config, newest)


def _way_on(config: StageConfig, directory: Path) -> str:
    """How the run that is in a directory can go on, for a message."""
    newest, final = latest_checkpoint(directory), directory / "final"
    if (final / CONFIG_FILE).is_file():
        setting, end = length_of(load_config(type(config), final / CONFIG_FILE))
        longer = f"{resume_overrides(config)} {setting}={2 * end:g}"
        return f"{longer} to make it longer, or " if newest else "or "
    if newest:
        return f"{resume_overrides(config)} to continue it, or "
    if config_file_of_run(directory):
        return f"{resume_overrides(config, 'auto')} to start it again, or "
    return "or "


def finished_run(config: StageConfig, stage: str) -> StageRecord | None:
    """Return the record of the run to resume if it is finished, and not to become longer."""
    final = config.stage_dir(stage) / "final"
    record = read_record(final) if config.resume and not config.overwrite else None
    if record is None or refuse_changes(config, final).keys() & set(LENGTH):
        return None
    return record


def say_finished(config: StageConfig, directory: Path) -> None:
    """Say that a run is finished, and how to make it longer."""
    setting, end = length_of(config)
    longer = f"{setting}={2 * end:g} would make it longer"
    say(f"{directory} is finished: nothing to do ({longer})")


def prepare_run_directory(config: StageConfig, stage: str) -> Path:
    """Create the stage's directory and return it; with `overwrite=true`, first delete what a run
    wrote there.

    `config.yaml` then holds what the run was started with. If there is a checkpoint to resume from,
    `checkpoint_to_resume` writes that file instead, once it has accepted the configuration.
    """
    from accelerate import PartialState

    state, directory = PartialState(), config.stage_dir(stage)
    refuse_used_directory(config, stage)
    state.wait_for_everyone()
    if state.is_main_process:
        if config.overwrite:
            clear(directory)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{refused_file(error)}; set runs_dir to another folder") from error
        remove_unfinished(directory)
        write_identity(directory, stage)
        if latest_checkpoint(directory) is None:
            write_whole(directory / CONFIG_FILE, config_text(config))
    state.wait_for_everyone()
    return directory


# --- Where a stopped run continues ----------------------------------------------------------------


def checkpoint_to_resume(config: StageConfig, directory: Path) -> Path | None:
    """Return the newest intact checkpoint if the run is to be resumed, and say which it is.

    Damaged checkpoints are named and set aside; the logs are cut back to the checkpoint.
    """
    return on_main_process(lambda: _resume(config, directory)) if config.resume else None


def _resume(config: StageConfig, directory: Path) -> Path | None:
    intact, damaged = find_intact(directory)
    refuse_another_run(directory, step_of(intact))
    if intact is None and (directory / "final").is_dir():
        raise _only_the_result(directory)
    if intact is None and config.resume is True:
        problems = "".join(f"\n  {path}: {problem}" for path, problem in damaged.items())
        raise InputError(
            f"resume=true: no checkpoint is intact, so there is nothing to continue:{problems}\n"
            f"{resume_overrides(config, 'auto')} sets these aside and starts the run again"
        )
    changed = refuse_changes(config, intact) if intact else {}
    for key, line in changed.items():
        effect = "the end of the run" if key in LENGTH else "after the stop"
        effect = "where the scorer listens" if key in SERVED else effect
        effect = "without effect on what is trained" if is_harmless(key) else effect
        say(f"changed, {effect}: {line}")
    for checkpoint, problem in damaged.items():
        aside = set_aside(checkpoint)
        instead = f"{intact} is used instead" if intact else "no earlier one is intact"
        warn(f"{checkpoint} is damaged: {problem}; {instead} (the damaged one is now {aside.name})")
    for path in others_checkpoints(directory):
        if step_of(path) > step_of(intact):
            warn(f"{path} is not a checkpoint of this run: it is left unchanged")
    truncate_logs(directory, manifest_of(intact)["logs"] if intact else {})
    adjusted = [line for key, line in changed.items() if not is_harmless(key)]
    if adjusted:
        row = {"after_step": step_of(intact), "changed": adjusted}
        append_jsonl(directory / CHANGES, [row])
    write_whole(directory / CONFIG_FILE, config_text(config))
    say(f"resuming from {intact}" if intact else "no checkpoint to resume from: starting afresh")
    return intact


def _only_the_result(directory: Path) -> InputError:
    way = f"start a new run from its result: another run_name and model.path={directory / 'final'}"
    if directory.name == "reward":
        way = "start a new run: another run_name"
    return InputError(
        f"{directory} is finished, and no intact checkpoint is left to continue from; {way}"
    )


def find_intact(directory: Path) -> tuple[Path | None, dict[Path, str]]:
    """Find the newest intact checkpoint of the run in a stage directory; change nothing.

    Returns:
        That checkpoint, and for each newer, damaged one what is wrong with it, newest first.
    """
    damaged: dict[Path, str] = {}
    for checkpoint in reversed(own_checkpoints(directory)):
        problem = find_damage(checkpoint) or _damage_of_best(checkpoint)
        if problem is None:
            return checkpoint, damaged
        damaged[checkpoint] = problem
    return None, damaged


def _damage_of_best(checkpoint: Path) -> str | None:
    """Describe damage in the best checkpoint that an intact one names: `final/` may need it."""
    best = manifest_of(checkpoint)["best"]
    if best is None or best == step_of(checkpoint):
        return None
    other = checkpoint.with_name(f"checkpoint-{best}")
    problem = find_damage(other)
    return problem and f"its best checkpoint, {other.name}, is damaged: {problem}"


def truncate_logs(directory: Path, sizes: dict[str, int]) -> None:
    """Cut the logs back to their sizes at a checkpoint, in bytes; empty those without a size."""
    for name in LOGS:
        file, size = directory / name, sizes.get(name, 0)
        found = file.stat().st_size if file.is_file() else 0
        if found < size:
            warn(f"{file} is shorter than when the checkpoint was written: rows are missing in it")
        elif found > size:
            cut_jsonl(file, size)


def refuse_another_run(directory: Path, step: int) -> None:
    """Refuse a complete checkpoint of another run that is newer than `step`."""
    ours = read_identity(directory)
    for path in reversed(others_checkpoints(directory)):
        manifest = None if path.is_symlink() else read_manifest(path)
        if ours is None or manifest is None or step_of(path) <= step:
            continue
        theirs = manifest.get("run")
        whose = f"{theirs['stage']} {theirs['id']}" if theirs else "unknown"
        raise InputError(
            f"{path} belongs to another run ({whose}) than its directory ({ours['stage']} "
            f"{ours['id']}, by {IDENTITY}); move it back to where it came from, or delete it"
        )
