"""Write one page about a run: python -m rlhf.report run_name=mine

The page is a single HTML file that needs no network: results of each stage, curves, answers before
and after, the reward model's report, score against KL, warnings, timings and settings. It reads the
files of the run alone and needs no model. A run that is still training has a page too.
"""

from __future__ import annotations

import base64
import io
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from rlhf.checkpoint.disk import write_whole
from rlhf.compare import METRICS, OWN, Stages, find_stages, latest_metrics, read_result
from rlhf.config import (
    CONFIG_FILE,
    STAGES,
    InputError,
    dotted,
    plain_values,
    written_settings,
    yaml_scalar,
)
from rlhf.console import interval_text, say
from rlhf.curves import draw_curves, draw_frontier, plot_hint
from rlhf.data import whole_characters
from rlhf.metrics import METRICS as MEANINGS
from rlhf.metrics import read_json, read_jsonl
from rlhf.option_parser import run_command
from rlhf.rubrics import as_dialogue
from rlhf.web.render import visible

TITLES = {"sft": "Supervised fine-tuning", "reward": "Reward model", "ppo": "PPO"}
OTHERS = {"update": "update that became final/"}  # results that are no metrics
MAX_ANSWERS = 8  # shown of a stage
MAX_WARNINGS = 20
DIAGNOSIS = "diagnosis/diagnosis.json"  # of rlhf.diagnose, in the directory of the run


@dataclass
class ReportOptions:
    """The command line."""

    run_name: str | None = None
    """Run in runs_dir (default: path)."""
    path: str | None = None
    """Directory of a run, such as runs/mine."""
    runs_dir: str = "runs"
    """Folder of the runs."""
    out: str | None = None
    """Page to write (default: report.html in the directory of the run)."""


@dataclass
class Answer:
    """Answers to one prompt, at the first and at the shown step."""

    prompt: str
    before: dict[str, Any] | None
    after: dict[str, Any]


def run(options: ReportOptions) -> None:
    """Write the page."""
    if (options.run_name is None) == (options.path is None):
        raise InputError("give run_name=<run>, or path=<directory of a run>")
    directory = Path(options.path or Path(options.runs_dir) / str(options.run_name)).expanduser()
    stages = find_stages(directory)
    out = Path(options.out).expanduser() if options.out else directory / "report.html"
    text = page(directory.resolve().name, stages)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, whole_characters(text))
    except OSError as error:
        raise InputError(f"out={out} cannot be written: {error.strerror}") from error
    say(f"saved {out}, {out.stat().st_size / 1024:.0f} KiB: open it in a browser")
    if hint := plot_hint("pictures in the page"):
        say(hint)


def page(name: str, stages: Stages) -> str:
    """Return the page of a run as HTML; everything that a model wrote in it is escaped, and has no
    hidden characters."""
    environment = Environment(
        loader=PackageLoader("rlhf.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    template = environment.get_template("page.html")
    sections = [section(stage, directory) for stage, directory in stages.items()]
    return template.render(name=name, sections=sections)


def section(stage: str, directory: Path) -> dict[str, Any]:
    """Collect what the page shows of a stage."""
    rows = read_jsonl(directory / METRICS, "step")
    record = _read_record(directory)
    frontier = frontier_picture(rows, directory) if stage == "ppo" else None
    report, can_draw = directory / "final/report.png", rows and not plot_hint("")
    return {
        "stage": stage,
        "title": TITLES[stage],
        "directory": str(directory),
        "record": record,
        "step": rows[-1]["step"] if rows else 0,
        "results": list(results(record["metrics"] if record else latest_metrics(rows))),
        "curves": _picture(draw_curves({stage: {stage: directory}})) if can_draw else None,
        "frontier": frontier,
        "report": _report_text(directory / "final") if stage == "reward" else "",
        "report_picture": _uri(report.read_bytes(), "png") if report.is_file() else None,
        "answers": answers(directory, record),
        "warnings": read_jsonl(directory / "watchdog.jsonl")[-MAX_WARNINGS:],
        "timings": _timings(read_jsonl(directory / "timings.jsonl")),
        "changed": list(changed_settings(stage, directory)),
        "settings": (directory / CONFIG_FILE).read_text(encoding="utf-8"),
    }


# --- Numbers and settings -------------------------------------------------------------------------


def results(metrics: dict[str, Any]) -> Iterable[tuple[str, str, str]]:
    """Yield name, value with its interval, and meaning of each metric."""
    for name, value in metrics.items():
        if name.endswith(("_low", "_high")) or not isinstance(value, int | float):
            continue
        low, high = (metrics.get(f"{name}_{side}") for side in ("low", "high"))
        text = f"{value:.4g}" if isinstance(value, float) else f"{value:,}"
        if low is not None and high is not None:
            text = interval_text(value, low, high)
        yield name, text, MEANINGS.get(name) or OTHERS.get(name, "")


def changed_settings(stage: str, directory: Path) -> Iterable[tuple[str, str, str]]:
    """Yield each setting that differs from its default, with both values."""
    defaults = dotted(plain_values(STAGES[stage]()))
    for key, value in written_settings(directory / CONFIG_FILE).items():
        if key not in OWN and value != defaults.get(key):
            yield key, str(yaml_scalar(value)), str(yaml_scalar(defaults.get(key)))


def _read_record(directory: Path) -> dict[str, Any] | None:
    file = directory / "final/rlhf.json"
    return read_result(file) if file.is_file() else None


def _report_text(final: Path) -> str:
    """The reward model's report in words."""
    from rlhf.reward.report.page import stored_text  # it imports torch

    return stored_text(final)


def _timings(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Sums of the seconds of each phase, and the mean rate."""
    rows = [row for row in rows if "seconds" in row]  # others have counts alone
    if not rows:
        return {}
    found = {"in all": f"{rows[-1]['seconds']:,.0f} s"}
    for name, title in (("collect_seconds", "rollouts"), ("optimize_seconds", "optimiser steps")):
        if name in rows[-1]:
            found[title] = f"{sum(row.get(name, 0) for row in rows):,.0f} s"
    rates = [row["tokens_per_second"] for row in rows if row.get("tokens_per_second")]
    return found | ({"tokens per second": f"{sum(rates) / len(rates):,.0f}"} if rates else {})


# --- Answers --------------------------------------------------------------------------------------


def answers(directory: Path, record: dict[str, Any] | None) -> list[Answer]:
    """Pair the answers to the first prompts before training with those of the result."""
    rows = read_jsonl(directory / "samples.jsonl", "prompt")
    if not rows:
        return []
    steps = [row.get("step", 0) for row in rows]
    shown = (record or {}).get("metrics", {}).get("update", max(steps))
    by_step: dict[int, dict[str, dict[str, Any]]] = {}
    for step, row in zip(steps, rows, strict=True):
        by_step.setdefault(step, {}).setdefault(as_dialogue(row["prompt"]), row)
    before = by_step[min(steps)] if min(steps) < shown else {}
    after = by_step.get(shown) or by_step[max(steps)]
    found = [Answer(prompt, before.get(prompt), row) for prompt, row in after.items()]
    return found[:MAX_ANSWERS]


# --- Pictures -------------------------------------------------------------------------------------


def frontier_picture(rows: list[dict[str, Any]], directory: Path) -> str | None:
    """Draw the held-out scores against the square root of the KL, with best-of-n where the run was
    diagnosed; None if there are too few points."""
    if plot_hint(""):
        return None
    file = directory.parent / DIAGNOSIS
    found = read_json(file) if file.is_file() else {}
    figure = draw_frontier(rows, found.get("best_of_n") if found.get("gold") else None)
    return _picture(figure) if figure else None


def _picture(figure: Any) -> str:
    """A figure as the source of an <img>; its background is that of the page."""
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", transparent=True)
    return _uri(stream.getvalue(), "svg+xml")


def _uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


if __name__ == "__main__":
    raise SystemExit(run_command(str(__doc__), ReportOptions, run, sys.argv[1:]))
