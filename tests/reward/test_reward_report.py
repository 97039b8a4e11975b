"""The report of the reward stage: its numbers by hand, its warnings by their cause, its files from
a real run, and PPO reading them.

Run: python -m pytest tests/reward/test_reward_report.py
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

from rlhf import train_ppo, train_reward, train_sft
from rlhf.config import (
    CheckpointConfig,
    DatasetConfig,
    EvaluationConfig,
    InputError,
    ModelConfig,
    PPOConfig,
    PPOStageConfig,
    RewardStageConfig,
    ScorerComponent,
    ScorerConfig,
    SFTStageConfig,
)
from rlhf.demo.world import MODEL_CONFIG
from rlhf.reward.report.__main__ import main
from rlhf.reward.report.measures import agreement, heldout_metrics, measure, shorten
from rlhf.reward.report.page import PICTURE, draw, markdown, page_files, terminal_text
from rlhf.reward.report.verdict import judge, make_report

FILES = ("report.json", "report.md", "report.png")


class WordTokenizer:
    """Stands for the tokenizer of the rows: id 7 is the word w7."""

    def decode(self, ids, skip_special_tokens):
        return " ".join(f"w{i}" for i in ids)


def make_rows(ranks, lengths):
    """Encoded rows of these ranks and lengths, and the canonical ones."""
    rows = [
        {"ranks": r, "lengths": n, "row": i, "input_ids": [[0, 0, *range(size)] for size in n]}
        for i, (r, n) in enumerate(zip(ranks, lengths, strict=True))
    ]
    return rows, [{"prompt": f"question {i}"} for i in range(len(rows))]


def report_of(scores, ranks, lengths, **canonical):
    """Report of one list of scores, ranks and lengths per prompt."""
    rows, origin = make_rows(ranks, lengths)
    origin = [row | {k: v[i] for k, v in canonical.items()} for i, row in enumerate(origin)]
    tensors = [torch.tensor(s, dtype=torch.float32) for s in scores]
    return make_report(tensors, rows, origin, WordTokenizer(), "rows.jsonl")


# Prompt A: three responses ranked 0 1 2 that score 3 1 2, of 10, 4 and 9 tokens: pairs 0-1 right (2
# apart, better longer), 0-2 right (1 apart, similar), 1-2 wrong (1 apart, better shorter).
# Prompt B: two responses that score the same, of 5 and 4 tokens (similar). Prompt C: a pair ordered
# wrong by 4, the worse one first, of 8 and 3 tokens.
SCORES = [[3.0, 1.0, 2.0], [0.5, 0.5], [2.0, -2.0]]
RANKS = [[0, 1, 2], [0, 1], [1, 0]]
LENGTHS = [[10, 4, 9], [5, 4], [8, 3]]


def test_accuracy_and_the_longer_wins_rule_by_hand_in_every_slice():
    report = report_of(SCORES, RANKS, LENGTHS, subset=["a", "a", None])
    found = {
        (group, name): (piece["accuracy"], piece["longer_wins"], piece["num_pairs"])
        for group, pieces in report["slices"].items()
        for name, piece in pieces.items()
    }
    assert found == {
        ("all", "all"): (2.5 / 5, 3 / 5, 5),
        ("length", "similar"): (1.5 / 2, 1.0, 2),
        ("length", "better longer"): (1.0, 1.0, 1),
        ("length", "better shorter"): (0.0, 0.0, 2),
        ("ranks apart", "1"): (1.5 / 4, 2 / 4, 4),
        ("ranks apart", "2"): (1.0, 1.0, 1),
        # |score gaps| 0 1 1 2 4: quartiles 1, 1, 2; what equals an edge lies below it
        ("score gap", "quarter 1"): (1.5 / 3, 2 / 3, 3),
        ("score gap", "quarter 3"): (1.0, 1.0, 1),
        ("score gap", "quarter 4"): (0.0, 0.0, 1),
        ("subset", "a"): (2.5 / 4, 3 / 4, 4),
    }
    assert report["num_pairs"] == 5 and report["num_responses"] == 7
    assert report["slices"]["all"]["all"]["score_gap"] == pytest.approx((2 + 1 + 1 + 0 + 4) / 5)
    assert report["slices"]["length"]["similar"]["num_prompts"] == 2


def test_the_metrics_of_an_evaluation_are_the_same_numbers():
    rows, _ = make_rows(RANKS, LENGTHS)
    assert heldout_metrics([torch.tensor(s) for s in SCORES], rows) == {
        "eval_accuracy": 0.5,
        "eval_longer_wins_accuracy": pytest.approx(0.6),
        "eval_margin": pytest.approx((2 + 1 - 1 + 0 - 4) / 5),
        "eval_num_pairs": 5,
        "eval_num_length_matched_pairs": 2,
        "eval_length_matched_accuracy": 0.75,
    }


def test_intervals_resample_prompts_not_pairs():
    # Ten prompts, all pairs right in five of them and wrong in the others: as sure as ten coins.
    scores = [[3.0, 2.0, 1.0, 0.0]] * 5 + [[0.0, 1.0, 2.0, 3.0]] * 5
    report = report_of(scores, [[0, 1, 2, 3]] * 10, [[5, 5, 5, 5]] * 10)
    piece = report["slices"]["all"]["all"]
    assert piece["num_pairs"] == 60 and piece["accuracy"] == 0.5
    ends = [piece["accuracy_low"], piece["accuracy_high"]]
    assert ends == pytest.approx([0.2, 0.8])  # 60 coins: 0.37 to 0.63


def test_order_and_scores_of_best_and_worst_by_hand():
    report = report_of(SCORES, RANKS, LENGTHS)
    # B: the best is one of two with the highest score. tau: A 2 right 1 wrong, B ties, C wrong.
    assert report["order"]["top1"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert report["order"]["top1_chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)
    assert report["order"]["kendall_tau"] == pytest.approx((1 / 3 + 0 - 1) / 3)
    best, worst = report["scores"]["best"], report["scores"]["worst"]
    assert best["mean"] == pytest.approx((3 + 0.5 - 2) / 3) and best["q50"] == 0.5
    assert worst["mean"] == pytest.approx((2 + 0.5 + 2) / 3) and worst["q05"] == pytest.approx(0.65)
    assert report["scores"]["all"]["std"] == pytest.approx((15.5 / 7) ** 0.5)


def test_a_perfect_ranking_of_four():
    report = report_of([[4.0, 1.0, 3.0, 2.0]], [[0, 3, 1, 2]], [[5, 5, 5, 5]])
    assert report["order"] == {"top1": 1, "top1_chance": 0.25, "kendall_tau": pytest.approx(1)}
    pieces = report["slices"]["ranks apart"]
    assert {name: piece["num_pairs"] for name, piece in pieces.items()} == {"1": 3, "2": 2, "3+": 1}
    assert report["mistakes"] == [] and report["scores"]["worst"]["mean"] == 1


def test_correlation_with_length_is_measured_within_prompts_as_well():
    # Within each prompt the longer response scores less; between prompts, longer ones more.
    scores = [[1.0, 0.0], [11.0, 10.0], [5.0, 5.0]]
    report = report_of(scores, [[0, 1], [0, 1], [0, 1]], [[10, 12], [100, 102], [50, 60]])
    length = report["length"]
    assert length["pearson"] > 0.9 and length["spearman"] > 0.7
    assert length["within_prompt_pearson"] == length["within_prompt_spearman"] == -1
    assert length["num_prompts"] == 2  # equal scores have no correlation


def test_calibration_tells_calibrated_from_overconfident_scores():
    generator = torch.Generator().manual_seed(0)
    gaps = 2 * torch.randn(2000, generator=generator)
    first_wins = torch.rand(2000, generator=generator) < gaps.sigmoid()
    ranks = [[0, 1] if won else [1, 0] for won in first_wins.tolist()]
    rows, _ = make_rows(ranks, [[5, 5]] * 2000)
    errors = {}
    for scale in (1.0, 5.0):
        scores = [torch.tensor([scale * gap, 0.0]) for gap in gaps.tolist()]
        bins = measure(scores, rows, [None] * 2000)["calibration"]
        errors[scale] = bins["ece"]
        assert sum(b["num_pairs"] for b in bins["bins"]) == 2000
    assert errors[1.0] < 0.04 and errors[5.0] > 0.12


def test_mistakes_are_the_largest_wrong_gaps_one_of_a_prompt_with_their_texts():
    found = report_of(SCORES, RANKS, LENGTHS)["mistakes"]
    assert [mistake["prompt"] for mistake in found] == ["question 2", "question 0"]
    better = {"score": -2.0, "rank": 0, "length": 3, "response": "w0 w1 w2"}
    worse = {"score": 2.0, "rank": 1, "length": 8, "response": "w0 w1 w2 w3 w4 w5 w6 w7"}
    assert found[0]["better"] == better and found[0]["worse"] == worse
    (only,) = report_of([[0.0, 5.0, 9.0]], [[0, 1, 2]], [[4, 4, 4]])["mistakes"]
    assert (only["better"]["score"], only["worse"]["score"]) == (0.0, 9.0)
    many = report_of([[0.0, i, 9.0] for i in range(8)], [[0, 1, 2]] * 8, [[4, 4, 4]] * 8)
    assert [m["worse"]["score"] - m["better"]["score"] for m in many["mistakes"]] == [9.0] * 5


def test_hidden_characters_are_shown_in_the_page():
    report = report_of(SCORES, RANKS, LENGTHS)
    report["mistakes"][0]["prompt"] = "\u202eabc \x1b[31m"
    page = markdown(report, has_picture=False)
    assert "        [U+202E]abc [U+001B][31m\n" in page and not {"\u202e", "\x1b"} & set(page)


def test_long_texts_keep_their_start_and_their_end():
    text = shorten("start " + "x" * 2000 + "\n\n end")
    assert text.startswith("start x") and text.endswith("x end") and " [...] " in text
    assert len(text) < 420 and shorten("a\n b") == "a b"


# --- Warnings -------------------------------------------------------------------------------------


def synthetic(seed, score, num_prompts=60, similar=False):
    """Report of five responses a prompt, whose quality grows with length, scored by a function of
    (quality, length, noise)."""
    generator = torch.Generator().manual_seed(seed)
    scores, ranks, lengths = [], [], []
    for _ in range(num_prompts):
        n = torch.randint(*((95, 100) if similar else (10, 100)), (5,), generator=generator)
        quality = n / 30 + torch.randn(5, generator=generator)
        scores.append(score(quality, n.float(), torch.randn(5, generator=generator)).tolist())
        ranks.append((-quality).argsort().argsort().tolist())
        lengths.append(n.tolist())
    return report_of(scores, ranks, lengths)


def test_a_good_reward_model_is_not_warned_about():
    report = synthetic(0, lambda quality, length, noise: quality + noise / 2)
    assert report["warnings"] == [] and report["slices"]["all"]["all"]["accuracy"] > 0.7


def test_a_scorer_of_length_is_named_although_it_is_far_above_chance():
    report = synthetic(0, lambda quality, length, noise: length.sqrt())
    assert report["slices"]["all"]["all"]["accuracy_low"] > 0.6
    only_length, driven = report["warnings"]
    assert "not shown to know more than length: on held-out pairs of similar" in only_length
    assert "comparisons of similar length" in only_length
    assert "follow length: correlation +1.00" in driven and "write longer" in driven
    (driven,) = synthetic(0, lambda quality, length, noise: noise / 9 - length)["warnings"][1:]
    assert "write shorter" in driven


def test_a_random_scorer_is_near_chance_and_a_reversed_one_the_wrong_way_round():
    (warning,) = synthetic(1, lambda quality, length, noise: noise)["warnings"]
    assert "near chance on 60 held-out prompts" in warning and "0.5" in warning
    (warning,) = synthetic(1, lambda quality, length, noise: noise - quality)["warnings"]
    assert "wrong way round" in warning and "rank 0" in warning


def test_the_thresholds_of_the_warnings():
    good = synthetic(0, lambda quality, length, noise: quality)

    def with_values(correlation=0.0, similar=None, **accuracy):
        report = json.loads(json.dumps(good))
        report["length"]["within_prompt_spearman"] = correlation
        report["slices"]["all"]["all"] |= accuracy
        if similar is None:
            del report["slices"]["length"]["similar"]
        else:
            report["slices"]["length"]["similar"]["accuracy_low"] = similar
        return [re.sub(":.*", "", warning) for warning in judge(report)]

    chance = ["the reward model is near chance on 60 held-out prompts (accuracy"]
    assert [w[: len(chance[0])] for w in with_values(accuracy_low=0.5)] == chance
    assert with_values(accuracy_low=0.501, longer_wins=0.5, similar=0.501) == []
    assert len(with_values(accuracy_low=0.6, similar=0.5)) == 1
    # without pairs of similar length, the rule itself is the bar
    assert "no held-out pair" not in str(with_values(accuracy_low=0.6, longer_wins=0.59))
    assert len(with_values(accuracy_low=0.6, longer_wins=0.6)) == 1
    assert with_values(0.6, 0.55) == with_values(-0.6, 0.55) == with_values(None, 0.55) == []
    assert len(with_values(0.61, 0.55)) == len(with_values(-0.61, 0.55)) == 1


def test_fewer_than_five_prompts_get_no_verdict():
    """All pairs wrong; the interval has no width."""
    wrong = [0.0, 1.0], [0, 1], [3, 4]

    def warnings(num):
        return report_of(*([column] * num for column in wrong))["warnings"]

    assert len(warnings(4)) == 1 and "only 4 held-out prompts" in warnings(4)[0]
    assert "wrong way round" in warnings(5)[1]


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(InputError, match=r"gives \[1.0, nan\] to .* prompt 2; .*float32"):
        report_of([[1.0, 2.0], [1.0, float("nan")]], [[0, 1]] * 2, [[3, 4]] * 2)


def test_a_report_without_anything_to_correlate_can_be_written_and_read():
    report = report_of([[1.0, 1.0]], [[0, 1]], [[4, 4]])
    assert report["length"]["pearson"] is None and report["order"]["kendall_tau"] == 0
    rows, _ = make_rows([[0, 1]], [[4, 4]])
    files = page_files(report, [torch.ones(2)], rows)
    assert json.loads(files["report.json"]) == report
    assert "None: every pair is ordered right." in files["report.md"].decode()


# --- Agreement ------------------------------------------------------------------------------------


def test_agreement_by_hand():
    # Prompt 1: of three pairs two alike. Prompt 2: a tie. The level of a prompt does not matter.
    first = [torch.tensor([0.0, 1.0, 2.0]), torch.tensor([5.0, 5.0])]
    second = [torch.tensor([10.0, 12.0, 11.0]), torch.tensor([-1.0, 1.0])]
    found = agreement(first, second)
    assert found["ordered_alike"] == pytest.approx((2 + 0.5) / 4) and found["num_pairs"] == 4
    # around the means: -1 0 1 0 0 and -1 1 0 -1 1: covariance 1, squares 2 and 4
    assert found["pearson"] == pytest.approx(1 / 8**0.5)
    assert agreement(first, first)["pearson"] == pytest.approx(1)
    assert agreement(first, [-3 * x for x in first])["pearson"] == pytest.approx(-1)


# --- A real run -----------------------------------------------------------------------------------


WORLD = DatasetConfig(
    path="python:rlhf.demo.world.rows", max_length=64, max_rows=256, max_eval_rows=32
)


def reward_config(runs: Path, **values) -> RewardStageConfig:
    config = RewardStageConfig(runs_dir=str(runs), dataset=dataclasses.replace(WORLD))
    config.trainer |= {"max_steps": 24, "learning_rate": 3e-3, "per_device_train_batch_size": 8}
    return dataclasses.replace(config, **values)


def ppo_config(runs: Path, scorer: ScorerConfig) -> PPOStageConfig:
    return PPOStageConfig(
        runs_dir=str(runs),
        dataset=dataclasses.replace(WORLD),
        model=ModelConfig(path=str(runs / "run/sft/final")),
        scorer=scorer,
        ppo=PPOConfig(num_updates=1, batch_size=8, response_length=8, missing_eos_penalty=None),
        evaluation=EvaluationConfig(num_prompts=4),
        checkpoint=CheckpointConfig(every=1),
        preflight="only",
    )


@pytest.fixture(scope="module", autouse=True)
def pictures_are_drawn():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf.reward.report.page.draw", draw)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with an SFT stage and a reward stage; `said.txt`: what the latter printed."""
    folder = tmp_path_factory.mktemp("runs")
    sft = SFTStageConfig(
        runs_dir=str(folder),
        model=ModelConfig(
            config=MODEL_CONFIG | {"hidden_size": 32, "intermediate_size": 64},
            tokenizer="python:rlhf.demo.world.build_tokenizer",
        ),
        dataset=dataclasses.replace(WORLD),
        num_samples=0,
    )
    sft.trainer |= {"max_steps": 8, "learning_rate": 3e-3}
    train_sft(sft)
    with (folder / "said.txt").open("w") as said, redirect_stdout(said), redirect_stderr(said):
        train_reward(reward_config(folder))
    return folder


def read_report(final: Path) -> dict:
    return json.loads((final / "report.json").read_text(encoding="utf-8"))


def test_the_stage_writes_the_report_beside_the_model(runs):
    final = runs / "run/reward/final"
    report, record = read_report(final), json.loads((final / "rlhf.json").read_text())
    piece, similar = report["slices"]["all"]["all"], report["slices"]["length"]["similar"]
    metrics = record["metrics"]
    assert piece["accuracy"] == pytest.approx(metrics["eval_accuracy"])
    assert piece["longer_wins"] == pytest.approx(metrics["eval_longer_wins_accuracy"])
    assert similar["accuracy"] == pytest.approx(metrics["eval_length_matched_accuracy"])
    assert piece["num_pairs"] == metrics["eval_num_pairs"] and report["num_prompts"] == 32
    page = (final / "report.md").read_text()
    assert f"| all | {piece['accuracy']:.3f} |" in page and "![" in page
    assert report["mistakes"][0]["better"]["response"] in " ".join(page.split())
    assert (final / PICTURE).read_bytes()[:4] == b"\x89PNG"
    assert len(terminal_text(report).splitlines()) < 20
    said = (runs / "said.txt").read_text()
    assert terminal_text(report) in said and "with report.md and report.png" in said
    assert all(f"warning: {warning}\n" in said for warning in report["warnings"])


def test_without_matplotlib_the_stage_says_once_how_to_get_the_picture(runs, tmp_path, capsys):
    from importlib.util import find_spec

    with pytest.MonkeyPatch.context() as patch:
        none = lambda name, *rest: None if name == "matplotlib" else find_spec(name, *rest)  # noqa: E731
        patch.setattr("importlib.util.find_spec", none)
        source = ModelConfig(path=str(runs / "run/sft/final"))
        train_reward(reward_config(tmp_path, model=source))
    final = tmp_path / "run/reward/final"
    assert not (final / PICTURE).exists() and "![" not in (final / "report.md").read_text()
    assert capsys.readouterr().out.count("pip install 'rlhf[plot]'") == 1


@pytest.mark.slow
def test_the_command_makes_the_same_report_and_adds_the_agreement_of_two_seeds(runs, tmp_path):
    one = runs / "run/reward/final"
    source = ModelConfig(path=str(runs / "run/sft/final"))
    two = train_reward(reward_config(tmp_path / "two", seed=2, model=source)).directory
    assert main([f"path={one}", f"out={tmp_path}"]) == 0
    assert all((tmp_path / name).read_bytes() == (one / name).read_bytes() for name in FILES)
    again = train_reward(reward_config(tmp_path / "again", model=source)).directory
    assert all((again / name).read_bytes() == (one / name).read_bytes() for name in FILES)
    assert main([f"path={one}", f"out={tmp_path}", f"compare=[{two},{one}]"]) == 0
    report = read_report(tmp_path)
    other, itself = report.pop("agreement")
    assert report == read_report(one)
    assert itself["ordered_alike"] == 1 and itself["pearson"] == pytest.approx(1)
    assert other["model"] == str(two) and 0.5 < other["ordered_alike"] < 1
    assert 0 < other["pearson"] < 0.999
    accuracy = read_report(two)["slices"]["all"]["all"]["accuracy"]
    assert other["accuracy"] == pytest.approx(accuracy, abs=0.1)  # theirs is of another split
    assert f"agreement with {two}" in (tmp_path / "report.md").read_text().lower()


def test_the_command_reports_on_other_rows(runs, tmp_path, capsys):
    rows = [
        {"prompt": f"name {n} animals", "responses": ["dog cat", "."], "ranks": [0, 1], "subset": n}
        for n in "abcdefgh"
    ]
    path = tmp_path / "ranked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    final = runs / "run/reward/final"
    data = [f"dataset.path={path}", f"dataset.eval_path={path}", "dataset.format=ranked"]
    assert main([f"path={final}", f"out={tmp_path}", *data]) == 0
    report = read_report(tmp_path)
    assert report["data"] == str(path) and report["num_pairs"] == 8
    assert list(report["slices"]["subset"]) == list("abcdefgh")
    bare = tmp_path / "bare"  # a model that no stage wrote
    shutil.copytree(final, bare, ignore=shutil.ignore_patterns("rlhf.json", "config.yaml"))
    assert main([f"path={bare}"]) == 2
    assert "does not say what it was trained on" in capsys.readouterr().err
    assert main([f"path={bare}", *data]) == 0
    assert read_report(bare)["summary"] == report["summary"]
    as_a_stage = [*data[:2], "dataset=ranked", "+dataset.columns.prompt=prompt"]
    assert main([f"path={final}", f"out={tmp_path}", *as_a_stage]) == 0
    assert read_report(tmp_path)["summary"] == report["summary"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "path is missing"),
        (["path={final}", "seed=2"], "seed=2 changes no report; give dataset.<key>=value for"),
        (["path={final}", "dataset=rankde"], "dataset=rankde does not exist; choose one of"),
        (["path={final}", "dataset.eval_path"], "cannot read 'dataset.eval_path'"),
        (["path={final}", "dataset.pth=x"], "unknown key 'dataset.pth'. Did you mean"),
        (["path={final}", "out={final}/config.json"], "out=.*config.json is no directory and"),
        (["path={sft}"], "written by the sft stage"),
        (["path={bare}"], "path=.* is not a model directory"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(runs, tmp_path, capsys, arguments, message):
    names = {"final": runs / "run/reward/final", "sft": runs / "run/sft/final", "bare": tmp_path}
    assert main([argument.format(**names) for argument in arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


# --- PPO reads it ---------------------------------------------------------------------------------


def change_report(source: Path, target: Path, text: str | None = None, **values) -> Path:
    """A copy of a reward model with another report."""
    shutil.copytree(source, target)
    report = json.dumps(read_report(source) | values)
    (target / "report.json").write_text(report if text is None else text)
    return target


def test_ppo_passes_on_the_summary_and_the_warnings_of_its_reward_models(runs, tmp_path, capsys):
    final = runs / "run/reward/final"
    report = synthetic(0, lambda quality, length, noise: length)
    known = {"summary": report["summary"], "warnings": report["warnings"]}
    driven = change_report(final, tmp_path / "driven", **known)
    good = change_report(final, tmp_path / "good", summary="accuracy 0.9", warnings=[])
    components = [ScorerComponent(str(driven)), ScorerComponent(str(good))]
    train_ppo(ppo_config(runs, ScorerConfig(components=components)))
    shown = capsys.readouterr()
    assert f"{driven}: {report['summary']}\n" in shown.out
    assert f"{good}: accuracy 0.9\n" in shown.out
    assert len(report["warnings"]) == 2
    assert all(f"warning: {warning}\n" in shown.err for warning in report["warnings"])


def test_ppo_is_silent_without_a_report_and_refuses_a_damaged_one(runs, tmp_path, capsys):
    final = runs / "run/reward/final"
    bare = tmp_path / "bare"
    shutil.copytree(final, bare, ignore=shutil.ignore_patterns("report.*"))
    train_ppo(ppo_config(runs, ScorerConfig(path=str(bare))))
    assert "held-out pairs" not in capsys.readouterr().out
    for number, text in enumerate(('{"summary": ', "[]", '{"summary": "fine"}')):
        damaged = change_report(final, tmp_path / f"damaged{number}", text)
        with pytest.raises(InputError, match="report.json is damaged.*rlhf.reward.report path="):
            train_ppo(ppo_config(runs, ScorerConfig(path=str(damaged))))
