"""What one forward pass per response saves: the reward stage against pairs through TRL.

Both sides train the same small Llama on the same ranked data, whose K responses a prompt make
K (K - 1) / 2 pairs. Our Trainer passes each response through the model once a step; TRL's
RewardTrainer takes each pair for itself, so each response K - 1 times. One optimiser step covers
the same prompts on both sides, in one forward pass, and its loss is the same number: that is
checked. Each side runs in a process of its own; they take turns, epoch by epoch.

Left out: GPUs, mixed precision, gradient accumulation, the time of an evaluation.

Run: python examples/benchmarks/reward_kwise.py        (minutes on one CPU core)
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from parts import Worker, answer

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 2048
SIDES = ("kwise", "pairs")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--responses", type=int, nargs="+", default=[2, 4, 8], help="values of K")
    parser.add_argument("--prompts", type=int, default=8, help="prompts in an epoch")
    parser.add_argument("--prompts-per-step", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="timed epochs, after one to warm up")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size of the model")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=24)
    parser.add_argument(
        "--response-tokens", type=int, nargs=2, default=[16, 64], help="least, most"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


# --- One side, in a process of its own ----------------------------------------------------------


def ranked_rows(settings: argparse.Namespace, num_responses: int) -> list[dict[str, Any]]:
    """Encoded rows of random tokens, best response first."""
    draw = random.Random(num_responses)
    rows = []
    for _ in range(settings.prompts):
        prompt = [draw.randrange(10, VOCABULARY) for _ in range(settings.prompt_tokens)]
        lengths = [draw.randint(*settings.response_tokens) for _ in range(num_responses)]
        responses = [[draw.randrange(10, VOCABULARY) for _ in range(num)] for num in lengths]
        row = {"input_ids": [prompt + ids for ids in responses], "ranks": [*range(num_responses)]}
        rows.append(row | {"scores": None, "margin": None, "probability": None})
    return rows


def build_model(settings: argparse.Namespace, pad_token_id: int) -> Any:
    import torch
    from transformers import AutoModelForSequenceClassification, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=settings.hidden,
        intermediate_size=4 * settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        pad_token_id=pad_token_id,
        num_labels=1,
    )
    return AutoModelForSequenceClassification.from_config(config)


def build_kwise(rows: list[dict], settings: argparse.Namespace, arguments: dict) -> tuple:
    """Our Trainer, and the rows of its first step."""
    from datasets import Dataset
    from transformers import TrainingArguments

    from rlhf.config import RewardConfig
    from rlhf.data import RankedCollator
    from rlhf.demo.world import build_tokenizer
    from rlhf.models import ScalarModel
    from rlhf.reward.ranking_trainer import RankingTrainer

    pad = build_tokenizer().pad_token_id
    size = settings.prompts_per_step
    trainer = RankingTrainer(
        model=ScalarModel(build_model(settings, pad)),
        args=TrainingArguments(per_device_train_batch_size=size, **arguments),
        train_dataset=Dataset.from_list(rows),
        data_collator=RankedCollator(pad),
        ranking=RewardConfig(),
        heldout=[],
    )
    return trainer, rows[:size]


def build_pairs(rows: list[dict], settings: argparse.Namespace, arguments: dict) -> tuple:
    """TRL's RewardTrainer on all pairs, and the pairs of the prompts of our first step."""
    import trl
    from datasets import Dataset

    from rlhf.demo.world import build_tokenizer

    tokenizer = build_tokenizer()
    pairs = [
        {"chosen_ids": chosen, "rejected_ids": rejected}
        for row in rows
        for chosen, rejected in itertools.combinations(row["input_ids"], 2)
    ]
    size = settings.prompts_per_step * len(pairs) // len(rows)
    args = trl.RewardConfig(
        per_device_train_batch_size=size,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        **arguments,
    )
    trainer = trl.RewardTrainer(
        build_model(settings, tokenizer.pad_token_id),
        args,
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    return trainer, pairs[:size]


def measure(settings: argparse.Namespace, num_responses: int) -> None:
    """Train one side, each epoch on request; print its times, then its memory and first loss."""
    import torch
    from transformers import TrainerCallback

    class EpochOnRequest(TrainerCallback):
        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            sys.stdin.readline()
            self.began = time.perf_counter()

        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            answer(time.perf_counter() - self.began)

    torch.set_num_threads(settings.threads)
    arguments = {
        "num_train_epochs": settings.repeats + 1,
        "learning_rate": 1e-5,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    build = build_kwise if settings.side == "kwise" else build_pairs
    with tempfile.TemporaryDirectory() as folder:
        trainer, first = build(
            ranked_rows(settings, num_responses), settings, arguments | {"output_dir": folder}
        )
        trainer.add_callback(EpochOnRequest())
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with torch.no_grad():
            loss = trainer.compute_loss(trainer.model, trainer.data_collator(first))
        trainer.train()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    mebibyte = 1024**2 if sys.platform == "darwin" else 1024
    growth = (peak - before) / mebibyte
    answer({"growth": growth, "peak": peak / mebibyte, "loss": loss.item()})


# --- Both sides -----------------------------------------------------------------------------------


def start(name: str, num_responses: int, arguments: list[str]) -> Worker:
    """A process that trains one side: an epoch, in seconds, each time that it is asked."""
    command = [sys.executable, __file__, *arguments, "--side", name]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return Worker(name, [*command, "--responses", str(num_responses)], environment)


def compare(num_responses: int, arguments: list[str], repeats: int) -> dict[str, Any]:
    """Train both sides, in turns, so that other load meets both; their first losses must agree."""
    sides = [start(name, num_responses, arguments) for name in SIDES]
    epochs = [[side.ask() for side in sides] for _ in range(repeats + 1)][1:]
    found = {side.name: side.end() for side in sides}
    for side, seconds in zip(sides, zip(*epochs, strict=True), strict=True):
        found[side.name] |= {"seconds": statistics.median(seconds), "epochs": seconds}
    kwise, pairs = (found[name] for name in SIDES)
    if abs(kwise["loss"] - pairs["loss"]) > 1e-5:
        raise SystemExit(f"not the same loss: {kwise['loss']} and {pairs['loss']}")
    return {
        "responses": num_responses,
        "sequences_ratio": 1 / (num_responses - 1),
        "time_ratio": kwise["seconds"] / pairs["seconds"],
        "growth_ratio": kwise["growth"] / pairs["growth"],
        "peak_ratio": kwise["peak"] / pairs["peak"],
        **found,
    }


def markdown(results: list[dict[str, Any]]) -> str:
    lines = [
        "| K | sequences | time of an epoch | memory of training | peak of the process |",
        "|---|---|---|---|---|",
    ]
    for result in results:
        ratios = [f"{result[f'{name}_ratio']:.2f}" for name in ("sequences", "time", "growth")]
        lines.append(
            f"| {result['responses']} | {' | '.join(ratios)} | {result['peak_ratio']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    arguments = sys.argv[1:]
    settings = parse(arguments)
    if settings.side:
        return measure(settings, settings.responses[0])
    began, results = time.perf_counter(), []
    for num_responses in settings.responses:
        results.append(compare(num_responses, arguments, settings.repeats))
        sides = [f"{name} {results[-1][name]['seconds']:.2f} s" for name in SIDES]
        print(f"K = {num_responses}: {', '.join(sides)} an epoch", file=sys.stderr)
    print("ours / TRL's RewardTrainer on the same pairs\n\n" + markdown(results))
    print(f"\n{time.perf_counter() - began:.0f} s in all", file=sys.stderr)
    last = results[-1]
    text = f"K = {last['responses']}: {last['time_ratio']:.2f} of the time of pairs through TRL"
    text += f", {last['growth_ratio']:.2f} of the memory of training"
    print(json.dumps({"headline": text, "settings": vars(settings), "results": results}))


if __name__ == "__main__":
    main()
