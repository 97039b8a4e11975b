"""The stages on a GPU with the default precision (bfloat16 there), after each other in one process.

They run on a CPU too, so that the tests' own code is known to work.
Run: pytest tests/gpu/test_gpu_stages.py -m gpu
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from helpers.tiny_ppo import make_config, write_policy

from rlhf import train_ppo, train_reward, train_sft
from rlhf.config import DatasetConfig, ModelConfig, RewardStageConfig, SFTStageConfig
from rlhf.metrics import read_jsonl

DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"]


def write_rows(folder):
    """Demonstrations and rankings of the same prompts, next to the prompts of `make_config`."""
    prompts = [row["prompt"] for row in read_jsonl(folder / "prompts.jsonl")]
    for name, row in (
        ("rows", lambda p: {"prompt": p, "completion": " an apple"}),
        ("ranked", lambda p: {"prompt": p, "responses": [" yes", " no, never"], "ranks": [0, 1]}),
    ):
        text = "".join(json.dumps(row(prompt)) + "\n" for prompt in prompts)
        (folder / f"{name}.jsonl").write_text(text)


@pytest.mark.parametrize("device", DEVICES)
def test_the_three_stages_run_in_one_process_and_stay_finite(device, tmp_path):
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("the stages take the GPU here")
    ppo = make_config(write_policy(tmp_path / "policy"), tmp_path, num_updates=3)
    write_rows(tmp_path)
    common = {"runs_dir": ppo.runs_dir, "run_name": ppo.run_name}
    data = {"eval_fraction": 0.3, "max_length": 64}
    sft = SFTStageConfig(
        **common,
        num_samples=2,
        response_length=8,
        model=ModelConfig(path=str(tmp_path / "policy")),
        dataset=DatasetConfig(
            path=str(tmp_path / "rows.jsonl"), format="prompt_completion", **data
        ),
    )
    reward = RewardStageConfig(
        **common,
        dataset=DatasetConfig(path=str(tmp_path / "ranked.jsonl"), format="ranked", **data),
    )
    for config in (sft, reward):
        config.trainer |= {"max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 2}
    ppo.model.path = ppo.scorer.path = None
    ppo.scorer.normalize, ppo.critic.init = "demo_mean_zero", "reward"
    train_sft(sft)
    train_reward(reward)
    result = train_ppo(ppo)
    assert result.directory is not None
    for stage in ("sft", "reward", "ppo"):
        rows = read_jsonl(ppo.stage_dir(stage) / "metrics.jsonl")
        numbers = [x for row in rows for x in row.values() if isinstance(x, float)]
        assert len(numbers) > 9 and all(map(math.isfinite, numbers)), stage
