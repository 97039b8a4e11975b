"""Which files in a stage directory belong to its run: nothing else is loaded, renamed or deleted.

`run.json` identifies a run; it is written once. A checkpoint of the run is a directory (not a link)
named exactly `checkpoint-<step>` whose manifest names the run. If the manifest is damaged, the copy
of `run.json` in the checkpoint decides. A checkpoint has a hidden name until it is complete.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from rlhf.checkpoint.disk import (
    MANIFEST,
    UNSEALED,
    files_of,
    hidden_names,
    read_manifest,
    remove_directory,
    write_manifest,
    write_whole,
)
from rlhf.checkpoint.lock import require_held
from rlhf.checkpoint.output import OUTPUT
from rlhf.checkpoint.record import CHANGES, RECORD, read_record
from rlhf.config import CONFIG_FILE, InputError
from rlhf.console import num_processes
from rlhf.curves import PICTURE
from rlhf.metrics import read_jsonl

IDENTITY = "run.json"  # {"id": ..., "stage": ...}
INPUTS = "inputs.json"  # see `started_from`
CHECKPOINT = re.compile("checkpoint-(0|[1-9][0-9]*)")
DAMAGED = ".damaged"  # ends the name of a damaged checkpoint that was set aside
RESULTS = ("final", "critic")
STOPPED = "stopped.json"  # the note of a run that stopped at a non-finite number
LOGS = ("metrics.jsonl", "timings.jsonl", "samples.jsonl", "watchdog.jsonl", CHANGES)
FILES = (
    IDENTITY,
    INPUTS,
    CONFIG_FILE,
    STOPPED,
    OUTPUT,
    PICTURE,
    *LOGS,
)  # what a stage writes into its directory
ROLLOUT = re.compile("update-[0-9]{6,}[.]jsonl")  # in `rollouts/`

# --- Identity -------------------------------------------------------------------------------------


def read_identity(directory: Path) -> dict[str, str] | None:
    """Read `run.json`; None if there is none or it is damaged."""
    try:
        found = json.loads((directory / IDENTITY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and {"id", "stage"} <= found.keys() else None


def run_id(directory: Path) -> str | None:
    """Return the id of the run in a stage directory; None before it has begun."""
    identity = read_identity(directory)
    return identity["id"] if identity else None


def write_identity(directory: Path, stage: str) -> None:
    """Write `run.json` if there is none; checkpoints that were copied here bring their own id."""
    if read_identity(directory) is not None:
        return
    newest = latest_checkpoint(directory)
    identity = manifest_of(newest)["run"] if newest else None
    identity = identity or {"id": secrets.token_hex(8), "stage": stage}
    write_whole(directory / IDENTITY, json.dumps(identity))


# --- Checkpoints ----------------------------------------------------------------------------------


def step_of(checkpoint: Path | None) -> int:
    """Return the step in the name of a checkpoint; 0 for None."""
    return int(checkpoint.name.split("-")[-1]) if checkpoint else 0


def numbered(directory: Path) -> list[Path]:
    """Return everything that has a checkpoint's name, oldest first."""
    paths = [path for path in directory.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)]
    return sorted(paths, key=step_of)


def is_own(path: Path, directory: Path) -> bool:
    """True if the run in a stage directory wrote this checkpoint."""
    if path.is_symlink() or not path.is_dir():
        return False
    run, manifest, copy = read_identity(directory), read_manifest(path), read_identity(path)
    if manifest is None:
        return copy is not None and run in (None, copy)
    # without run.json, the checkpoint says whose directory this is
    return run is None or manifest.get("run") == run


def is_empty(path: Path) -> bool:
    """True for an empty directory that is no link."""
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def own_checkpoints(directory: Path) -> list[Path]:
    """Return the run's checkpoints, oldest first, damaged ones included."""
    return [path for path in numbered(directory) if is_own(path, directory)]


def complete_checkpoints(directory: Path) -> list[Path]:
    """Return the run's checkpoints that have an intact manifest, oldest first."""
    return [path for path in own_checkpoints(directory) if read_manifest(path) is not None]


def latest_checkpoint(directory: Path) -> Path | None:
    """Return the run's newest complete checkpoint."""
    return next(reversed(complete_checkpoints(directory)), None)


def others_checkpoints(directory: Path) -> list[Path]:
    """Return what has a checkpoint's name but is not the run's, oldest first: checkpoints of other
    runs, and files and directories of the user."""
    others = [path for path in numbered(directory) if not is_own(path, directory)]
    return [path for path in others if not is_empty(path)]


def damaged_checkpoints(directory: Path) -> list[Path]:
    """Return the run's checkpoints that were set aside as damaged."""
    return [
        path
        for path in directory.glob(f"checkpoint-*{DAMAGED}")
        if CHECKPOINT.fullmatch(path.name.removesuffix(DAMAGED)) and is_own(path, directory)
    ]


def manifest_of(checkpoint: Path) -> dict[str, Any]:
    """Read the manifest of a complete checkpoint, as `seal` wrote it."""
    manifest = read_manifest(checkpoint)
    assert manifest is not None, checkpoint
    return manifest


def facts_of_run(directory: Path, best: int | None = None) -> dict[str, Any]:
    """What the manifest of a checkpoint says of the run in a stage directory as it is now.

    `best` is the step of the best checkpoint so far, which is kept together with this one.
    """
    logs = [directory / name for name in sorted(LOGS) if (directory / name).is_file()]
    return {
        "run": read_identity(directory),
        "processes": num_processes(),
        "best": best,
        "changes": read_jsonl(directory / CHANGES),
        "logs": {log.name: log.stat().st_size for log in logs},
    }


def seal(checkpoint: Path, directory: Path, facts: dict[str, Any]) -> None:
    """Write the manifest of a checkpoint of the run in a stage directory, with `facts_of_run`; it
    is complete then."""
    require_held(directory)
    if facts["run"] is not None:
        shutil.copyfile(directory / IDENTITY, checkpoint / IDENTITY)
    write_manifest(checkpoint, facts)


def publish(written: Path, checkpoint: Path, best: int | None = None) -> None:
    """Seal a checkpoint that was written elsewhere on the same disk, then move it to its name."""
    refuse_taken_steps(checkpoint.parent, [step_of(checkpoint)])
    seal(written, checkpoint.parent, facts_of_run(checkpoint.parent, best))
    os.replace(written, checkpoint)


def refuse_taken_steps(directory: Path, steps: Collection[int]) -> None:
    """Refuse new checkpoints whose names belong to something that the run did not write."""
    for path in others_checkpoints(directory):
        if step_of(path) in steps:
            raise InputError(
                f"{path} is in the way: this run did not write it, and needs the name for a "
                "checkpoint. Move it, then continue with resume=auto"
            )


def refuse_blocked_names(directory: Path) -> None:
    """Refuse a directory in which a stage could not write its files."""
    existing = next(path for path in (directory, *directory.parents) if os.path.lexists(path))
    if not existing.is_dir():
        what = "a broken link" if existing.is_symlink() else "a file"
        raise InputError(f"{existing} is {what}, not a directory; move it, or change run_name")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{existing} cannot be written to; make it writable, or change runs_dir")
    for name in FILES + RESULTS:
        path, wanted = directory / name, "a directory" if name in RESULTS else "a file"
        kinds = {"a link": path.is_symlink, "a file": path.is_file, "a directory": path.is_dir}
        what = next((kind for kind, is_kind in kinds.items() if is_kind()), "something else")
        if os.path.lexists(path) and what != wanted:
            raise InputError(f"{path} is {what}, but the stage writes {wanted} there; move it")


# --- Deleting and renaming ------------------------------------------------------------------------


def prune_checkpoints(directory: Path, keep_last: int) -> None:
    """Delete the run's checkpoints, except the newest `keep_last` and the best ones they name.

    A damaged one that was set aside is deleted once the run has passed its step. A checkpoint that
    holds files of the user is kept.
    """
    kept = complete_checkpoints(directory)[-keep_last:]
    if not kept:
        return
    newest = step_of(kept[-1])
    steps = {step_of(c) for c in kept} | {manifest_of(c)["best"] for c in kept}
    older = [c for c in own_checkpoints(directory) if step_of(c) < newest]
    passed = [c for c in older if step_of(c) not in steps]
    passed += [d for d in damaged_checkpoints(directory) if step_of(d.with_suffix("")) <= newest]
    for path in passed:
        if not _files_of_others(path, manifest_of(kept[-1])["files"]):
            remove_directory(path)


def remove_unfinished(directory: Path) -> None:
    """Delete what a killed run left half-written or half-deleted."""
    for path in directory.glob(".*"):
        name = path.name.removeprefix(".").removesuffix(".tmp").removesuffix(".old")
        is_known = CHECKPOINT.fullmatch(name.removesuffix(DAMAGED)) or name in RESULTS
        if path.name == UNSEALED or (is_known and path in hidden_names(directory / name)):
            shutil.rmtree(path)


def clear(directory: Path) -> None:
    """Delete what the run in a stage directory wrote, and nothing else; see `refuse_to_clear`."""
    refuse_to_clear(directory)
    results = [directory / name for name in RESULTS if (directory / name).is_dir()]
    empty = [path for path in numbered(directory) if is_empty(path)]
    written = own_checkpoints(directory) + damaged_checkpoints(directory)
    for path in [*written, *empty, *results]:
        remove_directory(path)
    rollouts = [f for f in (directory / "rollouts").glob("*") if ROLLOUT.fullmatch(f.name)]
    for file in [*rollouts, *(directory / name for name in FILES)]:
        file.unlink(missing_ok=True)
    if is_empty(directory / "rollouts"):
        (directory / "rollouts").rmdir()


def refuse_to_clear(directory: Path) -> None:
    """Refuse to delete what the run wrote if files of the user are in between."""
    others = others_checkpoints(directory)
    for path in own_checkpoints(directory) + damaged_checkpoints(directory):
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
    """Rename a damaged checkpoint and return its new name."""
    aside = checkpoint.with_name(checkpoint.name + DAMAGED)
    if aside in damaged_checkpoints(checkpoint.parent):
        remove_directory(aside)
    elif os.path.lexists(aside):
        raise InputError(f"{checkpoint} is damaged, and {aside} is in the way; move one of them")
    os.replace(checkpoint, aside)
    return aside


def _others_in_result(result: Path) -> list[Path]:
    """Return what no stage wrote in `final/` or `critic/`, or in place of that directory."""
    if not (result / RECORD).is_file():
        return [result] if os.path.lexists(result) and not is_empty(result) else []
    try:
        record = read_record(result)
    except InputError:  # damaged
        record = None
    if record is None or not record.files:
        return []
    # python -m rlhf.reward.report adds these later
    known = {*record.files, "report.json", "report.md", "report.png"}
    return [file for file in files_of(result) if file.relative_to(result).as_posix() not in known]


def _files_of_others(checkpoint: Path, names: Iterable[str]) -> list[Path]:
    """Return the files in a checkpoint that its run did not write.

    `names` replaces the list in the checkpoint's manifest if that is damaged.
    """
    manifest = read_manifest(checkpoint)
    known = {MANIFEST, IDENTITY, *(names if manifest is None else manifest["files"])}
    if manifest is None and not known - {MANIFEST, IDENTITY}:
        return []
    return [f for f in files_of(checkpoint) if f.relative_to(checkpoint).as_posix() not in known]
