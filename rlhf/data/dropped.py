"""What was dropped from a data set: reasons, their counts, and the first case of each."""

from __future__ import annotations

from collections import Counter

from rlhf.data.rows import whole_characters

REPAIRED = "texts with half of a character, now U+FFFD"
_NOT_ROWS = ("single responses", REPAIRED)  # reasons that start so do not count rows


class Reason(str):
    """Why something was dropped; `first` describes the first case: file, row and the field at
    fault, if any."""

    first: str

    def __new__(cls, reason: str, first: str = "") -> Reason:  # copies set `first` themselves
        self = super().__new__(cls, reason)
        self.first = whole_characters(first)
        return self


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
