"""Commands whose disk is full: one line each, nothing half written, and the same command goes on.

Runs on a full disk are tested in tests/checkpoint/test_disk.py, rankings in
tests/rank/test_unusable_stores.py. Run: python -m pytest tests/commands/test_full_disks.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.chat_models import random_policy, write
from helpers.disks import largest_file
from helpers.endpoints import Answers, running
from helpers.judging import chat
from helpers.scorers import policy_tokenizer, write_reward_model

from rlhf.chat.rankings import Rankings
from rlhf.config import SFTStageConfig, save_config
from rlhf.evaluate.__main__ import main as evaluate
from rlhf.export import ExportOptions, export
from rlhf.generate.__main__ import main as generate
from rlhf.option_parser import run_command
from rlhf.report.__main__ import ReportOptions, run
from rlhf.score import main as score

FULL = "File too large; raise the limit on the size of a file (ulimit -f), then give the same"


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("policy") / "final", random_policy())


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory) -> str:
    return write_reward_model(tmp_path_factory.mktemp("reward"), policy_tokenizer(), seed=1)


def rows_of(name: str, rows: list[dict]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


def files() -> set[str]:
    found = (path for path in Path().rglob("*") if path.is_file())
    return {str(path) for path in found if path.suffix != ".lock" and path.parts[0] != "cache"}


def refused(capsys, size: int, command, *arguments) -> str:
    """What a command says where no file may be larger than `size` bytes."""
    capsys.readouterr()
    with largest_file(size):
        assert command(list(arguments)) == 2
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error: ")]
    return line


def exported(arguments: list[str]) -> int:
    return run_command("", ExportOptions, export, arguments)


def reported(arguments: list[str]) -> int:
    return run_command("", ReportOptions, run, arguments)


def test_an_export_leaves_nothing_and_can_be_given_again(policy, capsys):
    line = refused(capsys, 20_000, exported, f"path={policy}", "out=new/plain")
    assert FULL in line and line.startswith("error: cannot write new")
    assert files() == set()
    assert exported([f"path={policy}", "out=new/plain"]) == 0


def test_a_page_that_is_there_is_kept(capsys):
    config = SFTStageConfig(runs_dir="runs", run_name="mine")
    Path("runs/mine/sft").mkdir(parents=True)
    save_config(config, Path("runs/mine/sft/config.yaml"))
    rows_of("runs/mine/sft/metrics.jsonl", [{"step": 1, "loss": 0.5}])
    assert reported(["run_name=mine"]) == 0
    before, names = Path("runs/mine/report.html").read_text(), files()
    line = refused(capsys, 2000, reported, "run_name=mine")
    assert line == "error: out=runs/mine/report.html cannot be written: File too large"
    assert Path("runs/mine/report.html").read_text() == before and files() == names


def length(prompts, responses):
    """Score by length."""
    return [float(len(response)) for response in responses]


def test_an_evaluation_names_the_file_and_ends_when_there_is_space(capsys):
    for name, text in (("a", "one"), ("b", "longer")):
        rows_of(f"{name}.jsonl", [{"prompt": f"{i}", "response": text} for i in range(40)])
    command = "a=a.jsonl", "b=b.jsonl", "by=scorer", f"scorer=python:{__name__}.length"
    line = refused(capsys, 1500, evaluate, *command)
    assert line.startswith("error: cannot write evaluation-pairwise") and FULL in line
    assert not Path("evaluation-pairwise/report.json").exists()
    assert evaluate([*command]) == 0
    assert json.loads(Path("evaluation-pairwise/report.json").read_text())["wins_b"] == 40


@pytest.mark.parametrize("kind", ["policy", "endpoint"])
def test_answers_that_were_written_are_not_made_again(kind, policy, capsys):
    prompts = rows_of("prompts.jsonl", [{"prompt": f"Name fruit {i}."} for i in range(200)])
    with running(Answers(chat("An apple. " * 20))) as server:
        model = [f"path={policy}"] if kind == "policy" else ["model=m", f"url={server.url}"]
        command = [*model, f"prompts={prompts}", "response_length=4", "batch_size=4"]
        line = refused(capsys, 10_000 if kind == "policy" else 60_000, generate, *command)
        asked = len(server.requests)
        assert generate([*command, "num_requests=2"]) == 0
        said = capsys.readouterr()
    assert len(Path("prompts.answers.jsonl").read_text().splitlines()) == 200
    if kind == "policy":
        assert FULL in line and "continuing prompts.answers.jsonl.partial after " in said.out
    else:
        assert "prompts.answers.jsonl.answers.sqlite cannot be used: disk I/O error" in line
        assert 0 < asked < 200 and len(server.requests) < 200 + 10  # those on their way


def test_scores_that_were_written_are_not_made_again(reward_model, capsys):
    data = rows_of("a.jsonl", [{"prompt": "A fruit?", "response": f"{i}"} for i in range(300)])
    command = f"path={reward_model}", f"data={data}", "batch_size=4"
    line = refused(capsys, 8000, score, *command)
    assert line.startswith("error: cannot write") and FULL in line
    assert score([*command]) == 0
    assert "continuing a.scored.jsonl.partial after " in capsys.readouterr().out
    assert len(Path("a.scored.jsonl").read_text().splitlines()) == 300


def test_a_mark_that_does_not_fit_changes_nothing_and_can_be_sent_again():
    rankings = Rankings(Path("rankings.jsonl"))
    row = {"prompt": "A fruit?", "responses": ["x" * 500, "y"], "ranks": [0, 1], "id": "1"}
    rankings.put("1", row)
    before = Path("rankings.jsonl").read_bytes()
    with largest_file(900), pytest.raises(OSError):
        rankings.put("2", row | {"id": "2"})
    assert Path("rankings.jsonl").read_bytes() == before and files() == {"rankings.jsonl"}
    rankings.put("2", row | {"id": "2"})
    assert [*Rankings(Path("rankings.jsonl")).rows] == ["1", "2"]
