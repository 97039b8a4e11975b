"""The figures of a pairwise evaluation, as a table and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf.config import JUDGE
from rlhf.console import estimate_text, interval_text, say, table, warn
from rlhf.functional import bootstrap_interval, length_controlled, prediction_powered_mean, win_rate
from rlhf.rubrics import as_dialogue
from rlhf.web.render import visible

if TYPE_CHECKING:
    from rlhf.evaluate.judgement import Judgement

NUM_EXAMPLES, NUM_CHARACTERS = 3, 1200
SEPARATED = 6  # coefficient of the length that only verdicts with hardly an exception give
FEW = 30  # prompts; an interval of fewer says little
Figures = dict[str, Any]  # the keys of report.json


def figures_of(judgements: Sequence[Judgement], gold: Tensor | None = None) -> Figures:
    """The figures of `report.json`; win rates are those of b.

    Args:
        gold: (N,) preferences by people, nan where there is none.
    """
    counted = [i for i, judgement in enumerate(judgements) if judgement.winner is not None]
    used = [judgements[i] for i in counted]
    num = {name: sum(j.winner == name for j in used) for name in ("a", "b", "tie")}
    figures: Figures = {
        "num_prompts": len(judgements),
        "wins_a": num["a"],
        "wins_b": num["b"],
        "ties": num["tie"],
        "without_verdict": len(judgements) - len(used),
        "mean_length_a": sum(len(j.a) for j in judgements) / len(judgements),
        "mean_length_b": sum(len(j.b) for j in judgements) / len(judgements),
    }
    asked = [j for j in used if j.verdicts is not None]
    if asked:
        first = sum(j.verdicts == ("a", "b") for j in asked)
        second = sum(j.verdicts == ("b", "a") for j in asked)
        figures["inconsistent"] = sum(not j.consistent for j in asked)
        figures |= {"first_wins_in_both_orders": first, "second_wins_in_both_orders": second}
    scored = [j.scores for j in used if j.scores is not None]
    if scored:
        a, b = (sum(column) for column in zip(*scored, strict=True))
        figures |= {"total_score_a": a, "total_score_b": b}
    if not used:
        return figures
    preferences = torch.tensor([{"a": 0.0, "tie": 0.5, "b": 1.0}[str(j.winner)] for j in used])
    low, high = bootstrap_interval(preferences)
    rate = win_rate(num["b"], num["a"], num["tie"])
    figures["win_rate"] = {"mean": rate, "low": low, "high": high}
    gaps = torch.tensor([float(len(j.b) - len(j.a)) for j in used])
    figures["length_controlled"] = length_controlled(preferences, gaps)._asdict()
    if gold is not None:
        figures["trust"] = trust(preferences, gold[counted])
    return figures


def trust(preferences: Tensor, gold: Tensor) -> Figures | None:
    """How far the judge agrees with people, and the win rate without its errors."""
    known = ~gold.isnan()
    if known.sum() < 2 or known.all():
        what = "fewer than two prompts have" if known.sum() < 2 else "every prompt has"
        warn(f"{what} a gold label, so that no win rate is corrected; label some of the prompts")
        return None
    agree = (preferences[known] == gold[known]).float()
    low, high = bootstrap_interval(agree)
    corrected = prediction_powered_mean(gold[known], preferences[known], preferences[~known])
    return {
        "num_gold": int(known.sum()),
        "agreement": {"mean": float(agree.mean()), "low": low, "high": high},
        "bias": float((preferences[known] - gold[known]).mean()),
        "win_rate": corrected._asdict(),
    }


def rows_of(figures: Figures) -> list[tuple[str, str]]:
    """The rows of the table: name and value."""
    share = "{} of {}".format
    num = figures["num_prompts"]
    rows = [
        ("a", figures["a"]),
        ("b", figures["b"]),
        ("by", figures["by"]),
        (
            "wins of a, ties, wins of b",
            f"{figures['wins_a']}, {figures['ties']}, {figures['wins_b']}",
        ),
        (
            "mean length of a, of b",
            f"{figures['mean_length_a']:.0f}, {figures['mean_length_b']:.0f}",
        ),
    ]
    if figures["without_verdict"]:
        rows.append(("without a verdict, not counted", share(figures["without_verdict"], num)))
    if "inconsistent" in figures:
        rows.append(("another verdict in the other order", share(figures["inconsistent"], num)))
        both = figures["first_wins_in_both_orders"], figures["second_wins_in_both_orders"]
        rows.append(("of these, the first won, the second won", f"{both[0]}, {both[1]}"))
    if "total_score_a" in figures:
        a, b = figures["total_score_a"], figures["total_score_b"]
        if figures["by"].startswith(JUDGE):  # ratings are positive; Vicuna's table has their ratio
            rows.append(("total score of a, of b", f"{a:g}, {b:g} (b has {b / a:.1%} of a)"))
        else:
            rows.append(("mean score of a, of b", f"{a / num:.4g}, {b / num:.4g}"))
    if "win_rate" in figures:
        rows.append(("win rate of b", estimate_text(figures["win_rate"])))
        equal = figures["length_controlled"]
        text = interval_text(equal["win_rate"], equal["low"], equal["high"])
        if abs(equal["length"]) > SEPARATED:
            text = "cannot be told: length explains every verdict"
        rows.append(("win rate of b at equal length", text))
    if found := figures.get("trust"):
        agreed = f"{estimate_text(found['agreement'])} of {found['num_gold']}"
        rows.append(("the judge agrees with gold labels", agreed))
        rows.append(("win rate of b, corrected by gold labels", estimate_text(found["win_rate"])))
    return rows


def conclusion(figures: Figures) -> str:
    """What the figures say, in one sentence."""
    if "win_rate" not in figures:
        return "no comparison has a verdict"
    found = figures.get("trust")
    value = found["win_rate"] if found else figures["win_rate"]
    if value["low"] <= 0.5 <= value["high"]:
        return "the interval contains 0.5: no difference is shown"
    b_is_better = value["low"] > 0.5
    at_equal_length = figures["length_controlled"]["win_rate"] > 0.5
    note = "" if b_is_better == at_equal_length else ", but not at equal length"
    return f"{'b' if b_is_better else 'a'} is better{note}"


def show_figures(figures: Figures) -> None:
    """Print the table, the conclusion, and what to be careful about."""
    num = figures["num_prompts"]
    say(f"{num} prompts, 95 % intervals in brackets\n")
    say(table(rows_of(figures), ("figure", "value")))
    say(f"\n{conclusion(figures)}")
    if num < FEW:
        say(f"{num} prompts say little; take 200 or more")
    biased = figures.get("inconsistent", 0)
    if biased > 0.3 * num:
        say(
            f"the judge changed its verdict with the order for {biased} of {num}: take a better one"
        )


def markdown(figures: Figures, judgements: Sequence[Judgement]) -> str:
    """The report as a page, with examples."""
    lines = ["# Pairwise evaluation", "", "| figure | value |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows_of(figures)]
    lines += ["", conclusion(figures).capitalize() + ".", ""]
    for title, chosen in examples(judgements).items():
        lines += [f"## {title}", ""] if chosen else []
        for judgement in chosen:
            lines += _example(judgement)
    return "\n".join(lines).rstrip() + "\n"


def draw(figures: Figures) -> Any:
    """Draw the win rates with their intervals; return a matplotlib figure."""
    from matplotlib.figure import Figure

    equal = figures["length_controlled"]
    rates = {"as judged": figures["win_rate"]}
    if abs(equal["length"]) <= SEPARATED:
        rates["at equal length"] = equal | {"mean": equal["win_rate"]}
    if figures.get("trust"):
        rates["corrected by gold labels"] = figures["trust"]["win_rate"]
    figure = Figure(figsize=(6.5, 1.2 + 0.5 * len(rates)), dpi=100, layout="constrained")
    axes = figure.subplots()
    for row, rate in enumerate(reversed(rates.values())):
        axes.plot([rate["low"], rate["high"]], [row, row], color="tab:blue", linewidth=2)
        axes.plot(rate["mean"], row, "o", color="tab:blue")
        axes.annotate(f"{rate['mean']:.2f}", (rate["mean"], row + 0.14), ha="center")
    axes.axvline(0.5, color="grey", linestyle=":")
    axes.set_yticks(range(len(rates)), [*reversed(rates)])
    axes.set(xlim=(0, 1), ylim=(-0.6, len(rates) - 0.4), xlabel="win rate of b, 95 % intervals")
    names = f"a: {figures['a']}    b: {figures['b']}"
    axes.set_title(names, fontsize="medium", parse_math=False)  # a path may have two $
    return figure


def examples(judgements: Sequence[Judgement]) -> dict[str, list[Judgement]]:
    """The most instructive comparisons: wins that length does not explain, by a scorer those with
    the largest gap; and those where the order decided."""

    def surprise(judgement: Judgement) -> float:
        if judgement.scores is not None:
            return abs(judgement.scores[1] - judgement.scores[0])
        longer = (len(judgement.b) - len(judgement.a)) / (len(judgement.a) + len(judgement.b) + 1)
        return -longer if judgement.winner == "b" else longer

    found = {
        f"{name} wins": [j for j in judgements if j.winner == name and j.consistent]
        for name in ("b", "a")
    }
    found["The order decided"] = [j for j in judgements if not j.consistent and j.winner]
    return {
        title: sorted(group, key=surprise, reverse=True)[:NUM_EXAMPLES]
        for title, group in found.items()
    }


def _example(judgement: Judgement) -> list[str]:
    parts = {"prompt": as_dialogue(judgement.prompt), "a": judgement.a, "b": judgement.b}
    if judgement.scores is not None:
        parts["scores"] = "a {:.4g}, b {:.4g}".format(*judgement.scores)
    if judgement.reasons is not None:
        parts["judge, a first"], parts["judge, b first"] = judgement.reasons
    lines = []
    for name, text in parts.items():
        shown = text if len(text) <= NUM_CHARACTERS else f"{text[:NUM_CHARACTERS]} [...]"
        lines += [f"**{name}**", "", *(f"    {line}" for line in visible(shown).split("\n")), ""]
    return [*lines, "---", ""]
