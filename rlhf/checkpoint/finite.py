"""Numbers that are not finite: how they are found in tensors, and how a run that met one may go on.

A run that stops for this reason leaves `stopped.json` in its stage directory. As long as its newest
checkpoint is from before the stop, `resume=true` accepts other values of the settings in
`ADJUSTABLE`; what changed is written to `changes.jsonl`, to later checkpoints and to `rlhf.json`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlhf.config import InputError
from rlhf.metrics import append_jsonl, read_jsonl

STOPPED, CHANGES = "stopped.json", "changes.jsonl"
# Settings that may change on resume after such a stop: those that decide whether numbers overflow.
ADJUSTABLE = (
    *("precision", "model.dtype", "model.attn_implementation", "trainer.fp16"),
    *("trainer.learning_rate", "trainer.warmup_steps", "trainer.max_grad_norm"),
    *("ppo.learning_rate", "critic.learning_rate", "ppo.lr_warmup_updates", "ppo.lr_warmup_start"),
    *("ppo.max_grad_norm", "ppo.adam_epsilon", "ppo.target_kl", "ppo.clip_scores"),
)


class NonFiniteError(InputError):
    """A loss, a gradient, a metric or a weight of a run is not finite."""


def find_non_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Find the first floating-point tensor with a number that is not finite.

    Returns:
        Its name and that number, e.g. "lm_head.weight holds nan"; None if all are finite.
    """
    for name, tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if not local.is_floating_point() or local.dtype.itemsize == 1 or not local.numel():
            continue
        # one pass without a copy, unlike isfinite(); a nan is both the least and the greatest
        for value in map(float, local.detach().aminmax()):
            if not math.isfinite(value):
                return f"{name} holds {value}"
    return None


def find_non_finite_in(directory: Path) -> str | None:
    """As `find_non_finite`, in every safetensors file of a directory; names the file too."""
    for file in sorted(directory.rglob("*.safetensors")):
        with safe_open(file, framework="pt") as content:
            problem = find_non_finite((name, content.get_tensor(name)) for name in content.keys())
        if problem is not None:
            return f"{file.name}: {problem}"
    return None


def optimizer_tensors(optimizer: Any) -> Iterable[tuple[str, Tensor]]:
    """Name the tensors of an optimiser's state, e.g. "optimiser state 3.exp_avg"."""
    for index, state in enumerate(getattr(optimizer, "state", {}).values()):
        for key, value in state.items():
            if isinstance(value, Tensor):
                yield f"optimiser state {index}.{key}", value


# --- The stop -------------------------------------------------------------------------------------


def write_stop(directory: Path, step: int, problem: str) -> None:
    """Note in a stage directory that a number was not finite in optimiser step or update `step`."""
    content = {"reason": "non_finite", "step": step, "problem": problem}
    (directory / STOPPED).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def stopped_after(directory: Path, step: int) -> int | None:
    """Return the step in which the run of a stage directory met a number that is not finite; None
    if it did not, or if it has come past that step since.

    Args:
        step: of the checkpoint that the run continues from.
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


def record_changes(directory: Path, step: int, lines: list[str]) -> None:
    """Append the settings that a run continues with after `step`, e.g. "precision: ... -> ..."."""
    if lines:
        append_jsonl(directory / CHANGES, [{"after_step": step, "changed": lines}])


def read_changes(directory: Path) -> list[dict[str, Any]]:
    """Read what `record_changes` wrote, oldest first."""
    return read_jsonl(directory / CHANGES)
