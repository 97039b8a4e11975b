"""Training rollouts that are written as rows.

Run: python -m pytest tests/ppo/test_saved_rollouts.py
"""

import json

import datasets
import pytest
import torch
from helpers.tiny_ppo import make_config, words_scorer

from rlhf import train_ppo
from rlhf.metrics import read_jsonl


@pytest.fixture(scope="module")
def run(policy_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rollouts")
    config = make_config(policy_dir, folder, save_rollouts=2, gamma=1.0, lam=1.0)
    train_ppo(config)
    return config.stage_dir("ppo")


def test_every_second_rollout_is_a_file(run):
    names = [file.name for file in sorted((run / "rollouts").iterdir())]
    assert names == ["update-000002.jsonl", "update-000004.jsonl"]


def test_datasets_reads_them_and_they_agree_with_the_metrics(run):
    rows = datasets.load_dataset(
        "json",
        data_files=str(run / "rollouts/*.jsonl"),
        split="train",
        cache_dir=str(run / "cache"),
    )
    assert len(rows) == 16
    metrics = {row["step"]: row for row in read_jsonl(run / "metrics.jsonl") if "kl_k3" in row}
    for update in (2, 4):
        own = [row for row in rows if row["update"] == update]
        for name, metric in (("score", "score"), ("kl", "kl"), ("response_length",) * 2):
            mean = sum(row[name] for row in own) / len(own)
            assert mean == pytest.approx(metrics[update][metric], rel=1e-5, abs=1e-6), name
        assert sum(row["finished"] for row in own) / len(own) == metrics[update]["eos_rate"]


def test_a_row_holds_what_the_update_was_made_of(run):
    for row in read_jsonl(run / "rollouts/update-000004.jsonl"):
        lists = [value for value in row.values() if isinstance(value, list)]
        assert len(lists) == 8 and {len(values) for values in lists} == {row["response_length"]}
        difference = torch.tensor(row["logprobs"]) - torch.tensor(row["ref_logprobs"])
        torch.testing.assert_close(torch.tensor(row["token_kl"]), difference, rtol=1e-5, atol=1e-6)
        # gamma = lam = 1: the return of the first token is the sum of the rewards
        assert row["returns"][0] == pytest.approx(sum(row["rewards"]), rel=1e-4, abs=1e-4)
        if row["finished"]:
            expected = words_scorer([row["prompt"]], [row["response"]])[0]
            assert row["score"] == pytest.approx(expected, rel=1e-6)


def test_text_and_conversations_in_one_run_make_one_column(policy_dir, tmp_path):
    config = make_config(policy_dir, tmp_path, save_rollouts=1, num_updates=1, batch_size=16)
    file = tmp_path / "prompts.jsonl"
    rows = read_jsonl(file)
    for row in rows[::2]:
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_ppo(config)
    written = read_jsonl(config.stage_dir("ppo") / "rollouts/update-000001.jsonl")
    kinds = {isinstance(row["prompt"], str) for row in written}
    assert kinds == {True}
    assert any(row["prompt"].startswith('[{"role": "user"') for row in written)
