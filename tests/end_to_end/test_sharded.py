"""Two processes that FSDP2 shards give the result of one process on the same global batch, and of
their checkpoints another number of processes can go on.

FSDP2 runs on the CPU here, see helpers/sharded.py. All cases of the default run share two
processes.

Run: python -m pytest tests/end_to_end/test_sharded.py, with `-m slow` for more cases
"""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
from helpers.runs import directory_of, ppo_config, train, write_data, write_random_policy
from helpers.sharded import in_group, text_of
from safetensors.torch import load_file
from torch.testing import assert_close

from rlhf.config import PeftConfig, ScorerConfig
from rlhf.metrics import read_jsonl

ROUNDING = {
    "rtol": 1e-4,
    "atol": 1e-5,
}  # of weights after three updates: Adam divides by small sums


def new_ppo(folder):
    """Three updates, averaged weights, and the best evaluated update as the result."""
    config = ppo_config(folder / "one", folder, write_random_policy(folder / "policy"))
    config.scorer = ScorerConfig("python:helpers.runs.lengths", normalize="none")
    config.ppo.num_updates, config.ppo.num_ppo_epochs = 3, 1
    config.checkpoint.every = config.evaluation.every = 1
    config.checkpoint.keep_last = 9
    return config


def train_all(*configs):
    """Train several runs in one process."""
    for config in configs:
        train(config)


def in_two(config):
    return dataclasses.replace(config, runs_dir=config.runs_dir.replace("one", "two"))


def assert_same(one, two, files):
    for name in files:
        first, second = (load_file(directory_of(config) / name) for config in (one, two))
        assert first.keys() == second.keys()
        for key in first:
            assert_close(second[key], first[key], **ROUNDING, msg=lambda m, k=key: f"{k}: {m}")
    both = (read_jsonl(directory_of(config) / "metrics.jsonl") for config in (one, two))
    for first, second in zip(*both, strict=True):
        assert first.keys() == second.keys()
        for name, value in first.items():
            if "second" not in name and name != "sampler_gap":
                assert second[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_ppo_in_slices_gives_the_result_of_one_process_and_resumes_in_another_number(tmp_path):
    write_data(tmp_path)
    full = new_ppo(tmp_path)
    lora = dataclasses.replace(full, run_name="lora", peft=PeftConfig(enabled=True, r=4))
    lora.preflight, lora.ppo = True, dataclasses.replace(full.ppo, ema_decay=None)
    train_all(full, lora)

    log = tmp_path / "log"
    assert in_group(train_all, in_two(full), in_two(lora), log=log) == [0, 0], text_of(log)
    assert "sharding: FSDP2, what trains in slices over 2 processes" in text_of(log)
    record = json.loads((directory_of(in_two(full)) / "final/rlhf.json").read_text())
    assert record["sharding"].startswith("FSDP2")
    files = ["final/model.safetensors", "critic/model.safetensors"]
    state = ["policy", "critic", "averages", "optimizer_policy", "optimizer_critic"]
    checkpoints = [f"checkpoint-3/{name}.safetensors" for name in state]
    assert_same(full, in_two(full), files + checkpoints)
    assert_same(lora, in_two(lora), [*files, "final/adapter/adapter_model.safetensors"])

    # what two processes have saved, one goes on with
    one = dataclasses.replace(in_two(full), resume=True)
    for name in ("final", "critic", "checkpoint-2", "checkpoint-3"):
        shutil.rmtree(directory_of(one) / name)
    train(one)
    assert_same(full, one, files + checkpoints)
