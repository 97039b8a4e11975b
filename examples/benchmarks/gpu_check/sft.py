"""The SFT stage on a Llama of 1 B or 7 B with random weights: a few steps of full fine-tuning.

Rows have lengths as instruction data has them (log-normal, median 130 tokens, at most 512). The
stage runs as a user runs it, up to its `final/`; the time of a step comes from its own metrics.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaForCausalLM
from world import DEVICE, SHAPES, make_model, make_tokenizer

from rlhf import SFTStageConfig, train_sft
from rlhf.config import DatasetConfig, ModelConfig

NEEDED_7B = 110  # GiB: weights, gradients and Adam's moments in float32


def main() -> None:
    size = sys.argv[-1]
    dry = size == "tiny"
    if size == "7b":
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        if memory < NEEDED_7B:
            reason = f"full 7 B needs {NEEDED_7B} GiB of GPU memory, this one has {memory:.0f}"
            print(json.dumps({"status": "skipped", "headline": reason}))
            return
    batch_size, num_steps = (2, 4) if dry else (16 if size == "7b" else 8, 8)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_world(folder, size, num_rows=batch_size * num_steps + 16)
        config = SFTStageConfig(
            runs_dir=str(folder / "runs"),
            num_samples=0,
            model=ModelConfig(path=str(folder / "model"), gradient_checkpointing=size == "7b"),
            dataset=DatasetConfig(
                path=str(folder / "rows.jsonl"),
                format="prompt_completion",
                eval_fraction=0.1,
                max_length=512,
            ),
        )
        config.trainer |= {
            "max_steps": num_steps,
            "per_device_train_batch_size": batch_size,
            "logging_steps": 1,
            "eval_strategy": "no",
            "learning_rate": 1e-5,
        }
        config.checkpoint.every = 10_000
        train_sft(config)
        stage = config.stage_dir("sft")
        rows = [
            {k: row[k] for k in ("loss", "grad_norm", "num_tokens")}
            for row in read(stage / "metrics.jsonl")
            if "loss" in row
        ]
        clock = [row["seconds"] for row in read(stage / "timings.jsonl") if "seconds" in row]
    first = 2  # steps with first-use costs
    seconds = (clock[num_steps - 1] - clock[first - 1]) / (num_steps - first)
    tokens = (rows[-1]["num_tokens"] - rows[first - 1]["num_tokens"]) / (num_steps - first)
    figures = {"seconds_of_step": seconds, "tokens_per_second": tokens / seconds, "steps": rows}
    headline = f"{tokens / seconds:,.0f} tokens/s without padding"
    print(json.dumps({"headline": headline, "batch_size": batch_size} | figures))


def write_world(folder: Path, size: str, num_rows: int) -> None:
    """Write a model, its tokenizer and rows."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32  # on disk; it trains in float32
    make_model(LlamaForCausalLM, size, 1, dtype).save_pretrained(folder / "model")
    make_tokenizer(size).save_pretrained(folder / "model")
    rng, vocabulary = random.Random(1), SHAPES[size][4]
    with (folder / "rows.jsonl").open("w") as stream:
        for _ in range(num_rows):
            length = min(500, max(8, int(rng.lognormvariate(4.87, 0.7))))
            words = [f"t{rng.randrange(4, vocabulary)}" for _ in range(length)]
            cut = max(2, length // 4)
            row = {"prompt": " ".join(words[:cut]), "completion": " " + " ".join(words[cut:])}
            stream.write(json.dumps(row) + "\n")


def read(file: Path) -> list[dict[str, float]]:
    """Rows of a JSONL file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


if __name__ == "__main__":
    main()
