"""Tokens per second of the SFT stage without counting padding: padded, padding-free and packed.

Held equal: a model with random weights, full fine-tuning, the rows, whose lengths are like those of
Alpaca with its prompt (log-normal, median 130 tokens, at most 512), and about the same number of
tokens in a step. Each way trains as a user does (`train_sft`), in a process of its own; the ways
take turns, round by round. On one thread of a CPU, seconds are those of the process.

The share of the machine's rate counts 6 FLOP for each weight and each token that is not padding.
From it follows how long a 7 B model would train on Alpaca (52,002 rows, 3 epochs) and on Dolly
(15,011 rows, 1 epoch) with these lengths: an extrapolation, not a measurement.

Left out: LoRA, several GPUs, evaluation, loading and saving.

Run: python examples/benchmarks/sft_throughput.py --preset small
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from parts import Worker, answer
from transformers import LlamaForCausalLM, TrainerCallback
from transformers.utils.logging import disable_progress_bar
from world import (
    DEVICE,
    ROOT,
    SHAPES,
    clock,
    describe,
    machine,
    make_model,
    make_tokenizer,
    memory_in_use,
    num_matrix_weights,
    peak_since,
    synchronize,
    table,
)

WAYS: dict[str, dict[str, Any]] = {
    "padded": {"forward": "padded"},
    "padding-free": {"forward": "padding_free"},
    "packing": {"forward": "auto", "packing": True},
}
LONGEST = 512  # tokens of a row, and of a packed row
FIRST = 2  # steps with first-use costs
DATA = {"Alpaca, 3 epochs": 3 * 52_002, "Dolly, 1 epoch": 15_011}  # rows
SEVEN_B = 6.74e9  # weights
NEEDED_7B = 110  # GiB: weights, gradients and Adam's moments in float32


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    presets = [name for name in SHAPES if name != "7b-lora"]
    parser.add_argument("--preset", choices=presets, default="small")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--batch", type=int, default=16, help="rows of a step, not packed")
    parser.add_argument("--steps", type=int, default=8, help=f"the first {FIRST} are not timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


# --- The world, on disk ---------------------------------------------------------------------------


def make_lengths(count: int) -> list[int]:
    """Tokens of each row."""
    rng = random.Random(1)
    return [min(LONGEST - 12, max(8, int(rng.lognormvariate(4.87, 0.7)))) for _ in range(count)]


def write_world(folder: Path, preset: str, num_rows: int) -> list[int]:
    """Write a model, its tokenizer and rows; return weights by token, and of the head."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32  # on disk; it trains in float32
    model = make_model(LlamaForCausalLM, preset, 1, dtype)
    model.save_pretrained(folder / "model")
    make_tokenizer(preset).save_pretrained(folder / "model")
    rng, vocabulary = random.Random(2), SHAPES[preset][4]
    with (folder / "rows.jsonl").open("w") as stream:
        for length in make_lengths(num_rows):
            words = [f"t{rng.randrange(4, vocabulary)}" for _ in range(length)]
            cut = max(2, length // 4)
            row = {"prompt": " ".join(words[:cut]), "completion": " " + " ".join(words[cut:])}
            stream.write(json.dumps(row) + "\n")
    return list(num_matrix_weights(model))


# --- One way, in a process of its own -------------------------------------------------------------


def measure(options: argparse.Namespace) -> None:
    """Train, and answer with seconds and tokens of the steps that are timed."""
    from rlhf import SFTStageConfig, train_sft
    from rlhf.config import DatasetConfig, ModelConfig

    clocks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronize()
            clocks.append(clock())

    transformers.trainer.DEFAULT_CALLBACKS.append(Clock)
    way = dict(WAYS[options.ways])
    forward, batch = way.pop("forward"), options.batch
    if way:  # a packed row holds several
        batch = max(1, round(batch * statistics.mean(make_lengths(1000)) / LONGEST))
    config = SFTStageConfig(
        run_name=f"{options.ways}-{os.getpid()}",
        runs_dir=str(options.folder / "runs"),
        num_samples=0,
        model=ModelConfig(
            path=str(options.folder / "model"),
            forward=forward,
            gradient_checkpointing=options.preset == "7b",
        ),
        dataset=DatasetConfig(
            path=str(options.folder / "rows.jsonl"),
            format="prompt_completion",
            eval_fraction=0.1,
            max_length=LONGEST,
        ),
    )
    config.trainer |= way | {
        "max_steps": options.steps,
        "per_device_train_batch_size": batch,
        "logging_steps": 1,
        "eval_strategy": "no",
        "learning_rate": 1e-5,
    }
    config.checkpoint.every = 10_000
    memory_in_use()
    train_sft(config)
    lines = (config.stage_dir("sft") / "metrics.jsonl").read_text().splitlines()
    tokens = [row["num_tokens"] for row in map(json.loads, lines) if "loss" in row]
    record = json.loads((config.stage_dir("sft") / "final/rlhf.json").read_text())
    answer(
        {
            "seconds": clocks[-1] - clocks[FIRST - 1],
            "tokens": tokens[-1] - tokens[FIRST - 1],
            "forward": record.get("forward"),
            "peak_mib": peak_since(),
        }
    )


# --- All ways -------------------------------------------------------------------------------------


def run_way(options: argparse.Namespace, way: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--ways", way, "--folder", str(folder)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return Worker(way, command, {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}).end()


def summary(
    rounds: dict[str, list[dict[str, Any]]], weights: int, limits: dict[str, Any]
) -> dict[str, Any]:
    """Medians over the rounds, next to the padded way of the same round, and what follows."""
    found: dict[str, Any] = {}
    rates = {way: [r["tokens"] / r["seconds"] for r in rows] for way, rows in rounds.items()}
    for way, rows in rounds.items():
        rate = statistics.median(rates[way])
        found[way] = {"tokens_per_second": rate}
        if "padded" in rates:
            pairs = zip(rates[way], rates["padded"], strict=True)
            found[way]["ratio_to_padded"] = statistics.median(a / b for a, b in pairs)
        found[way]["share"] = 6 * weights * rate / limits["flops_per_second"]
        found[way]["peak_mib"] = max(row["peak_mib"] for row in rows)
        mean = statistics.mean(make_lengths(1000))
        for name, num_rows in DATA.items():
            flops = 6 * SEVEN_B * num_rows * mean
            hours = flops / found[way]["share"] / limits["flops_per_second"] / 3600
            found[way][f"hours of 7 B, {name}"] = hours
        found[way]["forward"] = rows[0]["forward"]
    return found


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    if options.folder:
        return measure(options)
    if options.preset == "7b":
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30 if DEVICE == "cuda" else 0
        if memory < NEEDED_7B:
            reason = f"7 B needs a GPU with {NEEDED_7B} GiB, this machine's has {memory:.0f}"
            return print(json.dumps({"status": "skipped", "headline": reason}))
    limits = machine()
    print(describe(limits), flush=True)
    rounds: dict[str, list[dict[str, Any]]] = {way: [] for way in options.ways.split(",")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # enough for every way: the packed one takes as many tokens, but whole rows of them
        weights = write_world(folder, options.preset, 2 * options.batch * (options.steps + 2))
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
        for number in range(options.rounds):
            for way in rounds:
                rounds[way].append(run_way(options, way, folder))
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    found = summary(rounds, sum(weights), limits)
    columns = [name for name in next(iter(found.values())) if name != "forward"]
    print(table(["rows", *columns], [[way, *(found[way][c] for c in columns)] for way in found]))
    print(
        "\nhours of 7 B: an extrapolation from the share of this machine's rate, not a measurement"
    )
    cells = [f"{way} {values['tokens_per_second']:,.0f}" for way, values in found.items()]
    cells[0] += " tokens/s without padding"
    settings = {k: v for k, v in vars(options).items() if k != "folder"}
    result = {"headline": ", ".join(cells), "ways": found, "machine": limits, "settings": settings}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
