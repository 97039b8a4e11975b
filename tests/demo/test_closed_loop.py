"""The closed loop: its annotator at the page of rankings, and a miniature of the whole.

Run: python -m pytest tests/demo/test_closed_loop.py; with -m slow the miniature
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from rlhf.demo.world import gold_score, rows
from rlhf.rank import Store, Task

EXAMPLE = Path(__file__).parents[2] / "examples/closed_loop"
sys.path.insert(0, str(EXAMPLE))
import annotator  # noqa: E402
import closed_loop  # noqa: E402
import rounds  # noqa: E402

MINIATURE = [
    *("rankings=[4,6]", "dataset.max_rows=64", "sft.trainer.max_steps=8"),
    *("reward.trainer.max_steps=2", "reward.dataset.max_eval_rows=8", "ppo.num_updates=1"),
    *("evaluation.every=1", "evaluation.num_prompts=8", "ppo.batch_size=8"),
]


def test_without_noise_ranks_follow_the_scores_and_equal_ones_tie():
    ranks = annotator.noisy_ranks([0.2, 0.9, 0.2, 0.5], 0.0, random.Random(0))
    assert ranks == [2, 0, 2, 1]


def test_so_many_comparisons_of_two_answers_are_wrong():
    wrong = [
        annotator.noisy_ranks([1.0, 0.0], 0.15, random.Random(seed)) == [1, 0]
        for seed in range(2000)
    ]
    assert 0.13 < sum(wrong) / len(wrong) < 0.17  # four standard errors are 0.032
    assert annotator.noisy_ranks([0.5, 0.5], 0.5, random.Random(0)) == [0, 0]


def test_a_pair_against_gold_is_wrong_and_a_tie_half():
    prompt = rows("ppo", "train")[0]["prompt"]
    answers = ["dog", "", "thanks"]  # of no two is the gold score known to be equal but the last
    scores = [gold_score(prompt, answer) for answer in answers]
    assert scores[0] > scores[1] == scores[2] == 0
    row = {"prompt": prompt, "responses": answers}
    assert rounds.share_of_wrong_pairs([row | {"ranks": [0, 1, 2]}]) == 0
    assert rounds.share_of_wrong_pairs([row | {"ranks": [1, 0, 1]}]) == 0.75


def test_the_annotator_ranks_all_that_the_page_shows(tmp_path, monkeypatch):
    from starlette.testclient import TestClient

    from rlhf.rank.app import make_app

    answers = ["dog cat .", "dog", "wonderful wonderful dog ."]
    store = Store(tmp_path / "store.sqlite")
    asked = [row["prompt"] for row in rows("ppo", "train")[:5]]
    store.add(Task(i, prompt, answers) for i, prompt in enumerate(asked))
    page = TestClient(make_app(store), base_url="http://127.0.0.1:8765")

    def ask(url, body, endpoint, field):
        answer = page.post(urlsplit(url).path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    monkeypatch.setattr(annotator, "ask", ask)
    assert annotator.annotate(annotator.Options(noise=0.0)) == 5
    judgements = store.judgements()
    assert [one.task.number for one in judgements] == [0, 1, 2, 3, 4]
    for one in judgements:
        scores = [gold_score(one.task.prompt, response) for response in answers]
        order = sorted({*scores}, reverse=True)
        assert one.ranks == [order.index(score) for score in scores]


def test_the_title_claims_only_what_the_paired_win_rates_bear_out():
    claim = "Every round of rankings raises the true score"
    sft, better, unclear = {"round": 0}, {"win_rate_low": 0.6}, {"win_rate_low": 0.49}
    all_better, not_all = {"rounds": [sft, better, better]}, {"rounds": [sft, better, unclear]}
    assert rounds.title_of([all_better]) == rounds.title_of([all_better] * 2) == claim
    assert claim not in (rounds.title_of([not_all]), rounds.title_of([all_better, not_all]))


def test_several_seeds_are_their_mean_and_range(tmp_path, capsys):
    ends = {"gold_low": 0.0, "gold_high": 1.0, "win_rate_low": 0.6}
    for seed, scores in enumerate([(0.5, 0.7), (0.5, 0.8)]):
        of = [{"round": n, "rankings": 4 * n, "gold": gold} | ends for n, gold in enumerate(scores)]
        old = [of[1] | {"round": 2, "rankings": 8}]
        result = {"num_prompts": 9, "num_answers": 4, "noise": 0.1, "rounds": of, "old_labels": old}
        (tmp_path / f"{seed}").mkdir()
        (tmp_path / f"{seed}/closed_loop.json").write_text(json.dumps(result))
    out = tmp_path / "seeds.png"
    rounds.run(rounds.Options([str(tmp_path / "0"), str(tmp_path / "1")], str(out)))
    assert "0.75 [0.7, 0.8]" in capsys.readouterr().out and out.stat().st_size > 5000


@pytest.mark.slow
def test_a_miniature_goes_around_twice_and_continues(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLE.parents[1]))
    assert closed_loop.main(MINIATURE) == 0
    folder = Path("runs/loop")
    result = json.loads((folder / "closed_loop.json").read_text())
    assert [row["rankings"] for row in result["rounds"]] == [0, 4, 10]
    assert [row["round"] for row in result["old_labels"]] == [2]
    assert all(row["gold_low"] <= row["gold"] <= row["gold_high"] for row in result["rounds"])
    assert (folder / "closed_loop.png").stat().st_size > 5000
    ranked = [
        json.loads(line) for line in (folder / "round-2.rankings.jsonl").read_text().splitlines()
    ]
    assert {row["models"][0] for row in ranked} == {"runs/loop-1/ppo/final"}
    first = {
        json.dumps(row["prompt"]) for row in map(json.loads, (folder / "round-1.jsonl").open())
    }
    assert not first & {json.dumps(row["prompt"]) for row in ranked}
    table = capfd.readouterr().out.rpartition("held-out prompts, 95 %")[2]
    (folder / "closed_loop.png").unlink()
    assert closed_loop.main(MINIATURE) == 0
    said = capfd.readouterr().out
    assert "optimiser steps made" not in said and said.count("is finished: nothing to do") == 6
    assert said.rpartition("held-out prompts, 95 %")[2] == table
