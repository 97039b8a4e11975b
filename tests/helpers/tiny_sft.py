"""A tiny SFT run on rows of its own."""

from __future__ import annotations

import json

from rlhf.config import CheckpointConfig, DatasetConfig, SFTStageConfig


def sft_config(folder, run_name, max_steps, **values):
    """A short SFT run in `folder` with a checkpoint after every second step."""
    rows = [{"prompt": f"Name a fruit {i}.", "completion": f"An apple {i}."} for i in range(16)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SFTStageConfig(
        run_name=run_name,
        runs_dir=str(folder / "runs"),
        dataset=DatasetConfig(
            path=str(folder / "rows.jsonl"), format="prompt_completion", eval_fraction=0.25
        ),
        checkpoint=CheckpointConfig(every=2),
        num_samples=0,
        trainer={
            "max_steps": max_steps,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 2,
        },
        **values,
    )
