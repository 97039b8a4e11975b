"""People, judges, and data from models"""

import socket
import sqlite3
from pathlib import Path

from bad_input import Case
from bad_input.world import append, write_rows

PORT = 18811  # below those that Linux gives away by itself
RANK = "rlhf.rank prompts=answers.jsonl"
POLICY, REWARD = "runs/mine/sft/final", "runs/mine/reward/final"
TAKEN: list[socket.socket] = []


def take_port(folder: Path) -> None:
    """Have rows to rank, and another program at the port."""
    write_answers(folder)
    if not TAKEN:
        try:
            TAKEN.append(socket.create_server(("127.0.0.1", PORT)))
        except OSError:
            pass  # another program has it already


def write_answers(folder: Path) -> None:
    """Write rows with two answers each, and the answers of two models."""
    ranked = [{"prompt": f"Name fruit {i}.", "responses": ["A.", "B."]} for i in range(4)]
    write_rows(folder / "answers.jsonl", ranked)
    for name in ("a", "b"):
        rows = [{"prompt": row["prompt"], "response": name} for row in ranked]
        write_rows(folder / f"{name}.jsonl", rows)


def write_one_line(folder: Path) -> None:
    """Write a file whose rows have lost their line breaks: 40 MB."""
    append(folder / "big.jsonl", b'{"prompt": "Name a fruit."} ' * 1_430_000)


def write_text_as_store(folder: Path) -> None:
    write_answers(folder)
    (folder / "answers.rankings.sqlite").write_text("rankings\n" * 500)


def write_other_store(table: str):
    """A function that makes a table where the store of rankings would be."""

    def write(folder: Path) -> None:
        write_answers(folder)
        with sqlite3.connect(folder / "answers.rankings.sqlite") as database:
            database.execute(f"CREATE TABLE {table} (number INTEGER PRIMARY KEY, body TEXT)")

    return write


CASES = [
    Case(
        "ranking at a port in use",
        f"{RANK} port={PORT}",
        (f"port={PORT}", "Address already in use", f"port={PORT + 1}"),
        prepare=take_port,
    ),
    Case(
        "a chat page at a port in use",
        f"rlhf.chat path={POLICY} web=true port={PORT}",
        (f"port={PORT}", "Address already in use", f"port={PORT + 1}"),
        prepare=take_port,
    ),
    Case(
        "people who compare at a port in use",
        f"rlhf.evaluate a={POLICY} b={POLICY} prompts=prompts.jsonl by=people port={PORT}",
        (f"port={PORT}", "Address already in use", f"port={PORT + 1}"),
        prepare=take_port,
    ),
    Case(
        "a scorer that is served at a port in use",
        f"rlhf.score path={REWARD} serve=127.0.0.1:{PORT}",
        (f"serve=127.0.0.1:{PORT}", "Address already in use", "another port"),
        prepare=take_port,
    ),
    Case(
        "a page for other machines without a secret",
        f"{RANK} host=0.0.0.0",
        ("host=0.0.0.0", "token="),
        prepare=write_answers,
    ),
    Case(
        "ranking prompts without answers",
        "rlhf.rank prompts=prompts.jsonl port=0",
        ("prompts.jsonl has no answers to rank", "path=<policy>"),
    ),
    Case(
        "a store of rankings that is a text file",
        f"{RANK} port=0",
        ("answers.rankings.sqlite", "file is not a database", "another out=<file>"),
        prepare=write_text_as_store,
    ),
    Case(
        "a store of rankings that is the database of another program",
        f"{RANK} port=0",
        ("answers.rankings.sqlite", "another program", "another out=<file>"),
        prepare=write_other_store("cookies"),
    ),
    Case(
        "a store of rankings of another version",
        f"{RANK} port=0",
        ("answers.rankings.sqlite", "another version of rlhf", "number, body"),
        prepare=write_other_store("tasks"),
    ),
    Case(
        "marks of a chat that would go into a file of something else",
        f"rlhf.chat path={POLICY} web=true out=prompts.jsonl port=0",
        ("out=prompts.jsonl", "line 1 is no ranking", "another out=<file>"),
    ),
    Case(
        "answers of one model that are not there",
        "rlhf.evaluate a=empty.jsonl b=b.jsonl by=scorer scorer=runs/mine/reward/final",
        ("a=empty.jsonl has no rows",),
        prepare=lambda folder: (write_answers(folder), (folder / "empty.jsonl").touch()),
    ),
    Case(
        "a judge without a model",
        "rlhf.score path=judge:helpfulness data=a.jsonl",
        ("a judge needs model=<its name> and url=<its endpoint>",),
        prepare=write_answers,
    ),
    Case(
        "an endpoint where nothing listens",
        "rlhf.generate url=http://127.0.0.1:9/v1 model=mine prompts=prompts.jsonl",
        ("url=http://127.0.0.1:9/v1 cannot be reached (Connection refused)",),
    ),
    Case(
        "prompts in one line of 40 MB",
        f"rlhf.generate path={POLICY} prompts=big.jsonl",
        ("big.jsonl, row 1: it has 40,040,000 bytes", "is a line break missing?"),
        prepare=write_one_line,
    ),
    Case(
        "rows to score in one line of 40 MB",
        f"rlhf.score path={REWARD} data=big.jsonl",
        ("line 1: it has 40,040,000 bytes", "is a line break missing?"),
        prepare=write_one_line,
    ),
    Case(
        "rows to train on in one line of 40 MB",
        "rlhf.sft model.path=model run_name=new dataset=prompt_completion dataset.path=big.jsonl",
        ("big.jsonl, row 1: it has 40,040,000 bytes", "is a line break missing?"),
        prepare=write_one_line,
    ),
    Case(
        "a mode of generate that does not exist",
        "rlhf.generate mode=smaple prompts=prompts.jsonl",
        ("mode=smaple is not one of sample, self_instruct",),
    ),
    Case(
        "a report of a run that does not exist",
        "rlhf.report run_name=mime",
        ("runs/mime", "Did you mean runs/mine?"),
    ),
]
