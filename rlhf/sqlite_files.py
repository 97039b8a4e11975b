"""Opening an SQLite file of ours, and saying in one line why it cannot be used.

`rlhf.rank` keeps what people said in such a file, judges and `rlhf.generate` the answers of models.
Left out: changing a file of an older version.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf.config import InputError

WAIT = 20.0  # seconds for another process that writes
# beginnings of sqlite_errorname: what helps
REMEDIES = {
    "SQLITE_BUSY": "end the program that uses it",
    "SQLITE_LOCKED": "end the program that uses it",
    "SQLITE_FULL": "free some space",
    "SQLITE_IOERR": "check the disk, and the limit on the size of a file (ulimit -f)",
    "SQLITE_READONLY": "make the file and its folder writable",
    "SQLITE_CANTOPEN": "make the file and its folder writable",
}


def open_database(file: Path | str, schema: str, other: str) -> sqlite3.Connection:
    """Open a file in WAL mode, synced at each commit, and make the tables that it lacks.

    Args:
        schema: CREATE statements, each with IF NOT EXISTS.
        other: what to do with a file that is damaged or not ours: "give another out=<file>".

    Raises:
        InputError: it cannot be opened or written, is damaged, or holds something else.
    """
    with database_errors(file, other):
        database = sqlite3.connect(
            file, timeout=WAIT, isolation_level=None, check_same_thread=False
        )
        try:
            (found,) = database.execute("PRAGMA quick_check(1)").fetchone()
            if found != "ok":
                raise InputError(f"{file} is damaged ({' '.join(found.split())}); {other}")
            _require_same_tables(database, schema, file, other)
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = FULL")
            database.executescript(schema)
        except BaseException:
            database.close()
            raise
    return database


def _require_same_tables(
    database: sqlite3.Connection, schema: str, file: Path | str, other: str
) -> None:
    """Refuse the file of another program, or of a version with other columns, before it changes."""
    model = sqlite3.connect(":memory:")
    model.executescript(schema)
    ours, found = _tables(model), _tables(database)
    model.close()
    if found and not found.keys() & ours.keys():
        raise InputError(f"{file} is a database of another program; {other}")
    for name in ours.keys() & found.keys():
        if found[name] != ours[name]:
            listed = f"{', '.join(found[name])}, not {', '.join(ours[name])}"
            raise InputError(
                f"{file} was written by another version of rlhf: its table {name} has the columns "
                f"{listed}; use that version, or {other}"
            )


def _tables(database: sqlite3.Connection) -> dict[str, list[str]]:
    """Columns of each table."""
    names = database.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
    ).fetchall()
    query = "SELECT name FROM pragma_table_info(?) ORDER BY cid"
    return {name: [column for (column,) in database.execute(query, (name,))] for (name,) in names}


@contextmanager
def database_errors(file: Path | str, other: str) -> Iterator[None]:
    """Turn an error of SQLite into an InputError that names the file and what helps.

    Args:
        other: as in `open_database`.
    """
    try:
        yield
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", "")
        remedy = next((fix for start, fix in REMEDIES.items() if name.startswith(start)), None)
        fix = other if remedy is None else f"{remedy}, then give the same command again"
        raise InputError(f"{file} cannot be used: {error}; {fix}") from error
