"""The pipeline on the embedded demo world, and a table of true scores: python -m rlhf.demo

Runs `python -m rlhf.pipeline recipe=demo` (its --help describes the overrides) under a run name
that is still free. The world, its data and its true ("gold") score are in `rlhf.demo.world`.
Examples of overrides: seed=2, ppo.num_updates=40.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.console import table
from rlhf.metrics import read_jsonl
from rlhf.option_parser import run_command
from rlhf.pipeline import PipelineOptions
from rlhf.pipeline import run as run_pipeline

NUM_SHOWN = 4


@dataclass
class DemoOptions:
    """The command line."""

    run_name: str | None = None
    """Name of the run (default: demo, or demo-2, ... if that exists)."""
    runs_dir: str = "runs"
    """Folder of all runs."""
    overrides: list[str] = field(default_factory=list)
    """Overrides of the stages."""


def run(options: DemoOptions) -> int:
    """Run the stages and print the table; return the status of the stage that failed, or 0."""
    runs = Path(options.runs_dir)
    name = options.run_name or _free_name(runs)
    where = [f"run_name={name}", f"runs_dir={runs}"]
    pipeline = PipelineOptions(overrides=["recipe=demo", *where, *options.overrides])
    if status := run_pipeline(pipeline):
        return status
    print(closing_table(runs / name))
    return 0


def closing_table(run: Path) -> str:
    """Summarise a finished demo run: the true (gold) scores before and after PPO."""
    records = [json.loads((run / s / "final/rlhf.json").read_text()) for s in ("ppo", "reward")]
    after, reward = (record["metrics"] for record in records)
    before = next(row for row in read_jsonl(run / "ppo/metrics.jsonl") if "eval_score" in row)
    figures = [
        ("gold score of the SFT policy (0 to 1)", before["eval_independent_score"]),
        ("gold score after PPO", after["eval_independent_score"]),
        ("reward model's score before PPO", before["eval_score"]),
        ("reward model's score after PPO", after["eval_score"]),
        ("KL(PPO || SFT), nats per response", after["eval_kl"]),
        ("win rate of PPO over SFT, by gold", after["eval_win_rate"]),
        ("PPO update that became final/, the best on these prompts", after["update"]),
        ("reward model: accuracy against gold", reward["eval_accuracy"]),
        ("`the longer response wins`: accuracy", reward["eval_longer_wins_accuracy"]),
    ]
    old_answers, new_answers = _answers(run, 0), _answers(run, after["update"])
    comparisons = [
        f"  {old['prompt'][-1]['content']} | {old['response']} ({old['independent_score']:.2f}) -> "
        f"{new['response']} ({new['independent_score']:.2f})"
        for old, new in list(zip(old_answers, new_answers, strict=True))[:NUM_SHOWN]
    ]
    return "\n".join(
        [
            f"\n=== the demo, on {len(old_answers)} held-out prompts\n",
            table(figures, ("", "value")),
            "\nsome answers (prompt | SFT -> PPO, gold score in brackets):",
            *comparisons,
            f"\nmetrics.jsonl and samples.jsonl of each stage are in {run}/<stage>/",
        ]
    )


def _answers(run: Path, update: int) -> list[dict[str, Any]]:
    return [row for row in read_jsonl(run / "ppo/samples.jsonl") if row["step"] == update]


def _free_name(runs: Path) -> str:
    names = ["demo", *(f"demo-{number}" for number in range(2, 1000))]
    return next(name for name in names if not (runs / name).exists())


if __name__ == "__main__":
    again = "interrupted; the same command with its run_name continues"
    raise SystemExit(run_command(str(__doc__), DemoOptions, run, sys.argv[1:], again))
