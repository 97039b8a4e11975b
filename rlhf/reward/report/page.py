"""The reward model's report for people: in the terminal, as Markdown, and as a picture.

matplotlib is imported only when the picture is drawn.
"""

from __future__ import annotations

import io
import json
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.console import say, table, warn
from rlhf.curves import plot_hint
from rlhf.metrics import read_json
from rlhf.reward.report.measures import (
    LENGTH_MATCH,
    Report,
    Row,
    around_prompt_means,
    responses_by_rank,
)
from rlhf.web.render import visible

HEADER = ("held-out pairs", "accuracy", "95 % interval", "longer wins", "pairs", "prompts")
PICTURE = "report.png"
BETTER, WORSE = "#1b7837", "#c51b7d"


def show_report(report: Report, saved: str, files: Iterable[str]) -> None:
    """Print the report with its warnings, and where its files (their names) were saved."""
    say("\n" + terminal_text(report))
    for warning in report["warnings"]:
        warn(warning)
    say(f"\nsaved {saved}")
    if PICTURE not in files:
        say(plot_hint(PICTURE))


def page_files(report: Report, scores: list[Tensor], rows: list[Row]) -> dict[str, bytes]:
    """Make the files of the report, by name; without matplotlib there is no picture."""
    picture = {}
    if not plot_hint(PICTURE):
        picture[PICTURE] = draw(report, scores, rows)
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return {
        # "replace": half a surrogate pair, if the data has one, cannot be written
        "report.json": text.encode("utf-8", "replace"),
        "report.md": markdown(report, bool(picture)).encode("utf-8", "replace"),
    } | picture


def terminal_text(report: Report) -> str:
    """Lay out the report in about twenty lines; `report.md` also has subsets and mistakes."""
    return "\n".join([table(_rows(_slices(report)), HEADER), *_facts(report)])


def stored_text(final: Path) -> str:
    """The report of a finished stage, as `terminal_text`; empty if it has none."""
    file = final / "report.json"
    return terminal_text(read_json(file)) if file.is_file() else ""


def _slices(report: Report, subsets: bool = False) -> list[tuple[str, dict[str, Any]]]:
    """The slices with their names: "all", "length: similar", ..."""
    return [
        (name if group == name else f"{group}: {name}", piece)
        for group, pieces in report["slices"].items()
        for name, piece in pieces.items()
        if subsets or group != "subset"
    ]


def _rows(slices: list[tuple[str, dict[str, Any]]]) -> list[tuple[Any, ...]]:
    return [
        (
            name,
            f"{piece['accuracy']:.3f}",
            f"{piece['accuracy_low']:.3f} to {piece['accuracy_high']:.3f}",
            f"{piece['longer_wins']:.3f}",
            piece["num_pairs"],
            piece["num_prompts"],
        )
        for name, piece in slices
    ]


def _facts(report: Report) -> list[str]:
    order, bins, length = report["order"], report["calibration"], report["length"]
    best, worst = report["scores"]["best"], report["scores"]["worst"]
    kinds = ("pearson", "spearman", "within_prompt_pearson", "within_prompt_spearman")
    lines = [
        f"best response scored highest: {order['top1']:.2f} of prompts (at random "
        f"{order['top1_chance']:.2f}); Kendall's tau {order['kendall_tau']:.2f}",
        f"calibration: expected error {bins['ece']:.3f}, Brier score {bins['brier']:.3f} (a coin "
        "has 0.25)",
        "score and length: Pearson {}, Spearman {}; within prompts {}, {}".format(
            *(_signed(length[kind]) for kind in kinds)
        ),
        f"raw scores: best-ranked {best['mean']:.3f} +- {best['std']:.3f}, worst-ranked "
        f"{worst['mean']:.3f} +- {worst['std']:.3f}",
    ]
    for other in report.get("agreement", []):
        lines.append(
            f"agreement with {other['model']} (accuracy {other['accuracy']:.3f}): "
            f"{other['ordered_alike']:.3f} of {other['num_pairs']} pairs ordered alike, Pearson "
            f"within prompts {_signed(other['pearson'])}"
        )
    return lines


def _signed(value: float | None) -> str:
    """A correlation with its sign; "-" for None."""
    return "-" if value is None else f"{value:+.2f}"


# --- Markdown -------------------------------------------------------------------------------------

PAGE = """# Reward model report

Held-out rows: {data}

{summary}.

{warnings}

{facts}
{picture}
## Accuracy

Share of pairs whose better response scores higher, a tie half; the interval resamples prompts.
Similar length: the shorter response has at least {match} of the longer's tokens.

{accuracy}

## Calibration

Of the pairs whose higher score should win with probability sigmoid(score gap), the share that does.

{calibration}

## Raw scores

{scores}

## Worst mistakes

{mistakes}
"""


def markdown(report: Report, has_picture: bool) -> str:
    """Lay out everything as a Markdown page."""
    bins, scores = report["calibration"]["bins"], report["scores"]
    warnings = [f"- **Warning:** {warning}" for warning in report["warnings"]]
    points = [(f"{b['predicted']:.3f}", f"{b['observed']:.3f}", b["num_pairs"]) for b in bins]
    spread = [(name, *(f"{x:.3f}" for x in values.values())) for name, values in scores.items()]
    return PAGE.format(
        data=report["data"],
        summary=report["summary"][0].upper() + report["summary"][1:],
        warnings="\n".join(warnings or ["- No warnings."]),
        facts="\n".join(f"- {fact[0].upper()}{fact[1:]}." for fact in _facts(report)),
        picture=f"\n![accuracy, calibration, length and scores]({PICTURE})\n"
        if has_picture
        else "",
        match=LENGTH_MATCH,
        accuracy=_table(_rows(_slices(report, subsets=True)), HEADER),
        calibration=_table(points, ("predicted", "observed", "pairs")),
        scores=_table(spread, ("responses", *scores["all"])),
        mistakes=_mistakes(report) or "None: every pair is ordered right.",
    )


def _table(rows: list[tuple[Any, ...]], header: tuple[str, ...]) -> str:
    """A Markdown table; a bar in a cell would end it."""
    cells = [[str(value).replace("|", "\\|") for value in row] for row in rows]
    lines = [list(header), ["---", *["---:"] * (len(header) - 1)], *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _mistakes(report: Report) -> str:
    """Lay out the texts as indented code, which Markdown leaves unchanged."""
    lines: list[str] = []
    for number, mistake in enumerate(report["mistakes"], 1):
        better, worse = mistake["better"], mistake["worse"]
        gap = worse["score"] - better["score"]
        lines += [f"{number}. The worse response scores {gap:.3f} higher", ""]
        for title, text in (
            ("prompt", mistake["prompt"]),
            (_title("better", better), better["response"]),
            (_title("worse", worse), worse["response"]),
        ):
            wrapped = textwrap.wrap(visible(text), 92) or [""]
            lines += [f"    {title}:", "", *(f"        {line}" for line in wrapped), ""]
    return "\n".join(lines[:-1])


def _title(name: str, side: dict[str, Any]) -> str:
    return f"{name} (rank {side['rank']}, score {side['score']:.3f}, {side['length']} tokens)"


# --- Picture --------------------------------------------------------------------------------------


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
    slices = _slices(report)
    for y, (_, piece) in enumerate(slices):
        panel.hlines(y, piece["accuracy_low"], piece["accuracy_high"], color="C0", linewidth=2)
        panel.plot(piece["accuracy"], y, "o", color="C0")
        panel.plot(piece["longer_wins"], y, "|", color="black", markersize=12)
    panel.axvline(0.5, color="grey", linestyle=":", linewidth=1)
    labels = [f"{name} ({piece['num_pairs']})" for name, piece in slices]
    panel.set_yticks(range(len(slices)), labels, fontsize=9)
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
    panel.set_title(f"Score and length: correlation within prompts {_signed(within)}", fontsize=11)


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
