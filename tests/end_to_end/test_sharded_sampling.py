"""PPO whose processes sample from slices of the policy, layer by layer, gives the result of one
process and resumes bit for bit; `sampling.gather=auto` does that where a copy does not fit.

FSDP2 runs on the CPU here, see helpers/sharded.py. Planted bugs are in test_process_mutants.py.

Run: python -m pytest tests/end_to_end/test_sharded_sampling.py -m slow
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import pytest
from helpers.runs import directory_of, outcome, ppo_config, write_random_policy, write_rows
from helpers.sharded import (
    assert_same,
    in_group,
    in_two,
    text_of,
    train_all,
    train_with_little_memory,
)
from omegaconf import OmegaConf

from rlhf.config import PeftConfig, SamplingConfig, ScorerConfig, WatchdogConfig
from rlhf.metrics import read_jsonl

pytestmark = pytest.mark.slow
STATE = ("policy", "critic", "averages", "optimizer_policy", "optimizer_critic")
SAVED = [f"checkpoint-3/{name}.safetensors" for name in STATE]
LORA = PeftConfig(enabled=True, r=4)


def three_updates(folder, gather):
    """PPO on prompts of unequal lengths, sampled in batches of three and one: in full, with LoRA,
    and on one base."""
    prompts = [{"prompt": "Name a fruit" + " and another" * (i % 4) + f" {i}"} for i in range(24)]
    write_rows(folder / "prompts.jsonl", prompts)
    ppo = ppo_config(folder / "one", folder, write_random_policy(folder / "policy"))
    ppo.scorer = ScorerConfig("python:helpers.runs.lengths", normalize="none")
    ppo.ppo.num_updates, ppo.ppo.num_ppo_epochs, ppo.ppo.rollout_batch_size = 3, 1, 3
    ppo.checkpoint.every = ppo.evaluation.every = 1
    ppo.checkpoint.keep_last, ppo.sampling = 9, SamplingConfig(gather=gather)
    adapters = dataclasses.replace(ppo, run_name="adapters", peft=LORA)
    shared = dataclasses.replace(adapters, run_name="shared")
    shared.ppo = dataclasses.replace(ppo.ppo, share_base=True)
    return ppo, adapters, shared


def sampling_of(config) -> str:
    return json.loads((directory_of(config) / "final/rlhf.json").read_text())["sampling"]


def test_sampling_from_slices_gives_the_result_of_one_process_and_resumes(tmp_path):
    configs = three_updates(tmp_path, "layers")
    for config in configs:
        config.preflight = True  # it samples too; with this limit, also longer responses
        config.watchdog = WatchdogConfig(eos_rate=0.9)
    train_all(*configs)
    log, two = tmp_path / "log", [in_two(config) for config in configs]
    assert in_group(train_all, *two, log=log) == [0, 0], text_of(log)
    for one, config in zip(configs, two, strict=True):
        assert_same(one, config, *SAVED)
        said = sampling_of(config)
        assert said.startswith("loop, layer by layer: each process gathers 0."), said
        printed = (directory_of(config) / "output.log").read_text()
        assert f"sampling: {said}" in printed
        longer = "; given 32 tokens, " in " ".join(printed.split())
        assert longer, "the preflight has sampled longer responses"
    expected = [outcome(config) for config in two]
    for config in two:
        for name in ("final", "checkpoint-3"):
            shutil.rmtree(directory_of(config) / name)
    again = [dataclasses.replace(config, resume=True) for config in two]
    assert in_group(train_all, *again, log=log) == [0, 0], text_of(log)
    assert [outcome(config) for config in two] == expected


def test_slices_sample_in_the_type_of_a_copy(tmp_path):
    runs = three_updates(tmp_path, "layers")
    runs[0].preflight, runs[1].precision = True, "bfloat16"  # slices are float32 all the same
    given = {"copy": [], "layers": []}
    for gather, configs in given.items():
        sampling = SamplingConfig(gather=gather, dtype="bfloat16")
        for config in runs:
            values = {"runs_dir": str(tmp_path / gather), "sampling": sampling}
            configs.append(dataclasses.replace(config, **values))
        assert in_group(train_all, *configs, log=tmp_path / gather) == [0, 0], text_of(
            tmp_path / gather
        )
    for copied, config in zip(*given.values(), strict=True):
        results = [outcome(run) for run in (config, copied)]
        for files in results:
            del files["rlhf.json"]  # it says how each sampled
        assert results[0] == results[1]
        said = sampling_of(config)
        way = "by a copy of the policy in bfloat16, layer by layer: each process gathers 0.1 MiB"
        assert way in said and said.endswith("and keeps 0.0 MiB of the copy"), said
        rows = read_jsonl(directory_of(config) / "metrics.jsonl")[-3:]
        assert min(row["sampler_gap"] for row in rows) > 1e-4, "bfloat16 rounds"


def test_a_copy_that_does_not_fit_is_refused_before_it_is_made(tmp_path):
    ppo, _, _ = three_updates(tmp_path, "copy")
    ppo.preflight = True
    graph = dataclasses.replace(ppo, sampling=SamplingConfig(engine="graph"))
    fixes, log = {"gather=copy": "", "engine=graph": "sampling.engine=loop "}, tmp_path / "log"
    for config, (given, fix) in zip((ppo, graph), fixes.items(), strict=True):
        assert in_group(train_with_little_memory, config, log=log) == [1, 1]
        error = rf"InputError: sampling\.{given}: with a copy of the policy of 0\.2 MiB, the run .*"
        error += rf"; set {fix}sampling\.gather=layers, which"
        assert len(re.findall(error, text_of(log))) == 2, text_of(log)
    assert not (directory_of(ppo) / "final").exists()
    ppo.preflight = False
    assert in_group(train_with_little_memory, ppo, log=log) == [0, 0], text_of(log)


def test_processes_sample_from_slices_if_a_copy_does_not_fit_on_one_of_them(tmp_path):
    ppo, _, shared = three_updates(tmp_path, "auto")
    train_all(ppo, shared)
    log, copied, two = tmp_path / "log", in_two(ppo), in_two(shared)
    assert in_group(train_all, copied, log=log) == [0, 0], text_of(log)
    assert in_group(train_with_little_memory, two, log=log) == [0, 0], text_of(log)
    assert_same(ppo, copied)
    assert_same(shared, two)
    said = "by a copy of the policy in float32: 0.2 MiB on each process, gathered once before a rol"
    assert said in sampling_of(copied)
    assert "loop, layer by layer: each process" in sampling_of(two)
    printed = (directory_of(two) / "output.log").read_text()
    assert "sampling.gather=layers: with a copy of the policy of 0.2 MiB, the run would" in printed
    chosen = [
        OmegaConf.load(directory_of(c) / "config.yaml").sampling.gather for c in (copied, two)
    ]
    assert chosen == ["copy", "layers"]
    for name in ("final", "checkpoint-3"):
        shutil.rmtree(directory_of(two) / name)
    again = dataclasses.replace(two, resume=True)  # with auto, and memory is large now
    assert in_group(train_all, again, log=log) == [0, 0], text_of(log)
    assert "by a copy" in sampling_of(two)
    assert_same(shared, two)
