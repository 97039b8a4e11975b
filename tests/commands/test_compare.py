"""Curves of a stage, and the command `rlhf.compare`, on runs that only have their written files.

Run: python -m pytest tests/commands/test_compare.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf.compare import CompareOptions, run
from rlhf.config import PPOConfig, PPOStageConfig, SFTStageConfig, save_config
from rlhf.curves import PANELS, draw_curves, write_curves
from rlhf.metrics import METRICS
from rlhf.option_parser import run_command

SFT_ROWS = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "eval_loss": 2.5}]
PPO_ROWS = [
    {"step": 0, "eval_score": -1.0, "eval_score_low": -1.5, "eval_score_high": -0.5},
    {"step": 1, "score": -0.5, "kl": 0.1},
    {"step": 2, "score": None, "kl": 0.2},
    {"step": 2, "eval_score": 0.5, "eval_score_low": 0.0, "eval_score_high": 1.0},
]


def write_run(runs: Path, name: str, seed: int, kl_coef: float, finished: bool = True) -> Path:
    """The files of an SFT and a PPO stage that `compare` reads."""
    ppo = PPOStageConfig(runs_dir=str(runs), run_name=name, seed=seed)
    ppo.ppo = PPOConfig(kl_coef=kl_coef)
    ppo.model.path = str(runs / name / "sft/final")
    for stage, config, rows in (
        ("sft", SFTStageConfig(runs_dir=str(runs), run_name=name), SFT_ROWS),
        ("ppo", ppo, PPO_ROWS),
    ):
        directory = runs / name / stage
        directory.mkdir(parents=True)
        save_config(config, directory / "config.yaml")
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / "metrics.jsonl").write_text(lines)
        if finished:
            (directory / "final").mkdir()
            metrics = {"eval_loss": 2.5} if stage == "sft" else {"eval_score": 0.5 + seed}
            record = {"metrics": metrics | {"eval_kl": 1.0, "eval_kl_low": 0.5}}
            (directory / "final/rlhf.json").write_text(json.dumps(record))
    return runs / name


@pytest.fixture
def command(capsys):
    """Run the command: (exit status, stdout, stderr)."""

    def run_it(*arguments):
        return run_command("", CompareOptions, run, list(arguments)), *capsys.readouterr()

    return run_it


def lines_of(panel) -> list[tuple[list, list]]:
    """Steps and values of the lines of a panel that have points."""
    data = [(list(line.get_xdata()), list(line.get_ydata())) for line in panel.get_lines()]
    return [points for points in data if points[0]]


def test_curves_show_training_and_held_out_values_over_steps(tmp_path):
    run = write_run(tmp_path, "a", 1, 0.1)
    figure = draw_curves({"a": {"sft": run / "sft", "ppo": run / "ppo"}})
    shown = {axis.get_title(): axis for axis in figure.axes if axis.get_visible()}
    titles = ["loss, nats per token", "score", "KL to the reference, nats per response"]
    assert list(shown) == titles
    assert lines_of(shown[titles[0]]) == [([1, 2], [3.0, 2.0]), ([2], [2.5])]
    assert lines_of(shown["score"]) == [([1], [-0.5]), ([0, 2], [-1.0, 0.5])]
    bars = [segment.tolist() for segment in shown["score"].collections[0].get_segments()]
    assert bars == [[[0, -1.5], [0, -0.5]], [[2, 0.0], [2, 1.0]]]


def test_every_metric_of_a_panel_exists():
    names = {name for panels in PANELS.values() for _, name in panels}
    assert all(METRICS.keys() & {name, f"eval_{name}"} for name in names)


def test_without_matplotlib_a_stage_writes_no_curves(tmp_path, monkeypatch):
    directory = write_run(tmp_path, "a", 1, 0.1) / "ppo"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    write_curves(directory, "ppo", "a")
    assert not (directory / "curves.png").exists()


def test_a_table_shows_the_settings_that_differ_and_the_final_metrics(command, tmp_path):
    one, two = write_run(tmp_path, "one", 1, 0.1), write_run(tmp_path, "two", 2, 0.25)
    out = tmp_path / "new/both.png"
    status, output, errors = command(f"path=[{one},{two}/]", f"out={out}")
    assert (status, errors) == (0, "")
    header, _, *rows = output.split("\n\n")[0].splitlines()
    assert header.split() == ["one", "two"]
    assert [line.rsplit(maxsplit=2) for line in rows] == [
        ["ppo.seed", "1", "2"],
        ["ppo.ppo.kl_coef", "0.1", "0.25"],
        ["sft: eval_loss", "2.5", "2.5"],
        ["sft: eval_kl", "1", "1"],
        ["ppo: eval_score", "1.5", "2.5"],
        ["ppo: eval_kl", "1", "1"],
    ]
    assert output.endswith(f"\nsaved {out}\n")
    assert out.read_bytes().startswith(b"\x89PNG")


def test_a_run_without_a_stage_or_an_end_is_compared_as_far_as_it_goes(command, tmp_path):
    one, two = write_run(tmp_path, "one", 1, 0.1), write_run(tmp_path, "two", 1, 0.1, False)
    arguments = f"path=[{one / 'sft'},{two / 'ppo'}]", f"out={tmp_path}/c.png"
    status, output, _ = command(*arguments)
    rows = output.split("\n\n")[0].splitlines()[2:]
    assert [line.rsplit(maxsplit=2) for line in rows] == [
        ["sft: eval_loss", "2.5", "-"],
        ["sft: eval_kl", "1", "-"],
        ["ppo: eval_score", "-", "0.5"],
        ["ppo: not finished, at step", "-", "2"],
    ]
    assert status == 0 and str(two / "ppo") in output


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{runs}/nowhere", "path={runs}/nowhere: no such directory"),
        ("{runs}/oen", "path={runs}/oen: no such directory. Did you mean {runs}/one"),
        ("{runs}", "did you mean path=[{runs}/one,{runs}/two]?"),
        ("", "path is missing; add path=<runs or stages to compare, such as [runs/a,runs/b]>"),
    ],
)
def test_what_is_no_run_is_refused(command, tmp_path, path, message):
    for name in ("one", "two"):
        write_run(tmp_path, name, 1, 0.1)
    status, output, errors = command(f"path={path.format(runs=tmp_path)}", f"out={tmp_path}/c.png")
    assert (status, output) == (2, "") and message.format(runs=tmp_path) in errors
    status, _, errors = command(f"path={tmp_path}/one", f"out={tmp_path}/c.xyz")
    assert status == 2 and "c.xyz cannot be written: " in errors


@pytest.mark.parametrize("content", ["[1]\n", '{"name": 1}\n'])
@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "final/rlhf.json"])
def test_a_damaged_file_is_named(command, tmp_path, name, content):
    write_run(tmp_path, "a", 1, 0.1), write_run(tmp_path, "b", 2, 0.2, finished="final" in name)
    (tmp_path / "b/ppo" / name).write_text(content)
    status, _, errors = command(f"path=[{tmp_path}/a,{tmp_path}/b]")
    assert status == 2 and f"b/ppo/{name} is damaged" in errors and errors.count("\n") == 1
