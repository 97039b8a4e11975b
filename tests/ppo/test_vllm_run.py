"""PPO with the engine `vllm`, through a server in this process: figures, a death, a continuation.

Run: pytest tests/ppo/test_vllm_run.py
"""

from __future__ import annotations

import dataclasses
import json

import pytest
from helpers.fake_vllm import fake_vllm
from helpers.tiny_ppo import make_config

from rlhf import train_ppo
from rlhf.config import InputError, SamplingConfig
from rlhf.metrics import read_jsonl
from rlhf.tokenizer import load_tokenizer


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr("rlhf.http_endpoint.FIRST_WAIT", 0.0)


def test_a_run_whose_server_dies_continues_with_another_one(policy_dir, tmp_path, capsys):
    config = make_config(policy_dir, tmp_path, num_updates=3)
    config.evaluation.num_prompts = 0
    tokenizer = load_tokenizer(config.model)
    with fake_vllm(tokenizer) as server:
        config.sampling = SamplingConfig(engine="vllm", url=server.url)
        num_loads = 0

        def die_in_the_third_update(path, body):
            nonlocal num_loads
            num_loads += path == "/collective_rpc"  # the probe's is the first
            return "die" if num_loads > 3 else None

        server.fault = die_in_the_third_update
        with pytest.raises(InputError) as error:
            train_ppo(config)
    said = str(error.value)
    assert f"sampling.url={server.url}/" in said and "cannot be reached (" in said
    assert "update 2 is saved in" in said and "continue with resume=true" in said
    assert f"sampling: vllm 0.32.0, server {server.url} (weights as" in capsys.readouterr().out
    with fake_vllm(tokenizer) as other:
        config.sampling.url = other.url
        train_ppo(dataclasses.replace(config, resume=True))
    directory = config.stage_dir("ppo")
    rows = read_jsonl(directory / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["sampler_gap"] < 1e-4 for row in rows)
    record = json.loads((directory / "final" / "rlhf.json").read_text())
    assert record["sampling"].startswith(f"vllm 0.32.0, server {other.url} ")
