"""Small configurations of the three stages on the demo's data, and stages in two processes."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

from rlhf.config import (
    CheckpointConfig,
    DatasetConfig,
    EvaluationConfig,
    ModelConfig,
    PPOConfig,
    PPOStageConfig,
    RewardStageConfig,
    SFTStageConfig,
)
from rlhf.demo.world import MODEL_CONFIG

ROOT = Path(__file__).parents[2]
WORLD = DatasetConfig(
    path="python:rlhf.demo.world.rows", max_length=64, max_rows=256, max_eval_rows=32
)


def sft_config(runs: Path, **values) -> SFTStageConfig:
    """Sixteen optimiser steps of the demo's SFT stage."""
    config = SFTStageConfig(
        runs_dir=str(runs),
        model=ModelConfig(
            config=MODEL_CONFIG | {"hidden_size": 32, "intermediate_size": 64},
            tokenizer="python:rlhf.demo.world.build_tokenizer",
        ),
        dataset=dataclasses.replace(WORLD),
        num_samples=8,
        response_length=16,
    )
    config.trainer |= {"max_steps": 16, "learning_rate": 3e-3, "logging_steps": 4, "eval_steps": 8}
    config.trainer["per_device_train_batch_size"] = 16
    config.checkpoint.every = 8
    return dataclasses.replace(config, **values)


def reward_config(runs: Path, **values) -> RewardStageConfig:
    """Sixteen optimiser steps of the demo's reward stage."""
    config = RewardStageConfig(runs_dir=str(runs), dataset=dataclasses.replace(WORLD))
    config.trainer |= {"max_steps": 16, "learning_rate": 1e-3, "logging_steps": 4, "eval_steps": 8}
    config.trainer["per_device_train_batch_size"] = 8
    config.checkpoint.every = 8
    return dataclasses.replace(config, **values)


def ppo_config(runs: Path, **values) -> PPOStageConfig:
    """Two PPO updates of the demo."""
    return dataclasses.replace(
        PPOStageConfig(
            runs_dir=str(runs),
            dataset=dataclasses.replace(WORLD),
            ppo=PPOConfig(num_updates=2, batch_size=16, response_length=16, learning_rate=1e-3),
            evaluation=EvaluationConfig(
                every=1, num_prompts=8, scorer="python:rlhf.demo.world.gold_scores"
            ),
            checkpoint=CheckpointConfig(every=1),
            preflight=False,
        ),
        **values,
    )


# Without --multi_gpu, accelerate ignores the number on a machine without GPUs and starts one.
LAUNCH = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
LAUNCH += " --main_process_port 0"  # a free one: other tests launch at the same time


def launch(stage: str, arguments: list[str], tmp_path: Path) -> None:
    """Run a stage in two processes."""
    accelerate = [sys.executable, "-m", "accelerate.commands.launch"]
    command = [*accelerate, *LAUNCH.split(), "-m", f"rlhf.{stage}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=1200,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert "2 processes" in result.stdout
