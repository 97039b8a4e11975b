"""SQLite files that cannot be used: one clear line, nothing changed in them, nothing lost.

The store of rankings and the file of a judge's answers are opened by the same function.
Run: python -m pytest tests/rank/test_unusable_stores.py
"""

from __future__ import annotations

import logging
import sqlite3
import time
from pathlib import Path

import pytest
from helpers.disks import largest_file, mounted, remount
from starlette.testclient import TestClient

import rlhf.rank.app
import rlhf.sqlite_files
from rlhf.config import InputError
from rlhf.rank.app import make_app
from rlhf.rank.store import Store, Task
from rlhf.scorers.answer_file import Answer, AnswerFile


def store_of(file: Path) -> Store:
    return Store(file)


def answers_of(file: Path) -> AnswerFile:
    return AnswerFile(str(file), "cache")


def close(one: Store | AnswerFile) -> None:
    one.close() if isinstance(one, Store) else one.database.close()


KINDS = pytest.mark.parametrize(
    ("opened", "table", "fix"),
    [
        (store_of, "tasks", "move it away, or give another out=<file>"),
        (answers_of, "answers", "move it away, or give cache=<another file>"),
    ],
)


@pytest.fixture(autouse=True)
def short_wait(monkeypatch):
    monkeypatch.setattr(rlhf.sqlite_files, "WAIT", 0.1)


def refusal(opened, file: Path) -> str:
    before = file.read_bytes()
    with pytest.raises(InputError) as caught:
        opened(file)
    assert file.read_bytes() == before
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(file))
    return str(caught.value)


@KINDS
def test_a_text_file_is_refused(opened, table, fix, tmp_path):
    file = tmp_path / "text.sqlite"
    file.write_text("not a database, but long enough to be read as one " * 50)
    assert refusal(opened, file) == f"{file} cannot be used: file is not a database; {fix}"


@KINDS
def test_a_damaged_file_is_refused(opened, table, fix, tmp_path):
    file = tmp_path / "damaged.sqlite"
    database = sqlite3.connect(file)
    database.execute("CREATE TABLE other (text TEXT)")
    database.executemany("INSERT INTO other VALUES (?)", [("x" * 3000,)] * 20)
    database.commit()
    database.close()
    data = bytearray(file.read_bytes())
    data[4096:12288] = b"\xff" * 8192
    file.write_bytes(data)
    message = refusal(opened, file)
    assert "is damaged (" in message and message.endswith(fix)


@KINDS
def test_the_file_of_another_program_is_refused_and_gets_no_table(opened, table, fix, tmp_path):
    file = tmp_path / "cookies.sqlite"
    with sqlite3.connect(file) as database:
        database.execute("CREATE TABLE cookies (name TEXT)")
    assert refusal(opened, file) == f"{file} is a database of another program; {fix}"


@KINDS
def test_a_file_with_other_columns_is_of_another_version(opened, table, fix, tmp_path):
    file = tmp_path / "old.sqlite"
    with sqlite3.connect(file) as database:
        database.execute(f"CREATE TABLE {table} (number INTEGER PRIMARY KEY, body TEXT)")
    message = refusal(opened, file)
    assert "another version of rlhf: its table" in message and "number, body, not " in message


@KINDS
def test_a_file_that_another_program_holds_is_refused_and_may_be_opened_later(
    opened, table, fix, tmp_path
):
    file = tmp_path / "held.sqlite"
    close(opened(file))
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("PRAGMA locking_mode = EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(InputError) as caught:
        opened(file)
    other.close()
    again = "end the program that uses it, then give the same command again"
    assert str(caught.value) == f"{file} cannot be used: database is locked; {again}"
    opened(file)


@KINDS
def test_a_folder_that_is_not_there_is_named(opened, table, fix, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="folder cannot be used: unable to open database file; ma"):
        opened(tmp_path / "folder")


@pytest.fixture
def small_disk(tmp_path):
    yield from mounted(tmp_path / "disk")


@KINDS
def test_a_disk_that_is_read_only_is_named(opened, table, fix, small_disk):
    disk = small_disk(1 << 20)
    close(opened(disk / "one.sqlite"))
    remount(disk, "ro")
    for name in ("one.sqlite", "other.sqlite"):
        with pytest.raises(
            InputError, match=f"{name} cannot be used: .*; make the file and its fo"
        ):
            opened(disk / name)


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("SQLITE_READONLY_DIRECTORY", "make the file and its folder writable, then give the same"),
        ("SQLITE_FULL", "free some space, then give the same command again"),
        ("SQLITE_BUSY_SNAPSHOT", "end the program that uses it, then give the same command again"),
        ("SQLITE_CORRUPT_VTAB", "take another"),
    ],
)
def test_an_error_names_what_helps(name, fix):
    error = sqlite3.OperationalError("it failed")
    error.sqlite_errorname = name
    with pytest.raises(InputError, match=f"^a.sqlite cannot be used: it failed; {fix}"):
        with rlhf.sqlite_files.database_errors("a.sqlite", "take another"):
            raise error


def test_answers_that_a_full_disk_refuses_end_the_command_in_one_line(tmp_path):
    file = answers_of(tmp_path / "answers.sqlite")
    with largest_file(300_000), pytest.raises(InputError) as caught:
        for number in range(500):
            file.write(str(number), Answer("x" * 1000))
    assert "cannot be used: disk I/O error; check the disk, and the limit on the s" in str(
        caught.value
    )
    file.write("last", Answer("fits"))
    assert file.read(["0", "last"]) == {"0": Answer("x" * 1000), "last": Answer("fits")}


# --- The page on a full disk ----------------------------------------------------------------------


@pytest.fixture
def store(tmp_path) -> Store:
    store = Store(tmp_path / "rankings.sqlite")
    store.add([Task(i, f"question {i}", ["a", "b", "c"]) for i in range(400)])
    return store


def test_a_submission_that_a_full_disk_refuses_counts_when_the_browser_sends_it_again(store):
    page = TestClient(make_app(store), base_url="http://127.0.0.1:8765")
    wal = store.file.with_name(f"{store.file.name}-wal")
    body = {"annotator": "ann", "kind": "ranking", "ranks": [0, 1, 2], "demonstration": "y" * 3000}
    token = page.post("/api/next", json={"annotator": "ann"}).json()["task"]["token"]
    with largest_file(wal.stat().st_size + 500_000):
        taken = 0
        while (answer := page.post("/api/submit", json=body | {"token": token})).is_success:
            token, taken = answer.json()["task"]["token"], taken + 1
        assert 2 < taken < 300
        for _ in range(2):  # the browser tries again, and another person looks
            refused = page.post("/api/submit", json=body | {"token": token})
            assert refused.status_code == 503 and "disk I/O error" in refused.json()["error"]
        assert len(store.judgements()) == taken
    answer = page.post("/api/submit", json=body | {"token": token})
    assert answer.status_code == 200, answer.text
    judgements = store.judgements()
    assert len(judgements) == taken + 1
    assert {one.demonstration for one in judgements} == {"y" * 3000}


@pytest.mark.parametrize("error", [OSError(28, "No space left"), sqlite3.Error("disk I/O error")])
def test_an_export_that_fails_is_said_once_and_tried_again(store, monkeypatch, capsys, error):
    calls: list[int] = []

    def export():
        calls.append(len(store.judgements()))
        if len(calls) < 4:
            raise error

    monkeypatch.setattr(rlhf.rank.app, "EXPORT_SECONDS", 0.01)
    with TestClient(make_app(store, export=export)):
        ends = time.monotonic() + 300
        while len(calls) < 4 and time.monotonic() < ends:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(calls) == 4  # the fourth one succeeded
    said = capsys.readouterr().err
    assert said.count("nothing is exported") == 1 and f"all is in {store.file}" in said


def test_an_export_that_fails_at_the_end_is_no_traceback(store, caplog):
    def export():
        raise OSError(28, "No space left")

    with caplog.at_level(logging.ERROR):
        with TestClient(make_app(store, export=export)):
            pass
    assert not caplog.records
