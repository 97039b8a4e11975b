"""SFT and reward under DeepSpeed: two processes on a CPU give the result of one on the same global
batch, and what they save goes on in any number of processes, however these shard.

Needs deepspeed in the environment of the tests: `make test-deepspeed`.

Run: python -m pytest -m slow tests/end_to_end/test_deepspeed.py
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys

import pytest
import torch
from helpers.commands import run
from helpers.memory import Peak, give_back_at_once
from helpers.runs import directory_of, reward_config, sft_config, write_data, write_random_policy
from helpers.sampled_shares import assert_shares_of_one, require_same_from_copies, sample_shares
from helpers.sharded import assert_same, in_group, in_two, text_of, train_all
from helpers.tiny import tiny_model, tiny_tokenizer
from helpers.zero import assert_equal, go_back, in_zero

from rlhf.config import CONF_DIR, ModelConfig, PeftConfig
from rlhf.distributed import join_processes
from rlhf.models import load_policy, shard
from rlhf.tokenizer import load_tokenizer
from rlhf.zero import divide_weights, runnable

pytest.importorskip("deepspeed", reason="make test-deepspeed installs it")
pytestmark = pytest.mark.slow
LORA = PeftConfig(enabled=True, r=4)


def three_steps(folder):
    """SFT and reward models, each in full and with LoRA: three steps without dropout."""
    policy = write_random_policy(folder / "policy")
    sft = sft_config(folder / "one", write_data(folder))
    sft.model, sft.num_samples = ModelConfig(path=str(policy)), 2
    sft.trainer |= {"eval_steps": 3}
    reward = reward_config(folder / "one", folder, policy)
    for config in (sft, reward):
        config.dataset.max_length = 128
        config.batch_size, config.checkpoint.every = 8, 2
        config.trainer |= {"max_steps": 3, "logging_steps": 1, "learning_rate": 1e-3}
        config.trainer |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    full = [dataclasses.replace(c, run_name="full", peft=PeftConfig()) for c in (sft, reward)]
    lora = [dataclasses.replace(c, run_name="lora", peft=LORA) for c in (sft, reward)]
    return [*full, *lora]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same runs, each made by one process."""
    configs = three_steps(tmp_path_factory.mktemp("deepspeed"))
    train_all(*configs)
    return configs


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload"])
def test_two_processes_give_the_result_of_one(name, runs, tmp_path):
    both = [in_two(config, runs_dir=str(tmp_path)) for config in runs]
    in_zero(name, tmp_path / "log", *both)
    what = "gradients and optimiser" if name == "zero2" else "what trains"
    for one, two in zip(runs, both, strict=True):
        record = json.loads((directory_of(two) / "final/rlhf.json").read_text())
        stage = 2 if name == "zero2" else 3
        assert record["sharding"] == f"DeepSpeed ZeRO-{stage}, {what} in slices over 2 processes"
        assert record["forward"] == "padding-free"
        assert_same(one, two)
        files = [*(directory_of(two) / "checkpoint-3").rglob("*.*")]
        assert {f.suffix for f in files} == {".safetensors", ".json", ".yaml"}, "nothing is pickled"


def test_runs_go_on_under_the_same_and_other_launches(runs, tmp_path):
    sft, reward = runs[0], runs[3]
    both = [in_two(config, runs_dir=str(tmp_path / "zero3")) for config in (sft, reward)]
    in_zero("zero3", tmp_path / "log", *both)
    saved = [f"checkpoint-3/{name}.safetensors" for name in ("model", "optimizer")]

    same = [go_back(config, tmp_path / "same") for config in both]
    in_zero("zero3", tmp_path / "same-log", *same)
    for first, second in zip(both, same, strict=True):
        assert_equal(first, second, *saved)

    alone = [go_back(config, tmp_path / "alone") for config in both]
    train_all(*alone)
    other = [go_back(config, tmp_path / "other") for config in both]
    in_zero("zero2", tmp_path / "other-log", *other)
    whole = [go_back(config, tmp_path / "whole") for config in (sft, reward)]  # of one process
    in_zero("zero3", tmp_path / "whole-log", *whole)
    for moved in (alone, other, whole):
        for one, two in zip((sft, reward), moved, strict=True):
            assert_same(one, two)


def test_the_command_of_the_docs_trains(runs, tmp_path):
    write_data(tmp_path)
    policy = write_random_policy(tmp_path / "policy")
    file = CONF_DIR / "accelerate" / "zero3.yaml"
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(file)]
    launch += ["--num_processes", "2", "--main_process_port", "0", "-m", "rlhf.reward"]
    settings = ["run_name=typed", f"model.path={policy}", "dataset=ranked", "precision=bfloat16"]
    settings += ["dataset.path=reward_train.jsonl", "batch_size=8", "trainer.max_steps=2"]
    found = run([sys.executable, *launch, *settings], tmp_path)
    assert found.returncode == 0, found.stdout + found.stderr
    record = json.loads((tmp_path / "runs/typed/reward/final/rlhf.json").read_text())
    assert record["sharding"].startswith("DeepSpeed ZeRO-3, what trains in slices")
    assert record["forward"] == "padding-free"  # also in bfloat16


def test_a_number_that_is_not_finite_stops_the_run_and_is_not_saved(runs, tmp_path):
    config = in_two(runs[0], runs_dir=str(tmp_path))
    config.trainer = config.trainer | {"learning_rate": 1e30}
    config.checkpoint = dataclasses.replace(config.checkpoint, every=1)
    for name in ("zero2", "zero3"):
        config.run_name, log = name, tmp_path / f"{name}-log"
        codes = in_group(train_all, config, log=log, shards=name)
        assert 0 not in codes
        assert "nothing was updated with it" in text_of(log) or "was not written" in text_of(log)
        assert not (directory_of(config) / "final").exists()


def load(path, folder):
    """Load a model in slices; write the peak of this process's memory."""
    give_back_at_once()
    join_processes()
    config = ModelConfig(path=str(path))
    tokenizer = load_tokenizer(config)
    divide_weights([torch.nn.Parameter(torch.zeros(4))], on_cpu=False)  # imports
    with Peak(daemon=True) as peak:
        shard(load_policy(config, tokenizer, in_slices=True))
    (folder / f"peak-{os.environ['RANK']}").write_text(str(peak.bytes))


def test_under_zero3_no_process_loads_the_whole_model(tmp_path):
    tokenizer = tiny_tokenizer()
    wide = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
    model = tiny_model("llama", tokenizer, **wide)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    weights = sum(p.nbytes for p in model.parameters())
    log, largest = tmp_path / "log", max(p.nbytes for p in model.parameters())
    work = load, tmp_path / "model", tmp_path
    assert in_group(*work, log=log, shards="zero3") == [0, 0], text_of(log)
    for rank in (0, 1):
        peak = int((tmp_path / f"peak-{rank}").read_text())
        assert 0.9 * weights / 2 < peak < 1.1 * weights / 2 + 4 * largest


def sample_in_slices(path, folder):
    """Sample this process's rows of a model that DeepSpeed keeps in slices."""
    join_processes()
    config = ModelConfig(path=str(path))
    tokenizer = load_tokenizer(config)
    model = load_policy(config, tokenizer, in_slices=True)
    shard(model)
    with runnable(model, on_cpu=False):
        sample_shares(model, tokenizer, int(os.environ["RANK"]), folder)
        require_same_from_copies(model, tokenizer, int(os.environ["RANK"]))


def test_processes_sample_their_own_rows_of_slices_as_one_process_does(tmp_path):
    path, log = write_random_policy(tmp_path / "policy"), tmp_path / "log"
    codes = in_group(sample_in_slices, path, tmp_path, log=log, shards="zero3")
    assert codes == [0, 0], text_of(log)
    assert_shares_of_one(path, tmp_path)
