"""Rows of data for tests: conversations, files of rows, the real files where they are at hand."""

import json
from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2].parent / "shared"


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


CONVERSATIONS = {
    "one turn": [user("Name a fruit."), assistant("An apple.")],
    "three turns": [
        {"role": "system", "content": "Be brief."},
        user("Name a fruit.\n\n### Input:\nin winter"),
        assistant("An orange, i think."),
        user("Why?"),
        assistant("It is\nsweet: yes"),
        user("Sure?"),
        assistant("Yes."),
    ],
    "spaces": [user("Hi "), assistant(" leading and trailing  "), user("a"), assistant("\nb\n\n")],
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def rows_of(path):
    """The rows of a JSONL file."""
    # not splitlines(), which also splits at separators inside a text
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]


def real_file(name):
    file = SHARED / "data" / name
    if not file.exists():
        pytest.skip(f"the real file {name} is not on this machine")
    return file
