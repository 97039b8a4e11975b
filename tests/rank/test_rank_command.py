"""The command `python -m rlhf.rank`, with a scripted annotator in place of the web page.

Run: python -m pytest tests/rank/test_rank_command.py
"""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest
from helpers.chat_models import random_policy, write
from helpers.commands import blocks, commands
from helpers.endpoints import Answers, running
from helpers.judging import prefers_long_answers
from helpers.rows import rows_of
from helpers.scorers import policy_tokenizer, write_reward_model

import rlhf.rank.__main__ as command_module
from rlhf.config import DatasetConfig
from rlhf.data import load_splits
from rlhf.option_parser import read_options, run_command
from rlhf.rank.__main__ import RankOptions, run
from rlhf.rank.ranked_rows import demonstration_rows, ranked_rows
from rlhf.rank.store import Store, Task
from rlhf.rank.tasks import Answerer

PAGE = Path(__file__).parents[2] / "docs/ranking.md"
EXPORTED = (ranked_rows, demonstration_rows)
ANSWERED = [
    {"prompt": "Name a fruit.", "responses": ["An apple.", "A dog.", ""], "id": 7},
    {"prompt": [{"role": "user", "content": "Name a tool."}], "responses": ["A saw.", "Red"]},
    {"prompt": "Name a colour.", "responses": ["Red", " Red"]},
    {"prompt": "Name an animal.", "responses": ["A dog.", "Blue"], "models": ["a", "b"]},
]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("policy") / "final", random_policy())


@pytest.fixture
def people(monkeypatch) -> list:
    """What people do in place of the page: functions of the store, one per serving."""
    todo: list = []

    def serve(store, taken, host, token, annotators, export):
        todo.pop(0)(store) if todo else None

    monkeypatch.setattr(command_module, "serve", serve)
    return todo


@pytest.fixture
def command(capsys, people):
    """Run the command: (exit status, stdout, stderr)."""

    def run_it(*arguments):
        status = run_command("", RankOptions, run, ["port=0", *arguments])
        return status, *capsys.readouterr()

    return run_it


def file_of(name: str, rows) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


def shortest_first(store: Store, name: str = "ann", **more) -> None:
    """Rank everything by length."""
    while (showing := store.next(name)) is not None:
        texts = [showing.task.responses[card[0]] for card in showing.cards]
        lengths = sorted(set(map(len, texts)))
        ranks = [lengths.index(len(text)) for text in texts]
        store.submit(showing.token, name, "ranking", ranks, **more)


def test_rows_with_answers_need_no_model_and_become_rankings_that_stages_read(command, people):
    file_of("answers.jsonl", ANSWERED)
    people.append(lambda store: shortest_first(store, demonstration="A better one."))
    status, output, errors = command("prompts=answers.jsonl")
    assert status == 0, errors
    assert "1 prompts are not shown: no two different answers (1)" in output
    assert (
        "3 of 3 prompts ranked, 3 rankings; 0 skipped, 3 demonstrations, 0 conversations" in output
    )
    assert "a wins 0.00 of its pairs with b" in output
    rows = rows_of("answers.rankings.jsonl")
    assert rows[0] == {
        **{"id": 7, "prompt": "Name a fruit.", "responses": ["An apple.", "A dog."]},
        **{"ranks": [1, 0], "annotator": "ann"},
    }
    assert rows[2]["models"] == ["a", "b"]
    shared = {"eval_fraction": 0.0, "path": "answers.rankings.jsonl", "format": "ranked"}
    train = load_splits(DatasetConfig(**shared), "reward", 1, needs_eval=False).train
    assert [row["ranks"] for row in train] == [[1, 0], [1, 0], [1, 0]]
    written = DatasetConfig(path="answers.rankings.demonstrations.jsonl", eval_fraction=0.0)
    assert len(load_splits(written, "sft", 1, needs_eval=False).train) == 3
    assert rows_of(written.path)[1]["completion"][-1]["content"] == "A better one."


def test_the_same_judgements_give_the_same_bytes(command, people):
    file_of("answers.jsonl", ANSWERED)
    people.append(shortest_first)
    command("prompts=answers.jsonl")
    names = [f"answers.rankings.{name}" for name in ("jsonl", "report.json")]
    before = [Path(name).read_bytes() for name in names]
    for name in names:
        Path(name).unlink()
    assert command("prompts=answers.jsonl", "serve=false")[0] == 0
    assert [Path(name).read_bytes() for name in names] == before


def test_conversations_that_people_wrote_are_rows_for_sft(command, people):
    file_of("answers.jsonl", ANSWERED)
    turns = [{"role": role, "content": role} for role in ("user", "assistant")]
    people.append(lambda store: store.save_conversation("token", "ann", turns))
    assert "answers.rankings.conversations.jsonl" in command("prompts=answers.jsonl")[1]
    written = DatasetConfig(path="answers.rankings.conversations.jsonl", eval_fraction=0.0)
    (row,) = load_splits(written, "sft", 1, needs_eval=False).train
    assert row["messages"] == turns


def test_the_same_command_continues_and_flagged_prompts_are_left_out(command, people):
    file_of("answers.jsonl", ANSWERED)

    def one_then_flag(store):
        for kind in ("ranking", "flag"):
            showing = store.next("ann")
            reason = "unsafe" if kind == "flag" else ""
            store.submit(showing.token, "ann", kind, [0] * len(showing.cards), reason)

    people += [one_then_flag, lambda store: shortest_first(store, "bob")]
    assert "1 of 3 prompts ranked" in command("prompts=answers.jsonl")[1]
    output = command("prompts=answers.jsonl")[1]
    assert "2 of 3 prompts ranked" in output and "flagged, and left out of the rankings" in output
    assert "unsafe (1)" in output
    assert [row["annotator"] for row in rows_of("answers.rankings.jsonl")] == ["ann", "bob"]


def test_a_ranking_of_a_prompt_that_somebody_else_flagged_is_left_out(tmp_path):
    store = Store(tmp_path / "flagged.sqlite", overlap=2)
    store.add([Task(i, "q", ["a", "b"]) for i in range(2)])
    shortest_first(store, "ann")
    assert [len(list(rows(store.judgements()))) for rows in EXPORTED] == [2, 0]
    store.submit(store.next("bob").token, "bob", "flag", demonstration="half a sentence")
    assert [len(list(rows(store.judgements()))) for rows in EXPORTED] == [1, 0]


def test_two_policies_compete_and_a_stopped_sampling_continues(policy, command, monkeypatch):
    shutil.copytree(policy, "other")
    file_of("prompts.jsonl", [{"prompt": f"Name {i} things."} for i in range(20)])
    arguments = ["prompts=prompts.jsonl", f"path=[{policy},other]", "samples_per_prompt=3"]
    arguments += ["response_length=6", "batch_size=1"]
    whole = command(*arguments, "out=whole.jsonl")
    assert whole[0] == 0, whole[2]
    tasks = Store(Path("whole.sqlite")).tasks()
    assert {tuple(task.models) for task in tasks.values()} <= {
        (str(policy), str(policy), "other"),
        (str(policy), "other"),
        (str(policy), str(policy)),
    }
    calls, real = [], Answerer.__call__

    def stopped(self, questions):
        calls.append(len(questions))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, questions)

    monkeypatch.setattr(Answerer, "__call__", stopped)
    assert command(*arguments, "out=stopped.jsonl")[0] == 130
    continued = command(*arguments, "out=stopped.jsonl")
    assert "continuing after" in continued[1]
    assert Store(Path("stopped.sqlite")).tasks() == tasks
    assert sum(calls) == 40 + calls[2], "no chunk was sampled twice"
    other = command(*arguments, "out=stopped.jsonl", "seed=2")
    assert other[0] == 2 and "seed: 1 -> 2" in other[2]


def test_the_prompts_on_which_reward_models_disagree_come_first(command, people, tmp_path):
    for name in ("a", "b", "c"):
        model = write_reward_model(tmp_path / name, policy_tokenizer(), seed=ord(name))
        shutil.move(model, name + "_rm")
    shutil.copytree("a_rm", "same_rm")
    rows = [{"prompt": f"Name {i}", "responses": [f"a {i}", "an apple dog"]} for i in range(8)]
    file_of("answers.jsonl", rows)
    seen = []
    people += [lambda store: seen.append([store.next(n).task.number for n in "abcdefgh"])] * 3
    disagree = ["prompts=answers.jsonl", "order=disagreement"]
    for out, models in (("1", "[a_rm,b_rm]"), ("2", "[b_rm,a_rm]"), ("3", "[a_rm,same_rm]")):
        done = command(*disagree, f"reward_models={models}", f"out={out}.jsonl")
        assert done[0] == 0, done[2]
    assert seen[0] == seen[1] and sorted(seen[0]) == [*range(8)] != seen[0]
    assert seen[2] == [*range(8)], "models that agree keep the order of the file"


def test_the_commands_of_the_page_have_options_that_exist(command):
    lines = [line for line in commands(PAGE) if "rlhf.rank" in line]
    assert len(lines) == 3
    for line in lines:
        assert read_options(RankOptions, line.split()[3:]).prompts


def test_the_python_of_the_page_runs(capsys):
    ((_, code),) = blocks(PAGE, "python")
    exec(code, {})
    assert capsys.readouterr().out == "[0, 0]\n"


def test_the_file_of_rlhf_generate_is_read_and_unanswered_rows_are_counted(command):
    row = {"prompt": "Hi", "response": "", "not_answered": "the prompt is too long"}
    file_of("answers.jsonl", [*ANSWERED[:2], row, {"prompt": "Hello", "responses": []}])
    status, output, errors = command("prompts=answers.jsonl")
    assert status == 0, errors
    assert "2 prompts are not shown: not answered in the file (2)" in output


def test_a_file_that_was_mended_can_be_given_again(command):
    file_of("answers.jsonl", ANSWERED[2:3])
    assert command("prompts=answers.jsonl")[0] == 2
    file_of("answers.jsonl", ANSWERED)
    assert command("prompts=answers.jsonl")[0] == 0


# --- A judge ranks too ----------------------------------------------------------------------------


def test_a_judge_is_one_of_the_annotators_and_its_agreement_with_people_is_shown(command, people):
    file_of("answers.jsonl", ANSWERED)
    people.append(shortest_first)
    asked = ["prompts=answers.jsonl", "scorer=judge:helpfulness", "model=m", "cache=:memory:"]
    with running(Answers(prefers_long_answers)) as server:
        status, output, errors = command(*asked, f"url={server.url}", "overlap=2")
    assert status == 0, errors
    assert "judge:helpfulness ranked the answers to 3 prompts" in output
    assert "judge m, helpfulness (version 1): 6 answers asked" in output
    assert "agreement on 3 prompts that several people ranked" in output
    rows = rows_of("answers.rankings.jsonl")
    assert [row["annotator"] for row in rows] == ["judge:helpfulness"] * 3 + ["ann"] * 3
    assert rows[0]["responses"] == ["An apple.", "A dog."] and rows[0]["ranks"] == [0, 0]
    assert rows[1]["responses"] == ["A saw.", "Red"] and rows[1]["ranks"] == [0, 1]


def test_a_judge_that_ranks_all_needs_no_page_and_goes_on_after_a_failure(command, people):
    file_of("answers.jsonl", ANSWERED)
    people.append(lambda store: pytest.fail("nothing is left to rank"))
    asked = ["prompts=answers.jsonl", "scorer=judge:helpfulness", "model=m", "num_requests=1"]
    with running(Answers(*[prefers_long_answers] * 2, (401, {"error": "no key"}))) as server:
        status, _, errors = command(*asked, f"url={server.url}", "cache=kept.sqlite")
        assert status == 2 and "no key" in errors
        assert len(Store(Path("answers.rankings.sqlite")).judgements()) == 1
        server.answers = [prefers_long_answers]
        status, output, errors = command(*asked, f"url={server.url}", "cache=kept.sqlite")
    assert status == 0, errors
    assert "3 of 3 prompts ranked, 3 rankings" in output
    assert [row["annotator"] for row in rows_of("answers.rankings.jsonl")] == [asked[1][7:]] * 3


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prompts=none.jsonl"], "prompts=none.jsonl is not a file"),
        (["prompts=prompts.jsonl"], "prompts=prompts.jsonl has no answers to rank; add path="),
        (["prompts=half.jsonl"], "row 2: it has no `responses`; add path=<policy>"),
        (["prompts=many.jsonl"], "row 1: `responses` must be 2 to 9 texts"),
        (["prompts=equal.jsonl"], "has nothing to rank: no two different answers (1)"),
        (["prompts=a.jsonl", "samples_per_prompt=10"], "samples_per_prompt must lie in [2, 9]"),
        (["prompts=a.jsonl", "path=nowhere"], "path=nowhere"),
        (
            ["prompts=a.jsonl", "url=http://a/v1"],
            "add scorer=judge:helpfulness. To rank answers of",
        ),
        (["prompts=a.jsonl", "scorer=judge:helpfulness"], "a judge needs model=<its name> and url"),
        (["prompts=a.jsonl", "scorer=nowhere"], "scorer=nowhere"),
        (["prompts=a.jsonl", "order=disagreement"], "reward_models=[a,b], two or more models"),
        (["prompts=a.jsonl", "host=0.0.0.0"], "host=0.0.0.0 lets other machines in; add token="),
        (["prompts=a.jsonl", "token=short"], "at least 8 characters, got 5"),
        (
            ["prompts=a.jsonl", "host=no.such.invalid", "token=long secret"],
            "host=no.such.invalid is not an address",
        ),
        (["prompts=a.jsonl", "out=taken.jsonl"], "taken.jsonl exists already"),
        (["prompts=a.jsonl", "out=mine.sqlite"], "give out=mine.jsonl"),
        (["prompts=a.jsonl", "serve=false"], "nothing was ranked yet; leave serve=false out"),
    ],
)
def test_bad_input_gets_one_clear_line(command, arguments, message):
    file_of("prompts.jsonl", [{"prompt": "Hi"}])
    file_of("half.jsonl", [*ANSWERED[:1], {"prompt": "Hi"}])
    file_of("many.jsonl", [{"prompt": "Hi", "responses": ["a"] * 10}])
    file_of("equal.jsonl", [{"prompt": "Hi", "responses": ["a", "a "]}])
    file_of("a.jsonl", ANSWERED)
    file_of("taken.jsonl", [{"mine": 1}])
    status, _, errors = command(*arguments)
    assert status == 2 and message in errors
    assert rows_of("taken.jsonl") == [{"mine": 1}]
    assert not Path("prompts.rankings.sqlite").exists()


def test_a_port_in_use_is_refused_before_anything_is_sampled(command):
    file_of("answers.jsonl", ANSWERED)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, _, errors = command("prompts=answers.jsonl", f"port={port}")
    assert status == 2 and "another program uses it; give port=" in errors
    assert not Path("answers.rankings.sqlite").exists()


def test_a_missing_library_names_the_extra(command, monkeypatch):
    import rlhf.web.server

    file_of("answers.jsonl", ANSWERED)
    monkeypatch.setattr(rlhf.web.server, "find_spec", lambda name: None)
    status, _, errors = command("prompts=answers.jsonl")
    assert status == 2 and "pip install 'rlhf[web]'" in errors


def test_other_prompts_in_the_same_store_are_refused(command, people):
    file_of("answers.jsonl", ANSWERED)
    command("prompts=answers.jsonl", "out=mine.jsonl")
    file_of("answers.jsonl", ANSWERED[:2])
    status, _, errors = command("prompts=answers.jsonl", "out=mine.jsonl")
    assert status == 2 and "was begun with other values" in errors
