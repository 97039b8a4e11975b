"""Two models that talk: `python -m rlhf.generate mode=two_agents`.

Run: python -m pytest tests/commands/test_two_agents.py
"""

from __future__ import annotations

import shlex
from pathlib import Path

from helpers.chat_models import EOS, random_policy, scripted, write
from helpers.commands import commands
from helpers.endpoints import Answers, running
from helpers.judging import chat
from helpers.rows import rows_of

from rlhf.config import DatasetConfig
from rlhf.data import load_splits
from rlhf.generate.__main__ import main

PAGE = Path(__file__).parents[2] / "docs/generating-data.md"


def texts(row: dict) -> list[str]:
    roles = ["user", "assistant"] * (len(row["messages"]) // 2)
    assert [turn["role"] for turn in row["messages"]] == roles
    return [turn["content"] for turn in row["messages"]]


def both_sides(body):
    """The person asks on twice and ends; the assistant counts what it was asked."""
    first, *turns = body["messages"]
    if "play a person" in first["content"]:
        asked = sum(turn["role"] == "assistant" for turn in turns)
        return chat(f"<think>hm</think>And {asked}?" if asked < 3 else "Thanks. [END]")
    questions = [turn for turn in body["messages"] if turn["role"] == "user"]
    return chat(f"Answer {len(questions)}.")


def test_each_model_sees_the_conversation_from_its_own_side(tmp_path, capsys):
    (tmp_path / "q.txt").write_text("A fruit?\nA tool?\n")
    arguments = ["mode=two_agents", "model=m", f"prompts={tmp_path}/q.txt", "num_requests=1"]
    with running(Answers(both_sides)) as server:
        assert main([*arguments, f"url={server.url}", "system=Be brief.", "max_turns=9"]) == 0
        bodies = [body["messages"] for _, _, body in server.requests]
    rows = rows_of(tmp_path / "q.talks.jsonl")
    expected = ["Answer 1.", "And 1?", "Answer 2.", "And 2?", "Answer 3."]
    assert [texts(row) for row in rows] == [["A fruit?", *expected], ["A tool?", *expected]]
    assert [turn["role"] for turn in bodies[2]] == ["system", "user", "assistant", "user"]
    assert [turn["role"] for turn in bodies[1]] == [
        "user",
        "assistant",
        "user",
    ]  # the persona first
    assert [turn["content"] for turn in bodies[1][1:]] == ["A fruit?", "Answer 1."]
    output = capsys.readouterr().out
    assert (
        "2 conversations from 2 questions\n3.0 questions a conversation; ended by: the person, "
        in output
    )
    splits = load_splits(DatasetConfig(path=str(tmp_path / "q.talks.jsonl")), "sft", 1)
    assert len(splits.train + splits.eval) == 2 and not splits.dropped


def test_another_model_plays_the_person_and_a_failure_loses_no_answer(tmp_path, capsys):
    (tmp_path / "q.txt").write_text("A fruit?\n")
    arguments = ["mode=two_agents", "model=m", f"prompts={tmp_path}/q.txt", "max_turns=2"]
    person = Answers(chat("Which colour?"))
    with running(Answers(chat("An apple."), (401, {}), chat("Red."))) as server, running(person):
        arguments += [f"url={server.url}", f"user_url={person.url}", "user_model=p"]
        assert main(arguments) == 2 and not (tmp_path / "q.talks.jsonl").exists()
        assert main(arguments) == 0
        assert len(server.requests) == 3 and len(person.requests) == 1
        assert {body["model"] for _, _, body in person.requests} == {"p"}
    assert "2 answers were known before" in capsys.readouterr().out
    [row] = rows_of(tmp_path / "q.talks.jsonl")
    assert texts(row) == ["A fruit?", "An apple.", "Which colour?", "Red."]


def test_a_turn_that_is_cut_off_or_empty_ends_the_conversation_before_it(tmp_path, capsys):
    (tmp_path / "q.txt").write_text("A fruit?\nA tool?\nA ship?\n")
    cut = chat("An app")
    cut[1]["choices"][0]["finish_reason"] = "length"
    answers = Answers(chat("An apple."), chat("Why?"), cut, cut, chat(" "))
    with running(answers) as server:
        given = [f"url={server.url}", "model=m", f"prompts={tmp_path}/q.txt", "num_requests=1"]
        assert main(["mode=two_agents", *given, "batch_size=1"]) == 0
    assert [texts(row) for row in rows_of(tmp_path / "q.talks.jsonl")] == [
        ["A fruit?", "An apple."]
    ]
    output = capsys.readouterr().out
    assert "1  without an answer (a turn cut off by response_length)" in output
    assert "1  without an answer (an empty turn of the assistant)" in output
    assert "ended by: a turn cut off by response_length (1)" in output


def test_two_directories_talk_and_the_same_command_gives_the_same_bytes(tmp_path, capsys):
    assistant = write(tmp_path / "a", scripted("abc" + EOS, max_position_embeddings=1024))
    person = write(tmp_path / "b", scripted("xyz" + EOS, max_position_embeddings=1024))
    (tmp_path / "q.txt").write_text("Hi\nHo\n")
    arguments = ["mode=two_agents", f"path={assistant}", f"user_path={person}", "temperature=0"]
    arguments += [f"prompts={tmp_path}/q.txt", "max_turns=2", "persona=Talk."]
    for name in ("one", "two"):
        assert main([*arguments, f"out={tmp_path}/{name}.jsonl"]) == 0, capsys.readouterr().err
    rows = rows_of(tmp_path / "one.jsonl")
    assert [texts(row) for row in rows] == [
        ["Hi", "abc", "xyz", "abc"],
        ["Ho", "abc", "xyz", "abc"],
    ]
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    assert "the person: " in capsys.readouterr().out


def test_wrong_input_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "q.txt").write_text("Hi\n")
    text = write(tmp_path / "text", random_policy(), prompts="text")
    given = ["mode=two_agents", f"prompts={tmp_path}/q.txt"]
    for arguments, error in {
        "": "add path=<model directory>, or url=<endpoint> and model=<name>; neither is given",
        "path=a user_url=http://127.0.0.1:9": "user_model is missing; add user_model=<name of the",
        "path=a user_path=./nope": "user_path=./nope: no such directory",
        f"path={text}": "cannot talk: it was trained on text prompts; add chat_template=plain",
    }.items():
        assert main([*given, *arguments.split()]) == 2
        assert error in capsys.readouterr().err


def test_the_command_of_the_page_runs(tmp_path, capsys, monkeypatch):
    command = next(one for one in commands(PAGE) if "two_agents" in one)
    (tmp_path / "questions.txt").write_text("A fruit?\n")
    monkeypatch.chdir(tmp_path)
    with running(Answers(both_sides)) as server:
        given = shlex.split(command.replace("http://127.0.0.1:8000", server.url))
        assert given[:3] == ["python", "-m", "rlhf.generate"]
        assert main(given[3:]) == 0, capsys.readouterr().err
    assert len(rows_of(Path("talks.jsonl"))) == 1
