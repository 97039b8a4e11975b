"""Where a stopped run continues: at its newest intact checkpoint.

A checkpoint's manifest also holds the sizes that the `*.jsonl` logs of the stage had, so that a
resumed run drops exactly what was written after the checkpoint.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from rlhf.checkpoint.atomic import find_damage, read_manifest, write_whole
from rlhf.checkpoint.cleanup import set_aside
from rlhf.checkpoint.config_changes import is_harmless, refuse_changes
from rlhf.checkpoint.nonfinite_stop import CHANGES, write_stop
from rlhf.checkpoint.ownership import (
    IDENTITY,
    LOGS,
    complete_checkpoints,
    manifest_of,
    others_checkpoints,
    own_checkpoints,
    read_identity,
    step_of,
)
from rlhf.config import (
    CONFIG_FILE,
    InputError,
    PPOStageConfig,
    RewardStageConfig,
    SFTStageConfig,
    StageConfig,
    config_text,
)
from rlhf.console import is_main_process, say, warn
from rlhf.metrics import append_jsonl


def checkpoint_to_resume(config: StageConfig, directory: Path) -> Path | None:
    """Return the newest intact checkpoint if the run is to be resumed, and say which it is.

    Damaged checkpoints are named and set aside; the logs are cut back to the checkpoint.

    Raises:
        InputError: the checkpoint belongs to another run, `refuse_changes` refuses the
            configuration, or resume=true finds no intact checkpoint.
    """
    if not config.resume:
        return None
    outcome: list[Any] = [None]
    if PartialState().is_main_process:
        try:
            outcome = [_resume(config, directory)]
        except InputError as error:  # raised on all processes, or the others would wait for ever
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], InputError):
        raise outcome[0]
    return outcome[0]


def _resume(config: StageConfig, directory: Path) -> Path | None:
    intact, damaged = find_intact(directory)
    refuse_another_run(directory, step_of(intact))
    if intact is None and config.resume is True:
        problems = "".join(f"\n  {path}: {problem}" for path, problem in damaged.items())
        raise InputError(
            f"resume=true: no checkpoint is intact, so there is nothing to continue:{problems}\n"
            "resume=auto sets these aside and starts the run again"
        )
    changed = refuse_changes(config, intact) if intact else {}
    for key, line in changed.items():
        effect = "without effect on what is trained" if is_harmless(key) else "after the stop"
        say(f"changed, {effect}: {line}")
    for checkpoint, problem in damaged.items():
        aside = set_aside(checkpoint)
        instead = f"{intact} is used instead" if intact else "no earlier one is intact"
        warn(f"{checkpoint} is damaged: {problem}; {instead} (the damaged one is now {aside.name})")
    for path in others_checkpoints(directory):
        if step_of(path) > step_of(intact):
            warn(f"{path} is not a checkpoint of this run: it is left unchanged")
    truncate_logs(directory, manifest_of(intact)["logs"] if intact else {})
    if intact:
        adjusted = [line for key, line in changed.items() if not is_harmless(key)]
        if adjusted:
            row = {"after_step": step_of(intact), "changed": adjusted}
            append_jsonl(directory / CHANGES, [row])
    write_whole(directory / CONFIG_FILE, config_text(config))
    say(f"resuming from {intact}" if intact else "no checkpoint to resume from: starting afresh")
    return intact


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
    """Drop what was written to the logs after a checkpoint.

    Args:
        sizes: of the logs at the checkpoint, in bytes; a log without a size is emptied.
    """
    for name in LOGS:
        file, size = directory / name, sizes.get(name, 0)
        found = file.stat().st_size if file.is_file() else 0
        if found < size:
            warn(f"{file} is shorter than when the checkpoint was written: rows are missing in it")
        elif found > size:
            os.truncate(file, size)


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


# --- After a non-finite number --------------------------------------------------------------------


def explain_stop(
    config: StageConfig,
    directory: Path,
    error: InputError,
    step: int,
    spoilt: bool,
    dtype: torch.dtype,
) -> InputError:
    """Note that a non-finite number ends the run, and add to the error how to continue.

    Args:
        step: optimiser step or update that was not finished.
        spoilt: True if the weights after the previous step led to the number: it would come again.
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
        delete = f"delete {newer}, whose weights led to it, then " if newer else ""
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
    """Return the learning rates of a stage, cut to at most 0.01."""
    rates: dict[str, float] = {}
    if isinstance(config, SFTStageConfig | RewardStageConfig):
        rates["trainer.learning_rate"] = float(config.trainer.get("learning_rate", 5e-5))
    if isinstance(config, PPOStageConfig):
        rates["ppo.learning_rate"] = config.ppo.learning_rate
        if config.ppo.has_critic:
            rates["critic.learning_rate"] = config.critic.learning_rate
    return {name: min(rate, 1e-2) for name, rate in rates.items()}
