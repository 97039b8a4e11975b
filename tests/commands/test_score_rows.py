"""Scores by a language model: `python -m rlhf.generate mode=score_rows`.

Run: python -m pytest tests/commands/test_score_rows.py
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from helpers.chat_models import EOS, scripted, write
from helpers.commands import commands
from helpers.endpoints import Answers, running
from helpers.judging import between, chat
from helpers.rows import rows_of

from rlhf.config import DatasetConfig
from rlhf.data import load_splits
from rlhf.generate.__main__ import main
from rlhf.generate.author import Reply
from rlhf.generate.score_rows import read_score

PAGE = Path(__file__).parents[2] / "docs/generating-data.md"
ROWS = [
    {"user_input": "Name a fruit.", "completion": "An apple.", "score": None, "id": 7},
    {"user_input": "Name a fruit.", "completion": "A car.", "score": 0.0},
    {"user_input": "Name a {response}.", "completion": "A saw {prompt}, or so."},
    {"user_input": "Name a {response}.", "completion": "No."},
]


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def by_words(body):
    """Score an answer by its number of words."""
    return chat(str(len(between("answer", body["messages"][0]["content"]).split())))


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("4", 4.0),
        ("Score: 4.5", 4.5),
        ("**3**/5", 3.0),
        ("On a scale of 0 to 5, I give 2.", 2.0),
        ("5 out of 5", 5.0),
        ("<think>1 or 2?</think>\n3", 3.0),
        ("0", 0.0),
        ("6", None),
        ("-1", None),
        ("3 for style, 4 for content", None),
        ("GPT4 would say four", None),
        ("", None),
    ],
)
def test_a_score_is_the_one_number_on_the_scale(answer, score):
    assert read_score(Reply(answer, True), 0, 5) == score


def test_missing_scores_are_filled_in_and_the_reward_stage_reads_the_rows(rows, tmp_path, capsys):
    with running(Answers(by_words)) as server:
        arguments = ["mode=score_rows", f"url={server.url}", "model=m", f"data={rows}"]
        assert main(arguments) == 0, capsys.readouterr().err
        bodies = [body for _, _, body in server.requests]
    out = tmp_path / "rows.scored.jsonl"
    expected = [
        row | {"score": score} for row, score in zip(ROWS, (2.0, 0.0, 5.0, 1.0), strict=True)
    ]
    assert rows_of(out) == expected and len(bodies) == 3
    assert {(body["temperature"], body["max_tokens"]) for body in bodies} == {(0.1, 256)}
    asked = {body["messages"][0]["content"] for body in bodies}
    assert any(
        "Name a {response}.\n" in text and "A saw {prompt}, or so.\n" in text for text in asked
    )
    output = capsys.readouterr().out
    assert "3 of 3 answers scored, 0 asked again\nmean 2.67, from 1 to 5\nsaved" in output
    assert f"next: python -m rlhf.reward dataset=chatllama_reward dataset.path={out} " in output
    config = DatasetConfig(path=str(out), format="chatllama_reward")
    splits = load_splits(config, "reward", 1)
    assert sorted(row["scores"] for row in splits.train + splits.eval) == [[2.0, 0.0], [5.0, 1.0]]


def test_an_answer_that_is_no_score_is_asked_again_then_left_out_and_counted(
    rows, tmp_path, capsys
):
    no = chat("I cannot tell.")
    answers = Answers(no, chat("4"), no, no, no, chat("3"))
    with running(answers) as server:
        arguments = ["mode=score_rows", f"url={server.url}", "model=m", f"data={rows}"]
        assert main([*arguments, "num_requests=1"]) == 0, capsys.readouterr().err
        again = server.requests[1][2]["messages"][0]["content"]
    assert again.endswith("was not one number from 0 to 5. Write the number alone.")
    assert [row["score"] for row in rows_of(tmp_path / "rows.scored.jsonl")] == [4.0, 0.0, 3.0]
    output = capsys.readouterr().out
    assert "2 of 3 answers scored, 3 asked again; left out:\n" in output
    assert "1  without a score after 3 tries\n" in output
    assert "the last answer that is no score: 'I cannot tell.'" in output


def test_a_failing_endpoint_loses_no_score(rows, tmp_path, capsys):
    with running(Answers(chat("4"), (401, {}), chat("2"))) as server:
        arguments = ["mode=score_rows", f"url={server.url}", "model=m", f"data={rows}"]
        arguments.append("num_requests=1")
        assert main(arguments) == 2 and not (tmp_path / "rows.scored.jsonl").exists()
        assert main(arguments) == 0
        assert len(server.requests) == 4  # one, the refused one, and two
    assert "3 of 3 answers scored (1 answers known before)" in capsys.readouterr().out
    assert [row["score"] for row in rows_of(tmp_path / "rows.scored.jsonl")] == [4, 0, 2, 2]


def test_several_answers_to_a_prompt_become_rows_of_scores(tmp_path, capsys):
    data, out = tmp_path / "answers.jsonl", tmp_path / "out.jsonl"
    data.write_text(json.dumps({"prompt": "A fruit?", "responses": ["An apple.", "No."]}) + "\n")
    with running(Answers(by_words)) as server:
        arguments = ["mode=score_rows", f"url={server.url}", "model=m", f"data={data}"]
        assert main([*arguments, f"out={out}"]) == 0, capsys.readouterr().err
    assert rows_of(out)[0]["scores"] == [2, 1]
    assert "next: python -m rlhf.reward dataset=ranked" in capsys.readouterr().out
    splits = load_splits(DatasetConfig(path=str(out)), "reward", 1)
    assert splits.train[0]["scores"] == [2.0, 1.0]


def test_a_directory_scores_with_a_template_and_a_scale_of_ones_own(rows, tmp_path, capsys):
    judge = write(tmp_path / "judge", scripted("9" + EOS))
    (tmp_path / "template.txt").write_text("{prompt} {response}\n")
    arguments = ["mode=score_rows", f"path={judge}", f"data={rows}", "highest=10"]
    arguments += [f"template={tmp_path}/template.txt", "response_length=4"]
    assert main(arguments) == 0, capsys.readouterr().err
    assert [row["score"] for row in rows_of(tmp_path / "rows.scored.jsonl")] == [9, 0, 9, 9]


def test_wrong_input_is_refused_in_one_line(rows, tmp_path, capsys):
    def write_rows(name, *found):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in found))
        return tmp_path / name

    (tmp_path / "t.txt").write_text("{prompt}")
    files = {
        write_rows("done.jsonl", ROWS[1]): "each of the 1 rows has its score already",
        write_rows("bad.jsonl", {"prompt": "A"}): "row 1: expected `user_input` and `completion`,",
        write_rows("text.jsonl", ROWS[0] | {"score": "4"}): "`score` must be a number or null, got",
        write_rows(
            "lists.jsonl", {"prompt": "A", "responses": ["B"], "scores": []}
        ): "equal length",
        write_rows("mixed.jsonl", ROWS[0], {"prompt": "A", "response": "B"}): "give them as two",
        tmp_path / "none.jsonl": "is not a file",
    }
    with running(Answers(by_words)) as server:
        url = ["mode=score_rows", f"url={server.url}", "model=m"]
        for file, error in files.items():
            assert main([*url, f"data={file}"]) == 2
            assert error in capsys.readouterr().err
        for option, error in {
            "lowest=5": "lowest=5 must be below highest=5",
            f"template={tmp_path}/t.txt": "does not show {response}; add it where it belongs",
            f"template={tmp_path}/no.txt": "no.txt is not a file",
        }.items():
            assert main([*url, f"data={rows}", option]) == 2
            assert error in capsys.readouterr().err
        assert not server.requests


def test_the_command_of_the_page_runs(rows, tmp_path, capsys, monkeypatch):
    command = next(one for one in commands(PAGE) if "score_rows" in one)
    rows.rename(tmp_path / "reward_training_data.jsonl")
    monkeypatch.chdir(tmp_path)
    with running(Answers(by_words)) as server:
        given = shlex.split(command.replace("http://127.0.0.1:8000", server.url))
        assert main(given[3:]) == 0, capsys.readouterr().err
    assert len(rows_of(Path("scored.jsonl"))) == 4
