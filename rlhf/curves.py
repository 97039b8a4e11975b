"""Curves of a stage's `metrics.jsonl`: what matters for it, over its steps.

Every stage writes them to `curves.png`, `rlhf.compare` draws those of several runs together, and a
notebook shows them: `draw_curves({"mine": {"ppo": "runs/mine/ppo"}})`. They need matplotlib
(`pip install 'rlhf[plot]'`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.console import is_main_process, warn
from rlhf.metrics import read_jsonl

PICTURE = "curves.png"
NUM_COLUMNS = 3
# stage -> (title of a panel, metrics in it); a metric's `eval_` form is drawn with it
PANELS: dict[str, list[tuple[str, str]]] = {
    "sft": [
        ("loss, nats per token", "loss"),
        ("share of tokens guessed right", "mean_token_accuracy"),
        ("entropy, nats per token", "entropy"),
    ],
    "reward": [
        ("loss, nats per prompt", "loss"),
        ("share of pairs ranked right", "accuracy"),
        ("margin of the better response", "margin"),
    ],
    "ppo": [
        ("score", "score"),
        ("score by evaluation.scorer", "independent_score"),
        ("KL to the reference, nats per response", "kl"),
        ("response length, tokens", "response_length"),
        ("entropy, nats per token", "entropy"),
        ("explained variance of the critic", "explained_variance"),
    ],
}
# title of a panel of the frontier, metric of PPO's evaluations, name in best-of-n
FRONTIER = [
    ("score that PPO trains on", "eval_score", "proxy"),
    ("trusted score (gold, evaluation.scorer)", "eval_independent_score", "gold"),
]
Points = tuple[list[float], list[float]]  # steps, values


def draw_curves(runs: Mapping[str, Mapping[str, str | Path]]) -> Any:
    """Draw the curves of one or more runs; return a matplotlib figure.

    Args:
        runs: label of a run -> its stages, each with its directory, which holds `metrics.jsonl`.
    """
    from matplotlib.figure import Figure

    rows = {
        (label, stage): read_jsonl(Path(directory) / "metrics.jsonl", "step")
        for label, stages in runs.items()
        for stage, directory in stages.items()
    }
    grid: list[tuple[str, str, str] | None] = []
    for stage, panels in PANELS.items():
        found = [row for (_, s), own in rows.items() if s == stage for row in own]
        names = {name for row in found for name in row}
        shown = [(stage, *panel) for panel in panels if {panel[1], f"eval_{panel[1]}"} & names]
        grid += [*shown, *[None] * (-len(shown) % NUM_COLUMNS)]
    num_rows = max(1, len(grid) // NUM_COLUMNS)
    figure = Figure(figsize=(11, 2.7 * num_rows + 0.5), dpi=90)
    axes = figure.subplots(num_rows, NUM_COLUMNS, squeeze=False).flat
    for axis, panel in zip(axes, grid or [None] * NUM_COLUMNS, strict=True):
        if panel is None:
            axis.set_visible(False)
            continue
        stage, title, name = panel
        _set_style(axis, f"{stage}: {title}" if len(runs) > 1 else title)
        for number, label in enumerate(runs):
            _draw_run(axis, rows.get((label, stage), []), name, f"C{number}")
    figure.legend(handles=_legend(list(runs)), loc="upper center", ncols=4, fontsize=9)
    figure.supxlabel("optimiser steps; of PPO, updates", fontsize=9)
    inch = 1 / figure.get_figheight()
    figure.subplots_adjust(0.06, 0.6 * inch, 0.98, 1 - 0.75 * inch, wspace=0.22, hspace=0.35)
    return figure


def _set_style(axis: Any, title: str) -> None:
    axis.set_title(title, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_run(axis: Any, rows: list[dict[str, Any]], name: str, color: str) -> None:
    steps, values = _points(rows, name)
    axis.plot(steps, values, color=color, alpha=0.6, marker=".", markersize=3, linewidth=1.2)
    held_out = f"eval_{name}"
    steps, values = _points(rows, held_out)
    axis.plot(steps, values, color=color, marker="o", markersize=4, linestyle="--", linewidth=1.2)
    bars = [row for row in rows if row.get(f"{held_out}_low") is not None]
    low, high = ([row[f"{held_out}_{side}"] for row in bars] for side in ("low", "high"))
    axis.vlines([row["step"] for row in bars], low, high, color=color, alpha=0.4, linewidth=1)


def _points(rows: list[dict[str, Any]], name: str) -> Points:
    known = [row for row in rows if row.get(name) is not None]
    return [row["step"] for row in known], [row[name] for row in known]


def _legend(labels: list[str]) -> list[Any]:
    from matplotlib.lines import Line2D

    runs = [
        Line2D([], [], color=f"C{i}", linewidth=3, label=label) for i, label in enumerate(labels)
    ]
    held_out = Line2D([], [], color="grey", marker="o", linestyle="--", label="held-out, 95 %")
    return [*runs, Line2D([], [], color="grey", label="training"), held_out]


def draw_frontier(rows: list[dict[str, Any]], best_of_n: list[dict[str, Any]] | None = None) -> Any:
    """Draw scores against the square root of the KL to the reference, a panel for each
    scorer; return a matplotlib figure, or None where there are fewer than two points.

    Args:
        rows: of PPO's `metrics.jsonl`; those of an evaluation are drawn.
        best_of_n: of `diagnosis.json`: `kl`, and `proxy` and `gold` with their intervals.

    Source: Gao et al. 2022 (arXiv 2210.10760), figure 1.
    """
    from matplotlib.figure import Figure

    best, points = best_of_n or [], [row for row in rows if row.get("eval_kl") is not None]
    panels = [
        (title, metric, name)
        for title, metric, name in FRONTIER
        if any(row.get(metric) is not None for row in points) or best
    ]
    if len(points) < 2 and len(best) < 2:
        return None
    figure = Figure(figsize=(4.6 * len(panels) + 0.6, 3.4), dpi=90, layout="constrained")
    for axis, (title, metric, name) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        own = [row for row in points if row.get(metric) is not None]
        if own:
            _draw_bars(axis, [_bar(row, metric) for row in own], "PPO, held-out prompts", "C0")
        if best:
            bars = [
                (row["kl"], *(row[name][end] for end in ("mean", "low", "high"))) for row in best
            ]
            _draw_bars(axis, bars, "best of n of the policy before PPO", "C1")
        _set_style(axis, title)
        axis.legend(fontsize=8, frameon=False)
    figure.supxlabel("square root of the KL to the reference, nats per response", fontsize=9)
    return figure


def _bar(row: dict[str, Any], metric: str) -> tuple[float, ...]:
    """KL, mean, and the ends of the interval where there is one."""
    ends = (row.get(f"{metric}_{end}") for end in ("low", "high"))
    return row["eval_kl"], row[metric], *(row[metric] if end is None else end for end in ends)


def _draw_bars(axis: Any, bars: list[tuple[float, ...]], label: str, color: str) -> None:
    distance = [max(0.0, bar[0]) ** 0.5 for bar in bars]
    axis.plot(distance, [bar[1] for bar in bars], "o-", color=color, markersize=4, label=label)
    low, high = ([bar[i] for bar in bars] for i in (2, 3))
    axis.vlines(distance, low, high, color=color, alpha=0.4, linewidth=1)


def plot_hint(picture: str) -> str:
    """What to install so that a picture can be drawn; empty where matplotlib is there."""
    if importlib.util.find_spec("matplotlib"):
        return ""
    return f"{picture} needs the matplotlib package: pip install 'rlhf[plot]'"


def write_curves(directory: Path, stage: str, label: str) -> None:
    """Write the curves of one stage into its directory, where matplotlib is there."""
    is_ready = not plot_hint(PICTURE) and (directory / "metrics.jsonl").is_file()
    if is_main_process() and is_ready:
        try:
            draw_curves({label: {stage: directory}}).savefig(directory / PICTURE)
        except OSError as error:  # a full disk stops the run where it writes its result
            warn(f"{directory / PICTURE} cannot be written: {error}")
