"""Two processes with one vLLM server: the first sends the weights, both sample their rows, and the
run is that of one process. A server that dies ends both, and the run goes on.

The server is a stand-in in the process of the test. Run: pytest -m slow
tests/end_to_end/test_vllm_processes.py
"""

from __future__ import annotations

import dataclasses
import json
import os

import pytest
from helpers.fake_vllm import fake_vllm
from helpers.runs import directory_of, ppo_config, train, write_data, write_random_policy
from helpers.sharded import in_group, text_of

from rlhf.config import PeftConfig, SamplingConfig, ScorerConfig
from rlhf.metrics import read_jsonl
from rlhf.sampling import VLLM
from rlhf.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow
LORA = PeftConfig(enabled=True, r=4)


@pytest.fixture
def run(tmp_path):
    config = ppo_config(tmp_path / "one", write_data(tmp_path), write_random_policy(tmp_path / "p"))
    config.scorer = ScorerConfig("python:helpers.runs.lengths", normalize="none")
    config.ppo.num_updates, config.ppo.num_ppo_epochs = 3, 1
    config.checkpoint.every, config.evaluation.num_prompts, config.preflight = 1, 0, False
    return config


@pytest.fixture
def server(run):
    with fake_vllm(load_tokenizer(run.model)) as fake:
        yield fake


def train_all(*configs):
    for config in configs:
        train(config)


def train_and_note(folder, *configs):
    """As `train_all`; write where this process has the copies that go to the server."""
    devices, load = set(), VLLM.load

    def noting(self, model, plain):
        if plain is not model:
            devices.add(plain.device.type)
        load(self, model, plain)

    VLLM.load = noting
    train_all(*configs)
    (folder / f"devices-{os.environ['RANK']}").write_text(",".join(devices))


def paths_of(server):
    return [path for path, _ in server.requests]


def with_server(run, name, server, **values):
    sampling = SamplingConfig(engine="vllm", url=server.url)
    return dataclasses.replace(run, run_name=name, sampling=sampling, **values)


def assert_same_rows(one, two):
    both = [read_jsonl(directory_of(config) / "metrics.jsonl") for config in (one, two)]
    assert [row["step"] for row in both[1]] == [1, 2, 3]
    for first, second in zip(*both, strict=True):
        assert second["sampler_gap"] < 1e-4
        for name in ("score", "kl", "loss/policy", "grad_norm"):
            if name in first:
                assert second[name] == pytest.approx(first[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("shards", [False, True], ids=["DDP", "FSDP2"])
def test_two_processes_with_one_server_are_one_run(shards, run, server, tmp_path):
    on_one_base = dataclasses.replace(run.ppo, share_base=True, ema_decay=None)
    one = (
        with_server(run, "full", server),
        with_server(run, "adapter", server, peft=LORA, ppo=on_one_base),
    )
    train_all(*one)
    own = paths_of(server)
    server.requests.clear()
    two = [dataclasses.replace(config, runs_dir=str(tmp_path / "two")) for config in one]
    work, log = (train_and_note, tmp_path, *two), tmp_path / "log"
    assert in_group(*work, log=log, shards=shards) == [0, 0], text_of(log)
    devices = [(tmp_path / f"devices-{rank}").read_text() for rank in (0, 1)]
    assert devices == (["cpu", "meta"] if shards else ["", ""]), "the first process holds a copy"
    for path in ("/collective_rpc", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        assert paths_of(server).count(path) == own.count(path) > 0  # of the first process alone
    for config, other in zip(one, two, strict=True):
        assert_same_rows(config, other)
        record = json.loads((directory_of(other) / "final/rlhf.json").read_text())
        assert f"server {server.url} (weights as " in record["sampling"]
        held = " on the first process, gathered once before a rollout" in record["sampling"]
        assert held == (shards and config.run_name == "full"), record["sampling"]


def test_a_server_that_dies_ends_both_processes_and_the_run_goes_on(run, server, tmp_path):
    config, log = with_server(run, "two", server), tmp_path / "log"
    num_loads = 0

    def die_for_the_second_process(path, body):
        nonlocal num_loads
        num_loads += path == "/collective_rpc"  # the probe's is the first
        return "die" if num_loads > 3 and path == "/v1/completions" else None

    server.fault = die_for_the_second_process
    assert in_group(train, config, log=log, shards=False) == [1, 1], text_of(log)
    said = text_of(log)
    assert "cannot be reached (" in said and "update 2 is saved in" in said
    server.fault = lambda path, body: None
    again = dataclasses.replace(config, resume=True)
    assert in_group(train, again, log=log, shards=False) == [0, 0], text_of(log)
    rows = read_jsonl(directory_of(config) / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
