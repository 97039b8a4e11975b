"""The notes of a run that stopped at a non-finite number, in its stage directory.

The run writes `stopped.json`. While its newest checkpoint is older than the stop, `resume=true`
accepts new values of the settings in `config_changes.ADJUSTABLE`. `changes.jsonl` lists what
changed; later checkpoints and `rlhf.json` repeat it.
"""

from __future__ import annotations

import json
from pathlib import Path

from rlhf.config import InputError

STOPPED = "stopped.json"
CHANGES = "changes.jsonl"  # rows of `after_step` and `changed`, e.g. ["precision: ... -> ..."]


def write_stop(directory: Path, step: int, problem: str) -> None:
    """Note in a stage directory that optimiser step or update `step` met a non-finite number."""
    content = {"reason": "non_finite", "step": step, "problem": problem}
    (directory / STOPPED).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def stopped_after(directory: Path, step: int) -> int | None:
    """Return the step at which the run met a non-finite number.

    Args:
        step: of the checkpoint that the run continues from.

    Returns:
        None if the run met none, or has passed that step since.
    """
    file = directory / STOPPED
    if not file.is_file():
        return None
    try:
        stop = int(json.loads(file.read_text(encoding="utf-8"))["step"])
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"{file} is damaged ({type(error).__name__}: {error}); delete it, and give the run its "
            "old settings"
        ) from error
    return stop if step < stop else None
