"""Scoring elsewhere while this process samples: order, groups, errors, and that it does not wait.

Run: python -m pytest tests/scorers/test_while_sampling.py
"""

from __future__ import annotations

import threading

import pytest
import torch
from helpers.endpoints import Answers, running, words
from helpers.tiny import tiny_model, tiny_tokenizer

from rlhf.config import EndpointConfig, InputError, ScorerComponent, ScorerConfig
from rlhf.sampling import generate, sampling_for, uniform_noise
from rlhf.scorers import Scores, ScoresInTheBackground, load_scorer

SECONDS = 300  # a test that would wait for ever ends


def by_first_id(rows, responses):
    return lambda: Scores(
        torch.tensor([float(ids[0]) for ids in responses]),
        components={"row": torch.tensor([float(row) for row in rows])},
    )


def test_scores_come_in_the_order_of_the_rows():
    with ScoresInTheBackground(by_first_id, 2, 2) as background:
        for row in (3, 0, 4, 1, 2):
            background.add(row, [10 * row])
        scores = background.result()
    assert [group for group, _ in background.groups] == [[3, 0], [4, 1], [2]]
    assert scores.total.tolist() == [0.0, 10.0, 20.0, 30.0, 40.0]
    assert scores.components["row"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_a_full_group_is_scored_before_the_next_row_comes():
    scored = threading.Event()

    def score(rows, responses):
        def task():
            scored.set()
            return by_first_id(rows, responses)()

        return task

    with ScoresInTheBackground(score, 2, 1) as background:
        background.add(0, [1])
        background.add(1, [1])
        assert scored.wait(SECONDS)


def test_the_first_group_that_fails_is_what_is_said_and_the_next_is_not_asked():
    asked = []

    def score(rows, responses):
        def task():
            asked.append(rows)
            raise InputError(f"rows {rows}")

        return task

    with pytest.raises(InputError, match=r"^rows \[0\]$"):
        with ScoresInTheBackground(score, 1, 1) as background:
            for row in range(3):
                background.add(row, [0])
            background.result()
    assert asked == [[0]]


def test_only_scorers_of_other_processes_score_meanwhile(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with running(Answers(words)) as server:
        endpoint = EndpointConfig(num_requests=3, url=server.url, model="wise")
        remote, judge = ScorerConfig(server.url, endpoint=endpoint), "judge:helpfulness"
        assert load_scorer(remote).num_at_once == 3
        assert load_scorer(ScorerConfig(judge, endpoint=endpoint)).num_at_once == 1

        def combined(*paths):
            parts = [ScorerComponent(path, name=f"part{i}") for i, path in enumerate(paths)]
            return load_scorer(ScorerConfig(components=parts, endpoint=endpoint)).num_at_once

        assert combined(server.url, server.url) == 3 and combined(server.url, judge) == 1
        assert combined(server.url, f"python:{__name__}.by_first_id") == 0


@pytest.mark.parametrize("batch_size", [2, 5])
def test_each_response_is_told_once_and_whole_as_soon_as_it_ends(batch_size):
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", tokenizer)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(10, 320, 8)]
    sampling = sampling_for(model, tokenizer, 6, 1.0)
    prompts = [[40, 41, 42], [50], [60, 61], [70, 71, 72, 73], [80]]
    told = {}

    def ended(row, ids):
        assert row not in told
        told[row] = list(ids)

    made = generate(model, prompts, sampling, uniform_noise((1,), range(5), 6), batch_size, ended)
    assert told == dict(enumerate(made.ids))
    if batch_size == 5:
        lengths = [len(made.ids[row]) for row in told]
        assert lengths == sorted(lengths) and len({*lengths}) > 1
