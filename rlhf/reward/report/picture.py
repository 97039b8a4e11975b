"""The picture of the reward model's report: accuracy, calibration, length and scores.

matplotlib is imported only when the picture is drawn.
"""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor

from rlhf.reward.report.measures import Report, Row, around_prompt_means, responses_by_rank

PICTURE = "report.png"
BETTER, WORSE = "#1b7837", "#c51b7d"


def signed(value: float | None) -> str:
    """Write a correlation with its sign; "-" for None."""
    return "-" if value is None else f"{value:+.2f}"


def draw(report: Report, scores: list[Tensor], rows: list[Row]) -> bytes:
    """Draw accuracy, calibration, score against length, and the scores; return a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8.5), dpi=100, layout="constrained")
    panels = figure.subplots(2, 2)
    _draw_accuracy(panels[0, 0], report)
    _draw_calibration(panels[0, 1], report)
    _draw_length(panels[1, 0], report, scores, rows)
    _draw_scores(panels[1, 1], scores, rows)
    for panel in panels.flat:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(report["summary"].replace("; ", "\n"), fontsize=11, fontweight="bold")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", pil_kwargs={"optimize": True})
    return stream.getvalue()


def _draw_accuracy(panel: Any, report: Report) -> None:
    named = [
        (name if group == name else f"{group}: {name}", piece)
        for group, pieces in report["slices"].items()
        if group != "subset"
        for name, piece in pieces.items()
    ]
    for y, (_, piece) in enumerate(named):
        ends = piece["accuracy_low"], piece["accuracy_high"]
        panel.hlines(y, *ends, color="C0", linewidth=2)
    values = [[piece[key] for _, piece in named] for key in ("accuracy", "longer_wins")]
    places = range(len(named))
    panel.plot(values[0], places, "o", color="C0")
    panel.plot(values[1], places, "|", color="black", markersize=12)
    panel.axvline(0.5, color="grey", linestyle=":", linewidth=1)
    labels = [f"{name} ({piece['num_pairs']})" for name, piece in named]
    panel.set_yticks(places, labels, fontsize=9)
    panel.invert_yaxis()
    panel.set_xlim(0, 1)
    panel.set_xlabel("dot: reward model, 95 % interval; bar: the longer one wins", fontsize=9)
    panel.set_title("Share of pairs ordered right (number of pairs)", fontsize=11)


def _draw_calibration(panel: Any, report: Report) -> None:
    bins = report["calibration"]["bins"]
    predicted, observed, counts = (
        [b[key] for b in bins] for key in ("predicted", "observed", "num_pairs")
    )
    sizes = [20 + 380 * n / sum(counts) for n in counts]
    panel.plot([0.5, 1], [0.5, 1], color="grey", linestyle=":", linewidth=1)
    panel.plot(predicted, observed, color="C0", linewidth=1)
    panel.scatter(predicted, observed, s=sizes, color="C0", alpha=0.8)
    for x, y, n in zip(predicted, observed, counts, strict=True):
        panel.annotate(str(n), (x, y), (0, 10), textcoords="offset points", ha="center", fontsize=8)
    panel.set_xlim(0.48, 1.02)
    panel.set_ylim(min(0.4, *observed) - 0.03, 1.06)
    panel.set_xlabel("predicted: sigmoid(score gap)")
    panel.set_ylabel("observed: share ordered right")
    error = report["calibration"]["ece"]
    panel.set_title(f"Calibration: expected error {error:.3f} (pairs at the points)", fontsize=11)


def _draw_length(panel: Any, report: Report, scores: list[Tensor], rows: list[Row]) -> None:
    lengths = [torch.tensor(row["lengths"]) for row in rows]
    x, y = around_prompt_means(lengths), around_prompt_means(scores)
    panel.scatter(x.tolist(), y.tolist(), s=9, color="C0", alpha=0.35, linewidths=0)
    within = report["length"]["within_prompt_spearman"]
    panel.set_xlabel("tokens, beyond the mean of the prompt's responses")
    panel.set_ylabel("score, beyond that mean")
    panel.set_title(f"Score and length: correlation within prompts {signed(within)}", fontsize=11)


def _draw_scores(panel: Any, scores: list[Tensor], rows: list[Row]) -> None:
    groups = responses_by_rank(scores, rows)
    low, high = float(groups["all"].min()), float(groups["all"].max())
    bins = torch.linspace(low, high if high > low else low + 1, 31).tolist()
    for name, color in (("best", BETTER), ("worst", WORSE)):
        values, label = groups[name].tolist(), f"{name}-ranked"
        panel.hist(values, bins=bins, density=True, alpha=0.5, color=color, label=label)
        panel.axvline(sum(values) / len(values), color=color, linewidth=1.5)
    panel.set_xlabel("raw score (lines: means)")
    panel.set_ylabel("density")
    panel.set_title("Scores of the best- and the worst-ranked responses", fontsize=11)
    panel.legend(fontsize=8)
