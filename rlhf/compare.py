"""Compare runs: python -m rlhf.compare path=[runs/a,runs/b]

It prints one table, of the settings that differ between the runs' stages and of their final
metrics, and draws their curves into one picture. A path is a run (runs/a) or one of its stages
(runs/a/ppo). `<run>` in a setting is the directory of the run itself.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config import CONFIG_FILE, STAGES, InputError, nearest, written_settings, yaml_scalar
from rlhf.console import say, table
from rlhf.curves import draw_curves, plot_hint
from rlhf.metrics import read_json, read_jsonl
from rlhf.option_parser import run_command

METRICS = "metrics.jsonl"
# settings that differ between any two runs, or say how a run was started
OWN = {"run_name", "runs_dir", "resume", "overwrite"}
Stages = dict[str, Path]


@dataclass
class CompareOptions:
    """The command line."""

    path: list[str]
    """Runs or stages to compare, such as [runs/a,runs/b]."""
    out: str = "compare.png"
    """Picture to write; needs matplotlib."""


def run(options: CompareOptions) -> None:
    """Print the table and draw the picture."""
    runs = {path: find_stages(Path(path).expanduser()) for path in options.path}
    labels = _labels(list(runs))
    named = dict(zip(labels, runs.values(), strict=True))
    rows = [*_differences(named), *_results(named)]
    say(table(rows, ("", *labels)))
    if hint := plot_hint(options.out):
        say(f"\n{hint}")
        return
    out = Path(options.out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        draw_curves(named).savefig(out)
    except (OSError, ValueError) as error:  # ValueError: a suffix that matplotlib does not know
        raise InputError(f"out={out} cannot be written: {error}; give a .png file") from error
    say(f"\nsaved {out}")


def find_stages(path: Path) -> Stages:
    """The directories of a run's stages, by stage."""
    path = path.parent if path.name == "final" else path
    if (path / METRICS).is_file() and path.name in STAGES:
        return {path.name: path}
    found = {stage: path / stage for stage in STAGES if (path / stage / METRICS).is_file()}
    if found:
        return found
    if not path.is_dir():
        others = {str(file.parents[1]) for file in path.parent.glob(f"*/*/{METRICS}")}
        raise InputError(f"path={path}: no such directory.{nearest(str(path), others)}")
    inside = sorted({file.parents[1] for file in path.glob(f"*/*/{METRICS}")})
    hint = f"; did you mean path=[{','.join(map(str, inside[:8]))}]?" if inside else ""
    expected = " or ".join(f"{stage}/{METRICS}" for stage in STAGES)
    raise InputError(f"path={path} is not a run: it has no {expected}{hint}")


def _labels(paths: list[str]) -> list[str]:
    """Short names of the runs; the paths where two have the same name."""
    names = [Path(path).name for path in paths]
    are_distinct = len(set(names)) == len(names) and not set(names) & {*STAGES, "final"}
    return names if are_distinct else paths


def _differences(runs: dict[str, Stages]) -> Iterator[list[Any]]:
    for stage in STAGES:
        settings = [
            _settings(stages[stage]) if stage in stages else None for stages in runs.values()
        ]
        given = [values for values in settings if values is not None]
        for key in dict.fromkeys(key for values in given for key in values):
            texts = [None if values is None else values.get(key, "-") for values in settings]
            if len({text for text in texts if text is not None}) > 1:
                yield [f"{stage}.{key}", *("-" if text is None else text for text in texts)]


def _settings(directory: Path) -> dict[str, str]:
    """The settings of a stage, as `key.of.a.setting`."""
    flat = written_settings(directory / CONFIG_FILE)
    run = str(Path(flat["runs_dir"]) / flat["run_name"])
    return {
        key: str(yaml_scalar(value)).replace(run, "<run>")
        for key, value in flat.items()
        if key not in OWN
    }


def _results(runs: dict[str, Stages]) -> Iterator[list[Any]]:
    for stage in STAGES:
        found = [_metrics(stages[stage]) if stage in stages else {} for stages in runs.values()]
        for name in dict.fromkeys(name for metrics in found for name in metrics):
            yield [f"{stage}: {name}", *(metrics.get(name) for metrics in found)]


def read_result(file: Path) -> dict[str, Any]:
    """Read the `rlhf.json` of a finished stage, which has `metrics`."""
    record = read_json(file)
    if not isinstance(record.get("metrics"), dict):
        raise InputError(f"{file} is damaged: it has no metrics; run the stage again")
    return record


def _metrics(directory: Path) -> dict[str, Any]:
    """The metrics of `final/`; of a stage that is not finished, its latest held-out ones."""
    record = directory / "final/rlhf.json"
    if record.is_file():
        metrics = read_result(record)["metrics"]
    else:
        rows = read_jsonl(directory / METRICS, "step")
        metrics = latest_metrics(rows) | {"not finished, at step": rows[-1]["step"] if rows else 0}
    return {n: v for n, v in metrics.items() if not n.endswith(("_low", "_high"))}


def latest_metrics(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The latest held-out metrics of a stage that has not finished."""
    return {name: row[name] for row in rows for name in row if name.startswith("eval_")}


if __name__ == "__main__":
    raise SystemExit(run_command(str(__doc__), CompareOptions, run, sys.argv[1:]))
