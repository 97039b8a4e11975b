"""Run directories: whose they are, and which checkpoint a run continues from.

`run.json` is the identity of a run, written once; the manifest of each of its checkpoints repeats
it. The manifest also holds the sizes that the `*.jsonl` files of the stage had, so that a resumed
run drops exactly what was written after the checkpoint.
"""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from rlhf.checkpoint.atomic import find_damage, read_manifest
from rlhf.checkpoint.finite import ADJUSTABLE, record_changes, stopped_after
from rlhf.checkpoint.ownership import (
    LOGS,
    check_entries,
    clear,
    facts_of,
    latest_checkpoint,
    num_processes,
    others_checkpoints,
    own_checkpoints,
    refuse_to_clear,
    remove_unfinished,
    set_aside,
    step_of,
)
from rlhf.checkpoint.stage_directory import StageRecord, read_record
from rlhf.config import (
    CONFIG_FILE,
    InputError,
    StageConfig,
    nothing_to_resume,
    plain_values,
    save_config,
)
from rlhf.console import say, warn
from rlhf.metrics import IDENTITY, read_identity

# Settings, or groups of them, that may change on resume: they do not affect the result.
HARMLESS = (
    *("runs_dir", "run_name", "tracker", "checkpoint", "preflight", "watchdog"),
    *("num_samples", "response_length", "temperature", "top_p", "ppo.save_rollouts"),
    *("reward.num_normalization_prompts", "normalization", "trainer.dataloader_num_workers"),
)
NOT_HARMLESS = ("watchdog.kl_budget",)  # it ends the run
TYPED = "model.trust_remote_code"  # never read from a run's own configuration

# --- The run directory ----------------------------------------------------------------------------


def check_run_directory(config: StageConfig, stage: str) -> None:
    """Refuse a directory that holds a run, unless told to resume or to overwrite; changes nothing.

    Raises:
        InputError: the directory is in use, there is nothing to resume, the newest checkpoint is
            one that `checkpoint_to_resume` will refuse, or something of the user is in the way.
    """
    directory = config.stage_dir(stage)
    if config.resume and config.overwrite:
        raise InputError(
            f"resume={str(config.resume).lower()} and overwrite=true contradict each other; give "
            "one of them"
        )
    if _in_use(directory) and not (config.resume or config.overwrite):
        done = "a finished run" if (directory / "final").is_dir() else "an unfinished run"
        raise InputError(
            f"{directory} already holds {done}; use another run_name, resume=true to continue it, "
            "or overwrite=true to delete it"
        )
    check_entries(directory)
    if config.overwrite:
        refuse_to_clear(directory)
    if config.resume and (directory / "final").is_dir():
        raise InputError(
            f"{directory} is finished: there is nothing to resume; use another run_name"
        )
    newest = latest_checkpoint(directory)
    if config.resume:
        _refuse_another_run(directory, step_of(newest))
    if config.resume is True and newest is None:
        raise nothing_to_resume(config, stage)
    if config.resume and newest and find_damage(newest, (CONFIG_FILE,)) is None:
        _check_same_config(config, newest)


def finished_run(config: StageConfig, stage: str) -> StageRecord | None:
    """Return the record of a run that is to be resumed and is finished, and say that it is.

    Raises:
        InputError: it ran with another configuration.
    """
    final = config.stage_dir(stage) / "final"
    record = read_record(final) if config.resume and not config.overwrite else None
    if record is not None:
        _check_same_config(config, final)
        say(f"{final.parent} is finished: nothing to do")
    return record


def prepare_run_directory(config: StageConfig, stage: str) -> Path:
    """Create the stage's directory, once all else is known to be good; see `check_run_directory`.

    With `overwrite=true`, what a run wrote there is deleted here. `config.yaml` says from now on
    what a run without a checkpoint was started with; `checkpoint_to_resume` writes that of the
    others.
    """
    state, directory = PartialState(), config.stage_dir(stage)
    check_run_directory(config, stage)
    state.wait_for_everyone()
    if state.is_main_process:
        if config.overwrite:
            clear(directory)
        directory.mkdir(parents=True, exist_ok=True)
        remove_unfinished(directory)
        _identify(directory, stage)
        if latest_checkpoint(directory) is None:
            _write_config(config, directory)
    state.wait_for_everyone()
    return directory


def _in_use(directory: Path) -> bool:
    """True where there is more than the beginning of a run that was stopped before it trained, and
    hidden files such as the lock."""
    beginning = (IDENTITY, CONFIG_FILE)
    return directory.is_dir() and any(
        path.name not in beginning and not path.name.startswith(".") for path in directory.iterdir()
    )


def _write_config(config: StageConfig, directory: Path) -> None:
    temporary = directory / f".{CONFIG_FILE}.tmp"
    save_config(config, temporary)
    os.replace(temporary, directory / CONFIG_FILE)


def _identify(directory: Path, stage: str) -> None:
    """Write `run.json` if there is none: checkpoints that were brought here alone bring theirs."""
    if read_identity(directory) is not None:
        return
    newest = latest_checkpoint(directory)
    identity = facts_of(newest)["run"] if newest else None
    temporary = directory / f".{IDENTITY}.tmp"
    temporary.write_text(json.dumps(identity or {"id": secrets.token_hex(8), "stage": stage}))
    os.replace(temporary, directory / IDENTITY)


# --- Resuming -------------------------------------------------------------------------------------


def checkpoint_to_resume(config: StageConfig, directory: Path) -> Path | None:
    """Return the newest intact checkpoint when resuming is asked for, and say which.

    Damaged ones are named and set aside; the logs are cut back to the checkpoint.

    Raises:
        InputError: the checkpoint is another run's, or was written with a configuration under which
            the run would not end as if it had never stopped, or resume=true finds none intact.
    """
    if not config.resume:
        return None
    outcome: list[Any] = [None]
    if PartialState().is_main_process:
        try:
            outcome = [_resume(config, directory)]
        except InputError as error:  # for all processes alike, or the others would wait for ever
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], InputError):
        raise outcome[0]
    return outcome[0]


def _resume(config: StageConfig, directory: Path) -> Path | None:
    damaged: dict[Path, str] = {}
    intact = None
    for candidate in reversed(own_checkpoints(directory)):
        problem = _find_problem(candidate)
        if problem is None:
            intact = candidate
            break
        damaged[candidate] = problem
    _refuse_another_run(directory, step_of(intact))
    if intact is None and config.resume is True:
        problems = "".join(f"\n  {path}: {problem}" for path, problem in damaged.items())
        raise InputError(
            f"resume=true: no checkpoint is intact, so there is nothing to continue:{problems}\n"
            "resume=auto sets these aside and starts the run again"
        )
    if intact:
        changed = _check_same_config(config, intact)
        adjusted = [line for key, line in changed.items() if not _is_harmless(key)]
        for line in changed.values():
            effect = "after the stop" if line in adjusted else "without effect on what is trained"
            say(f"changed, {effect}: {line}")
    for checkpoint, problem in damaged.items():
        aside = set_aside(checkpoint)
        instead = f"{intact} is used instead" if intact else "no earlier one is intact"
        warn(f"{checkpoint} is damaged: {problem}; {instead} (the damaged one is now {aside.name})")
    for path in others_checkpoints(directory):
        if step_of(path) > step_of(intact):
            warn(f"{path} is not a checkpoint of this run: it is left as it is")
    _cut_logs(directory, facts_of(intact)["logs"] if intact else {})
    if intact:
        record_changes(directory, step_of(intact), adjusted)
    _write_config(config, directory)
    say(f"resuming from {intact}" if intact else "no checkpoint to resume from: starting afresh")
    return intact


def _find_problem(checkpoint: Path) -> str | None:
    """As `find_damage`, but for the best checkpoint too, from which `final/` may be written."""
    problem = find_damage(checkpoint)
    best = None if problem else facts_of(checkpoint)["best"]
    if best is None or best == step_of(checkpoint):
        return problem
    other = checkpoint.with_name(f"checkpoint-{best}")
    problem = find_damage(other)
    return problem and f"it names {other.name} as the best, of which {problem}"


def _refuse_another_run(directory: Path, step: int) -> None:
    """Refuse a complete checkpoint of another run that is newer than those of this one."""
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


def _check_same_config(config: StageConfig, directory: Path) -> dict[str, str]:
    """Compare with the configuration that a directory was written with; return what differs.

    Raises:
        InputError: some of it is not harmless, and the run did not stop at a number that is not
            finite, after which the settings in `ADJUSTABLE` may change.
    """
    was, now = _settings_of(directory), _settings(config)
    manifest = read_manifest(directory)  # a checkpoint has one, `final/` has none
    stop = None
    if manifest is not None:
        stop = stopped_after(directory.parent, step_of(directory))
        was["number of processes"] = manifest["processes"]
        now["number of processes"] = num_processes()
    lines = {
        key: f"{key}: {_show(was, key)} -> {_show(now, key)}"
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key)
    }
    if manifest is None:
        lines.pop(TYPED, None)  # a finished run loads nothing
    elif TYPED in lines:
        lines[TYPED] += f" (type {TYPED}={_show(was, TYPED)} again: no file gives it)"
    allowed = ADJUSTABLE if stop is not None else ()
    refused = [lines[key] for key in lines if not _is_harmless(key) and key not in allowed]
    if refused:
        also = f" (only {', '.join(allowed)} may change after the stop)" if allowed else ""
        raise InputError(
            f"{directory} was written with another configuration:\n  "
            + "\n  ".join(refused)
            + "\nA resumed run must end as if it had never stopped: give these their old values"
            f"{also}, or start another run under its own run_name"
        )
    return lines


def _settings_of(directory: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from yaml import YAMLError

    file = directory / CONFIG_FILE
    try:
        return _flat(OmegaConf.to_container(OmegaConf.load(file)))
    except (OSError, ValueError, LookupError, TypeError, YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{file} is damaged ({type(error).__name__}: {reason})") from error


def _settings(config: StageConfig) -> dict[str, Any]:
    """Flatten a configuration as it would be read from YAML: a tuple would be a list."""
    from omegaconf import OmegaConf

    text = OmegaConf.to_yaml(OmegaConf.create(plain_values(config)))
    return _flat(OmegaConf.to_container(OmegaConf.create(text)))


def _is_harmless(key: str) -> bool:
    groups = tuple(f"{name}." for name in HARMLESS)
    return (key in HARMLESS or key.startswith(groups)) and key not in NOT_HARMLESS


def _flat(values: Any) -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}, with paths inside the run's own folder relative to it."""
    run = f"{Path(values['runs_dir']) / values['run_name']}/"
    flat: dict[str, Any] = {}
    left = dict(values)
    while left:
        key, value = left.popitem()
        if isinstance(value, dict):
            left |= {f"{key}.{name}": inner for name, inner in value.items()}
        elif key not in ("resume", "overwrite"):
            flat[key] = value.removeprefix(run) if isinstance(value, str) else value
    return flat


def _show(values: dict[str, Any], key: str) -> str:
    return json.dumps(values[key]) if key in values else "(not set)"


def _cut_logs(directory: Path, sizes: dict[str, int]) -> None:
    """Drop what was written to the logs after the checkpoint; all of it without one."""
    for name in LOGS:
        file, size = directory / name, sizes.get(name, 0)
        found = file.stat().st_size if file.is_file() else 0
        if found < size:
            warn(f"{file} is shorter than when the checkpoint was written: rows are missing in it")
        elif found > size:
            os.truncate(file, size)
