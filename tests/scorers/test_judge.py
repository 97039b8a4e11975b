"""A language model as the scorer: rubrics, verdicts, the file of answers, failures, cost.

Run: python -m pytest tests/scorers/test_judge.py
"""

from __future__ import annotations

import json
import sqlite3

import pytest
from helpers.endpoints import Answers, running
from helpers.judging import chat, prefers_long_answers
from helpers.tiny_ppo import make_config, write_policy

import rlhf.http_endpoint
from rlhf import train_ppo
from rlhf.config import CONF_DIR, EndpointConfig, InputError, ScorerComponent, ScorerConfig
from rlhf.inputs import check_inputs
from rlhf.rubrics import as_dialogue, read_choice, read_rating, read_rubric
from rlhf.score import main as score
from rlhf.scorers import Judge, load_scorer, score_responses

PROMPTS = ["name a fruit", [{"role": "user", "content": "and a tool"}]]
RESPONSES = ["an apple {{ 7 }}", "saw"]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(rlhf.http_endpoint, "FIRST_WAIT", 0.01)


def judge(server, rubric="helpfulness", **endpoint):
    config = {"model": "wise", "url": f"{server.url}/v1", "retries": 1} | endpoint
    return load_scorer(ScorerConfig(f"judge:{rubric}", endpoint=EndpointConfig(**config)))


@pytest.mark.parametrize(
    ("answer", "rating", "choice"),
    [
        ("Fine. [[7]]", 7.0, None),
        ("[[3]] no, [[ 4.5 ]]", 4.5, None),
        ("[[8/10]]", 8.0, None),
        ("[[0]]", None, None),
        ("[[11]]", None, None),
        ("[[-3]]", None, None),
        ("7", None, None),
        ("", None, None),
        ("[[A]] or rather [[B]]", None, "b"),
        ("[[ A ]]", None, "a"),
        ("[[C]]", None, "tie"),
        ("[[D]] [A]", None, None),
    ],
)
def test_the_last_verdict_in_double_brackets_counts(answer, rating, choice):
    assert read_rating(answer) == rating and read_choice(answer) == choice


@pytest.mark.parametrize("file", sorted((CONF_DIR / "judge").glob("*.yaml")), ids=lambda f: f.stem)
def test_every_rubric_shows_what_it_judges(file):
    rubric = read_rubric(f"judge:{file.stem}", "x")
    columns = dict.fromkeys(rubric.columns, "<known>")
    rate = rubric.ask_to_rate(PROMPTS[0], RESPONSES[0], columns)
    compare = rubric.ask_to_compare(PROMPTS[0], RESPONSES[0], "saw", columns)
    assert PROMPTS[0] in rate and "an apple {{ 7 }}" in rate and "<answer_b>\nsaw\n" in compare
    assert all("<known>" in text for text in (rate, compare)) == bool(rubric.columns)
    assert read_rating(rate) == 5 and {"[[A]]", "[[B]]", "[[C]]"} < set(
        compare.replace(",", "").split()
    )


def test_a_conversation_is_shown_with_its_roles():
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hi!"), ("user", "A tool?")]
    shown = as_dialogue([{"role": role, "content": text} for role, text in turns])
    assert shown == "system: Be brief.\n\nuser: Hi\n\nassistant: Hi!\n\nuser: A tool?"


def test_a_judge_rates_at_temperature_0_and_is_asked_once(capsys):
    with running(Answers(prefers_long_answers)) as server:
        first = judge(server, prices=[10.0, 100.0])
        assert isinstance(first, Judge)
        assert first([*PROMPTS, "name a fruit"], [*RESPONSES, RESPONSES[0]]).tolist() == [5, 1, 5]
        assert first(PROMPTS, RESPONSES).tolist() == [5, 1]
        assert judge(server)(PROMPTS, RESPONSES).tolist() == [5, 1]  # another process, later
        assert len(server.requests) == 2
        judge(server, "harmlessness")(PROMPTS, RESPONSES)
        judge(server, model="other")(PROMPTS, RESPONSES)
        assert len(server.requests) == 6
    path, _, body = server.requests[0]
    assert path == "/score/v1/chat/completions"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("wise", 0.0, 512)
    said = first.summary()
    assert said.startswith("judge wise, helpfulness (version 1): 2 answers asked, 3 known from ")
    assert "; 0 of 5 without a verdict; 200 tokens read and 20 written, costing 0.004" in said


def test_answers_are_kept_as_they_come_without_questions_or_keys(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-secret-secret")
    cache = tmp_path / "mine.sqlite"
    with running(Answers(chat("[[9]]"), (400, {"error": "no more money"}))) as server:
        own = judge(server, cache=str(cache), key_env="JUDGE_KEY", num_requests=1)
        with pytest.raises(InputError, match="url=http.*/v1/chat/completions .* 'no more money'"):
            own(PROMPTS, RESPONSES)
        server.answers[:] = [chat("[[2]]")]
        again = judge(server, cache=str(cache), key_env="JUDGE_KEY")
        assert again(PROMPTS, RESPONSES).tolist() == [9, 2]
    assert len(server.requests) == 3
    rows = sqlite3.connect(cache).execute("SELECT * FROM answers").fetchall()
    assert [row[1:] for row in rows] == [("[[9]]", 0, 0), ("[[2]]", 0, 0)]
    assert b"sk-secret" not in b"".join(file.read_bytes() for file in tmp_path.rglob("*sqlite*"))


def test_an_answer_without_a_verdict_is_the_lowest_score_and_counted():
    def evasive(body):
        return chat("I would rather not." if "saw" in body["messages"][0]["content"] else "[[8]]")

    with running(Answers(evasive)) as server:
        own = judge(server, max_unreadable=0.1)
        assert own([PROMPTS[0]] * 20, ["x"] * 19 + ["saw"]).tolist() == [8] * 19 + [1]
        assert "1 of 20 without a verdict" in own.summary()
        with pytest.raises(
            InputError, match="no verdict in 3 of 22 answers; the last: 'I would ra"
        ):
            own(PROMPTS, ["saw 2", "saw 3"])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, {"choices": []}), "expected a chat completion"),
        ((200, [1]), "expected a chat completion"),
        ((200, b"<html><title>Gateway</title>"), "an HTML page .'Gateway'., not JSON"),
        ((429, {"error": {"message": "quota"}}, {"Retry-After": "0"}), "429 .*'quota' .after 2 tr"),
    ],
    ids=str,
)
def test_an_endpoint_that_misbehaves_is_named(answer, message):
    with running(Answers(answer)) as server:
        with pytest.raises(InputError, match=f"^scorer.endpoint.url={server.url}/v1/.*{message}"):
            judge(server)(PROMPTS, RESPONSES)


def test_the_reference_of_each_row_is_shown():
    def knows(body):
        text = body["messages"][0]["content"]
        return chat("[[10]]" if "<reference>\na pear\n" in text else "[[2]]")

    with running(Answers(knows)) as server:
        own = judge(server, "correctness")
        columns = {"reference": ["a pear", "a plum"]}
        scores = score_responses(own, PROMPTS, RESPONSES, "the scorer", columns=columns)
        with pytest.raises(InputError, match="reads the column `reference`, which 1 of 2 rows do"):
            score_responses(own, PROMPTS, RESPONSES, "x", columns={"reference": ["a", None]})
        with pytest.raises(InputError, match="which 2 of 2 rows do not have"):
            own(PROMPTS, RESPONSES)
    assert scores.total.tolist() == [10, 2]


def test_a_local_model_judges_and_is_asked_once(tmp_path):
    model = str(write_policy(tmp_path / "policy"))
    (tmp_path / "short.yaml").write_text(
        "version: 2\nrate: 'rate {{ response }} {{ mood }}'\ncompare: '{{ a }} {{ b }}'\n"
    )
    endpoint = EndpointConfig(model=model, max_tokens=4, max_unreadable=1.0)
    config = ScorerConfig(f"judge:{tmp_path}/short.yaml", endpoint=endpoint, batch_size=2)
    own = load_scorer(config)
    assert own(["x"] * 3, ["a", "b c", "d"]).tolist() == [1, 1, 1]  # a random model has no verdict
    assert (own.num_asked, own.num_known, own.num_unreadable) == (3, 0, 3) and min(own.tokens) > 3
    again = load_scorer(config)
    again(["x"], ["b c"])
    assert (again.num_asked, again.num_known) == (0, 1)
    assert own.answers(["rate b c None"]) == again.answers(["rate b c None"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no rubric .*mine.yaml; give judge:<name> with one of correctness, harml"),
        ("- a", "must have the keys version, rate and compare"),
        ("version: 1\nrate: 3\n", "rate must be a text, got 3"),
        ("version: 1\nrate: '{{ response'\n", "rate is no Jinja template"),
        ("version: 1\nrate: hello\n", "rate must show {{ response }}"),
        ("version: 1\nrate: '{{ response }}'\ncompare: x\n", "compare must show {{ a }} and {{ b"),
        ("rate: '{{ response }}'\ncompare: '{{ a }}{{ b }}'\n", "version must be a number"),
        ("rate: [", "is damaged"),
    ],
)
def test_a_rubric_that_is_none_is_refused(tmp_path, text, message):
    file = tmp_path / "mine.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match=message):
        read_rubric(f"judge:{file}", "scorer.path")


@pytest.mark.parametrize(
    ("path", "endpoint", "message"),
    [
        ("judge:helpfulness", {}, "a judge needs scorer.endpoint.model=<its name> and scorer.end"),
        ("judge:helpfullness", {"model": "m"}, "there is no rubric"),
        ("judge:helpfulness", {"model": "no/where/x"}, "scorer.endpoint.model=no/where/x: no such"),
        ("judge:helpfulness", {"model": "m", "url": "127.0.0.1"}, "url=127.0.0.1 is not a URL"),
        ("judge:helpfulness", {"model": "m", "prices": [1.0]}, "prices must be two numbers"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_refused_before_models_load(
    policy_dir, tmp_path, path, endpoint, message
):
    config = make_config(policy_dir, tmp_path)
    config.scorer = ScorerConfig(path, endpoint=EndpointConfig(**endpoint))
    with pytest.raises(InputError, match=message):
        check_inputs(config, "ppo")


def test_a_file_that_is_no_file_of_answers_is_refused(tmp_path):
    (tmp_path / "x").write_text("hello, this is no database" * 99)
    with running(Answers(chat("[[1]]"))) as server:
        with pytest.raises(InputError, match="; move it away, or give scorer.endpoint.cache="):
            judge(server, cache=str(tmp_path / "x"))


def test_a_file_of_answers_is_judged(tmp_path, capsys):
    rows = [
        {"prompt": "name a fruit", "response": "an apple", "reference": "a pear"},
        {"prompt": "a tool", "responses": ["saw", "a big saw"], "reference": "a saw"},
    ]
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with running(Answers(prefers_long_answers)) as server:
        arguments = ["path=judge:correctness", "model=wise", f"url={server.url}", f"data={file}"]
        assert score(arguments) == 0
    written = [json.loads(line) for line in (tmp_path / "answers.scored.jsonl").open()]
    assert written[0]["score"] == 2 and written[1]["scores"] == [1, 3]
    said = capsys.readouterr().out
    assert "judge wise, correctness (version 1): 3 answers asked, 0 known" in said
    assert said.endswith("answers.scored.jsonl: scores by judge:correctness\n")


def test_ppo_trains_on_two_rubrics_of_a_judge(policy_dir, tmp_path, capsys):
    config = make_config(policy_dir, tmp_path, num_updates=1, missing_eos_penalty=0.0)
    with running(Answers(prefers_long_answers)) as server:
        config.scorer = ScorerConfig(
            components=[
                ScorerComponent("judge:helpfulness"),
                ScorerComponent("judge:harmlessness", weight=0.5),
            ],
            endpoint=EndpointConfig(model="wise", url=server.url, prices=[1.0, 1.0]),
        )
        result = train_ppo(config)
        rows = [json.loads(line) for line in (result.directory.parent / "metrics.jsonl").open()]
        (row,) = (row for row in rows if "score/helpfulness" in row)
        assert 1 <= row["score/helpfulness"] == row["score/harmlessness"] <= 10
        assert row["judge_unreadable"] == row["eval_judge_unreadable"] == 0
        (counts,) = (
            row
            for row in map(json.loads, (result.directory.parent / "timings.jsonl").open())
            if row["step"] == 1
        )
        assert counts["judge_asked"] + counts["judge_known"] == 2 * config.ppo.batch_size
        assert counts["judge_cost"] == pytest.approx(counts["judge_tokens"] / 1e6)
        assert counts["judge_asked"] > 0 < counts["judge_tokens"]
        assert capsys.readouterr().out.count("(version 1): ") == 2
        config.scorer.components[0].path = "judge:correctness"
        config.run_name = "other"
        with pytest.raises(
            InputError, match=r"\[0\].path=judge:correctness: no row has the column"
        ):
            train_ppo(config)
