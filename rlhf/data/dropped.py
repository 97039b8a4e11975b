"""Rows that are left out: their reasons and counts, and when there are too many of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from rlhf.config import InputError
from rlhf.data.rows import whole_characters

REPAIRED = "texts with half of a character, now U+FFFD"
_NOT_ROWS = ("single responses", REPAIRED)  # reasons that start so do not count rows


class Reason(str):
    """Why something was dropped; `first` describes the first case: file, row and field."""

    first: str

    def __new__(cls, reason: str, first: str = "") -> Reason:  # copies set `first` themselves
        self = super().__new__(cls, reason)
        self.first = whole_characters(first)
        return self


@dataclass
class BadRows:
    """Counts rows that are at fault and refuses their source: on_bad_row="stop" at the first of
    them, "drop" if they are half of all rows or more."""

    on_bad_row: str
    dropped: Counter[str]
    count: int = 0
    first: InputError | None = None

    def add(self, error: InputError, reason: Reason) -> None:
        if self.on_bad_row == "stop":
            fix = "; dataset.on_bad_row=drop drops such rows"
            raise type(error)(f"{error}{fix}") from error
        self.first = self.first or error
        self.count += 1
        self.dropped[reason] += 1

    def require_fewer_than_half(self, num_rows: int, fault: str, hint: str = "") -> None:
        if self.first is not None and 2 * self.count >= num_rows:
            share = f"{self.count} of {num_rows} rows are {fault}"
            rule = "dataset.on_bad_row=drop drops them only while they are fewer than half"
            raise type(self.first)(f"{self.first}{hint} ({share}; {rule})") from self.first


def describe_dropped(dropped: Counter[str]) -> str:
    """One line, such as "dropped 9 rows: 5 prompts differ, 4 empty response".

    Dropped single responses and repaired texts come last: their rows were kept.
    """
    counts = dropped.most_common()
    rows = [(count, reason) for reason, count in counts if not reason.startswith(_NOT_ROWS)]
    others = [(count, reason) for reason, count in counts if reason.startswith(_NOT_ROWS)]
    line = f"dropped {sum(count for count, _ in rows)} rows"
    line += ": " + ", ".join(f"{count} {reason}" for count, reason in rows) if rows else ""
    return line + "".join(f"; {count} {reason}" for count, reason in others)


def first_cases(dropped: Counter[str]) -> list[str]:
    """A line for each reason that names a case: "  first: rows.jsonl, row 2: prompts differ"."""
    return [f"  first: {reason.first}" for reason in dropped if isinstance(reason, Reason)]
