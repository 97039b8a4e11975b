"""What a run made in its directory. Nothing else in it is loaded, renamed or deleted.

A checkpoint is a directory (no link to one) named exactly `checkpoint-<step>`, whose manifest names
the run. Where the manifest is damaged, the copy of `run.json` in the checkpoint says whose it is.
What is not complete has a hidden name of its own: a checkpoint takes its name when it is complete.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf.checkpoint.atomic import (
    MANIFEST,
    UNSEALED,
    files_of,
    hidden_names,
    read_manifest,
    remove_directory,
    write_manifest,
)
from rlhf.checkpoint.finite import CHANGES, STOPPED, read_changes
from rlhf.checkpoint.lock import require_held
from rlhf.checkpoint.stage_directory import RECORD, read_record
from rlhf.config import CONFIG_FILE, InputError
from rlhf.metrics import IDENTITY, read_identity

CHECKPOINT = re.compile("checkpoint-(0|[1-9][0-9]*)")
DAMAGED = ".damaged"
RESULTS = ("final", "critic")
LOGS = ("metrics.jsonl", "timings.jsonl", "samples.jsonl", "watchdog.jsonl", CHANGES)
FILES = (IDENTITY, CONFIG_FILE, STOPPED, *LOGS)  # that a stage writes into its directory
ROLLOUT = re.compile("update-[0-9]{6,}[.]jsonl")  # in `rollouts/`

# --- Checkpoints ----------------------------------------------------------------------------------


def step_of(checkpoint: Path | None) -> int:
    """Step number in the name of a checkpoint; 0 without one."""
    return int(checkpoint.name.split("-")[-1]) if checkpoint else 0


def own_checkpoints(directory: Path) -> list[Path]:
    """Return the checkpoints that the run in a stage directory wrote, damaged ones too, oldest
    first."""
    return [path for path in _numbered(directory) if _is_own(path, directory)]


def complete_checkpoints(directory: Path) -> list[Path]:
    """Return the checkpoints of the run in a stage directory whose manifest is whole, oldest
    first."""
    return [path for path in own_checkpoints(directory) if read_manifest(path) is not None]


def latest_checkpoint(directory: Path) -> Path | None:
    """Return the newest complete checkpoint of the run in a stage directory."""
    return next(reversed(complete_checkpoints(directory)), None)


def others_checkpoints(directory: Path) -> list[Path]:
    """Return what is named as a checkpoint but is not the run's, oldest first: other runs'
    checkpoints, and files and directories of the user."""
    return [
        path
        for path in _numbered(directory)
        if not _is_own(path, directory) and not _is_empty(path)
    ]


def facts_of(checkpoint: Path) -> dict[str, Any]:
    """What `seal` wrote, of a checkpoint that is complete."""
    manifest = read_manifest(checkpoint)
    assert manifest is not None, checkpoint
    return manifest


def num_processes() -> int:
    """Number of processes that train."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def seal(checkpoint: Path, directory: Path, best: int | None = None) -> None:
    """Write the manifest of a checkpoint of the run in `directory`; it is complete from then on.

    Args:
        best: step of the best checkpoint so far, which is kept with this one.
    """
    require_held(directory)
    run = read_identity(directory)
    if run is not None:
        shutil.copyfile(directory / IDENTITY, checkpoint / IDENTITY)
    facts = {
        "run": run,
        "processes": num_processes(),
        "best": best,
        "changes": read_changes(directory),
        "logs": {name: (directory / name).stat().st_size for name in _logs(directory)},
    }
    write_manifest(checkpoint, facts)


def publish(written: Path, checkpoint: Path, best: int | None = None) -> None:
    """Seal a checkpoint that is written elsewhere on the same disk, and give it its name.

    Raises:
        InputError: the name is taken by what the run did not write.
    """
    refuse_taken(checkpoint)
    seal(written, checkpoint.parent, best)
    os.replace(written, checkpoint)


def refuse_taken(checkpoint: Path) -> None:
    """Refuse a name for a new checkpoint that something of the user has.

    Raises:
        InputError: names it.
    """
    if checkpoint in others_checkpoints(checkpoint.parent):
        raise InputError(
            f"{checkpoint} is in the way: this run did not write it, and needs the name for a "
            "checkpoint. Move it, then continue with resume=auto"
        )


def check_entries(directory: Path) -> None:
    """Refuse a directory in which a stage could not write its files.

    Raises:
        InputError: it cannot be written to, or something else is where a file of the stage goes.
    """
    for path in (directory, *directory.parents):
        if os.path.lexists(path):
            if not path.is_dir():
                what = "a broken link" if path.is_symlink() else "a file"
                raise InputError(f"{path} is {what}, not a directory; move it, or change run_name")
            if not os.access(path, os.W_OK | os.X_OK):
                raise InputError(
                    f"{path} cannot be written to; make it writable, or change runs_dir"
                )
            break
    for name in FILES + RESULTS:
        path = directory / name
        is_right = path.is_dir() if name in RESULTS else path.is_file()
        if os.path.lexists(path) and (path.is_symlink() or not is_right):
            kinds = {path.is_file(): "a file", path.is_dir(): "a directory"}
            what = "a link" if path.is_symlink() else kinds.get(True, "something else")
            wanted = "a directory" if name in RESULTS else "a file"
            raise InputError(f"{path} is {what}, but the stage writes {wanted} there; move it")


def refuse_taken_steps(directory: Path, steps: range) -> None:
    """As `refuse_taken`, for the steps whose checkpoints are planned."""
    for path in others_checkpoints(directory):
        if step_of(path) in steps:
            refuse_taken(path)


def _logs(directory: Path) -> list[str]:
    return sorted(name for name in LOGS if (directory / name).is_file())


def _numbered(directory: Path) -> list[Path]:
    paths = [path for path in directory.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)]
    return sorted(paths, key=step_of)


def _is_own(path: Path, directory: Path) -> bool:
    if path.is_symlink() or not path.is_dir():
        return False
    run, manifest, copy = read_identity(directory), read_manifest(path), read_identity(path)
    if manifest is None:
        return copy is not None and run in (None, copy)
    # without run.json, it is the checkpoint that says whose directory this is
    return run is None or manifest.get("run") == run


def _empty(directory: Path) -> list[Path]:
    return [path for path in _numbered(directory) if _is_empty(path)]


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


# --- Deleting -------------------------------------------------------------------------------------


def prune_checkpoints(directory: Path, keep_last: int) -> None:
    """Delete checkpoints of the run, except the newest `keep_last` and those that they name as the
    best.

    What was set aside as damaged goes once the run has passed its step. A checkpoint that holds
    files of the user is kept.
    """
    kept = complete_checkpoints(directory)[-keep_last:]
    if not kept:
        return
    newest = step_of(kept[-1])
    steps = {step_of(checkpoint) for checkpoint in kept} | {facts_of(c)["best"] for c in kept}
    passed = [c for c in own_checkpoints(directory) if step_of(c) < newest]
    passed = [c for c in passed if step_of(c) not in steps]
    passed += [d for d in _set_aside(directory) if step_of(d.with_suffix("")) <= newest]
    for path in passed:
        if not _files_of_others(path, facts_of(kept[-1])["files"]):
            remove_directory(path)


def remove_unfinished(directory: Path) -> None:
    """Delete what a run that was killed left half-written or half-deleted."""
    for path in directory.glob(".*"):
        name = path.name.removeprefix(".").removesuffix(".tmp").removesuffix(".old")
        is_own = CHECKPOINT.fullmatch(name.removesuffix(DAMAGED)) or name in RESULTS
        if path.name == UNSEALED or (is_own and path in hidden_names(directory / name)):
            shutil.rmtree(path)


def clear(directory: Path) -> None:
    """Delete what the run in a stage directory wrote; the rest stays. See `refuse_to_clear`."""
    refuse_to_clear(directory)
    results = [directory / name for name in RESULTS if (directory / name).is_dir()]
    for path in [*own_checkpoints(directory), *_set_aside(directory), *_empty(directory), *results]:
        remove_directory(path)
    rollouts = [f for f in (directory / "rollouts").glob("*") if ROLLOUT.fullmatch(f.name)]
    for file in [*rollouts, *(directory / name for name in FILES)]:
        file.unlink(missing_ok=True)
    if _is_empty(directory / "rollouts"):
        (directory / "rollouts").rmdir()


def refuse_to_clear(directory: Path) -> None:
    """Refuse to delete what the run wrote where files of the user are among it.

    Raises:
        InputError: names them, and what has a name that a new run needs.
    """
    others = others_checkpoints(directory)
    for path in own_checkpoints(directory) + _set_aside(directory):
        others += _files_of_others(path, [])
    for name in RESULTS:
        others += _others_in_result(directory / name)
    if others:
        listed = "\n  ".join(map(str, others))
        raise InputError(
            f"overwrite=true deletes what the run in {directory} wrote, but it did not write "
            f"these; move or delete them:\n  {listed}"
        )


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, and return its new name.

    Raises:
        InputError: something of the user has that name.
    """
    aside = checkpoint.with_name(checkpoint.name + DAMAGED)
    if aside in _set_aside(checkpoint.parent):
        remove_directory(aside)
    elif os.path.lexists(aside):
        raise InputError(f"{checkpoint} is damaged, and {aside} is in the way; move one of them")
    os.replace(checkpoint, aside)
    return aside


def _others_in_result(result: Path) -> list[Path]:
    """What is in `final/` or `critic/`, or in its place, and no stage wrote."""
    if not (result / RECORD).is_file():
        return [result] if os.path.lexists(result) and not _is_empty(result) else []
    try:
        record = read_record(result)
    except InputError:  # damaged
        record = None
    if record is None or not record.files:
        return []
    # python -m rlhf.reward.report writes its report again
    known = {*record.files, "report.json", "report.md", "report.png"}
    return [file for file in files_of(result) if file.relative_to(result).as_posix() not in known]


def _set_aside(directory: Path) -> list[Path]:
    """The run's checkpoints that were set aside as damaged."""
    return [
        path
        for path in directory.glob(f"checkpoint-*{DAMAGED}")
        if CHECKPOINT.fullmatch(path.name.removesuffix(DAMAGED)) and _is_own(path, directory)
    ]


def _files_of_others(checkpoint: Path, names: Iterable[str]) -> list[Path]:
    """Files in a checkpoint that its run did not write there.

    Args:
        names: what the run writes into a checkpoint, for one whose own manifest is damaged.
    """
    manifest = read_manifest(checkpoint)
    known = {MANIFEST, IDENTITY, *(names if manifest is None else manifest["files"])}
    if manifest is None and not known - {MANIFEST, IDENTITY}:
        return []
    return [f for f in files_of(checkpoint) if f.relative_to(checkpoint).as_posix() not in known]
