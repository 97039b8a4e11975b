"""The page of a run, from written files alone.

Run: python -m pytest tests/commands/test_report.py
"""

import json
import re
from pathlib import Path

import pytest

from rlhf.config import PPOConfig, PPOStageConfig, SFTStageConfig, save_config
from rlhf.curves import draw_frontier
from rlhf.option_parser import run_command
from rlhf.report.__main__ import ReportOptions, frontier_picture, run

MARKUP = "<script>alert(1)</script><img src=http://x/y.png>"
VERSIONS = {"rlhf": "0.1.0"}


def write_stage(config, stage: str, rows: list[dict], metrics: dict | None, **files) -> None:
    directory = Path(config.runs_dir) / config.run_name / stage
    directory.mkdir(parents=True)
    save_config(config, directory / "config.yaml")
    for name, lines in {"metrics": rows, **files}.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (directory / f"{name}.jsonl").write_text(text)
    if metrics is not None:
        (directory / "final").mkdir()
        record = {"metrics": metrics, "seed": 1, "parent": "runs/a/sft/final", "versions": VERSIONS}
        (directory / "final/rlhf.json").write_text(json.dumps(record))


def sample(step: int, prompt: str, response: str, **values) -> dict:
    turn = [{"role": "user", "content": prompt}]
    more = {"finished": True, "score": 0.5} | values
    return {"step": step, "prompt": turn, "response": response, **more}


def ppo_run(folder: Path, metrics: dict | None) -> Path:
    config = PPOStageConfig(runs_dir=str(folder), run_name="mine", ppo=PPOConfig(kl_coef=0.123))
    rows = [
        {"step": 0, "eval_score": -1.0, "eval_kl": 0.0},
        {"step": 2, "score": 0.1, "eval_score": 0.5, "eval_kl": 4.0},
        {"step": 4, "score": 0.2, "eval_score": 0.4, "eval_kl": 9.0},
    ]
    samples = [
        sample(0, "What is red?", "before <b>bold</b>", score=-1.0),
        sample(2, "What is red?", MARKUP, finished=False),
        sample(4, "What is red?", "of a later update"),
        sample(2, "no answer before", "only after"),
    ]
    watchdog = [{"step": 3, "message": "the length runs away <x>"}]
    timings = [{"step": n, "seconds": 2.0 * n, "collect_seconds": 0.5} for n in (1, 2)]
    files = {"samples": samples, "watchdog": watchdog, "timings": timings}
    write_stage(config, "ppo", rows, metrics, **files)
    return folder / "mine"


@pytest.fixture
def command(capsys):
    def run_it(*arguments):
        return run_command("", ReportOptions, run, list(arguments)), *capsys.readouterr()

    return run_it


def test_the_page_shows_results_answers_and_what_was_set(tmp_path, command):
    found = {"eval_score": 0.5, "eval_score_low": 0.25, "eval_score_high": 0.75, "update": 2}
    directory = ppo_run(tmp_path, found)
    status, output, _ = command("run_name=mine", f"runs_dir={tmp_path}")
    assert status == 0 and str(directory / "report.html") in output
    page = (directory / "report.html").read_text()
    assert "0.5 [0.25, 0.75]" in page and "the length runs away &lt;x&gt;" in page
    assert "<td>ppo.kl_coef</td><td>0.123</td>" in page and "<td>run_name</td>" not in page
    assert "before &lt;b&gt;bold&lt;/b&gt;" in page and "cut at the limit" in page
    assert "of a later update" not in page  # final/ is update 2
    assert page.index("only after") < page.index("Warnings")
    assert "in all: 4 s" in page and "rollouts: 1 s" in page
    assert page.count("<img") == 2  # curves, and score against KL


def test_a_diagnosed_run_has_best_of_n_next_to_ppo(tmp_path):
    directory = ppo_run(tmp_path, {"eval_score": 0.5, "update": 2})
    point = {"mean": 0.5, "low": 0.4, "high": 0.6}
    best = [{"kl": kl, "proxy": point, "gold": point} for kl in (0.0, 1.0)]
    (directory / "diagnosis").mkdir()
    file = directory / "diagnosis/diagnosis.json"
    file.write_text(json.dumps({"gold": "my.gold", "best_of_n": best}))
    with_best = frontier_picture([], directory / "ppo")
    assert with_best.startswith("data:image/svg")
    file.write_text(json.dumps({"gold": None, "best_of_n": best}))
    assert frontier_picture([], directory / "ppo") is None


def test_the_frontier_has_a_panel_for_each_scorer_and_a_line_for_ppo_and_best_of_n():
    rows = [{"eval_kl": 4.0, "eval_score": 1.0, "eval_score_low": None}, {"loss": 1.0}]
    best = [
        {
            "kl": 1.0,
            "proxy": dict.fromkeys(("mean", "low", "high"), 2.0),
            "gold": dict.fromkeys(("mean", "low", "high"), 3.0),
        }
    ] * 2
    proxy, gold = draw_frontier(rows, best).axes
    assert [line.get_xydata()[0].tolist() for line in proxy.lines] == [[2, 1], [1, 2]]
    assert [line.get_xydata()[0].tolist() for line in gold.lines] == [[1, 3]]
    (only,) = draw_frontier([*rows, *rows]).axes
    assert only.get_title() == "score that PPO trains on"


def test_what_a_model_wrote_is_not_executed_and_nothing_is_fetched(tmp_path, command):
    directory = ppo_run(tmp_path, {"eval_score": 0.5, "update": 2})
    assert command(f"path={directory}", f"out={tmp_path}/new/page.html")[0] == 0
    page = (tmp_path / "new/page.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    assert "default-src 'none'" in page
    assert not re.findall(r'<[^>]* (?:src|href)="(?!data:|#)', page)
    assert len(re.findall("<img [^>]*src=", page)) == 2


def test_hidden_characters_of_an_answer_are_shown(tmp_path, command):
    config = PPOStageConfig(runs_dir=str(tmp_path), run_name="mine")
    hidden = "\u202egnitirw \x1b[31m\x00 \ud83d \u05e9\u05dc\u05d5\u05dd\n\tsecond"
    samples = [sample(1, f"{hidden}?", hidden)]
    write_stage(config, "ppo", [{"step": 1, "score": 0.1}], None, samples=samples)
    assert command("run_name=mine", f"runs_dir={tmp_path}")[0] == 0
    page = (tmp_path / "mine/report.html").read_text()
    shown = "[U+202E]gnitirw [U+001B][31m[U+0000] \ufffd \u05e9\u05dc\u05d5\u05dd\n\tsecond"
    assert page.count(shown) == 2 and not set("\u202e\x1b\x00") & set(page)


def test_a_run_that_has_not_finished_has_a_page_too(tmp_path, command):
    directory = ppo_run(tmp_path, None)
    sft = SFTStageConfig(runs_dir=str(tmp_path), run_name="mine")
    write_stage(sft, "sft", [], None)  # it has just begun
    assert command(f"path={directory}")[0] == 0
    page = (directory / "report.html").read_text()
    assert "not finished: step 4" in page and "not finished: step 0" in page
    assert "of a later update" in page  # the latest


def test_the_reward_models_report_is_in_the_page(tmp_path, monkeypatch):
    from rlhf.report.__main__ import section

    config = SFTStageConfig(runs_dir=str(tmp_path), run_name="mine")
    write_stage(config, "reward", [{"step": 1, "loss": 0.5}], {"eval_accuracy": 0.75})
    monkeypatch.setattr(
        "rlhf.reward.report.page.stored_text", lambda final: f"table of {final.name}"
    )
    found = section("reward", tmp_path / "mine/reward")
    assert found["report"] == "table of final" and found["report_picture"] is None
    assert ("eval_accuracy", "0.75", "accuracy on held-out rows or prompts") in found["results"]


def test_bad_arguments_are_one_line_each(tmp_path, command):
    assert command()[::2] == (2, "error: give run_name=<run>, or path=<directory of a run>\n")
    status, _, errors = command("run_name=none", f"runs_dir={tmp_path}")
    assert status == 2 and "no such directory" in errors
    (tmp_path / "file").touch()
    directory = ppo_run(tmp_path, None)
    status, _, errors = command(f"path={directory}", f"out={tmp_path}/file/page.html")
    assert status == 2 and errors.count("\n") == 1 and "cannot be written" in errors


@pytest.mark.parametrize("content", ["[1]\n", '{"name": 1}\n'])
@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "config.yaml"])
def test_a_damaged_file_is_named(tmp_path, command, name, content):
    directory = ppo_run(tmp_path, {"update": 2})
    (directory / "ppo" / name).write_text(content)
    status, _, errors = command(f"path={directory}")
    assert status == 2 and f"ppo/{name} is damaged" in errors and errors.count("\n") == 1


@pytest.mark.parametrize("content", ["[1]\n", '{"metrics": 1}\n'])
def test_a_damaged_record_is_named(tmp_path, command, content):
    directory = ppo_run(tmp_path, {"update": 2})
    (directory / "ppo/final/rlhf.json").write_text(content)
    status, _, errors = command(f"path={directory}")
    assert status == 2 and "final/rlhf.json is damaged" in errors and errors.count("\n") == 1


def test_a_damaged_diagnosis_is_named_with_what_mends_it(tmp_path, command):
    directory = ppo_run(tmp_path, {"update": 2})
    (directory / "diagnosis").mkdir()
    (directory / "diagnosis/diagnosis.json").write_text('{"gold"')
    status, _, errors = command(f"path={directory}")
    assert status == 2 and "diagnosis.json is damaged" in errors and "delete it, or let" in errors


def test_a_row_that_is_being_written_is_left_out(tmp_path, command):
    directory = ppo_run(tmp_path, None)
    with (directory / "ppo/metrics.jsonl").open("a") as stream:
        stream.write('{"step": 5, "sco')
    assert command(f"path={directory}")[0] == 0
