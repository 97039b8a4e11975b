"""New tasks after the pattern of a few: `python -m rlhf.generate mode=self_instruct`.

Run: python -m pytest tests/commands/test_self_instruct.py
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
import sqlite3
from pathlib import Path

import pytest
from helpers.chat_models import random_policy, write
from helpers.commands import commands
from helpers.endpoints import Answers, running
from helpers.judging import chat
from helpers.rows import rows_of

from rlhf.config import DatasetConfig
from rlhf.data import load_splits
from rlhf.generate.__main__ import main
from rlhf.generate.self_instruct import SelfInstructOptions, read_seeds
from rlhf.generate.written_tasks import CUT, Earlier, Rules, Task, prompt_of_list, read_list

pytest.importorskip("rapidfuzz")

PAGE = Path(__file__).parents[2] / "docs/generating-data.md"
SHARED = Path(__file__).parents[2] / "../shared/data/self_instruct_seed_tasks.jsonl"
SEEDS = [
    {"instruction": "Name a fruit that is red.", "input": "", "output": "An apple."},
    {"instruction": "Sort the words.", "instances": [{"input": "b a", "output": "a b"}]},
    {"instruction": "Who wrote it?", "context": "Emma is by Austen.", "response": "Austen."},
]
RULES = Rules(4, 150, ["file", "go to"], keep_non_ascii=False)


@pytest.fixture
def seeds(tmp_path) -> Path:
    path = tmp_path / "seeds.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in SEEDS))
    return path


def item(number: int, instruction: str, given: str = "<noinput>", output: str = "Yes.") -> str:
    parts = {"Instruction": instruction, "Input": given, "Output": output}
    return "\n".join(f"{number}. {name}: {text}" for name, text in parts.items())


# --- The list -------------------------------------------------------------------------------------


def test_a_model_of_text_continues_the_list_and_a_chat_model_is_told_to():
    examples = [Task("Name a\n fruit:", "", "An apple."), Task("Sort the words.", "b a", "a b")]
    prompt = prompt_of_list(examples, 5, continues=True)
    assert prompt.endswith(
        "\n###\n1. Instruction: Name a fruit\n1. Input: <noinput>\n1. Output: An apple.\n"
        "###\n2. Instruction: Sort the words.\n2. Input: b a\n2. Output: a b\n###\n3. Instruction:"
    )
    assert "a list of 5 tasks" in prompt
    asked = prompt_of_list(examples, 5, continues=False)
    assert asked.endswith("Go on with task 3, in the same form, and end after task 5.")


def test_tasks_are_read_from_a_list():
    first = item(4, "Add  the\nnumbers.", "1 2", "3\n\n4. Both.")
    text = f"Sure!\n###\n{first}\n###\n{item(5, 'B')}"
    expected = [Task("Add the numbers.", "1 2", "3\n\n4. Both."), Task("B", "", "Yes.")]
    assert read_list(text, 4, 20, False, True) == expected
    bold = "**4. Instruction:** B\n**4. Input:** No input\n**4. Output:** Yes."
    assert read_list(bold, 4, 20, False, True) == expected[1:]
    thought = f"<think>{item(4, 'A draft.')}</think>\n{item(4, 'B')}"
    assert read_list(thought, 4, 20, False, True) == expected[1:]
    assert read_list(" B\n4. Input:\n4. Output: Yes.\n###", 4, 20, True, True) == expected[1:]


def test_what_is_cut_off_or_too_much_or_without_form_is_no_task():
    text = f"{item(18, 'A')}\n{item(19, 'B')}"
    assert read_list(text, 4, 20, False, ended=False)[1] == CUT
    assert len(read_list(f"{text}\n{item(20, 'C')}", 4, 20, False, ended=False)) == 2
    [fault] = read_list("4. Instruction: Say hello.\n4. Input: x", 4, 20, False, True)
    assert fault == "not in the form that was asked for"
    assert read_list("I cannot do that.", 4, 20, False, True) == []


@pytest.mark.parametrize(
    ("instruction", "fault"),
    [
        ("Sort these four words.", None),
        ("Sort these words.", "an instruction of fewer than 4 words"),
        ("word " * 150, None),
        ("word " * 151, "an instruction of more than 150 words"),
        ("Read the FILE and sort it.", "with a word of the blacklist"),
        ("Read the profiles and sort them.", None),
        ("Go to a shop and pay.", "with a word of the blacklist"),
        ("Write a program that sorts words.", "asks for a program"),
        ("(Sort) these four words.", "begins with punctuation"),
        ("Übersetze diese vier Wörter.", "begins outside ASCII (keep_non_ascii=true keeps these)"),
    ],
)
def test_an_instruction_must_pass_the_rules(instruction, fault):
    assert RULES.fault(Task(instruction.strip(), "", "Yes.")) == fault
    assert RULES.fault(Task("Sort these four words.", "", "")) == "without an output"


def test_rules_may_be_empty():
    rules = Rules(1, 150, [], keep_non_ascii=True)
    assert rules.fault(Task("Übersetze file.", "", "Ja.")) is None


# --- ROUGE-L --------------------------------------------------------------------------------------

SENTENCES = [
    "Sort these five names.",
    "sort these names by age",
    "What is the capital of France?",
    "Tell me what the capital city of France is, please!",
    "the the the cat",
    "the cat the dog the",
    "-- ?",
]
# pairs of them with rouge_score 0.1.2, RougeScorer(["rougeL"], use_stemmer=False)
PUBLISHED = {(0, 1): 0.6666666666666665, (2, 3): 0.625, (4, 5): 0.6666666666666665, (0, 4): 0.0}


def common(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, from its definition."""
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + common(a[1:], b[1:])
    return max(common(a[1:], b), common(a, b[1:]))


def test_rouge_l_is_that_of_rouge_score_and_of_its_definition():
    for i, a in enumerate(SENTENCES):
        for j, b in enumerate(SENTENCES):
            [(score, text)] = Earlier([b]).closest([a])
            words = [re.findall("[a-z0-9]+", one.lower()) for one in (a, b)]
            expected = 2 * common(*words) / max(sum(map(len, words)), 1)
            assert text == b and score == pytest.approx(expected, abs=1e-12)
            if (i, j) in PUBLISHED:
                assert score == pytest.approx(PUBLISHED[i, j], abs=1e-12)


def test_the_closest_of_many_is_found_also_from_a_number_on():
    earlier = Earlier(SENTENCES)
    texts = ["Sort these six names.", "Name the capital of France"]
    assert [text for _, text in earlier.closest(texts)] == [SENTENCES[0], SENTENCES[2]]
    assert next(earlier.closest(texts, start=1))[1] == SENTENCES[1]
    assert list(earlier.closest([])) == []


# --- The command ----------------------------------------------------------------------------------


NUMBERS = itertools.count()


def lists(body):
    """Two new tasks in each answer, two too similar, one too short, one cut off."""
    n = next(NUMBERS)
    listed = [
        item(4, f"Tell{n} us{n} something{n} new{n}.", "", f"It is {n}."),
        item(5, "Name a fruit that is very red."),
        item(6, "Draw."),
        item(7, f"Add{n} one{n} to{n} two{n}.", "1", "2"),
        item(8, f"Tell{n} us{n} something{n} newer{n}."),
        item(9, "Write me a l"),
    ]
    status, answer = chat("\n###\n".join(listed), prompt_tokens=9, completion_tokens=9)
    answer["choices"][0]["finish_reason"] = "length"
    return status, answer


def test_an_endpoint_writes_rows_that_sft_reads(seeds, tmp_path, capsys):
    out = tmp_path / "tasks.jsonl"
    with running(Answers(lists)) as server:
        arguments = [
            f"url={server.url}",
            "model=m",
            f"seeds={seeds}",
            f"out={out}",
            "num_requests=1",
        ]
        status = main(["mode=self_instruct", *arguments, "num_rows=3", "system=Be brief."])
    output, errors = capsys.readouterr()
    assert status == 0, errors
    rows = rows_of(out)
    assert [row["input"] for row in rows] == ["", "1", ""]
    assert list(rows[0]) == ["instruction", "input", "output", "most_similar", "similarity"]
    assert rows[0]["most_similar"] in {*(row["instruction"] for row in SEEDS)}
    path, _, body = server.requests[0]
    assert path == "/score/chat/completions" and body["messages"][0]["content"] == "Be brief."
    assert (body["temperature"], body["max_tokens"], body["stop"]) == (1.0, 3072, ["\n20."])
    for line in (
        "3 rows in",
        "3 new tasks from 2 answers; left out:",
        "     2  cut off by the end of the answer",
        "     2  an instruction of fewer than 4 words",
        "     2  too similar to an earlier one (>= 0.7)",
        f"saved {out}",
    ):
        assert line in output
    splits = load_splits(DatasetConfig(path=str(out)), "sft", 1)
    assert len(splits.train + splits.eval) == 3 and not splits.dropped
    found = [row["messages"] for row in splits.train + splits.eval]
    assert [
        {"role": "user", "content": rows[0]["instruction"]},
        {"role": "assistant", "content": rows[0]["output"]},
    ] in found


def test_the_command_of_the_page_runs(seeds, tmp_path, capsys, monkeypatch):
    command = commands(PAGE)[0]
    monkeypatch.chdir(tmp_path)
    with running(Answers(lists)) as server:
        command = command.replace("http://127.0.0.1:8000", server.url)
        given = shlex.split(command.replace("num_rows=1000", "num_rows=4"))
        assert given[:3] == ["python", "-m", "rlhf.generate"]
        assert main(given[3:]) == 0, capsys.readouterr().err
    assert len(rows_of(tmp_path / "tasks.jsonl")) == 4


def test_a_failing_endpoint_loses_no_answer(seeds, tmp_path, capsys):
    out, broken = tmp_path / "tasks.jsonl", (401, {"error": "no"})
    arguments = ["mode=self_instruct", "model=m", f"seeds={seeds}", f"out={out}", "num_requests=1"]
    with running(Answers(lists, lists, broken, lists)) as server:
        arguments += [f"url={server.url}", "num_rows=8"]
        assert main(arguments) == 2
        assert "answered 401" in capsys.readouterr().err and not out.exists()
        assert main(arguments) == 0
        assert len(server.requests) == 5  # two, the refused one, and two more
        assert "8 new tasks from 4 answers (2 known before)" in capsys.readouterr().out
        first = out.read_bytes()
        out.unlink()
        assert main(arguments) == 0 and out.read_bytes() == first
        assert main(arguments) == 2  # it exists
        assert len(server.requests) == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "seeds.jsonl", "tasks.jsonl", "tasks.jsonl.answers.sqlite",
    ]  # fmt: skip


def test_a_model_without_new_tasks_ends_the_command(seeds, tmp_path, capsys):
    arguments = ["mode=self_instruct", "model=m", f"seeds={seeds}", f"out={tmp_path}/t.jsonl"]
    arguments += ["patience=2", "num_requests=2"]
    with running(Answers(chat("I cannot do that."))) as server:
        assert main([*arguments, f"url={server.url}"]) == 2
    error = capsys.readouterr().err
    assert "no task passed; 0 new tasks from 2 answers; left out:" in error
    assert "2  answers without a task (no list in them)" in error
    with running(Answers(chat(item(4, "Name a tool that is blue.")))) as server:
        assert main([*arguments, f"url={server.url}", "seed=2"]) == 0
    assert "so that there are 1 of 100; give more seeds" in capsys.readouterr().err


def test_a_directory_continues_after_a_stop_with_the_same_bytes(
    seeds, tmp_path, capsys, monkeypatch
):
    policy = write(tmp_path / "final", random_policy())
    monkeypatch.setattr("rlhf.generate.self_instruct.read_list", as_tasks)
    arguments = ["mode=self_instruct", f"path={policy}", f"seeds={seeds}", "response_length=12"]
    arguments += ["num_seeds=1", "num_rows=5", "batch_size=2", "keep_non_ascii=true", "min_words=1"]
    arguments += ["chat_template=plain", "blacklist=[]"]
    monkeypatch.setattr("rlhf.generate.written_tasks.PROMPT", "")
    assert main([*arguments, f"out={tmp_path}/whole.jsonl"]) == 0, capsys.readouterr().err
    answers = tmp_path / "whole.jsonl.answers.sqlite"
    with sqlite3.connect(answers) as database:  # as a kill after three answers leaves it
        database.execute("DELETE FROM answers WHERE rowid > 3")
    database.close()
    answers.rename(tmp_path / "again.jsonl.answers.sqlite")
    assert main([*arguments, f"out={tmp_path}/again.jsonl"]) == 0
    assert "(3 known before)" in capsys.readouterr().out
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def as_tasks(text, *_):
    """A random model writes no lists: its whole answer is the instruction."""
    return [Task(f"a{text}", "", text)]


def test_wrong_input_is_refused_in_one_line(seeds, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text(
        '{"instruction": "Hi"}\n{"instruction": "A", "output": "B"}\n'
    )
    for arguments, error in {
        f"seeds={seeds}": "add path=<model directory>, or url=<endpoint> and model=<name>; neither",
        f"seeds={seeds} url=http://127.0.0.1:9": "model is missing; add model=<name of the model",
        f"seeds={seeds} path=./nope": "path=./nope: no such directory",
        f"seeds={seeds} path=a list_length=4": "no room after num_seeds=3; give list_length=5",
        "path=a": "seeds is missing; add seeds=<tasks to begin with",
    }.items():
        assert main(["mode=self_instruct", *arguments.split()]) == 2
        assert error in capsys.readouterr().err
    with running(Answers(lists)) as server:
        url = [f"url={server.url}", "model=m", f"out={tmp_path}/t.jsonl"]
        assert main(["mode=self_instruct", *url, f"seeds={tmp_path}/bad.jsonl"]) == 2
        assert "row 1: expected texts `instruction` and `output`; got" in capsys.readouterr().err
        assert main(["mode=self_instruct", *url, f"seeds={seeds}", "num_seeds=4"]) == 2
        assert (
            "has 3 tasks, and a prompt shows 4; give more, or num_seeds=3"
            in capsys.readouterr().err
        )
    assert main(["mode=self_instuct", "path=a"]) == 2
    assert (
        "mode=self_instuct is not one of sample, self_instruct, self_chat, two_agents"
        in capsys.readouterr().err
    )


def test_each_mode_has_its_own_help(capsys):
    assert main(["--help"]) == 0
    assert "samples_per_prompt" in (sample := capsys.readouterr().out) and "num_rows" not in sample
    assert main(["mode=self_instruct", "--help"]) == 0
    assert "rlhf.generate mode=self_instruct url=" in capsys.readouterr().out


@pytest.mark.skipif(not SHARED.is_file(), reason="the 175 seeds of Self-Instruct are not here")
def test_the_175_seeds_of_self_instruct_are_read():
    found = read_seeds(SHARED, SelfInstructOptions(seeds="x"))
    assert len(found) == 175 and sum(bool(task.input) for task in found) == 125
