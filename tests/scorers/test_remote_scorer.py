"""Scorers behind a URL: the server for any scorer, the client, and servers that misbehave.

Run: python -m pytest tests/scorers/test_remote_scorer.py
"""

from __future__ import annotations

import json
import re
import socket
import urllib.error

import pytest
import torch
from helpers.endpoints import TOO_LATE, Answers, open_here, running, words
from helpers.ports import held_port
from helpers.scorers import PROMPTS, RESPONSES
from helpers.tiny_ppo import make_config
from torch.testing import assert_close

import rlhf.http_endpoint
from rlhf import train_ppo
from rlhf.checkpoint import read_record
from rlhf.checkpoint.config_changes import refuse_changes
from rlhf.config import EndpointConfig, InputError, PPOStageConfig, ScorerConfig, hide, save_config
from rlhf.metrics import read_jsonl
from rlhf.scorers import ScoreServer, load_scorer, score_responses

HTML = b"<!DOCTYPE html><html><head><title>Login\n page</title></head></html>"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(rlhf.http_endpoint, "FIRST_WAIT", 0.01)


def remote(url, batch_size=2, **endpoint):
    config = EndpointConfig(**({"retries": 2} | endpoint))
    return load_scorer(ScorerConfig(url, batch_size=batch_size, endpoint=config))


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_a_served_reward_model_gives_its_scores(helpful, batch_size):
    scorer = load_scorer(ScorerConfig(helpful))
    with running(ScoreServer(scorer, "127.0.0.1:0", helpful)) as server:
        found = remote(server.url, batch_size)(PROMPTS, RESPONSES)
        assert server.num_scored == 3
    assert_close(found, scorer(PROMPTS, RESPONSES))


def exact(prompts, responses, answer):
    """Score 1 where the known answer is in the response."""
    return [float(known in text) for text, known in zip(responses, answer, strict=True)]


def test_columns_reach_a_served_python_scorer():
    columns = {"answer": ["dog", "green", "apple"], "id": [1, 2, 3]}
    with running(ScoreServer(exact, "127.0.0.1:0", "exact")) as server:
        scorer = remote(server.url)
        scores = score_responses(scorer, PROMPTS, RESPONSES, "x", columns=columns)
        with pytest.raises(
            InputError, match="422 .*no row has a column for its parameter `answer`"
        ):
            scorer(PROMPTS, RESPONSES)
    assert scores.total.tolist() == [1.0, 0.0, 1.0] and scores.total.dtype == torch.float32


def test_requests_are_small_batches_in_order():
    with running(Answers(words)) as server:
        scores = remote(server.url)([["x"]] * 5, ["a", "b c", "d e f", "", "g h"])
    assert scores.tolist() == [1.0, 2.0, 3.0, 0.0, 2.0]
    assert sorted(len(body["responses"]) for _, _, body in server.requests) == [1, 2, 2]


PASSING = [(503, {"error": "busy"}), (429, b"slow down", {"Retry-After": "0"}), (200, b'{"scor')]


@pytest.mark.parametrize("failure", [*PASSING, None, (200, b"")], ids=str)
def test_a_failure_that_passes_is_tried_again(failure, capsys):
    with running(Answers(failure, failure, words)) as server:
        scorer = remote(server.url)
        assert scorer(PROMPTS[:1], ["a b"]).tolist() == [2.0]
    assert len(server.requests) == 3
    assert scorer.counts() == {"remote_requests": 1, "remote_retries": 2}
    assert capsys.readouterr().err.count("trying again, at most 2 times") == 1


@pytest.mark.parametrize(
    ("answer", "tries", "message"),
    [
        ((503, {"error": {"message": "loading"}}), 3, "answered 503 .*: 'loading' .after 3 tries"),
        ((429, b"slow\n down", {"Retry-After": "0"}), 3, "answered 429 .*: 'slow down' .after 3"),
        ((200, b'{"scores": [1.'), 3, r"what is not JSON \(.*\): '{\"scores\": \[1.' \(after 3"),
        ((200, b""), 3, r"answered with what is not JSON \(.*\): nothing"),
        (None, 3, "cannot be reached .*closed connection without response.* .after 3 tries"),
        ((200, HTML), 1, "an HTML page .'Login page'., not JSON; is the URL right"),
        ((404, HTML), 1, "answered 404 Not Found: an HTML page .'Login page'"),
        (
            (401, {"detail": "who are you"}),
            1,
            "401 .*: 'who are you'; name the variable .*key_env=",
        ),
        ((302, b"", {"Location": "http://x/"}), 1, "302 Found: .*; give the URL .*: http://x/"),
        ((200, {"scores": [1.0, 2.0]}), 1, "answered 2 scores for 1 responses"),
        (
            (200, {"scores": [None]}),
            1,
            r"answered {'scores': \[None\]}; expected .* with 1 numbers",
        ),
        ((200, {"scores": ["1"]}), 1, "expected .*scores.* with 1 numbers"),
        ((200, [1.0]), 1, r"answered \[1.0\]; expected"),
        ((200, {"scores": [float("nan")]}), 1, "returned nan for 1 of 1 responses, .*'a b'"),
        ((200, {"scores": [1e39]}), 1, "returned inf for 1 of 1 responses"),
    ],
    ids=str,
)
def test_a_server_that_misbehaves_ends_the_run_and_is_named(answer, tries, message):
    with running(Answers(answer)) as server:
        with pytest.raises(InputError) as caught:
            remote(server.url)(PROMPTS[:1], ["a b"])
    assert len(server.requests) == tries
    text = str(caught.value)
    assert text.startswith(f"scorer.path={server.url} ") and "\n" not in text
    assert re.search(message, text), text


def test_a_server_that_is_slow_is_named():
    with running(Answers(TOO_LATE)) as server:
        with pytest.raises(InputError, match="did not answer within 0.2 seconds .after 2 tries"):
            remote(server.url, timeout=0.2, retries=1)(PROMPTS[:1], ["a b"])


def test_the_key_is_sent_and_never_shown(monkeypatch):
    monkeypatch.setenv("SCORER_KEY", "sk-123456789")
    echo = (403, {"error": "sk-123456789 is no key"})
    with running(Answers(words, echo)) as server:
        scorer = remote(server.url, key_env="SCORER_KEY")
        scorer(PROMPTS[:1], ["a"])
        with pytest.raises(InputError) as caught:
            scorer(PROMPTS[:1], ["a"])
    assert server.requests[0][1]["Authorization"] == "Bearer sk-123456789"
    assert "${oc.env:SCORER_KEY} is no key" in hide(str(caught.value))
    assert "is $SCORER_KEY the right key?" in str(caught.value)


@pytest.mark.parametrize(
    ("url", "endpoint", "message"),
    [
        ("http://127.0.0.1:{port}/score", {}, r"cannot be reached \(Connection refused\)"),
        ("http://127.0.0.1:99999", {}, "is not a URL"),
        ("http:///score", {}, "is not a URL, such as http://127.0.0.1:8000"),
        ("http://me:secret@127.0.0.1/x", {}, "^scorer.path holds a password; put it into a var"),
        ("http://127.0.0.1:{port}", {"key_env": "NO_SUCH_KEY"}, "export NO_SUCH_KEY=<key>"),
    ],
)
def test_a_url_that_cannot_work_is_refused_before_models_load(
    policy_dir, tmp_path, url, endpoint, message
):
    config = make_config(policy_dir, tmp_path)
    from rlhf.inputs import check_inputs

    with held_port() as port, pytest.raises(InputError, match=message):
        config.scorer = ScorerConfig(url.format(port=port), endpoint=EndpointConfig(**endpoint))
        check_inputs(config, "ppo")


@pytest.mark.parametrize("address", ["8123", "127.0.0.1:x", "127.0.0.1:99999"])
def test_an_address_that_is_none_is_refused(address):
    with pytest.raises(InputError, match=f"serve={address} "):
        ScoreServer(words, address, "x")


def test_a_port_in_use_is_refused():
    with running(Answers(words)) as server:
        with pytest.raises(InputError, match="Address already in use.; give another port"):
            ScoreServer(words, f"127.0.0.1:{server.server_port}", "x")


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{oops", 400, "expected JSON"),
        (b"[]", 422, "expected {"),
        (b'{"prompts": ["a"], "responses": []}', 422, "differ in number"),
        (b'{"prompts": ["a"], "responses": [1]}', 422, "must be texts"),
        (b'{"prompts": ["a"], "responses": ["b"], "columns": 1}', 422, "columns"),
        (b'{"prompts": ["a"], "responses": ["b"], "columns": {"answer": 1}}', 422, "columns"),
        (b'{"prompts": [1], "responses": ["b"]}', 422, "prompts[0]"),
        (b'{"prompts": [[{"role": "tool"}]], "responses": ["b"]}', 422, "has tool calls"),
        (b"[" * 100_000, 400, "expected JSON"),
        (b'{"prompts": ["\xff"]}', 400, "expected JSON"),
    ],
)
def test_the_server_says_what_is_wrong_with_a_request(body, status, message, capfd):
    with running(ScoreServer(exact, "127.0.0.1:0", "exact")) as server:
        with open_here(server.url) as answer:
            assert json.load(answer) == {"scorer": "exact"}
        with pytest.raises(urllib.error.HTTPError) as caught:
            open_here(server.url, body)
    assert caught.value.code == status and message in json.load(caught.value)["error"]
    assert capfd.readouterr().err == ""


HALF = b'POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{"prompts": ["a"'


def server_of_ones():
    return ScoreServer(lambda prompts, responses: [1.0] * len(responses), "127.0.0.1:0", "one")


def test_a_request_that_is_cut_off_or_never_ends_keeps_nobody_waiting(monkeypatch, capfd):
    with running(server_of_ones()) as server:
        monkeypatch.setattr(server.RequestHandlerClass, "timeout", 600)
        address = "127.0.0.1", server.server_port
        with socket.create_connection(address) as waits, socket.create_connection(address) as gone:
            for connection in (waits, gone):
                connection.sendall(HALF)
            gone.close()
            assert remote(server.url)(PROMPTS, RESPONSES).tolist() == [1.0] * 3
    assert "Traceback" not in capfd.readouterr().err


def test_a_request_that_never_ends_is_given_up(monkeypatch, capfd):
    server = server_of_ones()
    assert 0 < server.RequestHandlerClass.timeout <= 60
    monkeypatch.setattr(server.RequestHandlerClass, "timeout", 0.2)
    address = "127.0.0.1", server.server_port
    with socket.create_connection(address, timeout=300) as waits:
        waits.sendall(HALF)
        with running(server):
            assert waits.recv(100) == b""
    assert "Traceback" not in capfd.readouterr().err


def dies_after(num_requests):
    """Scores as `words_scorer` does, and then fails for good."""
    left = [num_requests]

    def answer(body):
        left[0] -= 1
        scores = [len(text) / 10 for text in body["responses"]]
        return (200, {"scores": scores}) if left[0] >= 0 else (500, {"error": "out of memory"})

    return answer


def test_ppo_scores_while_it_samples_and_resumes_at_another_port(policy_dir, tmp_path, capsys):
    """Two requests for an evaluation of 4 responses and three for an update of 8: the server dies
    in the middle of the third update. The numbers are those of the same scorer in the process."""

    def config(name, url, **changes):
        made = make_config(policy_dir, tmp_path, missing_eos_penalty=None)
        made.run_name = name
        if url:
            endpoint = EndpointConfig(retries=0, num_requests=1)
            made.scorer = ScorerConfig(url, batch_size=3, endpoint=endpoint)
        for key, value in changes.items():
            setattr(made, key, value)
        return made

    expected = train_ppo(config("local", None)).directory.parent / "metrics.jsonl"
    with running(Answers(dies_after(2 + 3 + 3 + 2 + 1))) as server:
        with pytest.raises(InputError, match="'out of memory'.*; update 2 is saved in .*continue"):
            train_ppo(config("remote", server.url))
        died_at = server.url
    scoring = "while others are sampled, in groups of 3, at most 1 group at once"
    assert f"     scoring: {scoring}\n" in capsys.readouterr().out
    with running(Answers(dies_after(99))) as server:
        directory = train_ppo(config("remote", server.url, resume=True)).directory
    moved = f'scorer.path: "{died_at}" -> "{server.url}"'
    assert f"changed, where the scorer listens: {moved}\n" in capsys.readouterr().out
    record = read_record(directory)
    assert record.scoring == scoring
    assert record.changes == [{"after_step": 2, "changed": [moved]}]
    assert (directory.parent / "metrics.jsonl").read_text() == expected.read_text()
    counts = [row for row in read_jsonl(directory.parent / "timings.jsonl") if row["step"] == 4]
    assert counts[0]["remote_requests"] == 3 and counts[0]["eval_remote_requests"] == 2
    assert counts[0]["remote_retries"] == 0


def test_scores_may_wait_for_the_last_response(policy_dir, tmp_path, capsys):
    config = make_config(policy_dir, tmp_path, num_updates=1, missing_eos_penalty=None)
    with running(Answers(dies_after(99))) as server:
        config.scorer = ScorerConfig(server.url, while_sampling=False)
        record = read_record(train_ppo(config).directory)
    assert record.scoring == "after sampling (scorer.while_sampling=false)"
    assert f"     scoring: {record.scoring}\n" in capsys.readouterr().out


def test_a_url_may_not_become_another_kind_of_scorer(policy_dir, tmp_path):
    config = make_config(policy_dir, tmp_path, num_updates=1)
    train_ppo(config)
    config.resume, config.scorer.path = True, "http://127.0.0.1:1/score"
    with pytest.raises(InputError, match="different configuration:\n  scorer.path: "):
        train_ppo(config)


def test_the_url_of_a_component_may_be_another_one_on_resume(tmp_path):
    def components(url, weight=1.0):
        parts = [{"path": "runs/a/reward/final"}, {"path": url, "weight": weight}]
        return PPOStageConfig(scorer=ScorerConfig(components=parts))

    final = tmp_path / "final"
    final.mkdir()
    save_config(components("http://127.0.0.1:1/score"), final / "config.yaml")
    changes = refuse_changes(components("http://127.0.0.1:2/score"), final)
    assert list(changes) == ["scorer.components"] and ":2/score" in changes["scorer.components"]
    for other in (components("http://127.0.0.1:2/score", weight=2.0), components("mine.score")):
        with pytest.raises(InputError, match="different configuration:\n  scorer.components: "):
            refuse_changes(other, final)
