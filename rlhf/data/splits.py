"""Sources: files, Hub data sets and Python functions to canonical rows, split by prompt."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rlhf.config import DatasetConfig, InputError, show
from rlhf.data.formats import FORMATS, GROUPED, resolve_format
from rlhf.data.read import in_one_line, read_rows
from rlhf.data.rows import (
    TEXTS,
    BadRow,
    DropRow,
    Row,
    as_messages,
    as_prompt,
    check_row,
    prompt_of,
    repaired,
    whole_characters,
    without_repeats,
)

REPAIRED = "texts with half of a character, now U+FFFD"
# Reasons that start so count something else than rows
_NO_ROWS = ("single responses", REPAIRED)


def load_rows(
    path: str,
    format: str,
    split: str,
    stage: str,
    field: str = "dataset.path",
    on_bad_row: str = DatasetConfig.on_bad_row,
) -> tuple[list[Row], Counter[str]]:
    """Read a source and make its rows canonical for a stage.

    Args:
        path: a .json (array, or one object per line), .jsonl, .csv or .parquet file, each also with
            .gz; a directory or Hub name, which `datasets.load_dataset` reads; or
            `python:package.module.function`, called as function(stage, split) for canonical rows.
        format: see `resolve_format`; not applied to the rows of a Python function.
        split: for a directory, Hub name or function; a single file has no splits.
        stage: sft, reward or ppo.
        field: configuration key, for messages.
        on_bad_row: "drop" counts malformed rows while they are fewer than half; "stop" refuses the
            first.

    Returns:
        Canonical rows in the order of the source; and what was dropped, a count for each `Reason`.

    Raises:
        InputError: no such source, no rows, or malformed rows: file, row number (1-based), field.
    """
    from_python = path.startswith("python:")
    apply = dict if from_python else resolve_format(format)
    if from_python or format not in FORMATS:
        apply = partial(_with_plain_turns, apply)
    merge = None if from_python else GROUPED.get(format)
    checked = stage if merge is None else None
    intake = _Intake(on_bad_row, field.partition(".")[0], stage)
    for raw in read_rows(path, split, stage, field):
        intake.take(raw.where, partial(_canonical, raw.value, apply, format, checked), raw.value)
    if intake.num_read == 0:
        raise InputError(f"{field}={path!r} has no rows; expected at least one")
    intake.finish()
    rows, dropped = intake.rows, intake.dropped
    if merge is not None:
        intake = _Intake(on_bad_row, field.partition(".")[0], stage)
        for row in merge(rows):
            where = f"{path}, prompt {show(row['prompt'])}"
            intake.take(where, partial(_canonical, row, dict, format, stage))
        intake.finish()
        rows, dropped = intake.rows, dropped + intake.dropped
    if stage == "reward":
        rows = _without_repeats(rows, dropped)
    return rows, dropped


class Reason(str):
    """Why something was dropped, with the first case of it: file, row and, if one is to blame,
    field."""

    first: str

    def __new__(cls, reason: str, first: str = "") -> Reason:  # copies set `first` themselves
        self = super().__new__(cls, reason)
        self.first = whole_characters(first)
        return self


@dataclass
class _Intake:
    """Takes the usable rows of a source and counts the others.

    Attributes:
        section: of the configuration that has the `format` of the source.
    """

    on_bad_row: str
    section: str
    stage: str
    rows: list[Row] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    num_read: int = 0
    num_bad: int = 0
    first_bad: tuple[BadRow, str, Any] | None = None  # with its message and the raw row

    def take(self, where: str, make: Callable[[], tuple[Row, list[str]]], raw: Any = None) -> None:
        """Take the row that `make` returns, or count why there is none."""
        self.num_read += 1
        try:
            row, repaired = make()
        except DropRow as reason:
            self.dropped[Reason(str(reason), f"{where}: {reason}")] += 1
            return
        except BadRow as error:
            text = f"{where}{', ' if str(error).startswith('field') else ': '}{error}"
            if self.first_bad is None:
                self.first_bad = error, text + _other_formats(error, raw, self), raw
            if self.on_bad_row == "stop":
                text = f"{self.first_bad[1]}; dataset.on_bad_row=drop drops such rows"
                raise InputError(text) from error
            self.num_bad += 1
            self.dropped[Reason(error.reason, text)] += 1
            return
        self.rows.append(row)
        for name in repaired:
            self.dropped[Reason(REPAIRED, f"{where}, field {name!r}: half of a character")] += 1

    def finish(self) -> None:
        """Refuse a source with more malformed rows than may be dropped."""
        if self.first_bad is not None and 2 * self.num_bad >= self.num_read:
            error, text, raw = self.first_bad
            if self.num_read == 1 and isinstance(raw, dict) and _holds_rows(raw):
                text += " If the file holds a single object, write one object per row."
            share = f"{self.num_bad} of {self.num_read} rows are malformed"
            rule = "dataset.on_bad_row=drop drops them only while they are fewer than half"
            raise InputError(f"{text} ({share}; {rule})") from error


def _other_formats(error: BadRow, raw: Any, intake: _Intake) -> str:
    """Name the formats that read a row in which a field is missing."""
    if not isinstance(raw, dict) or "missing or null" not in str(error):
        return ""
    others = [name for name in FORMATS if name not in GROUPED and _reads(name, raw, intake.stage)]
    fits = " or ".join(f"{intake.section}.format={name}" for name in others)
    return f"{'' if str(error).endswith('?') else ';'} {fits} reads it" if others else ""


def _holds_rows(raw: Row) -> bool:
    """Whether an object may be a whole file: rows in a field, or columns."""
    return any(isinstance(value, (list, dict)) and value for value in raw.values())


def _reads(format: str, raw: Row, stage: str) -> bool:
    try:
        _canonical(raw, FORMATS[format], format, stage)
    except (DropRow, BadRow):
        return False
    return True


def _with_plain_turns(apply: Callable[[Row], Row], raw: Row) -> Row:
    """Apply a function of the user's own; make its conversations what those of our formats are."""
    row = apply(raw)
    turns = {"messages": as_messages, "prompt": as_prompt, "completion": as_prompt}
    return row | {name: read(row[name], name) for name, read in turns.items() if name in row}


def _canonical(
    raw: Any, apply: Callable[[Row], Row], format: str, stage: str | None
) -> tuple[Row, list[str]]:
    """Apply a format to a raw row and check the result, unless `stage` is None.

    Returns:
        The canonical row, and the names of the fields that were repaired.

    Raises:
        DropRow: a well-formed row that the stage cannot use.
        BadRow: a malformed row.
    """
    if isinstance(raw, BadRow):
        raise raw
    if not isinstance(raw, dict):
        what = f"got {show(raw)}; expected an object with named fields"
        raise BadRow(what, "not an object")
    # Arrow and CSV fill an absent field with None: both mean "missing".
    raw = {name: value for name, value in raw.items() if value is not None}
    changed: list[str] = []
    try:
        row = apply(raw)
        row = row | {name: repaired(row[name], name, changed) for name in TEXTS if name in row}
        if stage is not None:
            check_row(row, stage)
    except (DropRow, BadRow):
        raise
    except KeyError as error:
        given = ", ".join(map(str, raw)) or "no fields"
        what = f"field {error}: missing or null; the row has {given}; "
        what += f"is {format!r} the right format?"
        raise BadRow(what, f"without field {error}") from error
    except InputError as error:
        raise BadRow(str(error), f"refused by format {format!r}") from error
    except Exception as error:  # a format of the user's own may raise anything
        what = f"format {format!r} cannot read it: {in_one_line(error)}"
        raise BadRow(what, f"unreadable to format {format!r}") from error
    return row, changed


def _without_repeats(rows: list[Row], dropped: Counter[str]) -> list[Row]:
    kept = [without_repeats(row) for row in rows]
    num_repeats = sum(len(row["responses"]) for row in rows)
    num_repeats -= sum(len(row["responses"]) for row in kept)
    if num_repeats:
        dropped["single responses that repeat another"] = num_repeats
    return kept


# --- Splits -------------------------------------------------------------------------------------


@dataclass
class Splits:
    """Canonical rows for training and evaluation.

    `dropped` counts the rows that were left out, by reason; `overlap` the evaluation rows whose
    prompt is also in `train` (only possible where the user gives both).
    """

    train: list[Row]
    eval: list[Row]
    dropped: Counter[str] = field(default_factory=Counter)
    overlap: int = 0

    @property
    def prompts(self) -> str:
        """How the training prompts reach the model: "conversation", "text" or "mixed"."""
        kinds = {
            "text" if isinstance(prompt_of(row), str) else "conversation" for row in self.train
        }
        return kinds.pop() if len(kinds) == 1 else "mixed"

    def describe(self, too_long: Counter[str]) -> str:
        """Say what was dropped, here and because of `too_long`, with the first case of each reason
        on a line of its own; and whether the sides overlap."""
        line = describe_dropped(self.dropped + too_long)
        if self.overlap:
            line += f"; {self.overlap} held-out rows share their prompt with a training row"
        return "\n".join([line, *first_cases(self.dropped + too_long)])


def _prompt_key(row: Row) -> str:
    prompt = prompt_of(row)
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)


def split_by_prompt(
    rows: list[Row], eval_fraction: float, seed: int
) -> tuple[list[Row], list[Row]]:
    """Split rows by a hash of seed and prompt: (train, eval), sharing no prompt.

    The side of a prompt depends on nothing else: not on the order or number of the rows. So the
    share of the evaluation prompts is `eval_fraction` in expectation only.
    """
    sides: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        digest = hashlib.sha256(f"{seed}\n{_prompt_key(row)}".encode(errors="replace")).digest()
        sides[int.from_bytes(digest[:8], "big") < eval_fraction * 2**64].append(row)
    return sides


def load_splits(config: DatasetConfig, stage: str, seed: int, needs_eval: bool = True) -> Splits:
    """Load the training and evaluation rows of a stage.

    `eval_path` gives the evaluation rows; else a `python:` path is called for split "eval"; else
    the rows of `path` are split by prompt. `max_rows` and `max_eval_rows` keep the first rows.

    Args:
        needs_eval: False reads no evaluation rows, and so leaves those of `path` that it holds out.

    Raises:
        InputError: see `load_rows`; or a side that is needed is empty.
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
    """Count the evaluation rows whose prompt is that of a training row."""
    seen = {_prompt_key(row) for row in train}
    return sum(_prompt_key(row) in seen for row in evaluation)


def to_conversation(row: Row) -> Row:
    """Make a text prompt a user turn and a text completion the assistant's; messages stay."""
    roles = {"prompt": "user", "completion": "assistant"}
    turns = {
        name: [{"role": role, "content": row[name]}]
        for name, role in roles.items()
        if isinstance(row.get(name), str)
    }
    return row | turns


def describe_dropped(dropped: Counter[str]) -> str:
    """One line, such as "dropped 9 rows: 5 prompts differ, 4 empty response".

    Single responses that were dropped, and texts that were repaired, are of rows that stayed.
    """
    rows: list[tuple[int, str]] = []
    others: list[tuple[int, str]] = []
    for reason, count in dropped.most_common():
        (others if reason.startswith(_NO_ROWS) else rows).append((count, reason))
    line = f"dropped {sum(count for count, _ in rows)} rows"
    line += ": " + ", ".join(f"{count} {reason}" for count, reason in rows) if rows else ""
    return line + "".join(f"; {count} {reason}" for count, reason in others)


def first_cases(dropped: Counter[str]) -> list[str]:
    """A line for each reason that names a case: "  first: rows.jsonl, row 2: prompts differ"."""
    return [f"  first: {reason.first}" for reason in dropped if isinstance(reason, Reason)]
