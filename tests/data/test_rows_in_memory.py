"""Rows that a caller passes are kept in a file of the run."""

from __future__ import annotations

import pytest
from helpers.rows import assistant, user

from rlhf import train_ppo, train_reward, train_sft
from rlhf.config import DatasetConfig, InputError, PPOStageConfig, RewardStageConfig, SFTStageConfig
from rlhf.data import load_splits, with_rows

ROWS = [{"messages": [user(f"Hi {i}"), assistant("Yo é")]} for i in range(12)]


def test_a_list_a_dataset_and_a_generator_give_the_same_file(tmp_path, monkeypatch):
    from datasets import Dataset

    monkeypatch.chdir(tmp_path)
    config = SFTStageConfig(run_name="mine")
    sources = [ROWS, Dataset.from_list(ROWS), (row for row in ROWS)]
    [path] = {with_rows(config, rows).dataset.path for rows in sources}
    assert path.startswith("runs/mine/rows-") and config.dataset.path is None
    both = with_rows(config, ROWS[:8], ROWS[8:]).dataset
    splits = load_splits(both, "sft", 1)
    assert [splits.train, splits.eval] == [ROWS[:8], ROWS[8:]] and both.format == "messages"
    assert len(list((tmp_path / "runs/mine").iterdir())) == 3


def test_rows_that_json_cannot_hold_are_refused(tmp_path):
    config = SFTStageConfig(runs_dir=str(tmp_path / "runs"))
    for bad, message in (("text", "expected a dict"), ({"a": {1, 2}}, "JSON cannot hold it")):
        with pytest.raises(InputError, match=rf"rows\[1\]: .*{message}"):
            with_rows(config, [{}, bad])
    assert not (tmp_path / "runs").exists()


def test_every_stage_takes_rows_or_a_path():
    data = DatasetConfig(path="a.jsonl")
    for train, config in (
        (train_sft, SFTStageConfig(dataset=data)),
        (train_reward, RewardStageConfig(dataset=data)),
        (train_ppo, PPOStageConfig(dataset=data)),
    ):
        with pytest.raises(InputError, match=r"give rows or dataset.path=a.jsonl, not both"):
            train(config, rows=ROWS)
