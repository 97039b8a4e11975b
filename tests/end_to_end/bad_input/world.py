"""The folder that the commands of the bad-input table run in.

model/            a tiny causal language model with its tokenizer
runs/mine/sft/    a finished run of the SFT stage
runs/mine/reward/ a finished run of the reward stage
rows.jsonl        prompt and completion     ranked.jsonl     prompt, responses, scores
prompts.jsonl     prompt                    broken/          a directory without a model
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from helpers.tiny import tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file

from rlhf import train_reward, train_sft
from rlhf.config import DatasetConfig, ModelConfig, RewardStageConfig, SFTStageConfig

SMALL = {"max_steps": 1, "per_device_train_batch_size": 2}


def write_rows(path: Path, rows: list[Any]) -> None:
    """Write JSON values, one per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def append(path: Path, data: bytes) -> None:
    """Add bytes to the end of a file."""
    with path.open("ab") as file:
        file.write(data)


def edit_json(path: Path, **values: Any) -> None:
    """Change some values of a JSON object in a file."""
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values))


def write_templates(directory: Path) -> None:
    """Give a tokenizer two named chat templates."""
    directory.mkdir()
    for name in ("rag", "tool_use"):
        text = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
        (directory / f"{name}.jinja").write_text(text)


def spoil_weights(directory: Path, name: str) -> None:
    """Make the first number of a weight nan."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[0] = math.nan
    save_file(tensors, file, metadata={"format": "pt"})


def write_model(directory: Path, family: str) -> None:
    """Write a tiny model of a family and its tokenizer."""
    tokenizer = tiny_tokenizer()
    tiny_model(family, tokenizer).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def build(folder: Path) -> Path:
    """Build the world in an empty folder, and return the folder."""
    write_model(folder / "model", "llama")
    (folder / "broken").mkdir()
    texts = [(f"Name fruit {i}.", f" An apple {i}.") for i in range(24)]
    write_rows(folder / "rows.jsonl", [{"prompt": p, "completion": c} for p, c in texts])
    write_rows(folder / "prompts.jsonl", [{"prompt": p} for p, _ in texts])
    write_rows(
        folder / "ranked.jsonl",
        [{"prompt": p, "responses": [c, " No."], "scores": [1.0, 0.0]} for p, c in texts],
    )
    common = {"run_name": "mine", "runs_dir": str(folder / "runs")}
    sft = SFTStageConfig(
        **common,
        num_samples=0,
        model=ModelConfig(path=str(folder / "model")),
        dataset=DatasetConfig(
            path=str(folder / "rows.jsonl"), format="prompt_completion", max_length=64
        ),
    )
    sft.dataset.eval_fraction = 0.3
    sft.trainer |= SMALL
    train_sft(sft)
    reward = RewardStageConfig(
        **common,
        dataset=DatasetConfig(path=str(folder / "ranked.jsonl"), format="ranked", max_length=64),
    )
    reward.dataset.eval_fraction = 0.3
    reward.trainer |= SMALL
    train_reward(reward)
    return folder
