"""Two processes give the result of one where they cannot have equally many rows: at the end of an
epoch, where one of them gets none, and in evaluations.

Run: python -m pytest tests/end_to_end/test_uneven_shares.py, with `-m slow` for FSDP2
"""

from __future__ import annotations

import json
import shutil

import pytest
from helpers.runs import (
    directory_of,
    ppo_config,
    reward_config,
    sft_config,
    write_data,
    write_random_policy,
    write_rows,
)
from helpers.sharded import assert_same, in_group, in_two, text_of, train_all

from rlhf.config import PeftConfig, ScorerConfig
from rlhf.metrics import read_jsonl


def runs(folder):
    """Two epochs of three steps of 4 rows and one of a single row, with 5 held-out rows, of SFT and
    reward model; PPO with 3 held-out prompts."""
    write_data(folder)
    policy = write_random_policy(folder / "policy")
    sft, reward = sft_config(folder / "one", folder), reward_config(folder / "one", folder, policy)
    sft.model.config["attention_dropout"], sft.num_samples = 0.0, 0
    reward.peft, reward.dataset.max_length = PeftConfig(), 128
    for config, stage in ((sft, "sft"), (reward, "reward")):
        for split, path, number in (
            ("train", config.dataset.path, 13),
            ("eval", config.dataset.eval_path, 5),
        ):
            rows = [json.loads(line) for line in open(path)][:number]
            write_rows(folder / f"{stage}_{split}.jsonl", rows)
        config.batch_size, config.checkpoint.every = 4, 3
        config.trainer = {"num_train_epochs": 2, "learning_rate": 1e-3, "logging_steps": 1}
        config.trainer |= {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
        config.trainer |= {"eval_strategy": "epoch"}
    sft.trainer["label_smoothing_factor"] = 0.1  # a mean of its own
    ppo = ppo_config(folder / "one", folder, policy)
    ppo.scorer = ScorerConfig("python:helpers.runs.lengths", normalize="none")
    ppo.ppo.num_updates = ppo.checkpoint.every = 2
    ppo.evaluation.every, ppo.evaluation.num_prompts = 1, 3
    return sft, reward, ppo


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated")
@pytest.mark.parametrize("shards", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_unequal_shares_give_the_result_of_one_process(shards, tmp_path):
    configs = sft, *_ = runs(tmp_path)
    train_all(*configs)
    both = [in_two(config) for config in configs]
    for config in both[:2]:
        config.trainer = config.trainer | {"per_device_train_batch_size": 2}
        config.trainer["per_device_eval_batch_size"] = 2
    log = tmp_path / "log"
    codes = in_group(train_all, *both, log=log, shards=shards)
    assert codes == [0, 0], text_of(log)
    for one, two in zip(configs, both, strict=True):
        assert_same(one, two)
    shutil.rmtree(directory_of(both[0]) / "final")
    shutil.rmtree(directory_of(both[0]) / "checkpoint-8")
    both[0].resume = True  # from step 6, in the middle of an epoch
    assert in_group(train_all, both[0], log=log, shards=shards) == [0, 0], text_of(log)
    assert_same(sft, both[0])
    samples = read_jsonl(directory_of(both[2]) / "samples.jsonl")
    assert [row["step"] for row in samples] == [0] * 3 + [1] * 3 + [2] * 3
    assert read_jsonl(directory_of(sft) / "metrics.jsonl")[-1]["step"] == 8
