"""Conversations of a model with itself: `python -m rlhf.generate mode=self_chat`.

Run: python -m pytest tests/commands/test_self_chat.py
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from helpers.chat_models import random_policy, write
from helpers.commands import commands
from helpers.endpoints import Answers, running
from helpers.judging import chat

from rlhf.config import DatasetConfig
from rlhf.data import load_splits
from rlhf.generate.__main__ import main
from rlhf.generate.author import Reply
from rlhf.generate.self_chat import read_transcript

PAGE = Path(__file__).parents[2] / "docs/generating-data.md"
TRANSCRIPT = "[|AI|] An apple.\n[|Human|] And a tool?\n[|AI|] A saw.\n[|Human|] Thanks!"


def texts(answer: str, ended=True, max_turns=9, continues=False) -> list[str]:
    messages = read_transcript("A fruit?", Reply(answer, ended), max_turns, continues)
    assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
    return [message["content"] for message in messages]


@pytest.mark.parametrize(
    "answer",
    [
        TRANSCRIPT,
        "Sure:\n" + TRANSCRIPT,
        "[|Human|] A fruit?\n" + TRANSCRIPT,
        "<think>[|AI|] A draft.</think>" + TRANSCRIPT,
        TRANSCRIPT.removeprefix("[|AI|]"),
    ],
)
def test_a_transcript_begins_with_the_question_and_ends_with_an_answer(answer):
    assert texts(answer) == ["A fruit?", "An apple.", "And a tool?", "A saw."]


def test_what_is_cut_off_or_too_much_or_out_of_form_is_left_out():
    assert texts(TRANSCRIPT, max_turns=1) == ["A fruit?", "An apple."]
    cut = TRANSCRIPT.removesuffix("\n[|Human|] Thanks!")
    assert texts(cut, ended=False) == ["A fruit?", "An apple."]
    assert texts("An app", ended=False) == texts("") == texts("[|AI|]") == []
    assert texts("[|AI|] An apple.\n[|AI|] A pear.") == ["A fruit?", "An apple."]
    assert texts(" An apple.\n[|AI|] A pear.", continues=True) == ["A fruit?", "An apple."]


def test_an_endpoint_writes_conversations_that_sft_reads(tmp_path, capsys):
    (tmp_path / "questions.txt").write_text("A fruit?\nA {number}?\nNothing?\nA fruit?\n")
    out = tmp_path / "questions.chats.jsonl"

    def transcript(body):
        empty = "Nothing?" in body["messages"][0]["content"]
        return chat("" if empty else TRANSCRIPT)

    arguments = ["mode=self_chat", "model=m", f"prompts={tmp_path}/questions.txt", "num_requests=1"]
    with running(Answers(transcript, transcript, (401, {}), transcript)) as server:
        arguments.append(f"url={server.url}")
        assert main(arguments) == 2 and not out.exists()
        assert main(arguments) == 0
        assert len(server.requests) == 5  # two, the refused one, and two: equal questions are two
    asked = server.requests[1][2]["messages"][0]["content"]
    assert "[|Human|] A {number}?\n[|AI|]\n\nBegin with the first answer" in asked
    output = capsys.readouterr().out
    assert "3 conversations from 4 questions; left out:\n       1  without an answer (no" in output
    assert "2.0 questions a conversation, 2 answers known before" in output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["topic"] for row in rows] == ["A fruit?", "A {number}?", "A fruit?"]
    splits = load_splits(DatasetConfig(path=str(out)), "sft", 1)
    read = [row["messages"] for row in splits.train + splits.eval]
    assert not splits.dropped and all(row["messages"] in read for row in rows)


def test_the_command_of_the_page_runs(tmp_path, capsys, monkeypatch):
    command = commands(PAGE)[1]
    (tmp_path / "questions.txt").write_text("A fruit?\n")
    monkeypatch.chdir(tmp_path)
    with running(Answers(chat(TRANSCRIPT))) as server:
        given = shlex.split(command.replace("http://127.0.0.1:8000", server.url))
        assert given[:3] == ["python", "-m", "rlhf.generate"]
        assert main(given[3:]) == 0, capsys.readouterr().err
    assert len(Path("chats.jsonl").read_text().splitlines()) == 1


def test_a_transcript_that_is_cut_off_is_counted_as_such(tmp_path, capsys):
    (tmp_path / "q.txt").write_text("A fruit?\n")
    status, answer = chat("[|AI|] An app")
    answer["choices"][0]["finish_reason"] = "length"
    with running(Answers((status, answer))) as server:
        given = [f"url={server.url}", "model=m", f"prompts={tmp_path}/q.txt"]
        assert main(["mode=self_chat", *given]) == 2
    assert "1  without an answer (cut off by response_length)" in capsys.readouterr().err


def test_a_directory_whose_context_is_too_short_says_so(tmp_path, capsys):
    policy = write(tmp_path / "final", random_policy())
    (tmp_path / "q.jsonl").write_text('{"prompt": [{"role": "user", "content": "A fruit?"}]}\n')
    assert main(["mode=self_chat", f"path={policy}", f"prompts={tmp_path}/q.jsonl"]) == 2
    error = capsys.readouterr().err
    assert "no conversation was written; 0 conversations from 1 questions" in error
    assert "the prompt is longer than the model's context" in error
