"""The three stages on the embedded demo world, and one closing table: `python -m rlhf.demo`.

Runs `python -m rlhf.sft`, `.reward` and `.ppo` with `recipe=demo`, one after the other, under a run
name that is still free. The world, its data and its gold score are in `rlhf.demo.world`. Each
argument goes to the stages that know it, e.g. `python -m rlhf.demo seed=2 ppo.num_updates=40`.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf.config import STAGES
from rlhf.console import table

NUM_SHOWN = 4


def main(arguments: list[str]) -> int:
    """Run the stages and print the table; return the exit status."""
    runs = Path(argument(arguments, "runs_dir", "runs"))
    run_name = argument(arguments, "run_name", "") or _free_name(runs)
    arguments = [a for a in arguments if not a.startswith("run_name=")]
    seconds = {}
    for stage in STAGES:
        began = time.perf_counter()
        status = run_stage(stage, [*arguments, f"run_name={run_name}"])
        if status:
            return status
        seconds[stage] = time.perf_counter() - began
    print(closing_table(runs / run_name, seconds))
    return 0


def argument(arguments: list[str], key: str, default: str) -> str:
    """Value of the last `key=value` in a list of overrides."""
    given = [a.partition("=")[2] for a in arguments if a.startswith(f"{key}=")]
    return given[-1] if given else default


def run_stage(stage: str, arguments: list[str]) -> int:
    """Run `python -m rlhf.<stage> recipe=demo` with overrides; return its exit status, 128 + signal
    where one ended it.

    Overrides that only other stages know are left out; what no stage knows is handed on, so that
    the stage refuses it by name.
    """
    keys = {name: {f.name for f in dataclasses.fields(config)} for name, config in STAGES.items()}
    foreign = set().union(*keys.values()) - keys[stage]
    mine = [a for a in arguments if re.split(r"[=.@]", a.lstrip("+~"))[0] not in foreign]
    print(f"\n=== python -m rlhf.{stage} recipe=demo {' '.join(mine)}", flush=True)
    asked: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def ask(number: int, _: Any) -> None:
        asked.append(number)
        if process is not None:
            process.terminate()

    # Ctrl-C reaches the stage from the terminal, these from here: it needs time to save.
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    previous = {number: signal.signal(number, ask) for number in numbers}
    command = [sys.executable, "-m", f"rlhf.{stage}", "recipe=demo", *mine]
    try:
        process = subprocess.Popen(command, preexec_fn=_ends_with(os.getpid()))
        if asked:
            process.terminate()
        while True:
            try:
                status = process.wait()
                break
            except KeyboardInterrupt:
                continue
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if status == 0 and asked:  # too late for this stage, but not for the next
        return 128 + asked[0]
    return status if status >= 0 else 128 - status


def _ends_with(parent: int) -> Callable[[], None] | None:
    """Return what a stage calls as it begins, so that it is asked to stop when `parent` is killed.

    Only Linux can do that; elsewhere the stage runs to its end.
    """
    if sys.platform != "linux":
        return None
    libc, set_death_signal = ctypes.CDLL(None), 1  # PR_SET_PDEATHSIG

    def begin() -> None:
        libc.prctl(set_death_signal, signal.SIGTERM)
        if os.getppid() != parent:  # it was killed before
            os.kill(os.getpid(), signal.SIGTERM)

    return begin


def closing_table(run: Path, seconds: dict[str, float]) -> str:
    """Summarise a finished demo run: what each stage reached, in terms of the true (gold) score."""
    records = {stage: json.loads((run / stage / "final/rlhf.json").read_text()) for stage in STAGES}
    evaluations = [row for row in _rows(run / "ppo/metrics.jsonl") if "eval_score" in row]
    before, after, reward = evaluations[0], records["ppo"]["metrics"], records["reward"]["metrics"]
    figures = [
        ("gold score of the SFT policy (0 to 1)", before["eval_independent_score"]),
        ("gold score after PPO", after["eval_independent_score"]),
        ("reward model's score before PPO", before["eval_score"]),
        ("reward model's score after PPO", after["eval_score"]),
        ("KL(PPO || SFT), nats per response", after["eval_kl"]),
        ("win rate of PPO over SFT, by gold", after["eval_win_rate"]),
        ("PPO update taken, the best on these prompts", after["update"]),
        ("reward model: accuracy against gold", reward["eval_accuracy"]),
        ("`the longer response wins`: accuracy", reward["eval_longer_wins_accuracy"]),
        *((f"seconds of {stage}, start-up included", round(s)) for stage, s in seconds.items()),
    ]
    return "\n".join(
        [
            f"\n=== the demo, on {len(_answers(run, 0))} held-out prompts\n",
            table(figures, ("", "value")),
            "\nsome answers (prompt | SFT -> PPO, gold score in brackets):",
            *_comparisons(_answers(run, 0), _answers(run, after["update"])),
            f"\nmetrics.jsonl and samples.jsonl of each stage are in {run}/<stage>/",
        ]
    )


def _comparisons(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[str]:
    return [
        f"  {old['prompt'][-1]['content']} | {old['response']} ({old['independent_score']:.2f}) -> "
        f"{new['response']} ({new['independent_score']:.2f})"
        for old, new in list(zip(before, after, strict=True))[:NUM_SHOWN]
    ]


def _answers(run: Path, update: int) -> list[dict[str, Any]]:
    return [row for row in _rows(run / "ppo/samples.jsonl") if row["step"] == update]


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _free_name(runs: Path) -> str:
    names = ["demo", *(f"demo-{number}" for number in range(2, 1000))]
    return next(name for name in names if not (runs / name).exists())


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
