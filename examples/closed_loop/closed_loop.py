"""The loop of RLHF, closed three times, on the embedded demo world, whose true reward is known.

After SFT, each round has three commands:

    rlhf.rank    a scripted annotator ranks answers of the newest policy, through its web page
    rlhf.reward  a reward model is trained from the SFT policy, on the rankings of all rounds
    rlhf.ppo     PPO goes on from the newest policy; the KL reference is the SFT policy

At the end the annotator ranks once more: answers of the last policy and of SFT to new prompts,
blind. A second line of runs shows what the new rankings are worth: it makes the same PPO updates
in each round, but always against the reward model of round 1.

The picture and `closed_loop.json` are in the run's folder: the true ("gold") score on held-out
prompts, which nothing trains on, against the number of rankings. The runs are `<run_name>` (SFT),
`<run_name>-1`, `-2`, ... and `<run_name>-old-2`, ... A stopped command continues when it is given
again. Overrides go to the stages that know them, e.g. `seed=2` or `ppo.num_updates=40`; `rounds.py`
draws several seeds.

Run: python examples/closed_loop/closed_loop.py
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from annotator import Options as Annotator
from annotator import annotate
from rounds import closing_table, draw, read_result

from rlhf.config import InputError, knob
from rlhf.console import say
from rlhf.curves import plot_hint
from rlhf.demo.world import rows
from rlhf.option_parser import run_command
from rlhf.pipeline import route, run_stage
from rlhf.rank import check_server

ANSWERS = 4  # to each prompt that is ranked
NUM_AT_THE_END = 100  # prompts; their requests are in no round and not in PPO
SETTINGS = [
    "recipe=demo",
    "reward.dataset.eval_path=python:rlhf.demo.world.rows",  # by gold; nothing is chosen by it
    "reward.trainer.num_train_epochs=6",
    "ppo.num_updates=20",
    "evaluation.every=5",
    "preflight=false",
]


@dataclass
class Options:
    """The command line."""

    rankings: list[int] = knob([100, 200, 400], ge=2)
    """Prompts that are ranked in each round, with 4 answers each: as many rounds as numbers."""
    noise: float = knob(0.15, ge=0, le=0.5)
    """Share of the annotator's comparisons that come out wrong."""
    run_name: str = "loop"
    """Beginning of the names of the runs."""
    runs_dir: str = "runs"
    """Folder of all runs."""
    overrides: list[str] = field(default_factory=list)
    """Overrides of the stages."""


class Failed(Exception):
    """A command failed, and said why; the argument is its status."""


def main(arguments: list[str]) -> int:
    """Run the loop; return the exit status."""
    again = "interrupted; the same command continues"
    return run_command(str(__doc__), Options, closed_loop, arguments, again)


def closed_loop(options: Options) -> int:
    """Run what is missing, draw, and print the table; return the status of what failed, or 0."""
    if hint := plot_hint("closed_loop.png"):
        raise InputError(hint)
    if not options.rankings:
        raise InputError("rankings=[] has no round; give a number for each, such as [100,200,400]")
    check_server("127.0.0.1", None)
    folder = Path(options.runs_dir) / options.run_name
    try:
        train(options, "sft", folder.name)
        newest = sft = folder / "sft/final"
        rankings: list[Path] = []
        for number, count in enumerate(options.rankings, start=1):
            name = f"{folder.name}-{number}"
            before = sum(options.rankings[: number - 1])
            asked = rows("ppo", "train")[before : before + count]
            rankings.append(rank(options, folder / f"round-{number}.jsonl", [newest], asked))
            listed = f"[{','.join(map(str, rankings))}]"
            train(options, "reward", name, f"model.path={sft}", f"dataset.path={listed}")
            scorer = folder.with_name(name) / "reward/final"
            newest = improve(options, name, newest, sft, scorer)
        asked = rows("ppo", "eval")[:NUM_AT_THE_END]
        rank(options, folder / "at-the-end.jsonl", [sft, newest], asked)
        compare_with_old_labels(options, folder)
    except Failed as failure:
        return int(failure.args[0])
    result = read_result(folder, len(options.rankings), ANSWERS)
    result["noise"] = options.noise
    file = folder / "closed_loop.json"
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    draw([result], file.with_suffix(".png"))
    say(closing_table(result))
    say(f"\nsaved {file.with_suffix('.png')} and {file}")
    return 0


def compare_with_old_labels(options: Options, folder: Path) -> None:
    """Make the PPO updates of rounds 2, 3, ... against the reward model of round 1."""
    sft, first = folder / "sft/final", folder.with_name(f"{folder.name}-1")
    newest = first / "ppo/final"
    for number in range(2, len(options.rankings) + 1):
        name = f"{folder.name}-old-{number}"
        newest = improve(options, name, newest, sft, first / "reward/final")


def improve(options: Options, run_name: str, policy: Path, sft: Path, scorer: Path) -> Path:
    """Train a policy with PPO against a reward model; return the new policy."""
    paths = f"model.path={policy}", f"ppo.reference={sft}", f"scorer.path={scorer}"
    train(options, "ppo", run_name, *paths)
    return Path(options.runs_dir) / run_name / "ppo/final"


def train(options: Options, stage: str, run_name: str, *inputs: str) -> None:
    """Run a stage; one that is finished says so."""
    shared = route([*SETTINGS, *options.overrides, f"runs_dir={options.runs_dir}"], [stage])[stage]
    if status := run_stage(stage, ["resume=auto", *shared, f"run_name={run_name}", *inputs]):
        raise Failed(status)


def rank(options: Options, prompts: Path, policies: Sequence[Path], asked: Sequence[Any]) -> Path:
    """Let the annotator rank answers of policies to rows of prompts.

    Args:
        prompts: file of the rows, which is written here.

    Returns:
        The file of the rankings.
    """
    prompts.write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
    paths = f"path=[{','.join(map(str, policies))}]"
    how = f"samples_per_prompt={ANSWERS}", "response_length=24", "temperature=1"
    with page([f"prompts={prompts}", paths, *how]) as url:
        annotate(Annotator(url, noise=options.noise))
    return prompts.with_suffix(".rankings.jsonl")


@contextmanager
def page(arguments: Sequence[str]) -> Iterator[str]:
    """Run `python -m rlhf.rank`, give the address of its page, and end it as Ctrl-C does."""
    print(f"\n=== python -m rlhf.rank {' '.join(arguments)}", flush=True)
    command = [sys.executable, "-m", "rlhf.rank", *arguments, "port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        output: Any = process.stdout
        for line in output:
            say(line.rstrip())
            if found := re.match(r"rank at (http://\S+)", line):
                break
        else:
            raise Failed(process.wait())
        try:
            yield found[1]
        finally:
            process.send_signal(signal.SIGINT)
            say(output.read().rstrip())
        if status := process.wait():
            raise Failed(status)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
