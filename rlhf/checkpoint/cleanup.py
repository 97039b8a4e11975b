"""Deleting and renaming what a run made in its directory, and nothing that a user put there.

`ownership.py` decides what the run made.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from rlhf.checkpoint.atomic import (
    MANIFEST,
    UNSEALED,
    files_of,
    hidden_names,
    read_manifest,
    remove_directory,
)
from rlhf.checkpoint.ownership import (
    CHECKPOINT,
    FILES,
    IDENTITY,
    RESULTS,
    complete_checkpoints,
    is_empty,
    is_own,
    manifest_of,
    numbered,
    others_checkpoints,
    own_checkpoints,
    step_of,
)
from rlhf.checkpoint.record import RECORD, read_record
from rlhf.config import InputError

DAMAGED = ".damaged"  # ends the name of a damaged checkpoint that was set aside
ROLLOUT = re.compile("update-[0-9]{6,}[.]jsonl")  # in `rollouts/`


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
    passed = [
        c for c in own_checkpoints(directory) if step_of(c) < newest and step_of(c) not in steps
    ]
    passed += [d for d in damaged_checkpoints(directory) if step_of(d.with_suffix("")) <= newest]
    for path in passed:
        if not _files_of_others(path, manifest_of(kept[-1])["files"]):
            remove_directory(path)


def remove_unfinished(directory: Path) -> None:
    """Delete what a killed run left half-written or half-deleted."""
    for path in directory.glob(".*"):
        name = path.name.removeprefix(".").removesuffix(".tmp").removesuffix(".old")
        is_own = CHECKPOINT.fullmatch(name.removesuffix(DAMAGED)) or name in RESULTS
        if path.name == UNSEALED or (is_own and path in hidden_names(directory / name)):
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
    """Refuse to delete what the run wrote if files of the user are in between.

    Raises:
        InputError: names them, and anything whose name a new run needs.
    """
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
    """Rename a damaged checkpoint and return its new name.

    Raises:
        InputError: something that the run did not write has the new name.
    """
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


def damaged_checkpoints(directory: Path) -> list[Path]:
    """Return the run's checkpoints that were set aside as damaged."""
    return [
        path
        for path in directory.glob(f"checkpoint-*{DAMAGED}")
        if CHECKPOINT.fullmatch(path.name.removesuffix(DAMAGED)) and is_own(path, directory)
    ]


def _files_of_others(checkpoint: Path, names: Iterable[str]) -> list[Path]:
    """Return the files in a checkpoint that its run did not write.

    Args:
        names: the files that the run writes, used if the checkpoint's own manifest is damaged.
    """
    manifest = read_manifest(checkpoint)
    known = {MANIFEST, IDENTITY, *(names if manifest is None else manifest["files"])}
    if manifest is None and not known - {MANIFEST, IDENTITY}:
        return []
    return [f for f in files_of(checkpoint) if f.relative_to(checkpoint).as_posix() not in known]
