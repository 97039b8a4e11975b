"""What a response token costs in PPO updates of 64 to 512 responses.

A process for each number of responses makes updates with the same models, epochs and number of
minibatches. They take turns, and in a round each makes the same number of responses: eight updates
of 64, or one of 512. The cost is CPU seconds on one thread of a CPU, which leave out other load,
else seconds; the first update of each process is left out, and its memory is not.

Run: python examples/benchmarks/episodes.py --preset small --lengths half
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import ppo_step
import torch
from parts import Worker
from transformers.utils.logging import disable_progress_bar
from world import DEVICE, ROOT, describe, machine, table

WITHIN = 0.1  # of the cost with the fewest responses


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--preset", choices=ppo_step.LIMITS, default="small")
    parser.add_argument("--lengths", choices=("full", "half"), default="half")
    parser.add_argument("--batches", nargs="+", type=int, default=[64, 128, 256, 512])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--set", nargs="+", default=[], help="settings, key=value")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def command_of(options: argparse.Namespace, batch: int) -> list[str]:
    """The arguments of `ppo_step.py` for one number of responses."""
    given = ["--preset", options.preset, "--lengths", options.lengths, "--sides", "ours"]
    given += ["--batch", str(batch), "--epochs", str(options.epochs)]
    given += ["--threads", str(options.threads)]
    return [*given, "--set", *options.set] if options.set else given


def measure(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The cost of each number of responses, after one update each that does not count."""
    workers, rows = [], []
    for batch in options.batches:
        command = [sys.executable, ppo_step.__file__, *command_of(options, batch)]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {"PYTHONPATH": path, "OMP_NUM_THREADS": str(options.threads)}
        workers.append(Worker(f"{batch}", [*command, "--folder", str(folder)], environment))
    for batch, worker in zip(options.batches, workers, strict=True):
        rows.append({"batch": batch, "updates": [], "forward": worker.read()["forward"]})
        worker.ask()
    for _ in range(options.rounds):
        for row, worker in zip(rows, workers, strict=True):
            for _ in range(max(options.batches) // row["batch"]):
                row["updates"].append(worker.ask())
            text = f"{row['batch']} responses: {row['updates'][-1]['seconds']:.1f} s an update"
            print(text, file=sys.stderr, flush=True)
    for row, worker in zip(rows, workers, strict=True):
        row["peak_mib"] = worker.end()["peak"]
        summarize(row, options)
    return rows


def summarize(row: dict[str, Any], options: argparse.Namespace) -> None:
    """Add what the updates cost, in all and for a token."""
    clock = "cpu_seconds" if DEVICE == "cpu" and options.threads == 1 else "seconds"
    tokens = sum(update["tokens"] for update in row["updates"])
    row["tokens"] = tokens / len(row["updates"])
    row["seconds"] = sum(update[clock] for update in row["updates"]) / len(row["updates"])
    row["ms_per_token"] = 1e3 * row["seconds"] / row["tokens"]


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    limits = machine()
    print(describe(limits), flush=True)
    with tempfile.TemporaryDirectory() as name:
        ppo_step.write_world(ppo_step.parse(command_of(options, 64)), Path(name))
        rows = measure(options, Path(name))
    first = rows[0]["ms_per_token"]
    for row in rows:
        row["relative"] = row["ms_per_token"] / first
    columns = ["batch", "tokens", "seconds", "ms_per_token", "relative", "peak_mib"]
    print(table(columns, [[row[column] for column in columns] for row in rows]))
    costs = [row["relative"] for row in rows]
    low, high = min(costs), max(costs)
    numbers = f"{options.batches[0]} to {options.batches[-1]} responses"
    text = f"{numbers}: a token costs {low:.2f} to {high:.2f} of what it costs with the fewest"
    print(f"\n{text}" + ("" if max(high - 1, 1 - low) <= WITHIN else f"; not within {WITHIN:.0%}"))
    settings = vars(options)
    print(json.dumps({"headline": text, "rows": rows, "machine": limits, "settings": settings}))


if __name__ == "__main__":
    main()
