"""What a person marked in the page of a chat, as ranked rows that the reward stage reads.

A row belongs to one question. The file is written anew with every mark, so that a kill loses none
and a reader sees whole rows; a mark that is taken back takes its row out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.config import InputError
from rlhf.data.rows import ranks_of


class Rankings:
    """The rows of a file, by the name of their question."""

    def __init__(self, out: Path):
        """Read the rows that are there."""
        self.out = out
        self.rows: dict[str, dict[str, Any]] = {}
        if not out.exists():
            return
        # bytes: an answer may have what splitlines() of text takes for the end of a line
        for number, line in enumerate(out.read_bytes().splitlines(), start=1):
            try:
                row = json.loads(line)
                found = isinstance(row, dict) and {"prompt", "responses", "ranks"} <= row.keys()
            except ValueError:
                found = False
            if not found:
                raise InputError(f"out={out}: line {number} is no ranking; give another out=<file>")
            self.rows[str(row.get("id", f"line {number}"))] = row

    def put(self, name: str, row: dict[str, Any] | None) -> None:
        """Set the row of a question; None takes it out."""
        from rlhf.checkpoint.disk import write_whole

        rows = {key: value for key, value in self.rows.items() if key != name or row is not None}
        if row is not None:
            rows[name] = row
        lines = (json.dumps(one, ensure_ascii=False) + "\n" for one in rows.values())
        if rows or self.out.exists():
            write_whole(self.out, "".join(lines))
        self.rows = rows  # after the file: a full disk changes neither


def ranked_row(
    name: str, prompt: Any, answers: Sequence[tuple[str, str]], marks: Sequence[int]
) -> dict[str, Any] | None:
    """The row of a question, or None where its marks order nothing.

    Args:
        answers: (model, text); empty ones are left out, nothing trains on them.
        marks: of the answers; a higher one is better.
    """
    full = [(mark, *answer) for mark, answer in zip(marks, answers, strict=True) if answer[1]]
    ranks, texts = ranks_of([mark for mark, _, _ in full]), [text for _, _, text in full]
    if not any(ranks) or len(set(texts)) < len(texts):
        return None
    models = [model for _, model, _ in full]
    return {"prompt": prompt, "responses": texts, "ranks": ranks, "models": models, "id": name}
