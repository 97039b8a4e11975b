"""Answering a file: `python -m rlhf.generate path=runs/mine/ppo/final prompts=prompts.jsonl`.

Run: python -m pytest tests/commands/test_generate.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.chat_models import TOKENIZER, random_policy, write
from helpers.endpoints import Answers, running
from helpers.judging import chat
from helpers.ports import held_port
from helpers.rows import rows_of
from helpers.scorers import policy_tokenizer, write_reward_model
from helpers.tiny import tiny_model

import rlhf.data.read
import rlhf.generate.sample
import rlhf.row_file
import rlhf.score
from rlhf.config import DatasetConfig, InputError, ModelConfig, ScorerConfig
from rlhf.data import encode_prompt, load_splits
from rlhf.generate import GenerateOptions, read_prompts, run
from rlhf.models import load_policy
from rlhf.option_parser import run_command
from rlhf.sampling import generate, sampling_for, uniform_noise
from rlhf.scorers import load_scorer
from rlhf.tokenizer import load_tokenizer

ROWS = [
    {"prompt": "Name a fruit.", "id": 7, "note": None},
    {"prompt": [{"role": "user", "content": "Name a tool."}], "reference": "é\u2028"},
    {
        "messages": [
            {"role": "user", "content": "Hi " * 9},
            {"role": "assistant", "content": "Hello."},
        ],
        "score": 0.5,
    },
    {"instruction": "Name a fruit " * 8, "output": "A pear."},
]
PROMPTS = ["Name a fruit.", "Name a tool.", "Hi " * 9, "Name a fruit " * 8]


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("policy") / "final", random_policy(), stage="ppo")


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory) -> str:
    return write_reward_model(tmp_path_factory.mktemp("reward"), policy_tokenizer(), seed=1)


@pytest.fixture
def command(capsys):
    """Run the command: (exit status, stdout, stderr)."""

    def run_it(*arguments):
        return run_command("", GenerateOptions, run, list(arguments)), *capsys.readouterr()

    return run_it


def file_of(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def alone(path, prompt, row, sample, seed=1, budget=12) -> tuple[str, bool]:
    """The answer to one prompt, sampled without any other."""
    tokenizer = load_tokenizer(ModelConfig(path=str(path)))
    model = load_policy(ModelConfig(path=str(path)), tokenizer)
    noise = uniform_noise((seed, row), [sample], budget)
    ids = encode_prompt(user(prompt), tokenizer)
    made = generate(model, [ids], sampling_for(model, tokenizer, budget, 1.0), noise)
    return tokenizer.decode(made.ids[0], skip_special_tokens=True), made.finished[0]


# --- The answers ----------------------------------------------------------------------------------


def test_an_answer_depends_on_seed_row_and_sample_alone(policy, command, tmp_path):
    prompts = file_of(tmp_path / "prompts.jsonl", ROWS)
    arguments = [f"path={policy}", f"prompts={prompts}", "response_length=12", "seed=3"]
    status, output, errors = command(*arguments, "samples_per_prompt=3", "batch_size=2")
    assert status == 0, errors
    out = tmp_path / "prompts.answers.jsonl"
    written = rows_of(out)
    for i, (row, prompt) in enumerate(zip(written, PROMPTS, strict=True)):
        assert row["prompt"] == user(prompt)
        budget = min(12, 128 - len(encode_prompt(user(prompt), policy_tokenizer())))
        expected = [alone(policy, prompt, i, sample, 3, budget) for sample in range(3)]
        assert list(zip(row["responses"], row["ended"], strict=True)) == expected
    kept = [{"id": 7, "note": None}, {"reference": "é\u2028"}, {}, ROWS[3]]
    new = ("prompt", "responses", "ended")
    assert [{k: v for k, v in row.items() if k not in new} for row in written] == kept
    ended = sum(sum(row["ended"]) for row in written) / 12
    assert f"4 of 4 prompts answered; {ended:.1%} of the answers ended by themselves; " in output
    assert output.endswith(f" tokens/s\nsaved {out}\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["prompts.answers.jsonl", "prompts.jsonl"]
    assert command(*arguments, f"out={tmp_path}/new/one.jsonl")[0] == 0
    first = [(row["response"], row["ended"]) for row in rows_of(tmp_path / "new/one.jsonl")]
    assert first == [(row["responses"][0], row["ended"][0]) for row in written]


def test_lines_of_text_and_csv_are_prompts(policy, command, tmp_path):
    (tmp_path / "a.txt").write_text("Name a fruit.\n\nName a tool.\n")
    (tmp_path / "b.csv").write_text("id,prompt\n1,Name a fruit.\n2,Name a tool.\n")
    for name in ("a.txt", "b.csv"):
        arguments = f"path={policy}", f"prompts={tmp_path / name}", "response_length=5"
        assert command(*arguments)[0] == 0
    lines, cells = (rows_of(tmp_path / f"{name}.answers.jsonl") for name in "ab")
    assert [row["prompt"] for row in lines] == [user(prompt) for prompt in PROMPTS[:2]]
    assert [row | {"id": str(i)} for i, row in enumerate(lines, start=1)] == cells


@pytest.mark.parametrize("data", ["é\n".encode("latin-1"), "Hi\n".encode("utf-16")])
def test_lines_in_another_encoding_are_refused(data, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(data)
    with pytest.raises(InputError, match="not a UTF-8 text file.* iconv"):
        read_prompts(tmp_path / "prompts.txt")


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfHi\r\nHo\n")
    assert [q.prompt for q in read_prompts(tmp_path / "prompts.txt")[0]] == ["Hi", "Ho"]


def test_a_policy_that_was_trained_on_text_continues_it(command, tmp_path):
    path = write(tmp_path / "text", tiny_model("llama", TOKENIZER), prompts="text")
    (tmp_path / "a.txt").write_text("Name a fruit.\n")
    assert command(f"path={path}", f"prompts={tmp_path}/a.txt", "response_length=5")[0] == 0
    assert rows_of(tmp_path / "a.answers.jsonl")[0]["prompt"] == "Name a fruit."
    chats = file_of(tmp_path / "b.jsonl", ROWS[1:2])
    status, _, errors = command(f"path={path}", f"prompts={chats}")
    assert status == 2 and "row 1 is a conversation, but" in errors
    assert errors.endswith("it was trained on text prompts; add chat_template=plain\n")


def test_the_system_message_is_part_of_the_written_prompt(policy, command, tmp_path):
    own = [{"role": "system", "content": "Be long."}, *user("Hi")]
    prompts = file_of(tmp_path / "p.jsonl", [{"prompt": "Hi"}, {"prompt": own}])
    assert command(f"path={policy}", f"prompts={prompts}", "system=Be brief.")[0] == 0
    first, second = rows_of(tmp_path / "p.answers.jsonl")
    assert first["prompt"] == [{"role": "system", "content": "Be brief."}, *user("Hi")]
    assert second["prompt"] == own


def test_best_of_keeps_the_answer_with_the_highest_score(policy, reward_model, command, tmp_path):
    prompts = file_of(tmp_path / "prompts.jsonl", ROWS)
    common = [f"path={policy}", f"prompts={prompts}", "samples_per_prompt=4", "response_length=9"]
    assert command(*common, f"out={tmp_path}/all.jsonl")[0] == 0
    assert command(*common, f"out={tmp_path}/best.jsonl", f"best_of={reward_model}")[0] == 0
    scorer = load_scorer(ScorerConfig(path=reward_model))
    pairs = zip(rows_of(tmp_path / "all.jsonl"), rows_of(tmp_path / "best.jsonl"), strict=True)
    for every, best in pairs:
        scores = scorer([every["prompt"]] * 4, every["responses"])
        chosen = int(scores.argmax())
        assert (best["response"], best["ended"]) == (
            every["responses"][chosen],
            every["ended"][chosen],
        )
        assert best["best_of_score"] == pytest.approx(float(scores[chosen]), abs=1e-5)
    arguments = [f"path={reward_model}", f"data={tmp_path}/best.jsonl"]
    assert rlhf.score.main(arguments) == 0
    for row in rows_of(tmp_path / "best.scored.jsonl"):
        assert row["score"] == pytest.approx(row["best_of_score"], abs=1e-5)


def test_a_prompt_that_does_not_fit_is_written_with_its_reason(
    policy, reward_model, command, tmp_path, capsys
):
    rows = [{"prompt": "long " * 90, "id": 1}, {"prompt": " "}, {"prompt": "Hi"}]
    prompts = file_of(tmp_path / "p.jsonl", rows)
    status, output, _ = command(f"path={policy}", f"prompts={prompts}", "response_length=9")
    first, second, third = rows_of(tmp_path / "p.answers.jsonl")
    length = len(encode_prompt(user("long " * 90), policy_tokenizer()))
    reason = f"the prompt has {length} tokens, the model's context 128"
    assert (first["response"], first["id"], first["not_answered"]) == ("", 1, reason)
    assert (second["response"], second["not_answered"]) == ("", "empty prompt")
    assert third["response"] == alone(policy, "Hi", 2, 0, budget=9)[0]
    assert f"1 of 3 prompts answered; 2 not (the first: {reason}); " in output and status == 0
    assert rlhf.score.main([f"path={reward_model}", f"data={tmp_path}/p.answers.jsonl"]) == 0
    scored = rows_of(tmp_path / "p.answers.scored.jsonl")
    assert [row.get("score") is None for row in scored] == [True, True, False]
    assert "; 2 rows that were not answered have none" in capsys.readouterr().out


# --- Continuing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.6, 1.0])
def test_a_stopped_command_ends_with_the_same_bytes(
    policy, reward_model, command, tmp_path, monkeypatch, share
):
    many = [{"prompt": f"Name {i} things" * (1 + i % 3), "id": i} for i in range(20)]
    prompts = file_of(tmp_path / "prompts.jsonl", many)
    arguments = [f"path={policy}", f"prompts={prompts}", "samples_per_prompt=2", "batch_size=1"]
    arguments += ["response_length=6", f"best_of={reward_model}"]
    assert command(*arguments, f"out={tmp_path}/whole.jsonl")[0] == 0
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    with monkeypatch.context() as patch:
        patch.setattr(rlhf.row_file.os, "replace", lambda *_: (_ for _ in ()).throw(SystemExit))
        with pytest.raises(SystemExit):
            command(*arguments, f"out={out}")
    data = partial.read_bytes()
    partial.write_bytes(data[: int(share * len(data))])
    status, _, errors = command(*arguments, f"out={out}", "seed=2")
    assert status == 2 and "begun with other values" in errors and "seed: 1 -> 2" in errors
    assert command(*arguments, f"out={out}")[0] == 0
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not list(tmp_path.glob("*partial*"))


# --- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prompts=nowhere.jsonl"], "prompts=nowhere.jsonl is not a file"),
        (["prompts={bad}"], "nothing was answered:\n  {bad}, row 3: expected `prompt` or `messag"),
        (["prompts={empty}"], "prompts={empty} has no prompts"),
        (["prompts={good}", "best_of=x"], "best_of chooses among several answers; add samples"),
        (
            ["prompts={good}", "samples_per_prompt=2", "temperature=0"],
            "with temperature 0 all 2 answers to a prompt are equal; add temperature=1",
        ),
        (
            ["prompts={good}", "samples_per_prompt=2", "best_of={base}"],
            "normalize=demo_mean_zero needs the score statistics",
        ),
    ],
)
def test_what_cannot_work_is_refused_and_nothing_is_written(
    policy, reward_model, command, tmp_path, arguments, message
):
    good, bad = [{"prompt": "Hi"}], [{"prompt": "Hi"}, {"question": "Hi"}, {"id": 3}]
    places = {
        "good": file_of(tmp_path / "good.jsonl", good),
        "bad": file_of(tmp_path / "bad.jsonl", bad),
        "empty": file_of(tmp_path / "empty.jsonl", []),
        "base": Path(reward_model).parents[1] / "base",
    }
    before = sorted(tmp_path.iterdir())
    given = [argument.format(**places) for argument in arguments]
    status, _, errors = command(f"path={policy}", f"out={tmp_path}/out.jsonl", *given)
    assert status == 2 and message.format(**places) in errors
    assert sorted(tmp_path.iterdir()) == before


# --- A model at an endpoint -----------------------------------------------------------------------


def counted(body):
    """Answers with the number of words that it was asked."""
    asked = body["messages"][-1]["content"]
    return chat(f"<think>hm</think>{len(asked.split())} words, {body['max_tokens']} tokens")


def test_a_model_at_an_endpoint_answers_and_a_failure_loses_no_answer(command, tmp_path):
    prompts = file_of(tmp_path / "prompts.jsonl", ROWS)
    refused = 401, {"error": "no key"}
    ask = ["model=m", f"prompts={prompts}", "samples_per_prompt=2", "num_requests=1", "system=Hi"]
    with running(Answers(counted, counted, counted, refused)) as server:
        status, _, errors = command(*ask, f"url={server.url}")
        assert status == 2 and "answered 401" in errors and "no key" in errors
        server.answers, num_before = [counted], len(server.requests)
        status, output, errors = command(*ask, f"url={server.url}")
        bodies = [body for _, _, body in server.requests]
    assert status == 0, errors
    assert "m at http://127.0.0.1" in output and "3 answers were known before" in output
    assert len(bodies) - num_before == 2 * len(ROWS) - 3, "an answer is asked for once"
    assert [turn["role"] for turn in bodies[0]["messages"]] == ["system", "user"]
    rows = rows_of(tmp_path / "prompts.answers.jsonl")
    assert rows[0]["responses"] == ["3 words, 256 tokens"] * 2 and rows[0]["ended"] == [True] * 2
    assert rows[0]["id"] == 7 and rows[0]["prompt"][0] == {"role": "system", "content": "Hi"}
    splits = load_splits(DatasetConfig(path=f"{tmp_path}/prompts.answers.jsonl"), "ppo", 1)
    assert len(splits.train + splits.eval) == len(ROWS)


def test_answers_without_a_text_are_counted(command, tmp_path):
    prompts = file_of(tmp_path / "prompts.jsonl", [{"prompt": f"{i}?"} for i in range(4)])
    silent = 200, {"choices": [{"message": {"content": None}}]}
    with running(Answers(counted, silent, counted, silent)) as server:
        ask = f"prompts={prompts}", "model=m", f"url={server.url}", "num_requests=1"
        status, output, errors = command(*ask)
    assert status == 0, errors
    assert "4 of 4 prompts answered" in output and "; 2 answers are empty" in output
    assert sorted(row["response"] for row in rows_of(tmp_path / "prompts.answers.jsonl"))[:2] == [
        "",
        "",
    ]


def test_a_line_of_text_that_no_context_holds_is_named(policy, command, tmp_path, monkeypatch):
    monkeypatch.setattr(rlhf.generate.sample, "LONGEST_ROW", 20)
    monkeypatch.setattr(rlhf.data.read, "LONGEST_ROW", 20)
    (tmp_path / "a.txt").write_text("A fruit?\n" + "x" * 21)
    status, _, errors = command(f"path={policy}", f"prompts={tmp_path / 'a.txt'}")
    assert status == 2 and "line 2: it has 21 bytes, and a row at most 20" in errors


def test_a_reward_model_chooses_among_the_answers_of_an_endpoint(reward_model, command, tmp_path):
    prompts = file_of(tmp_path / "p.jsonl", [{"prompt": "Name a fruit."}])
    texts = iter(["An apple.", "A dog.", "Red"])
    ask = [f"best_of={reward_model}", "samples_per_prompt=3", "model=m", f"prompts={prompts}"]
    with running(Answers(lambda body: chat(next(texts)))) as server:
        status, _, errors = command(*ask, f"url={server.url}", "normalize=none")
    assert status == 0, errors
    (row,) = rows_of(tmp_path / "p.answers.jsonl")
    config = ScorerConfig(reward_model, "none")
    scores = load_scorer(config, "cpu", "float32")(
        [row["prompt"]] * 3, ["An apple.", "A dog.", "Red"]
    )
    assert row["best_of_score"] == pytest.approx(max(scores.tolist()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "add path=<model directory>, or url=<endpoint> and model=<name>; neither is given"),
        (["path=x", "url=http://a"], "both are given"),
        (["url=http://127.0.0.1:9/v1"], "model is missing; add model=<name of the model at"),
        (["url=http://127.0.0.1:{port}/v1", "model=m"], "cannot be reached (Connection refused)"),
        (["url=http://a/v1", "model=m", "top_k=5"], "top_k is for a model at path, not for url"),
    ],
)
def test_an_endpoint_that_cannot_be_asked_is_refused(command, tmp_path, arguments, message):
    prompts = file_of(tmp_path / "p.jsonl", [{"prompt": "Hi"}])
    with held_port() as port:
        given = [argument.format(port=port) for argument in arguments]
        status, _, errors = command(f"prompts={prompts}", *given)
    assert status == 2 and message in errors
    assert [*tmp_path.iterdir()] == [prompts]
