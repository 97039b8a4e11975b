"""Training and held-out rows of a stage: from two sources, or one source split by prompt."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field

from rlhf.config import DatasetConfig, InputError
from rlhf.data.canonical import load_rows
from rlhf.data.dropped import describe_dropped, first_cases
from rlhf.data.rows import Row, prompt_key, prompt_of


@dataclass
class Splits:
    """Canonical rows for training and evaluation.

    `dropped` counts the rows that were left out, by reason; `overlap` counts the evaluation rows
    whose prompt is also in `train` (only possible where the user gives both).
    """

    train: list[Row]
    eval: list[Row]
    dropped: Counter[str] = field(default_factory=Counter)
    overlap: int = 0

    @property
    def prompts(self) -> str:
        """How the training prompts reach the model: "conversation", "text" or "mixed"."""
        are_texts = {isinstance(prompt_of(row), str) for row in self.train}
        return "mixed" if len(are_texts) != 1 else "text" if are_texts.pop() else "conversation"

    def describe(self, too_long: Counter[str]) -> str:
        """Say what was dropped, here and because of `too_long`, and whether the sides overlap; then
        the first case of each reason, a line each."""
        dropped = self.dropped + too_long
        line = describe_dropped(dropped)
        if self.overlap:
            line += f"; {self.overlap} held-out rows share their prompt with a training row"
        return "\n".join([line, *first_cases(dropped)])


def split_by_prompt(
    rows: list[Row], eval_fraction: float, seed: int
) -> tuple[list[Row], list[Row]]:
    """Split rows by a hash of seed and prompt: (train, eval), sharing no prompt.

    The side of a prompt does not depend on the order or number of the rows. So the share of the
    evaluation prompts is `eval_fraction` in expectation only.
    """
    sides: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        digest = hashlib.sha256(f"{seed}\n{prompt_key(row)}".encode(errors="replace")).digest()
        sides[int.from_bytes(digest[:8], "big") < eval_fraction * 2**64].append(row)
    return sides


def load_splits(config: DatasetConfig, stage: str, seed: int, needs_eval: bool = True) -> Splits:
    """Load the training and evaluation rows of a stage.

    `eval_path` gives the evaluation rows; else a `python:` path is called for split "eval"; else
    the rows of `path` are split by prompt. `max_rows` and `max_eval_rows` keep the first rows.

    Args:
        needs_eval: False reads no evaluation source; rows held out of `path` are still returned.

    Raises:
        InputError: see `load_rows`; or a required side is empty.
    """
    assert config.path is not None
    from_python = config.path.startswith("python:")
    split = "train" if from_python else config.split
    bad = config.on_bad_row
    train, dropped = load_rows(config.path, config.format, split, stage, on_bad_row=bad)
    if not needs_eval and (config.eval_path or from_python):
        evaluation: list[Row] = []
    elif config.eval_path or from_python:
        name = "dataset.eval_path" if config.eval_path else "dataset.path"
        path = config.eval_path or config.path
        split = "eval" if path.startswith("python:") else config.eval_split
        evaluation, dropped_eval = load_rows(path, config.format, split, stage, name, bad)
        dropped = dropped + dropped_eval
    else:
        train, evaluation = split_by_prompt(train, config.eval_fraction, seed)
    train, evaluation = train[: config.max_rows], evaluation[: config.max_eval_rows]
    if config.as_conversation:
        train, evaluation = ([to_conversation(row) for row in rows] for rows in (train, evaluation))
    if not train:
        raise InputError(
            f"dataset.path={config.path!r}: no row to train on; {describe_dropped(dropped)}"
            + "".join(f"; {line.strip()}" for line in first_cases(dropped)[:1])
        )
    if not evaluation and needs_eval:
        raise InputError(
            f"no row to evaluate on ({len(train)} to train on; {describe_dropped(dropped)}): raise "
            f"dataset.eval_fraction={config.eval_fraction} or give dataset.eval_path"
        )
    return Splits(train, evaluation, dropped, count_overlap(train, evaluation))


def count_overlap(train: list[Row], evaluation: list[Row]) -> int:
    """Count the evaluation rows that share their prompt with a training row."""
    seen = {prompt_key(row) for row in train}
    return sum(prompt_key(row) in seen for row in evaluation)


def to_conversation(row: Row) -> Row:
    """Make a text prompt a user turn and a text completion an assistant turn."""
    roles = {"prompt": "user", "completion": "assistant"}
    turns = {
        name: [{"role": role, "content": row[name]}]
        for name, role in roles.items()
        if isinstance(row.get(name), str)
    }
    return row | turns
