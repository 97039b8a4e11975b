"""A source to canonical rows: the format is applied, each row is checked, bad ones are counted.

Left out: reading the source (`read`), the formats, what a canonical row must hold (`rows`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rlhf.config import DatasetConfig, InputError, show
from rlhf.data.dropped import REPAIRED, Reason
from rlhf.data.formats import FORMATS, ONE_RESPONSE_PER_ROW, Format, merge_by_prompt, resolve_format
from rlhf.data.read import in_one_line, read_rows
from rlhf.data.rows import (
    TEXTS,
    BadRow,
    DropRow,
    Row,
    as_messages,
    as_prompt,
    check_row,
    repaired,
    without_repeats,
)


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
        stage: sft, reward, ppo or ptx.
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
    merges = format in ONE_RESPONSE_PER_ROW and not from_python
    section = field.partition(".")[0]
    intake = _Intake(apply, format, stage, on_bad_row, section, checks=not merges)
    intake.take_all(read_rows(path, split, stage, field))
    if intake.num_read == 0:
        raise InputError(f"{field}={path!r} has no rows; expected at least one")
    rows, dropped = intake.rows, intake.dropped
    if merges:
        intake = _Intake(dict, format, stage, on_bad_row, section)
        merged = merge_by_prompt(rows)
        intake.take_all((f"{path}, prompt {show(row['prompt'])}", row) for row in merged)
        rows, dropped = intake.rows, dropped + intake.dropped
    if stage == "reward":
        num_responses = sum(len(row["responses"]) for row in rows)
        rows = [without_repeats(row) for row in rows]
        if num_repeats := num_responses - sum(len(row["responses"]) for row in rows):
            dropped["single responses that repeat another"] = num_repeats
    return rows, dropped


def _with_plain_turns(apply: Format, raw: Row) -> list[Row]:
    """Apply a format of the user's own, and give its conversations the form of those of ours."""
    turns = {"messages": as_messages, "prompt": as_prompt, "completion": as_prompt}
    return [
        row | {name: read(row[name], name) for name, read in turns.items() if name in row}
        for row in _as_list(apply(raw))
    ]


def _as_list(rows: Row | list[Row]) -> list[Row]:
    return rows if isinstance(rows, list) else [rows]


@dataclass
class _Intake:
    """Takes the usable rows of a source and counts the others.

    Attributes:
        section: section of the configuration that has the `format` of the source.
        checks: False where a row is only a part of a canonical row.
    """

    apply: Format
    format: str
    stage: str
    on_bad_row: str
    section: str
    checks: bool = True
    rows: list[Row] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    num_read: int = 0
    num_bad: int = 0
    first_bad: tuple[BadRow, str, Any] | None = None  # with its message and the raw row

    def take_all(self, source: Iterator[tuple[str, Any]]) -> None:
        """Take raw rows, each with its place; refuse the source if half of them are malformed."""
        for where, raw in source:
            self.num_read += 1
            try:
                self._take(where, raw)
            except DropRow as reason:
                self._drop(where, reason)
            except BadRow as error:
                self._refuse(where, raw, error)
        if self.first_bad is not None and 2 * self.num_bad >= self.num_read:
            first, text, raw = self.first_bad
            columns = raw.values() if isinstance(raw, dict) and self.num_read == 1 else ()
            if any(isinstance(value, (list, dict)) and value for value in columns):
                text += " If the file holds a single object, write one object per row."
            share = f"{self.num_bad} of {self.num_read} rows are malformed"
            rule = "dataset.on_bad_row=drop drops them only while they are fewer than half"
            raise InputError(f"{text} ({share}; {rule})") from first

    def _take(self, where: str, raw: Any) -> None:
        if isinstance(raw, BadRow):
            raise raw
        if not isinstance(raw, dict):
            what = f"got {show(raw)}; expected an object with named fields"
            raise BadRow(what, "not an object")
        raw = _without_nulls(raw)
        with _as_bad_row(self.format, raw):
            rows = _as_list(self.apply(raw))
        for row in rows:
            changed: list[str] = []
            try:
                with _as_bad_row(self.format, raw):
                    texts = {n: repaired(row[n], n, changed) for n in TEXTS if n in row}
                    row = row | texts
                    if self.checks:
                        check_row(row, self.stage)
            except DropRow as reason:  # the other rows of a list stay
                self._drop(where, reason)
                continue
            self.rows.append(row)
            for name in changed:
                case = f"{where}, field {name!r}: half of a character"
                self.dropped[Reason(REPAIRED, case)] += 1

    def _drop(self, where: str, reason: DropRow) -> None:
        self.dropped[Reason(str(reason), f"{where}: {reason}")] += 1

    def _refuse(self, where: str, raw: Any, error: BadRow) -> None:
        text = f"{where}{', ' if str(error).startswith('field') else ': '}{error}"
        if self.first_bad is None:
            self.first_bad = error, text + self._other_formats(error, raw), raw
        if self.on_bad_row == "stop":
            text = f"{self.first_bad[1]}; dataset.on_bad_row=drop drops such rows"
            raise InputError(text) from error
        self.num_bad += 1
        self.dropped[Reason(error.reason, text)] += 1

    def _other_formats(self, error: BadRow, raw: Any) -> str:
        """Name the formats that read a row in which a field is missing."""
        if not isinstance(raw, dict) or "missing or null" not in str(error):
            return ""
        others = [name for name in FORMATS if _reads(name, raw, self.stage)]
        fits = " or ".join(f"{self.section}.format={name}" for name in others)
        return f"{'' if str(error).endswith('?') else ';'} {fits} reads it" if others else ""


def _reads(format: str, raw: Row, stage: str) -> bool:
    try:
        for row in _as_list(FORMATS[format](_without_nulls(raw))):
            check_row(row, stage)
    except Exception:  # any error means no
        return False
    return True


def _without_nulls(raw: Row) -> Row:
    """Leave out the fields that Arrow and CSV fill with None: they are missing."""
    return {name: value for name, value in raw.items() if value is not None}


@contextmanager
def _as_bad_row(format: str, raw: Row) -> Iterator[None]:
    """Turn any error of a format or a check into a `BadRow` that says what to do."""
    try:
        yield
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
