"""Two processes give the result of one on the same global batch after three steps, whatever trains
and however: SFT, reward and PPO x DDP, FSDP2, ZeRO-2, ZeRO-3 x full, LoRA, one base x padded,
padding-free.

All runs of a launch share two processes. FSDP2 runs on the CPU here, see helpers/sharded.py. What
the processes save and resume is in test_sharded.py, and for DeepSpeed, which needs a package, in
test_deepspeed.py and test_deepspeed_ppo.py.

Run: python -m pytest tests/end_to_end/test_process_matrix.py -m slow -s    (-s: a table of the
largest differences)
"""

from __future__ import annotations

import dataclasses
import json

import pytest
from helpers.runs import (
    directory_of,
    ppo_config,
    reward_config,
    sft_config,
    write_data,
    write_random_policy,
)
from helpers.sharded import in_group, in_two, metrics, tensors, text_of, train_all
from helpers.zero import in_zero

from rlhf.config import ModelConfig, PeftConfig, ScorerConfig
from rlhf.console import table

pytestmark = pytest.mark.slow
LIMIT = 1e-5  # of a weight, and of a metric in units of it where it is above 1
LORA = PeftConfig(enabled=True, r=4)
WAYS = {"full": PeftConfig(), "lora": LORA, "one base": LORA}
CASES = [
    (stage, way, forward)
    for stage in ("sft", "reward", "ppo")
    for way in WAYS
    for forward in ("padding_free", "padded")
    if stage == "ppo" or way != "one base"
]


def three_steps(stage, way, forward, folder):
    """A run of a stage, without dropout; PPO has all four roles, averaged weights, an adaptive KL
    coefficient and evaluations."""
    runs, policy = folder / "one", folder / "policy"
    if stage == "ppo":
        config = ppo_config(runs, folder, policy)
        config.scorer = ScorerConfig(str(folder / "one/reward lora padded/reward/final"))
        config.ppo.num_updates, config.ppo.num_ppo_epochs = 3, 1
        config.ppo.share_base = way == "one base"
        config.critic.init = "reward"
        config.checkpoint.every = config.evaluation.every = 3
    else:
        if stage == "sft":
            config = sft_config(runs, folder)
            config.num_samples = 0
        else:
            config = reward_config(runs, folder, policy)
        config.dataset.max_length = 128
        config.trainer |= {"max_steps": 3, "logging_steps": 1, "eval_steps": 3}
        config.trainer |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
        config.batch_size, config.checkpoint.every = 8, 3
    config.model = ModelConfig(path=str(policy), forward=forward)
    config.peft = dataclasses.replace(WAYS[way])
    config.run_name = f"{stage} {way} {forward}"
    return config


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All runs, made by one process."""
    folder = write_data(tmp_path_factory.mktemp("matrix"))
    write_random_policy(folder / "policy")
    configs = [three_steps(*case, folder) for case in CASES]
    train_all(*configs)
    return configs


def differences(one, two) -> tuple[float, float]:
    """The largest difference of a weight, and of a metric, between two runs."""
    weights = [float((first - second).abs().max()) for _, first, second in tensors(one, two)]
    gaps = [abs(first - second) / max(1.0, abs(first)) for _, first, second in metrics(one, two)]
    return max(weights), max(gaps)


@pytest.mark.parametrize("launch", ["ddp", "fsdp2", "zero2", "zero3"])
def test_two_processes_give_the_result_of_one(launch, runs, tmp_path):
    log = tmp_path / "log"
    both = [in_two(config, runs_dir=str(tmp_path)) for config in runs]
    if launch.startswith("zero"):
        pytest.importorskip("deepspeed", reason="make test-deepspeed installs it")
        in_zero(launch, log, *both, seconds=1500)
    else:
        codes = in_group(train_all, *both, log=log, shards=launch == "fsdp2", seconds=1500)
        assert codes == [0, 0], text_of(log)
    said = {"fsdp2": "FSDP2", "zero2": "DeepSpeed ZeRO-2", "zero3": "DeepSpeed ZeRO-3"}.get(launch)
    for config in both:
        record = json.loads((directory_of(config) / "final/rlhf.json").read_text())
        sharding = record["sharding"]
        assert sharding is None if said is None else sharding.startswith(said)
    rows = [(one.run_name, *differences(one, two)) for one, two in zip(runs, both, strict=True)]
    print("\n" + table(rows, (launch, "weights", "metrics")))
    assert all(max(weights, metrics) <= LIMIT for _, weights, metrics in rows), rows
