"""A file of answers that were paid for: a question is asked once, also after a kill.

It is SQLite in WAL mode, so that several processes may use it. It holds hashes of the questions and
the answers; no question and no key.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.config import InputError
from rlhf.sqlite_files import database_errors, open_database

TABLE = (
    "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, text TEXT NOT NULL, "
    "tokens_in INTEGER NOT NULL, tokens_out INTEGER NOT NULL)"
)
AT_ONCE = 500  # keys in a query


class Answer(NamedTuple):
    """A model's answer, and the tokens that it read and wrote."""

    text: str
    tokens_in: int = 0
    tokens_out: int = 0


class AnswerFile:
    """Answers by the hash of what was asked."""

    def __init__(self, path: str | None, field: str):
        """Open or make the file.

        Args:
            path: None for `judge.sqlite` in the user's folder of caches.
            field: configuration key of `path`, for messages.

        Raises:
            InputError: it cannot be opened, or is no such file; `read` and `write` too.
        """
        self.path = str(Path(path).expanduser()) if path else str(default_path())
        self.other = f"move it away, or give {field}=<another file>"
        self.lock = threading.Lock()
        try:
            if self.path != ":memory:":
                Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.path} cannot be made: {error}; {self.other}") from error
        self.database = open_database(self.path, TABLE, self.other)

    @staticmethod
    def key(identity: Sequence[Any], text: str) -> str:
        """Name a question: the model and its settings, and what it is asked."""
        return hashlib.sha256(json.dumps([identity, text]).encode()).hexdigest()

    def read(self, keys: Sequence[str]) -> dict[str, Answer]:
        """The answers that are known, by key."""
        found: dict[str, Answer] = {}
        with self.lock, database_errors(self.path, self.other):
            for start in range(0, len(keys), AT_ONCE):
                part = keys[start : start + AT_ONCE]
                marks = ",".join("?" * len(part))
                query = (
                    f"SELECT key, text, tokens_in, tokens_out FROM answers WHERE key IN ({marks})"
                )
                rows = self.database.execute(query, part).fetchall()
                found |= {key: Answer(*rest) for key, *rest in rows}
        return found

    def write(self, key: str, answer: Answer) -> None:
        """Keep an answer; it is on the disk when this returns."""
        with self.lock, database_errors(self.path, self.other):
            row = "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)"
            self.database.execute(row, (key, *answer))


def default_path() -> Path:
    """Where answers are kept if nothing else is said."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "rlhf/judge.sqlite"
