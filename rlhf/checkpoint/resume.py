"""Run directories: whose they are, which checkpoint a run continues from, which ones are kept.

`run.json` is the identity of a run, written once; the manifest of each of its checkpoints repeats
it. The manifest also holds the sizes that the `*.jsonl` files of the stage had, so that a resumed
run drops exactly what was written after the checkpoint.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from rlhf.checkpoint.files import MANIFEST, find_damage, read_manifest, write_manifest
from rlhf.checkpoint.finite import ADJUSTABLE, read_changes, record_changes, stopped_after
from rlhf.checkpoint.handoff import StageRecord, read_record
from rlhf.config import CONFIG_FILE, InputError, StageConfig, nothing_to_resume, save_config
from rlhf.metrics import IDENTITY, read_identity, say, warn

# Keys, or groups of them, of which a run that is resumed ends as if it had them from its start.
HARMLESS = (
    *("runs_dir", "run_name", "tracker", "checkpoint", "preflight", "watchdog"),
    *("num_samples", "response_length", "temperature", "top_p", "ppo.save_rollouts"),
    *("reward.num_normalization_prompts", "normalization", "trainer.dataloader_num_workers"),
)
NOT_HARMLESS = ("watchdog.kl_budget",)  # it ends the run
LEFTOVERS = (".damaged", ".tmp", ".old")

# --- The run directory ----------------------------------------------------------------------------


def check_run_directory(config: StageConfig, stage: str) -> None:
    """Refuse a directory that holds a run, unless told to resume or to overwrite; changes nothing.

    Raises:
        InputError: the directory is in use, there is nothing to resume, or the newest checkpoint is
            one that `checkpoint_to_resume` will refuse.
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
    if config.resume and (directory / "final").is_dir():
        raise InputError(
            f"{directory} is finished: there is nothing to resume; use another run_name"
        )
    newest = latest_checkpoint(directory)
    if config.resume is True and newest is None:
        raise nothing_to_resume(config, stage)
    if config.resume and newest and find_damage(newest, (CONFIG_FILE,)) is None:
        _check_same_run(newest, directory)
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

    With `overwrite=true`, what it held is deleted here. `config.yaml` says from now on what a run
    without a checkpoint was started with; `checkpoint_to_resume` writes that of the others.
    """
    state, directory = PartialState(), config.stage_dir(stage)
    check_run_directory(config, stage)
    state.wait_for_everyone()
    if state.is_main_process:
        if config.overwrite and directory.is_dir():
            shutil.rmtree(directory)
        directory.mkdir(parents=True, exist_ok=True)
        _identify(directory, stage)
        if latest_checkpoint(directory) is None:
            _write_config(config, directory)
    state.wait_for_everyone()
    return directory


def _in_use(directory: Path) -> bool:
    if not directory.is_dir():
        return False
    beginning = (IDENTITY, CONFIG_FILE)  # of a run that was stopped before it trained
    return any(path.name.removesuffix(".tmp") not in beginning for path in directory.iterdir())


def _write_config(config: StageConfig, directory: Path) -> None:
    temporary = directory / (CONFIG_FILE + ".tmp")
    save_config(config, temporary)
    os.replace(temporary, directory / CONFIG_FILE)


def _identify(directory: Path, stage: str) -> None:
    """Write `run.json` if there is none: checkpoints that were brought here alone bring theirs."""
    if read_identity(directory) is not None:
        return
    newest = latest_checkpoint(directory)
    identity = _facts(newest)["run"] if newest else None
    temporary = directory / (IDENTITY + ".tmp")
    temporary.write_text(json.dumps(identity or {"id": secrets.token_hex(8), "stage": stage}))
    os.replace(temporary, directory / IDENTITY)


# --- Checkpoints ----------------------------------------------------------------------------------


def complete_checkpoints(directory: Path) -> list[Path]:
    """Return every `checkpoint-N` of a stage, oldest first, without those left half-written."""
    return [path for path in _checkpoints(directory) if read_manifest(path) is not None]


def latest_checkpoint(directory: Path) -> Path | None:
    """Return the newest complete `checkpoint-N` in a stage directory."""
    return next(reversed(complete_checkpoints(directory)), None)


def step_of(checkpoint: Path | None) -> int:
    """Step number in the name of a checkpoint; 0 without one."""
    return int(checkpoint.name.split("-")[-1]) if checkpoint else 0


def _checkpoints(directory: Path) -> list[Path]:
    return sorted(filter(_is_numbered, directory.glob("checkpoint-*")), key=step_of)


def _is_numbered(path: Path) -> bool:
    return path.name.split("-")[-1].isdigit()


def seal(checkpoint: Path, directory: Path, best: int | None = None) -> None:
    """Write the manifest of a checkpoint of the run in `directory`; it is complete from then on.

    Args:
        best: step of the best checkpoint so far, which is kept with this one.
    """
    facts = {
        "run": read_identity(directory),
        "processes": _num_processes(),
        "best": best,
        "changes": read_changes(directory),
        "logs": {file.name: file.stat().st_size for file in sorted(directory.glob("*.jsonl"))},
    }
    write_manifest(checkpoint, facts)


def _facts(checkpoint: Path) -> dict[str, Any]:
    """What `seal` wrote, of a checkpoint that is complete."""
    manifest = read_manifest(checkpoint)
    assert manifest is not None, checkpoint
    return manifest


def _num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def prune_checkpoints(directory: Path, keep_last: int) -> None:
    """Delete checkpoints, but for the newest `keep_last` and those that they name as the best.

    What was set aside as damaged, or was left half-written, goes once the run has passed its step.
    """
    kept = complete_checkpoints(directory)[-keep_last:]
    if not kept:
        return
    newest = step_of(kept[-1])
    steps = {step_of(checkpoint) for checkpoint in kept} | {_facts(c)["best"] for c in kept}
    for checkpoint in _checkpoints(directory):
        if step_of(checkpoint) < newest and step_of(checkpoint) not in steps:
            # the manifest first: what a kill leaves over is no checkpoint
            (checkpoint / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(checkpoint)
    for leftover in directory.glob("checkpoint-*.*"):
        checkpoint = leftover.with_suffix("")
        if leftover.suffix in LEFTOVERS and _is_numbered(checkpoint):
            if step_of(checkpoint) <= newest:
                shutil.rmtree(leftover)


# --- Resuming -------------------------------------------------------------------------------------


def checkpoint_to_resume(config: StageConfig, directory: Path) -> Path | None:
    """Return the newest intact checkpoint when resuming is asked for, and say which.

    Damaged ones are named and set aside; the `*.jsonl` files are cut back to the checkpoint.

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
    for candidate in reversed(_checkpoints(directory)):
        problem = _find_problem(candidate)
        if problem is None:
            intact = candidate
            break
        damaged[candidate] = problem
    if intact is None and config.resume is True:
        problems = "".join(f"\n  {path}: {problem}" for path, problem in damaged.items())
        raise InputError(
            f"resume=true: no checkpoint is intact, so there is nothing to continue:{problems}\n"
            "resume=auto sets these aside and starts the run again"
        )
    if intact:
        _check_same_run(intact, directory)
        changed = _check_same_config(config, intact)
        adjusted = [line for key, line in changed.items() if not _is_harmless(key)]
        for line in changed.values():
            effect = "after the stop" if line in adjusted else "without effect on what is trained"
            say(f"changed, {effect}: {line}")
    for checkpoint, problem in damaged.items():
        aside = checkpoint.with_name(checkpoint.name + ".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(checkpoint, aside)
        instead = f"{intact} is used instead" if intact else "no earlier one is intact"
        warn(f"{checkpoint} is damaged: {problem}; {instead} (the damaged one is now {aside.name})")
    _cut_logs(directory, _facts(intact)["logs"] if intact else {})
    if intact:
        record_changes(directory, step_of(intact), adjusted)
    _write_config(config, directory)
    say(f"resuming from {intact}" if intact else "no checkpoint to resume from: starting afresh")
    return intact


def _find_problem(checkpoint: Path) -> str | None:
    """As `find_damage`, but for the best checkpoint too, from which `final/` may be written."""
    problem = find_damage(checkpoint)
    best = None if problem else _facts(checkpoint)["best"]
    if best is None or best == step_of(checkpoint):
        return problem
    other = checkpoint.with_name(f"checkpoint-{best}")
    problem = find_damage(other)
    return problem and f"it names {other.name} as the best, of which {problem}"


def _check_same_run(checkpoint: Path, directory: Path) -> None:
    theirs, ours = _facts(checkpoint)["run"], read_identity(directory)
    # without run.json, it is the checkpoint that says whose directory this is
    if ours is not None and theirs != ours:
        whose = f"{theirs['stage']} {theirs['id']}" if theirs else "unknown"
        raise InputError(
            f"{checkpoint} belongs to another run ({whose}) than its directory ({ours['stage']} "
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
        now["number of processes"] = _num_processes()
    lines = {
        key: f"{key}: {_show(was, key)} -> {_show(now, key)}"
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key)
    }
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

    return _flat(OmegaConf.to_container(OmegaConf.load(directory / CONFIG_FILE)))


def _settings(config: StageConfig) -> dict[str, Any]:
    """Flatten a configuration as it would be read from YAML: a tuple would be a list."""
    from omegaconf import OmegaConf

    text = OmegaConf.to_yaml(OmegaConf.structured(config))
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
    """Drop what was written to the `*.jsonl` files after the checkpoint; all of it without one."""
    for name in sorted({file.name for file in directory.glob("*.jsonl")} | sizes.keys()):
        file, size = directory / name, sizes.get(name, 0)
        found = file.stat().st_size if file.is_file() else 0
        if found < size:
            warn(f"{file} is shorter than when the checkpoint was written: rows are missing in it")
        elif found > size:
            os.truncate(file, size)
