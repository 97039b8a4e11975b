"""PPO under DeepSpeed: two processes on a CPU give the result of one on the same global batch, and
what they save goes on in any number of processes, however these shard.

Needs deepspeed in the environment of the tests: `make test-deepspeed`.

Run: python -m pytest -m slow tests/end_to_end/test_deepspeed_ppo.py
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys

import pytest
import torch
from helpers.commands import run
from helpers.memory import Peak, give_back_at_once
from helpers.runs import directory_of, outcome, write_data, write_random_policy
from helpers.sharded import assert_same, in_group, in_two, text_of, train_all
from helpers.sharded_runs import (
    LORA,
    SAVED,
    guarded,
    on_one_base,
    one_step_in_bfloat16,
    take_back,
    three_steps,
)
from helpers.tiny import tiny_model, tiny_tokenizer
from helpers.zero import assert_equal, go_back, in_zero
from safetensors.torch import load_file

from rlhf.config import CONF_DIR, ModelConfig, PPOConfig, SamplingConfig
from rlhf.distributed import backward, join_processes, make_accelerator, share, syncing, zero_stage
from rlhf.metrics import read_jsonl
from rlhf.models import load_policy, model_memory, shard
from rlhf.ppo.optimizer import make_optimizer
from rlhf.tokenizer import load_tokenizer
from rlhf.zero import make_engine

pytest.importorskip("deepspeed", reason="make test-deepspeed installs it")
pytestmark = pytest.mark.slow
replace = dataclasses.replace


def variants(sft, reward, ppo, folder):
    """PPO in full with averaged weights, in small passes and sampled from slices, padded, without a
    critic, with LoRA, rows of new tokens and recomputed blocks, with a policy that waits, on one
    base; with ptx texts and abandoned epochs; and ended by a budget."""
    settings = {"micro_batch_size": 1, "num_ppo_epochs": 2, "weight_decay": 0.1}
    settings = replace(ppo.ppo, max_grad_norm=0.1, **settings)
    small = replace(ppo, run_name="small", ppo=settings, preflight=True)
    small.sampling = SamplingConfig(gather="layers")
    model = replace(ppo.model, forward="padded", gradient_checkpointing=True)
    padded = replace(ppo, run_name="padded", model=model)
    settings = {"advantage": "grpo", "samples_per_prompt": 4, "kl_in": "loss", "ema_decay": None}
    settings = replace(ppo.ppo, kl_estimator="k3", **settings)
    grpo = replace(ppo, run_name="grpo", ppo=settings)
    tokens = ["<|one|>", "<|two|>"]
    model = replace(ppo.model, special_tokens=tokens, gradient_checkpointing=True)
    peft = replace(LORA, train_new_tokens=True)
    rows = replace(ppo, run_name="rows", model=model, peft=peft)
    lora = replace(ppo, run_name="lora", peft=LORA, preflight=True)
    critic = replace(ppo.critic, warmup_updates=2)
    waits = replace(ppo, run_name="waits", critic=critic, ppo=replace(ppo.ppo, ema_decay=None))
    others = small, padded, grpo, lora, rows, waits, on_one_base(sft, reward, ppo)
    return [ppo, *others, *guarded(ppo, folder)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same runs, each made by one process."""
    folder = tmp_path_factory.mktemp("deepspeed")
    sft, reward, ppo = three_steps(folder)
    configs = variants(sft, reward, ppo, folder)
    train_all(sft, reward, *configs)
    return {config.run_name: config for config in configs}


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_stages_in_bfloat16_give_the_result_of_whole_models(name, tmp_path):
    configs = one_step_in_bfloat16(tmp_path)
    assert in_group(train_all, *configs, log=tmp_path / "ddp", shards=False) == [0, 0]
    in_zero(name, tmp_path / "log", *map(in_two, configs))
    for config in configs:
        assert_same(config, in_two(config))


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload"])
def test_two_processes_give_the_result_of_one(name, runs, tmp_path):
    both = [in_two(config, runs_dir=str(tmp_path)) for config in runs.values()]
    in_zero(name, tmp_path / "log", *both)
    for one, two in zip(runs.values(), both, strict=True):
        what = "the base" if one.ppo.share_base else "what trains"
        what = "gradients and optimiser" if name == "zero2" else what
        record = json.loads((directory_of(two) / "final/rlhf.json").read_text())
        said = f"DeepSpeed ZeRO-{2 if name == 'zero2' else 3}, {what} in slices over 2 processes"
        assert record["sharding"].startswith(said)
        way = "a copy of the policy in float32"
        way = "layer by layer" if one.sampling.gather == "layers" else way
        assert (way in record["sampling"]) == (name != "zero2")
        last = directory_of(one) / "checkpoint-3"
        names = [n for n in SAVED if (directory_of(one) / n).is_file()] if last.is_dir() else []
        assert_same(one, two, *names)
        files = [*directory_of(two).glob("checkpoint-*/**/*.*")]
        assert {f.suffix for f in files} == {".safetensors", ".json", ".yaml"}, "nothing is pickled"
    rows = read_jsonl(directory_of(in_two(runs["stops"], runs_dir=str(tmp_path))) / "metrics.jsonl")
    assert sum(row.get("abandoned_epochs", 0) for row in rows) > 0


def test_runs_go_on_under_the_same_and_other_launches(runs, tmp_path):
    names = "run", "lora", "waits", "shared"
    ones = [runs[name] for name in names]
    saved = [n for n in SAVED if "averages" not in n]
    for launch in ("zero3", "zero2"):
        both = [in_two(config, runs_dir=str(tmp_path / launch)) for config in ones]
        in_zero(launch, tmp_path / launch, *both)
        same = [back(config, tmp_path / f"{launch}-same") for config in both]
        in_zero(launch, tmp_path / f"{launch}-same-log", *same)
        for first, second in zip(both, same, strict=True):
            assert_equal(first, second, *saved)
            assert outcome(first) == outcome(second)

        alone = [back(config, tmp_path / f"{launch}-alone") for config in both]
        train_all(*alone)
        other = [back(config, tmp_path / f"{launch}-other") for config in both]
        in_zero("zero2" if launch == "zero3" else "zero3", tmp_path / "other-log", *other)
        whole = [back(config, tmp_path / f"{launch}-whole") for config in ones]  # of one process
        in_zero(launch, tmp_path / "whole-log", *whole)
        fsdp = [back(config, tmp_path / f"{launch}-fsdp2") for config in both]
        log = tmp_path / "fsdp2-log"
        assert in_group(train_all, *fsdp, log=log) == [0, 0], text_of(log)
        for moved in (alone, other, whole, fsdp):
            for one, two in zip(ones, moved, strict=True):
                assert_same(one, two, *saved)


def back(config, runs_dir):
    """As `go_back`; its critic is removed too."""
    moved = go_back(config, runs_dir)
    if (directory_of(moved) / "critic").is_dir():
        take_back(moved, "critic")
    return moved


def test_the_commands_of_the_docs_train(tmp_path):
    write_data(tmp_path)
    policy = write_random_policy(tmp_path / "policy")
    (tmp_path / "lengths.py").write_text(
        "def score(prompts, responses): return list(map(len, responses))"
    )
    file = CONF_DIR / "accelerate" / "zero3.yaml"
    accelerate = ["-m", "accelerate.commands.launch", "--config_file", str(file)]
    accelerate += ["--num_processes", "2", "--main_process_port", "0", "-m", "rlhf.ppo"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    torchrun += ["-m", "rlhf.ppo", "distributed=zero3"]
    settings = [f"model.path={policy}", "dataset=prompt_completion", "dataset.path=prompts.jsonl"]
    settings += ["scorer=python", "scorer.path=lengths.score", "critic.init=policy"]
    settings += ["ppo.batch_size=8", "ppo.num_updates=2", "ppo.response_length=8"]
    settings += ["precision=bfloat16", "preflight=false"]
    for name, launch in (("accelerate", accelerate), ("torchrun", torchrun)):
        found = run([sys.executable, *launch, f"run_name={name}", *settings], tmp_path)
        assert found.returncode == 0, found.stdout + found.stderr
        record = json.loads((tmp_path / f"runs/{name}/ppo/final/rlhf.json").read_text())
        assert record["sharding"].startswith("DeepSpeed ZeRO-3, what trains in slices")
        assert record["forward"] == "padding-free"  # also in bfloat16
        assert "FutureWarning" not in found.stdout + found.stderr


def test_a_number_that_is_not_finite_stops_the_run_and_is_not_saved(runs, tmp_path):
    for name in ("zero2", "zero3"):
        config = in_two(runs["run"], runs_dir=str(tmp_path), run_name=name)
        config.ppo = replace(config.ppo, learning_rate=1e30)
        config.critic = replace(config.critic, learning_rate=1e30)
        log = tmp_path / f"{name}-log"
        codes = in_group(train_all, config, log=log, shards=name)
        assert 0 not in codes
        assert "not finite" in text_of(log) or "holds" in text_of(log)
        assert not (directory_of(config) / "final").exists()
        for file in directory_of(config).glob("checkpoint-*/*.safetensors"):
            assert all(math.isfinite(x.float().sum()) for x in load_file(file).values()), file


def make_steps(small, path, folder):
    """Load a policy as PPO does and make two steps, first of a tiny one, as libraries take memory
    at their first use; write the peaks of this process and what the preflight counts."""
    give_back_at_once()
    join_processes()
    accelerator = make_accelerator("float32")
    for source in (small, path):
        config = ModelConfig(path=str(source))
        with Peak(daemon=True) as peak:
            model = load_policy(config, load_tokenizer(config), in_slices=True)
            if zero_stage() == 3:
                shard(model)
            optimizer = make_optimizer(model.parameters(), 1e-3, PPOConfig())
            engine, optimizer = make_engine(share(model, accelerator), optimizer, 1.0, False)
            for _ in range(2):
                with syncing(engine, True, accelerator), Peak(daemon=True) as forward:
                    loss = engine(input_ids=torch.arange(8)[None]).logits.square().mean()
                backward(engine, loss, accelerator)
                optimizer.step()
                optimizer.zero_grad()
        counted = model_memory(model, distributed=True)
    numbers = {"peak": peak.bytes, "forward": forward.bytes}
    numbers["counted"] = counted.weights + counted.gradients + counted.adam
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(numbers))


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_a_process_holds_what_the_preflight_counts(name, tmp_path):
    tokenizer, sizes = tiny_tokenizer(), {"small": {}, "model": {}}
    sizes["model"] = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12}
    for folder, values in sizes.items():
        model = tiny_model("llama", tokenizer, **values)
        model.save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
    weights = sum(p.nbytes for p in model.parameters())
    work = make_steps, tmp_path / "small", tmp_path / "model", tmp_path
    assert in_group(*work, log=tmp_path / "log", shards=name) == [0, 0], text_of(tmp_path / "log")
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["peak"] == pytest.approx(found["counted"], rel=0.15), found
        assert found["forward"] < weights / 2, "a forward pass keeps no whole model"
