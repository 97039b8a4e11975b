"""Two processes, with whole models (DDP) or in slices (FSDP2), give the result of one process on
the same global batch, and what they save in slices goes on in any number of processes.

FSDP2 runs on the CPU here, see helpers/sharded.py. The stages of a test share two processes.

Run: python -m pytest tests/end_to_end/test_sharded.py, with `-m slow` for more cases
"""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from helpers.runs import directory_of, outcome, train
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
from safetensors.torch import load_file

from rlhf.config import PeftConfig
from rlhf.distributed import offloads
from rlhf.export import ExportOptions, export
from rlhf.metrics import read_jsonl


def test_stages_in_two_processes_give_the_result_of_one_and_resume_in_one(tmp_path):
    sft, reward, ppo = three_steps(tmp_path)
    configs = sft, reward, ppo, shared = sft, reward, ppo, on_one_base(sft, reward, ppo)
    train_all(*configs)
    whole = [in_two(config, runs_dir=str(tmp_path / "ddp")) for config in configs]
    log = tmp_path / "ddp-log"
    assert in_group(train_all, *whole, log=log, shards=False) == [0, 0], text_of(log)
    for config, two in zip(configs, whole, strict=True):
        assert_same(config, two)
    log = tmp_path / "log"
    assert in_group(train_all, *map(in_two, configs), log=log) == [0, 0], text_of(log)
    for config in configs:
        what = "the base" if config is shared else "what trains"
        record = json.loads((directory_of(in_two(config)) / "final/rlhf.json").read_text())
        assert record["sharding"].startswith(f"FSDP2, {what} in slices over 2 processes")
        assert record["forward"] == "padding-free"
    printed = (directory_of(in_two(shared)) / "output.log").read_text()
    assert "sharding: FSDP2, the base in slices over 2 processes; adapters" in printed
    assert "sampling: loop, layer by layer: each process gathers" in printed
    assert_same(sft, in_two(sft), "checkpoint-3/model.safetensors")
    assert_same(reward, in_two(reward))
    assert_same(ppo, in_two(ppo), *SAVED)
    assert_same(shared, in_two(shared), *SAVED)
    for config in configs:
        files = [*(directory_of(in_two(config)) / "checkpoint-3").rglob("*.*")]
        assert {f.suffix for f in files} == {".safetensors", ".json", ".yaml"}, "nothing is pickled"

    export(ExportOptions(str(directory_of(in_two(sft)) / "checkpoint-3"), str(tmp_path / "out")))
    exported = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in load_file(directory_of(in_two(sft)) / "final/model.safetensors").items():
        assert torch.equal(exported[name], tensor), name

    take_back(in_two(ppo), "final", "critic", "checkpoint-2", "checkpoint-3")
    take_back(in_two(sft), "final", "checkpoint-3")
    for config in (ppo, sft):
        train(in_two(config, resume=True))
    assert_same(ppo, in_two(ppo), *SAVED)
    assert_same(sft, in_two(sft))


def test_slices_in_bfloat16_give_the_result_of_whole_models(tmp_path):
    configs = one_step_in_bfloat16(tmp_path)
    for shards in (False, True):
        log = tmp_path / f"log-{shards}"
        runs = map(in_two, configs) if shards else configs
        assert in_group(train_all, *runs, log=log, shards=shards) == [0, 0], text_of(log)
    for config in configs:
        assert_same(config, in_two(config))


@pytest.mark.slow
def test_more_settings_in_slices_give_the_result_of_one_process(tmp_path):
    sft, reward, ppo = three_steps(tmp_path)
    train(sft)
    reward.peft = PeftConfig()
    rows = dataclasses.replace(LORA, train_new_tokens=True)
    adapters = dataclasses.replace(ppo, run_name="adapters", peft=rows, preflight=True)
    adapters.model = dataclasses.replace(ppo.model, special_tokens=["<|one|>", "<|two|>"])
    adapters.ppo = dataclasses.replace(ppo.ppo, ema_decay=None)
    padded = dataclasses.replace(
        ppo, run_name="padded", model=dataclasses.replace(ppo.model, forward="padded")
    )
    padded.model.gradient_checkpointing = True
    tuned = dataclasses.replace(sft, run_name="tuned", peft=LORA)
    tuned.model = dataclasses.replace(ppo.model)  # its tokenizer makes more tokens
    tuned.dataset = dataclasses.replace(sft.dataset, max_length=128)
    on = dataclasses.replace(tuned, run_name="on", peft=PeftConfig())  # in full, from files
    configs = reward, adapters, padded, tuned, on
    train_all(*configs)
    log = tmp_path / "log"
    assert in_group(train_all, *map(in_two, configs), log=log) == [0, 0], text_of(log)
    for config in configs:
        assert_same(config, in_two(config))


@pytest.mark.slow
def test_slices_that_wait_in_main_memory_give_the_result_of_one_process(tmp_path):
    sft, reward, ppo = three_steps(tmp_path)
    configs = sft, reward, ppo, on_one_base(sft, reward, ppo)
    train_all(*configs)
    log, both = tmp_path / "log", [in_two(config) for config in configs]
    codes = in_group(offloaded, *both, log=log, shards="fsdp2_offload")
    assert codes == [0, 0], text_of(log)
    for config, two in zip(configs, both, strict=True):
        assert_same(config, two, *(SAVED if config in configs[2:] else ()))


def offloaded(*configs):
    assert offloads()
    train_all(*configs)


@pytest.mark.slow
def test_processes_stop_adapt_and_warn_together(tmp_path):
    *_, ppo = three_steps(tmp_path)
    configs = stops, ends = guarded(ppo, tmp_path)
    train_all(*configs)
    log = tmp_path / "log"
    assert in_group(train_all, *map(in_two, configs), log=log) == [0, 0], text_of(log)
    for config in configs:
        assert_same(config, in_two(config))
    rows = read_jsonl(directory_of(stops) / "metrics.jsonl")
    assert sum(row.get("abandoned_epochs", 0) for row in rows) > 0
    assert any("ptx_loss" in row for row in rows)
    rows = [row for row in read_jsonl(directory_of(ends) / "metrics.jsonl") if "kl_coef" in row]
    assert len(rows) < 4, "the budget ends the run"
    assert len({row["kl_coef"] for row in rows}) == len(rows), "the coefficient adapts"
    said = [(directory_of(c) / "watchdog.jsonl").read_text() for c in (ends, in_two(ends))]
    fired = [[json.loads(row)["rule"] for row in text.splitlines()] for text in said]
    assert fired[0] == fired[1] and "kl_budget" in fired[0]


@pytest.mark.slow
def test_stages_in_slices_resume_bit_identically_and_from_one_process(tmp_path):
    sft, reward, ppo = three_steps(tmp_path)
    reward.run_name = "reward"  # a run moves without the SFT run that it started from
    configs = sft, reward, ppo, on_one_base(sft, reward, ppo)
    train_all(*configs)
    log = tmp_path / "log"
    two = [in_two(config) for config in configs]
    assert in_group(train_all, *two, log=log) == [0, 0], text_of(log)
    expected = [outcome(config) for config in two]
    for config in two:
        take_back(config, "final", "checkpoint-3")
    again = [dataclasses.replace(config, resume=True) for config in two]
    for config in configs:
        moved = in_two(config, run_name=f"{config.run_name}_from_one", resume=True)
        shutil.copytree(directory_of(config), directory_of(moved))
        take_back(moved, "final", "checkpoint-3")
        if config in configs[2:]:
            take_back(moved, "critic", "checkpoint-2")
        again.append(moved)
    assert in_group(train_all, *again, log=log) == [0, 0], text_of(log)
    assert [outcome(config) for config in two] == expected
    for config, moved in zip(configs, again[4:], strict=True):
        assert_same(config, moved, *(SAVED if config in configs[2:] else ()))

    take_back(again[1], "final", "checkpoint-3")
    train(again[1])  # the reward model in one process
    assert_same(reward, again[1])


@pytest.mark.slow
def test_what_two_processes_saved_goes_on_in_four_with_smaller_batches_on_each(tmp_path):
    sft, reward, ppo = three_steps(tmp_path)
    reward.run_name = "reward"  # a run moves without the SFT run that it started from
    configs = sft, reward, ppo, on_one_base(sft, reward, ppo)
    train_all(*configs)
    log, two = tmp_path / "log", [in_two(config) for config in configs]
    assert in_group(train_all, *two, log=log) == [0, 0], text_of(log)
    on = [dataclasses.replace(config, resume=True) for config in two]
    for config in on[:2]:
        take_back(config, "final", "checkpoint-3")
        config.trainer = config.trainer | {"per_device_train_batch_size": 1}
    for config in on[2:]:
        take_back(config, "final", "critic", "checkpoint-2", "checkpoint-3")
        config.ppo = dataclasses.replace(config.ppo, micro_batch_size=1)
    log = tmp_path / "four"
    assert in_group(train_all, *on, log=log, world=4) == [0] * 4, text_of(log)
    assert (tmp_path / "four-0").read_text().count("number of processes: 2 -> 4") == len(on)
    for config, moved in zip(configs, on, strict=True):
        assert_same(config, moved, *(SAVED if config in configs[2:] else ()))
