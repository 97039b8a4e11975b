"""What people's judgements say: how many there are, how far they agree, which policy wins.

Left out: the web page, which shows a part of it live.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

from rlhf.console import interval_text, table
from rlhf.rank.agreement import Estimate, agreements, ordinal_alpha, pairwise_agreement, share
from rlhf.rank.store import Judgement
from rlhf.web.render import visible

Report = dict[str, Any]


def live_report(judgements: Sequence[Judgement]) -> Report:
    """Agreement so far, without the names of models: people who rank must not know them."""
    rankings = by_prompt(judgements)
    return {
        "num_rankings": sum(map(len, rankings.values())),
        "num_prompts": len(rankings),
        "num_shared_prompts": sum(len(ranks) > 1 for ranks in rankings.values()),
        "alpha": _plain(ordinal_alpha([*rankings.values()])),
        "pairwise": _plain(pairwise_agreement([*rankings.values()])),
        "annotators": [_of_annotator(name, judgements) for name in _names(judgements)],
    }


def make_report(
    judgements: Sequence[Judgement], num_tasks: int, without: int, written: int
) -> Report:
    """Everything that the command shows and saves.

    Args:
        num_tasks: prompts that people can be asked.
        without: prompts of the file that they cannot, e.g. because all answers are equal.
        written: conversations that people wrote.
    """
    reasons = Counter(one.reason or "no reason" for one in judgements if one.kind == "flag")
    return {
        "num_tasks": num_tasks,
        "num_not_asked": without,
        **live_report(judgements),
        "num_skipped": sum(one.kind == "skip" for one in judgements),
        "num_demonstrations": sum(one.demonstration is not None for one in judgements),
        "num_conversations": written,
        "flags": dict(reasons.most_common()),
        "policies": policy_wins(judgements),
    }


def by_prompt(judgements: Iterable[Judgement]) -> dict[int, list[list[int]]]:
    """Number of the prompt -> its rankings, one per annotator."""
    found: dict[int, list[list[int]]] = defaultdict(list)
    for one in judgements:
        if one.kind == "ranking":
            found[one.task.number].append(one.ranks)
    return dict(found)


def policy_wins(judgements: Sequence[Judgement]) -> list[dict[str, Any]]:
    """For each two policies, the share of pairs of their answers that the first one wins, a tie
    half; the interval resamples prompts."""
    pairs: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for one in judgements:
        models = one.task.models if one.kind == "ranking" else []
        for i, j in combinations(range(len(models)), 2):
            if models[i] != models[j]:
                i, j = sorted((i, j), key=lambda number: models[number])
                won = (one.ranks[i] < one.ranks[j]) + (one.ranks[i] == one.ranks[j]) / 2
                pairs[models[i], models[j]][one.task.number].append(won)
    return [
        {"a": a, "b": b, "a_wins": _plain(share([*won.values()])), "num_prompts": len(won)}
        for (a, b), won in sorted(pairs.items())
    ]


def _names(judgements: Iterable[Judgement]) -> list[str]:
    return sorted({one.annotator for one in judgements})


def _of_annotator(name: str, judgements: Sequence[Judgement]) -> dict[str, Any]:
    """Counts of one annotator, and agreement with the others."""
    own = {j.task.number: j.ranks for j in judgements if j.annotator == name and j.ranks}
    with_others = [
        alike
        for one in judgements
        if one.ranks and one.annotator != name and one.task.number in own
        for alike in agreements(own[one.task.number], one.ranks)
    ]
    seconds = [j.seconds for j in judgements if j.annotator == name and j.kind == "ranking"]
    kinds = Counter(j.kind for j in judgements if j.annotator == name)
    return {
        "name": name,
        **{f"num_{kind}": kinds[kind] for kind in ("ranking", "skip", "flag")},
        "median_seconds": median(s for s in seconds if s is not None) if seconds else None,
        "agrees": sum(with_others) / len(with_others) if with_others else None,
    }


def _plain(estimate: Estimate) -> list[float | None]:
    """Value, low, high; None for nan, which JSON does not have."""
    return [None if math.isnan(number) else number for number in estimate]


# --- For the terminal -----------------------------------------------------------------------------


def report_text(report: Report) -> str:
    """Lay out the report for the terminal."""
    names = ("annotator", "ranked", "skipped", "flagged", "seconds each", "agrees with others")
    keys = ("name", "num_ranking", "num_skip", "num_flag", "median_seconds", "agrees")
    lines = [
        f"{report['num_prompts']:,} of {report['num_tasks']:,} prompts ranked, "
        f"{report['num_rankings']:,} rankings; {report['num_skipped']:,} skipped, "
        f"{report['num_demonstrations']:,} demonstrations, "
        f"{report['num_conversations']:,} conversations"
    ]
    if report["annotators"]:
        people = [[one[key] for key in keys] for one in report["annotators"]]
        lines += ["", table(people, names), ""]
    if report["num_shared_prompts"]:
        lines.append(
            f"agreement on {report['num_shared_prompts']:,} prompts that several people ranked: "
            f"pairs ordered alike {_interval(report['pairwise'])}, Krippendorff's alpha "
            f"{_interval(report['alpha'])}"
        )
    if report["flags"]:
        flags = report["flags"].items()
        reasons = (f"{visible(reason)} ({number})" for reason, number in flags)
        lines.append(f"flagged, and left out of the rankings: {', '.join(reasons)}")
    for pair in report["policies"]:
        lines.append(
            f"{pair['a']} wins {_interval(pair['a_wins'])} of its pairs with {pair['b']} "
            f"({pair['num_prompts']:,} prompts, a tie counts half)"
        )
    return "\n".join(lines)


def _interval(estimate: Sequence[float | None]) -> str:
    value, low, high = estimate
    if value is None:
        return "not known yet"
    if low is None or high is None:
        return f"{value:.2f}"
    return interval_text(value, low, high, ".2f")


def save_report(report: Report, file: Path) -> None:
    """Write the report as JSON."""
    import json

    from rlhf.checkpoint.disk import write_whole

    write_whole(file, json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
