"""The diagnosis in a terminal, and as a picture."""

from __future__ import annotations

from typing import Any

from rlhf.console import estimate_text, say, table
from rlhf.curves import draw_frontier
from rlhf.diagnose.remedies import NAMES, stopping_text, verdict
from rlhf.diagnose.weakest_link import Findings

SWAPS = {
    "sft": "known-good answers for the SFT policy's best",
    "reward": "gold for the scorer that PPO trains on",
    "ppo": "best of {n} by the same scorer for PPO",
}


def show(found: Findings) -> None:
    """Print the tables, the verdict and what to try."""
    num, n = found["num_prompts"], found["samples_per_prompt"]
    trusted = found["gold"] or "the scorer itself (no gold= was given)"
    say(f"\n{num} prompts of {found['prompts']}; gold: {trusted}; 95 % intervals in brackets\n")
    rows = [
        (row["name"], _text(row["gold"]), _text(row["proxy"]), row["kl"])
        for row in found["answers"]
    ]
    scorer = found["reward"] if len(found["reward"]) <= 40 else "the scorer"
    say(table(rows, ("who answers", "gold score", f"by {scorer}", "KL, nats")))
    swaps = [
        (NAMES[stage], SWAPS[stage].format(n=n), _text(found["gains"].get(stage), "+"))
        for stage in SWAPS
    ]
    say(f"\n{table(swaps, ('stage', 'swap', 'gain in gold score'))}\n")
    for name, text in (
        ("accuracy", "the scorer orders {} of the pairs of held-out rankings as their labels do"),
        ("agreement", "the scorer orders {} of the pairs of the SFT policy's answers as gold does"),
    ):
        if found[name]:
            say(text.format(_text(found[name])))
    say(f"\n{verdict(found)}")
    if found["commands"]:
        say("try:")
    for line in found["commands"]:
        say(line)
    for line in stopping_text(found):
        say(line)
    if num < 30:
        say(f"{num} prompts say little; take 64 or more")


def _text(value: dict[str, float] | None, sign: str = "") -> str:
    return "-" if value is None else estimate_text(value, sign)


def draw(found: Findings, rows: list[dict[str, Any]]) -> Any:
    """Draw scores against KL, and above them the gains; return a matplotlib figure.

    Args:
        rows: of PPO's `metrics.jsonl`, if there are any.
    """
    own = rows if found["gold"] else []
    figure = draw_frontier(own, found["best_of_n"])
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.6)
    gains = [f"{NAMES[name]} {_text(value, '+')}" for name, value in found["gains"].items()]
    figure.suptitle(f"gains in gold score: {', '.join(gains)}\n{verdict(found)}", fontsize=8)
    return figure
