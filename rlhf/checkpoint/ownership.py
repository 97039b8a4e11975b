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
from pathlib import Path
from typing import Any

from rlhf.checkpoint.atomic import read_manifest, write_manifest, write_whole
from rlhf.checkpoint.lock import require_held
from rlhf.checkpoint.nonfinite_stop import CHANGES, STOPPED
from rlhf.config import CONFIG_FILE, InputError
from rlhf.console import num_processes
from rlhf.metrics import read_jsonl

IDENTITY = "run.json"  # {"id": ..., "stage": ...}
CHECKPOINT = re.compile("checkpoint-(0|[1-9][0-9]*)")
RESULTS = ("final", "critic")
LOGS = ("metrics.jsonl", "timings.jsonl", "samples.jsonl", "watchdog.jsonl", CHANGES)
FILES = (IDENTITY, CONFIG_FILE, STOPPED, *LOGS)  # what a stage writes into its directory

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


def manifest_of(checkpoint: Path) -> dict[str, Any]:
    """Read the manifest of a complete checkpoint, as `seal` wrote it."""
    manifest = read_manifest(checkpoint)
    assert manifest is not None, checkpoint
    return manifest


def seal(checkpoint: Path, directory: Path, best: int | None = None) -> None:
    """Write the manifest of a checkpoint, which makes it complete.

    Args:
        directory: stage directory of the run.
        best: step of the best checkpoint so far, which is kept together with this one.
    """
    require_held(directory)
    run = read_identity(directory)
    logs = sorted(name for name in LOGS if (directory / name).is_file())
    if run is not None:
        shutil.copyfile(directory / IDENTITY, checkpoint / IDENTITY)
    facts = {
        "run": run,
        "processes": num_processes(),
        "best": best,
        "changes": read_jsonl(directory / CHANGES),
        "logs": {name: (directory / name).stat().st_size for name in logs},
    }
    write_manifest(checkpoint, facts)


def publish(written: Path, checkpoint: Path, best: int | None = None) -> None:
    """Seal a checkpoint that was written elsewhere on the same disk, then move it to its name.

    Raises:
        InputError: something that the run did not write has that name.
    """
    refuse_taken(checkpoint)
    seal(written, checkpoint.parent, best)
    os.replace(written, checkpoint)


def refuse_taken(checkpoint: Path) -> None:
    """Refuse a new checkpoint whose name belongs to something that the run did not write.

    Raises:
        InputError: names it.
    """
    if checkpoint in others_checkpoints(checkpoint.parent):
        raise InputError(
            f"{checkpoint} is in the way: this run did not write it, and needs the name for a "
            "checkpoint. Move it, then continue with resume=auto"
        )


def refuse_blocked_names(directory: Path) -> None:
    """Refuse a directory in which a stage could not write its files.

    Raises:
        InputError: it is not writable, or something has the name of a file that the stage writes.
    """
    existing = next(path for path in (directory, *directory.parents) if os.path.lexists(path))
    if not existing.is_dir():
        what = "a broken link" if existing.is_symlink() else "a file"
        raise InputError(f"{existing} is {what}, not a directory; move it, or change run_name")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{existing} cannot be written to; make it writable, or change runs_dir")
    for name in FILES + RESULTS:
        path = directory / name
        is_right = path.is_dir() if name in RESULTS else path.is_file()
        if os.path.lexists(path) and (path.is_symlink() or not is_right):
            kinds = {path.is_file(): "a file", path.is_dir(): "a directory"}
            what = "a link" if path.is_symlink() else kinds.get(True, "something else")
            wanted = "a directory" if name in RESULTS else "a file"
            raise InputError(f"{path} is {what}, but the stage writes {wanted} there; move it")


def refuse_taken_steps(directory: Path, steps: range) -> None:
    """Call `refuse_taken` for all planned checkpoints."""
    for path in others_checkpoints(directory):
        if step_of(path) in steps:
            refuse_taken(path)


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
