"""A scripted annotator at the page of `python -m rlhf.rank`, on prompts of the demo world.

It asks for a prompt, ranks the answers and submits, over HTTP as a browser does, until nothing is
left. It compares two answers at a time by their true ("gold") score; of two unequal ones it takes
the worse for the better with probability `noise`. Equal ones that end up next to each other tie.
What it says about a prompt does not depend on where it was interrupted.

Run, after python -m rlhf.rank prompts=...: python examples/closed_loop/annotator.py noise=0.15
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cmp_to_key
from itertools import pairwise
from typing import Any

from rlhf.config import EndpointConfig, knob
from rlhf.console import say
from rlhf.demo.world import gold_score
from rlhf.http_endpoint import ask
from rlhf.option_parser import run_command


@dataclass
class Options:
    """The command line."""

    url: str = "http://127.0.0.1:8765"
    """Address of the page."""
    name: str = "script"
    """Name of the annotator."""
    noise: float = knob(0.15, ge=0, le=0.5)
    """Share of the comparisons of two answers that come out wrong."""
    seed: int = knob(1, ge=0)
    """Equal seeds make equal mistakes."""


def annotate(options: Options) -> int:
    """Rank until the page has nothing left; return the number of rankings."""

    def request(what: str, **body: Any) -> Any:
        url = f"{options.url.rstrip('/')}/api/{what}"
        return ask(url, {"annotator": options.name} | body, EndpointConfig(), "url")["task"]

    count, task = 0, request("next")
    while task is not None:
        prompt = task["prompt"][-1]["text"]
        scores = [gold_score(prompt, card["text"]) for card in task["cards"]]
        rng = random.Random(f"{options.seed} {options.name} {prompt}")
        ranks = noisy_ranks(scores, options.noise, rng)
        task = request("submit", token=task["token"], kind="ranking", ranks=ranks)
        count += 1
    return count


def noisy_ranks(scores: Sequence[float], noise: float, rng: random.Random) -> list[int]:
    """Rank by score, 0 = best, comparing two at a time; a comparison of unequal scores is wrong
    with probability `noise`."""

    def compare(i: int, j: int) -> float:
        gap = scores[j] - scores[i]  # negative: i comes first
        return -gap if gap and rng.random() < noise else gap

    order = sorted(range(len(scores)), key=cmp_to_key(compare))
    ranks = [0] * len(scores)
    for place, (before, now) in enumerate(pairwise(order), start=1):
        ranks[now] = ranks[before] if scores[now] == scores[before] else place
    return ranks


def run(options: Options) -> None:
    """Annotate, and say how much."""
    say(f"{options.name} ranked the answers to {annotate(options):,} prompts")


if __name__ == "__main__":
    raise SystemExit(run_command(str(__doc__), Options, run, sys.argv[1:]))
