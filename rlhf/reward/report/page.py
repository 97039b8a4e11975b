"""The reward model's report for people: in the terminal and as Markdown."""

from __future__ import annotations

import importlib.util
import json
import textwrap
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from rlhf.console import say, table, warn
from rlhf.reward.report.measures import LENGTH_MATCH, Report, Row
from rlhf.reward.report.picture import PICTURE, draw, signed

HEADER = ("held-out pairs", "accuracy", "95 % interval", "longer wins", "pairs", "prompts")


def show_report(report: Report, saved: str, files: Iterable[str]) -> None:
    """Print the report with its warnings, and where it was saved.

    Args:
        files: names of the files that were written.
    """
    say("\n" + terminal_text(report))
    for warning in report["warnings"]:
        warn(warning)
    say(f"\nsaved {saved}")
    if PICTURE not in files:
        say(f"{PICTURE} needs the matplotlib package: pip install 'rlhf[plot]'")


def terminal_text(report: Report) -> str:
    """Lay out the report in about twenty lines; `report.md` also has subsets and mistakes."""
    groups = {name: group for name, group in report["slices"].items() if name != "subset"}
    return "\n".join([table(_rows(groups), HEADER), *_facts(report)])


def _rows(groups: dict[str, dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [
        (
            name if group == name else f"{group}: {name}",
            f"{piece['accuracy']:.3f}",
            f"{piece['accuracy_low']:.3f} to {piece['accuracy_high']:.3f}",
            f"{piece['longer_wins']:.3f}",
            piece["num_pairs"],
            piece["num_prompts"],
        )
        for group, pieces in groups.items()
        for name, piece in pieces.items()
    ]


def _facts(report: Report) -> list[str]:
    order, bins, length = report["order"], report["calibration"], report["length"]
    best, worst = report["scores"]["best"], report["scores"]["worst"]
    within = [length["within_prompt_pearson"], length["within_prompt_spearman"]]
    lines = [
        f"best response scored highest: {order['top1']:.2f} of prompts (at random "
        f"{order['top1_chance']:.2f}); Kendall's tau {order['kendall_tau']:.2f}",
        f"calibration: expected error {bins['ece']:.3f}, Brier score {bins['brier']:.3f} (a coin "
        "has 0.25)",
        "score and length: Pearson {}, Spearman {}; within prompts {}, {}".format(
            *map(signed, (length["pearson"], length["spearman"], *within))
        ),
        f"raw scores: best-ranked {best['mean']:.3f} +- {best['std']:.3f}, worst-ranked "
        f"{worst['mean']:.3f} +- {worst['std']:.3f}",
    ]
    for other in report.get("agreement", []):
        lines.append(
            f"agreement with {other['model']} (accuracy {other['accuracy']:.3f}): "
            f"{other['ordered_alike']:.3f} of {other['num_pairs']} pairs ordered alike, Pearson "
            f"within prompts {signed(other['pearson'])}"
        )
    return lines


def page_files(report: Report, scores: list[Tensor], rows: list[Row]) -> dict[str, bytes]:
    """Make the files of the report, by name; without matplotlib there is no picture.

    Args:
        scores, rows: the arguments of `make_report`, for the picture.
    """
    picture = {}
    if importlib.util.find_spec("matplotlib"):
        picture[PICTURE] = draw(report, scores, rows)
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return {
        # "replace": half a surrogate pair, if the data has one, cannot be written
        "report.json": text.encode("utf-8", "replace"),
        "report.md": markdown(report, bool(picture)).encode("utf-8", "replace"),
    } | picture


# --- Markdown -------------------------------------------------------------------------------------


def markdown(report: Report, has_picture: bool) -> str:
    """Lay out everything as a Markdown page."""
    lines = ["# Reward model report", "", f"Held-out rows: {report['data']}", ""]
    lines += [report["summary"][0].upper() + report["summary"][1:] + ".", ""]
    lines += [f"- **Warning:** {warning}" for warning in report["warnings"]]
    lines += ["- No warnings."] if not report["warnings"] else []
    lines += ["", *(f"- {fact[0].upper()}{fact[1:]}." for fact in _facts(report))]
    if has_picture:
        lines += ["", f"![accuracy, calibration, length and scores]({PICTURE})"]
    lines += [
        "",
        "## Accuracy",
        "",
        "Share of pairs whose better response scores higher, a tie half; the interval resamples "
        f"prompts. Similar length: the shorter response has at least {LENGTH_MATCH} of the "
        "longer's tokens.",
        "",
        *_table(_rows(report["slices"]), HEADER),
        "",
        "## Calibration",
        "",
        "Of the pairs whose higher score should win with probability sigmoid(score gap), the share "
        "that does.",
        "",
        *_table(
            [
                (f"{b['predicted']:.3f}", f"{b['observed']:.3f}", b["num_pairs"])
                for b in report["calibration"]["bins"]
            ],
            ("predicted", "observed", "pairs"),
        ),
        "",
        "## Raw scores",
        "",
        *_table(
            [
                (name, *(f"{value:.3f}" for value in values.values()))
                for name, values in report["scores"].items()
            ],
            ("responses", *next(iter(report["scores"].values()))),
        ),
        "",
        "## Worst mistakes",
        "",
        *(_mistakes(report) or ["None: every pair is ordered right."]),
    ]
    return "\n".join(lines) + "\n"


def _table(rows: list[tuple[Any, ...]], header: tuple[str, ...]) -> list[str]:
    """A Markdown table; a bar in a cell would end it."""
    cells = [[str(value).replace("|", "\\|") for value in row] for row in rows]
    lines = [list(header), ["---", *["---:"] * (len(header) - 1)], *cells]
    return [f"| {' | '.join(line)} |" for line in lines]


def _mistakes(report: Report) -> list[str]:
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
            wrapped = textwrap.wrap(text, 92) or [""]
            lines += [f"    {title}:", "", *(f"        {line}" for line in wrapped), ""]
    return lines[:-1]


def _title(name: str, side: dict[str, Any]) -> str:
    return f"{name} (rank {side['rank']}, score {side['score']:.3f}, {side['length']} tokens)"
