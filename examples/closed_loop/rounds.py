"""The figures, the table and the picture of the closed loop.

Run, for loops with different seeds: python examples/closed_loop/rounds.py path=[runs/loop,runs/two]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from rlhf.checkpoint import read_record
from rlhf.console import interval_text, say, table
from rlhf.demo.world import gold_score
from rlhf.metrics import read_json, read_jsonl
from rlhf.option_parser import run_command

ENDS = ("", "_low", "_high")  # a figure, and its 95 % bootstrap interval over held-out prompts
FIGURES = {"gold": "eval_independent_score", "kl": "eval_kl", "win_rate": "eval_win_rate"}
Row = dict[str, Any]


def read_result(folder: Path, num_rounds: int, num_answers: int) -> Row:
    """Read the figures of all rounds.

    Returns:
        `rounds`: SFT, with no rankings, then each round; `old_labels`, the rounds that were
        made against the reward model of round 1; `at_the_end`, what the annotator says of the last
        policy against SFT.
    """
    first = folder.with_name(f"{folder.name}-1") / "ppo"
    before = read_jsonl(first / "metrics.jsonl")[0]
    rounds = [{"round": 0, "rankings": 0} | figures_of(before)]
    old_labels: list[Row] = []
    num_rankings = 0
    for number in range(1, num_rounds + 1):
        ranked = read_jsonl(folder / f"round-{number}.rankings.jsonl")
        num_rankings += len(ranked)
        run, labels = folder.with_name(f"{folder.name}-{number}"), {"rankings": num_rankings}
        row = {"round": number, **labels, "wrong": share_of_wrong_pairs(ranked)}
        row["reward_accuracy"] = record_of(run / "reward/final")["eval_accuracy"]
        rounds.append(row | figures_of(record_of(run / "ppo/final")))
        if number > 1:
            old = folder.with_name(f"{folder.name}-old-{number}") / "ppo/final"
            old_labels.append({"round": number, **labels} | figures_of(record_of(old)))
    report = json.loads((folder / "at-the-end.rankings.report.json").read_text(encoding="utf-8"))
    return {
        "num_prompts": sum(row["step"] == 0 for row in read_jsonl(first / "samples.jsonl")),
        "num_answers": num_answers,
        "rounds": rounds,
        "old_labels": old_labels,
        "at_the_end": report["policies"],
    }


def record_of(final: Path) -> dict[str, float]:
    """The metrics of a finished stage."""
    record = read_record(final)
    assert record is not None
    return record.metrics


def figures_of(metrics: dict[str, float]) -> Row:
    """Our names of the figures of an evaluation, where it has them."""
    named = {name + end: metric + end for name, metric in FIGURES.items() for end in ENDS}
    found = {name: metrics[metric] for name, metric in named.items() if metric in metrics}
    return found | ({"update": metrics["update"]} if "update" in metrics else {})


def share_of_wrong_pairs(ranked: list[Row]) -> float:
    """The share of the ranked pairs of unequal answers that are ordered against their gold score;
    a tie counts one half."""
    wrong: list[float] = []
    for row in ranked:
        scores = [gold_score(row["prompt"], response) for response in row["responses"]]
        for i, j in combinations(range(len(scores)), 2):
            if scores[i] != scores[j]:
                better = (row["ranks"][j] - row["ranks"][i]) * (scores[i] - scores[j])
                wrong.append(0.5 if better == 0 else float(better < 0))
    return sum(wrong) / len(wrong) if wrong else 0.0


def closing_table(result: Row) -> str:
    """A row for each round, and what the annotator says in the end."""
    header = ("round", "rankings", "wrong pairs", "reward model's accuracy", "true score")
    header += ("win rate over the round before", "KL to SFT, nats", "true score, old rankings")
    old = {row["round"]: row for row in result["old_labels"]}
    cells = []
    for row in result["rounds"]:
        wins = _with_interval(row, "win_rate") if row["round"] else None
        figures = row.get("wrong"), row.get("reward_accuracy"), _with_interval(row, "gold")
        same = _with_interval(old[row["round"]], "gold") if row["round"] in old else None
        cells.append((row["round"] or "SFT", row["rankings"], *figures, wins, row["kl"], same))
    lines = [f"\n{result['num_prompts']} held-out prompts, 95 % intervals over them in brackets:"]
    lines.append(table(cells, header))
    for pair in result["at_the_end"]:
        wins = interval_text(*pair["a_wins"])
        lines.append(f"the annotator, blind: {pair['a']} wins {wins} of its pairs with {pair['b']}")
    return "\n".join(lines)


def _with_interval(row: Row, name: str) -> str:
    return interval_text(*(row[name + end] for end in ENDS))


# --- Several seeds --------------------------------------------------------------------------------


@dataclass
class Options:
    """The command line."""

    path: list[str]
    """Folders of finished loops that differ in their seed."""
    out: str = "closed-loop.png"
    """Picture to write."""


def run(options: Options) -> None:
    """Draw the mean and the range over the loops, and print them."""
    results = [read_json(Path(path) / "closed_loop.json") for path in options.path]
    draw(results, Path(options.out))
    whole = over_seeds(results)
    cells = []
    for row in whole["rounds"]:
        old = next((one for one in whole["old_labels"] if one["round"] == row["round"]), None)
        same = _with_interval(old, "gold") if old else None
        cells.append((row["round"], row["rankings"], _with_interval(row, "gold"), same))
    say(f"true score, mean and range of {len(results)} loops:")
    say(table(cells, ("round", "rankings", "new rankings in each round", "those of round 1 only")))
    say(f"saved {options.out}")


def over_seeds(results: Sequence[Row]) -> Row:
    """The first result with the mean of all true scores, and their range as the interval."""

    def mean(name: str) -> list[Row]:
        rows = []
        for same in zip(*(result[name] for result in results), strict=True):
            gold = [row["gold"] for row in same]
            ends = {"gold_low": min(gold), "gold_high": max(gold)}
            rows.append(same[0] | {"gold": sum(gold) / len(gold)} | ends)
        return rows

    return results[0] | {name: mean(name) for name in ("rounds", "old_labels")}


# --- The picture ----------------------------------------------------------------------------------


def title_of(results: Sequence[Row]) -> str:
    """State that the true score rises in every round, if the paired win rates of all loops bear it
    out."""
    if all(row["win_rate_low"] > 0.5 for result in results for row in result["rounds"][1:]):
        return "Every round of rankings raises the true score"
    return "The true score after each round of rankings"


def draw(results: Sequence[Row], file: Path) -> None:
    """Draw the true score against the number of rankings, of one loop or of several; write a
    PNG."""
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(7.5, 4.6), dpi=100, layout="constrained")
    panel: Any = figure.subplots()
    result = over_seeds(results) if len(results) > 1 else results[0]
    rounds, old = result["rounds"], [*result["rounds"][:2], *result["old_labels"]]
    if result["old_labels"]:
        label = "the same PPO updates, rankings of round 1 only"
        _line(panel, old, color="C1", linestyle="--", label=label)
    _line(panel, rounds, color="C0", label="new rankings of the newest policy in each round")
    for row in rounds:
        text, above = (f"round {row['round']}" if row["round"] else "SFT"), (0, 12)
        panel.annotate(text, (row["rankings"], row["gold_high"]), above, **CENTRED)
    panel.set_ylim(0, 1)
    panel.set_xticks([row["rankings"] for row in rounds])
    panel.set_xlabel(f"rankings of {result['num_answers']} answers so far")
    panel.set_ylabel("true score of the policy, 0 to 1")
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(loc="lower right", fontsize=9)
    figure.suptitle(title_of(results), fontsize=13, fontweight="bold")
    note = f"Bars: 95 % bootstrap intervals over {result['num_prompts']} held-out prompts. "
    if len(results) > 1:
        note = f"Means of {len(results)} seeds; bars: their range. "
    note += f"{result['noise']:.0%} of the annotator's comparisons are wrong."
    figure.supxlabel(note, fontsize=9)
    figure.savefig(file)
    with Image.open(file) as image:  # 128 colours do, at a third of the size
        image.convert("RGB").quantize(128).save(file, optimize=True)


CENTRED: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 9}


def _line(panel: Any, rows: list[Row], **style: Any) -> None:
    gold = [row["gold"] for row in rows]
    bars = [
        [row["gold"] - row["gold_low"] for row in rows],
        [row["gold_high"] - row["gold"] for row in rows],
    ]
    panel.errorbar([row["rankings"] for row in rows], gold, bars, marker="o", capsize=3, **style)


if __name__ == "__main__":
    raise SystemExit(run_command(str(__doc__), Options, run, sys.argv[1:]))
