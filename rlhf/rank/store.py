"""The store of what people judge: one SQLite file, which is the truth that exports are made from.

A judgement is on the disk when `submit` returns (write-ahead log, synced): a kill loses none. It is
accepted once: every showing of a task to an annotator has a token, and a token is judged once.
Nothing is deleted; an undone judgement stays in the file, marked.

    store = Store(Path("pairs.sqlite"))
    store.add([Task(0, "Name a fruit.", ["An apple.", "A dog."], ["a", "b"])])
    showing = store.next("ann")
    store.submit(showing.token, "ann", "ranking", ranks=[0] * len(showing.cards))
    store.judgements()

Left out: the web page (`app`), the sampling of answers (`tasks`), exports (`ranked_rows`).
"""

from __future__ import annotations

import json
import random
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlhf.sqlite_files import open_database
from rlhf.web.server import Refused

KINDS = ("ranking", "skip", "flag")
OTHER = "move it away, or give another out=<file>"  # where a file is no store
RESERVED_SECONDS = 1800.0  # how long a task that was shown waits for its annotator
SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS samples (
    policy INTEGER, task INTEGER, answers TEXT NOT NULL, PRIMARY KEY (policy, task));
CREATE TABLE IF NOT EXISTS tasks (
    number INTEGER PRIMARY KEY, position REAL NOT NULL, content TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS showings (
    token TEXT NOT NULL UNIQUE, task INTEGER NOT NULL REFERENCES tasks, annotator TEXT NOT NULL,
    cards TEXT NOT NULL, at REAL NOT NULL, PRIMARY KEY (task, annotator));
CREATE TABLE IF NOT EXISTS judgements (
    number INTEGER PRIMARY KEY AUTOINCREMENT, token TEXT NOT NULL UNIQUE,
    task INTEGER NOT NULL REFERENCES tasks, annotator TEXT NOT NULL, kind TEXT NOT NULL,
    content TEXT NOT NULL, at REAL NOT NULL, undone INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS conversations (
    number INTEGER PRIMARY KEY AUTOINCREMENT, token TEXT NOT NULL UNIQUE,
    annotator TEXT NOT NULL, messages TEXT NOT NULL, at REAL NOT NULL);
CREATE UNIQUE INDEX IF NOT EXISTS once ON judgements (task, annotator) WHERE NOT undone;
CREATE INDEX IF NOT EXISTS by_annotator ON judgements (annotator);
"""
# a showing that waits for its annotator
OPEN = """NOT EXISTS (SELECT 1 FROM judgements AS j WHERE j.task = showings.task
    AND j.annotator = showings.annotator AND NOT j.undone)"""
NEXT = f"""
SELECT tasks.number FROM tasks
WHERE tasks.number NOT IN (SELECT task FROM showings WHERE annotator = :annotator)
    AND tasks.number NOT IN (SELECT task FROM judgements WHERE kind = 'flag' AND NOT undone)
    AND :overlap > (SELECT COUNT(*) FROM judgements AS k
            WHERE k.task = tasks.number AND k.kind = 'ranking' AND NOT k.undone)
        + (SELECT COUNT(*) FROM showings WHERE task = tasks.number AND at > :fresh AND {OPEN})
ORDER BY position, tasks.number LIMIT 1"""


@dataclass
class Task:
    """A prompt with the answers that people rank."""

    number: int  # of its row in the file, from 0
    prompt: Any  # text or messages
    responses: list[str]
    models: list[str] = field(default_factory=list)  # that answered, as many; empty: not known
    kept: dict[str, Any] = field(default_factory=dict)  # other columns of the row

    def cards(self) -> list[list[int]]:
        """Numbers of the answers by their text: equal answers are one card."""
        texts: dict[str, list[int]] = {}
        for i, response in enumerate(self.responses):
            texts.setdefault(response.strip(), []).append(i)
        return list(texts.values())


@dataclass
class Showing:
    """A task as one annotator sees it; `cards` are numbers of answers, in the order of the page."""

    token: str
    task: Task
    cards: list[list[int]]
    before: dict[str, Any] | None  # the judgement that was undone, as it was submitted


@dataclass
class Judgement:
    """What an annotator said about a task."""

    task: Task
    annotator: str
    kind: str  # of KINDS
    ranks: list[int]  # of the responses, 0 = best; empty if the kind is not a ranking
    reason: str  # of a flag
    demonstration: str | None
    seconds: float | None  # between showing and submission
    shown: list[int]  # place on the page of each response, from 0


class Store:
    """An open store; methods may be called from several threads."""

    def __init__(self, file: Path, overlap: int = 1, seed: int = 1):
        """Open the file, or make it.

        Args:
            overlap: annotators who rank each task.
            seed: of the order of the cards.

        Raises:
            InputError: the file is not a store, or cannot be used.
        """
        self.file, self.overlap, self.seed = file, overlap, seed
        self._lock = threading.RLock()
        self._db = open_database(file, SCHEMA, OTHER)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # SQLite ends it by itself where the disk is full
                    self._db.execute("ROLLBACK")
                raise

    def _rows(self, query: str, *values: Any) -> list[Any]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

    # --- Tasks ------------------------------------------------------------------------------------

    def fact(self, name: str) -> Any:
        """Something that was stored under a name; None if nothing was."""
        found = self._rows("SELECT value FROM facts WHERE name = ?", name)
        return json.loads(found[0][0]) if found else None

    def set_fact(self, name: str, value: Any) -> None:
        """Store something under a name."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))

    def is_empty(self) -> bool:
        """True if there are neither tasks nor answers."""
        query = "SELECT EXISTS (SELECT 1 FROM tasks) OR EXISTS (SELECT 1 FROM samples)"
        return not self._rows(query)[0][0]

    def samples(self, policy: int) -> dict[int, Any]:
        """Answers of a policy that were saved: number of the task -> what was saved."""
        rows = self._rows("SELECT task, answers FROM samples WHERE policy = ?", policy)
        return {task: json.loads(answers) for task, answers in rows}

    def save_samples(self, policy: int, samples: Mapping[int, Any]) -> None:
        """Save answers of a policy, all or none."""
        rows = [(policy, task, json.dumps(answers)) for task, answers in samples.items()]
        with self._transaction() as db:
            db.executemany("INSERT INTO samples VALUES (?, ?, ?)", rows)

    def add(self, tasks: Iterable[Task]) -> None:
        """Add tasks, all or none; people see them in the order of their numbers."""
        rows = [(task.number, task.number, json.dumps(asdict(task))) for task in tasks]
        with self._transaction() as db:
            db.executemany("INSERT INTO tasks VALUES (?, ?, ?)", rows)

    def put_in_order(self, positions: Mapping[int, float]) -> None:
        """Change the order in which tasks are shown: number of the task -> position."""
        rows = [(position, number) for number, position in positions.items()]
        with self._transaction() as db:
            db.executemany("UPDATE tasks SET position = ? WHERE number = ?", rows)

    def tasks(self) -> dict[int, Task]:
        """All tasks by their number."""
        rows = self._rows("SELECT number, content FROM tasks ORDER BY number")
        return {number: Task(**json.loads(content)) for number, content in rows}

    # --- The queue of an annotator ----------------------------------------------------------------

    def next(self, annotator: str) -> Showing | None:
        """The task that an annotator sees now; None when there is none left.

        It is the same until it is judged, in every tab. A task that was shown to others counts as
        theirs for half an hour.
        """
        with self._transaction() as db:
            query = f"SELECT task FROM showings WHERE annotator = ? AND {OPEN} ORDER BY at DESC"
            waiting = db.execute(query, (annotator,)).fetchone()
            if waiting is None:
                values = {
                    "annotator": annotator,
                    "overlap": self.overlap,
                    "fresh": time.time() - RESERVED_SECONDS,
                }
                waiting = db.execute(NEXT, values).fetchone()
                if waiting is None:
                    return None
                self._show(db, waiting[0], annotator)
            return self._showing(waiting[0], annotator)

    def _show(self, db: sqlite3.Connection, number: int, annotator: str) -> None:
        (content,) = db.execute("SELECT content FROM tasks WHERE number = ?", (number,)).fetchone()
        cards = Task(**json.loads(content)).cards()
        random.Random(f"{self.seed} {number} {annotator}").shuffle(cards)
        row = (secrets.token_urlsafe(16), number, annotator, json.dumps(cards), time.time())
        db.execute("INSERT INTO showings VALUES (?, ?, ?, ?, ?)", row)

    def _showing(self, number: int, annotator: str) -> Showing:
        query = "SELECT token, cards FROM showings WHERE task = ? AND annotator = ?"
        ((token, cards),) = self._rows(query, number, annotator)
        ((content,),) = self._rows("SELECT content FROM tasks WHERE number = ?", number)
        query = """SELECT content FROM judgements WHERE task = ? AND annotator = ? AND undone
            ORDER BY number DESC LIMIT 1"""
        before = self._rows(query, number, annotator)
        task = Task(**json.loads(content))
        return Showing(token, task, json.loads(cards), json.loads(before[0][0]) if before else None)

    # --- Judgements -------------------------------------------------------------------------------

    def submit(
        self,
        token: str,
        annotator: str,
        kind: str,
        ranks: Sequence[int] = (),
        reason: str = "",
        demonstration: str | None = None,
    ) -> None:
        """Take a judgement; the same one again changes nothing.

        Args:
            token: of the showing.
            ranks: of the cards, in the order of the page; equal ones tie.
            demonstration: a better answer, which the annotator wrote.

        Raises:
            Refused: the token is unknown or judged already, or a value is not allowed.
        """
        if kind not in KINDS:
            raise Refused(f"A judgement is one of {', '.join(KINDS)}, not {kind!r}.")
        content = {"ranks": [*ranks], "reason": reason, "demonstration": demonstration}
        with self._transaction() as db:
            query = "SELECT kind, content, undone FROM judgements WHERE token = ? AND annotator = ?"
            if taken := db.execute(query, (token, annotator)).fetchone():
                if taken == (kind, json.dumps(content), 0):
                    return
                raise Refused("This prompt was judged already, in another tab or window.")
            query = "SELECT task, cards, at FROM showings WHERE token = ? AND annotator = ?"
            shown = db.execute(query, (token, annotator)).fetchone()
            if shown is None:
                raise Refused("This page is out of date: another tab or window changed the order.")
            task, cards, at = shown
            if kind == "ranking" and len(ranks) != len(json.loads(cards)):
                raise Refused(f"Rank all {len(json.loads(cards))} answers, not {len(ranks)}.")
            row = (token, task, annotator, kind, json.dumps(content), time.time())
            columns = "token, task, annotator, kind, content, at"
            db.execute(f"INSERT INTO judgements ({columns}) VALUES (?, ?, ?, ?, ?, ?)", row)

    def undo(self, annotator: str) -> bool:
        """Take back an annotator's last judgement, which is shown again; False if there is none."""
        query = """SELECT number, task FROM judgements WHERE annotator = ? AND NOT undone
            ORDER BY number DESC LIMIT 1"""
        with self._transaction() as db:
            last = db.execute(query, (annotator,)).fetchone()
            if last is not None:
                self._reopen(db, last[0], last[1], annotator)
            return last is not None

    def reopen_skipped(self, annotator: str) -> None:
        """Show an annotator again what was skipped."""
        query = """SELECT number, task FROM judgements WHERE annotator = ? AND NOT undone
            AND kind = 'skip' ORDER BY number DESC"""
        with self._transaction() as db:
            for number, task in db.execute(query, (annotator,)).fetchall():
                self._reopen(db, number, task, annotator)

    def _reopen(self, db: sqlite3.Connection, number: int, task: int, annotator: str) -> None:
        """Mark a judgement as undone and show its task under a new token, before all others."""
        db.execute("UPDATE judgements SET undone = 1 WHERE number = ?", (number,))
        row = (secrets.token_urlsafe(16), time.time(), task, annotator)
        db.execute("UPDATE showings SET token = ?, at = ? WHERE task = ? AND annotator = ?", row)

    def judgements(self) -> list[Judgement]:
        """All judgements that are not undone, in the order of their submission."""
        tasks = self.tasks()
        query = """SELECT task, annotator, kind, content, judgements.at - showings.at, cards
            FROM judgements JOIN showings USING (task, annotator)
            WHERE NOT undone ORDER BY number"""
        return [_judgement(tasks[row[0]], *row[1:]) for row in self._rows(query)]

    def changes(self) -> int:
        """A number that grows with every judgement, every undo and every conversation."""
        query = """SELECT (SELECT COUNT(*) + COALESCE(SUM(undone), 0) FROM judgements)
            + (SELECT COUNT(*) FROM conversations)"""
        return int(self._rows(query)[0][0])

    def save_conversation(
        self, token: str, annotator: str, messages: Sequence[Mapping[str, str]]
    ) -> None:
        """Save a conversation that an annotator wrote, both sides; once for each token.

        Raises:
            Refused: it does not alternate between user and assistant, or a turn is empty.
        """
        roles = [message["role"] for message in messages]
        if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
            raise Refused(
                "A conversation goes from user to assistant, and ends with the assistant."
            )
        if not all(message["content"].strip() for message in messages):
            raise Refused("A turn is empty: write it, or take its round out.")
        row = (token, annotator, json.dumps(messages), time.time())
        columns = "token, annotator, messages, at"
        with self._transaction() as db:
            db.execute(f"INSERT OR IGNORE INTO conversations ({columns}) VALUES (?, ?, ?, ?)", row)

    def conversations(self) -> list[dict[str, Any]]:
        """The conversations that people wrote: `messages` and `annotator`."""
        rows = self._rows("SELECT messages, annotator FROM conversations ORDER BY number")
        return [{"messages": json.loads(messages), "annotator": name} for messages, name in rows]

    def is_complete(self) -> bool:
        """True if every task that is not flagged has all of its rankings."""
        query = """SELECT EXISTS (SELECT 1 FROM tasks WHERE
            number NOT IN (SELECT task FROM judgements WHERE kind = 'flag' AND NOT undone)
            AND ? > (SELECT COUNT(*) FROM judgements AS k
                WHERE k.task = tasks.number AND k.kind = 'ranking' AND NOT k.undone))"""
        return not self._rows(query, self.overlap)[0][0]

    def progress(self, annotator: str) -> dict[str, int]:
        """Counts for the page: of this annotator, and of all."""
        query = """SELECT COALESCE(SUM(kind = 'ranking'), 0), COALESCE(SUM(kind = 'skip'), 0),
            COALESCE(SUM(kind = 'flag'), 0) FROM judgements WHERE annotator = ? AND NOT undone"""
        ((ranked, skipped, flagged),) = self._rows(query, annotator)
        query = """SELECT COUNT(*), (SELECT COUNT(DISTINCT task) FROM judgements
            WHERE kind = 'flag' AND NOT undone) FROM tasks"""
        ((tasks, left_out),) = self._rows(query)
        ((all_ranked,),) = self._rows(
            "SELECT COUNT(*) FROM judgements WHERE kind = 'ranking' AND NOT undone"
        )
        return {
            **{"ranked": ranked, "skipped": skipped, "flagged": flagged},
            **{
                "tasks": tasks,
                "all_ranked": all_ranked,
                "wanted": (tasks - left_out) * self.overlap,
            },
        }


def _judgement(
    task: Task, annotator: str, kind: str, content: str, seconds: float, cards: str
) -> Judgement:
    said, shown = json.loads(content), json.loads(cards)
    order = sorted(set(said["ranks"]))
    ranks, places = [0] * len(task.responses), [0] * len(task.responses)
    for place, numbers in enumerate(shown):
        for number in numbers:
            places[number] = place
            if kind == "ranking":
                ranks[number] = order.index(said["ranks"][place])
    if kind != "ranking":
        ranks = []
    return Judgement(
        *(task, annotator, kind, ranks, said["reason"], said["demonstration"], seconds, places)
    )
