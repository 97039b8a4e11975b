"""Held-out evaluation: its figures and intervals, and the update that becomes `final/`."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.rows import rows_of
from helpers.tiny_ppo import make_config
from safetensors.torch import load_file

from rlhf import train_ppo
from rlhf.checkpoint import read_record
from rlhf.ppo.evaluation import describe_selection, selection_value


def vowels(prompts, responses):
    """An independent scorer: share of vowels."""
    return [sum(c in "aeiou" for c in r) / max(1, len(r)) for r in responses]


def unsteady(prompts, responses):
    """Scores that grow a little with each call, as rounding changes those of other batches."""
    unsteady.calls = getattr(unsteady, "calls", 0) + 1
    return [len(r) / 10 + 1e-6 * unsteady.calls for r in responses]


@pytest.fixture(scope="module")
def finished(policy_dir, tmp_path_factory):
    """A finished run that evaluates after every update with an independent scorer."""
    folder = tmp_path_factory.mktemp("evaluation")
    config = make_config(policy_dir, folder, num_updates=6)
    config.evaluation = dataclasses.replace(
        config.evaluation, every=1, num_prompts=6, scorer=f"python:{__name__}.vowels"
    )
    config.checkpoint.every, config.checkpoint.keep_last = 2, 1
    return config, train_ppo(config)


def test_every_figure_is_the_mean_of_its_samples_with_bounds_around_it(finished):
    _, result = finished
    folder = result.directory.parent
    samples = rows_of(folder / "samples.jsonl")
    fields = {
        "eval_score": "score",
        "eval_kl": "kl",
        "eval_response_length": "response_length",
        "eval_eos_rate": "finished",
        "eval_independent_score": "independent_score",
        "eval_win_rate": "win",
    }
    evaluations = [row for row in rows_of(folder / "metrics.jsonl") if "eval_score" in row]
    assert [row["step"] for row in evaluations] == list(range(7))
    for row in evaluations:
        mine = [sample for sample in samples if sample["step"] == row["step"]]
        for metric, name in fields.items():
            if metric == "eval_win_rate" and row["step"] == 0:
                assert metric not in row
                continue
            values = [float(sample[name]) for sample in mine]
            assert row[metric] == pytest.approx(sum(values) / 6, rel=1e-5)
            assert min(values) <= row[f"{metric}_low"] <= row[metric] <= row[f"{metric}_high"]
            assert row[f"{metric}_high"] <= max(values)
            assert row[f"{metric}_low"] < row[f"{metric}_high"] or len(set(values)) == 1


def test_the_win_rate_compares_with_the_answers_before_training(finished):
    _, result = finished
    samples = rows_of(result.directory.parent / "samples.jsonl")
    before = [s["independent_score"] for s in samples if s["step"] == 0]
    for step in range(1, 7):
        now = [s for s in samples if s["step"] == step]
        for sample, old in zip(now, before, strict=True):
            new = sample["independent_score"]
            assert sample["win"] == (1.0 if new > old else 0.0 if new < old else 0.5)


def test_the_same_answer_is_a_tie_however_its_score_is_rounded(policy_dir, tmp_path):
    config = make_config(policy_dir, tmp_path, num_updates=2, learning_rate=1e-12)
    evaluation = dict(every=1, num_prompts=6, scorer=f"python:{__name__}.unsteady")
    config.evaluation = dataclasses.replace(config.evaluation, **evaluation)
    config.checkpoint.every = 1
    folder = train_ppo(config).directory.parent
    for name in ("final", "checkpoint-2"):
        shutil.rmtree(folder / name)
    train_ppo(dataclasses.replace(config, resume=True))
    samples = rows_of(folder / "samples.jsonl")
    assert len({(s["prompt"], s["response"]) for s in samples}) == 6
    assert [s["win"] for s in samples if s["step"]] == [0.5] * 12


def test_final_is_the_best_evaluated_update_and_says_so(finished, policy_dir, tmp_path, capsys):
    config, result = finished
    folder = result.directory.parent
    evaluations = [row for row in rows_of(folder / "metrics.jsonl") if "eval_score" in row][1:]
    values = {row["step"]: row["eval_score"] - 0.05 * row["eval_kl"] for row in evaluations}
    best = max(values, key=lambda step: (values[step], -step))
    assert result.update == best != 6  # or the test shows nothing
    record = json.loads((result.directory / "rlhf.json").read_text())
    assert record["metrics"]["update"] == best
    assert record["metrics"]["eval_score"] == result.after["eval_score"]
    # a run that ends there has the same weights
    shorter = dataclasses.replace(config, runs_dir=str(tmp_path), run_name="shorter")
    shorter.evaluation = dataclasses.replace(config.evaluation, select="last")
    original = shorter.ppo
    shorter.ppo = dataclasses.replace(original, lr_schedule="constant", num_updates=best)
    longer = dataclasses.replace(shorter, run_name="longer")
    longer.ppo = dataclasses.replace(shorter.ppo, num_updates=6)
    longer.evaluation = dataclasses.replace(config.evaluation, select="score_minus_kl")
    capsys.readouterr()
    chosen = train_ppo(longer)
    assert f"the policy after update {chosen.update} of 6 (the highest held-out" in (
        capsys.readouterr().out
    )
    shorter.ppo.num_updates = chosen.update
    ended = train_ppo(shorter)
    one, two = (load_file(r.directory / "model.safetensors") for r in (chosen, ended))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_checkpoint_of_the_best_update_is_kept_beside_the_last(finished):
    _, result = finished
    kept = {path.name for path in result.directory.parent.glob("checkpoint-*")}
    assert kept == {f"checkpoint-{result.update}", "checkpoint-6"}


@pytest.mark.parametrize(
    ("select", "kl_coef", "expected"),
    [
        ("score_minus_kl", None, 2.0 - 0.05 * 4.0),
        ("score_minus_kl", 0.5, 0.0),
        ("independent_score", None, 0.3),
        ("last", None, None),
    ],
)
def test_the_rules_of_selection(policy_dir, tmp_path, select, kl_coef, expected):
    config = make_config(policy_dir, tmp_path)
    config.evaluation = dataclasses.replace(
        config.evaluation, select=select, select_kl_coef=kl_coef
    )
    metrics = {"eval_score": 2.0, "eval_kl": 4.0, "eval_independent_score": 0.3}
    assert selection_value(config, metrics) == expected
    assert selection_value(config, {}) is None
    if kl_coef:
        assert describe_selection(config) == "the highest held-out score - 0.5 x KL"


def test_a_held_out_prompt_that_rows_repeat_is_evaluated_once(policy_dir, tmp_path, capsys):
    config = make_config(policy_dir, tmp_path, num_updates=1)
    config.dataset.eval_path = str(tmp_path / "eval.jsonl")
    rows = ['{"prompt": "say"}\n', '{"prompt": "say"}\n', '{"prompt": "name"}\n']
    Path(config.dataset.eval_path).write_text("".join(rows))
    samples = rows_of(train_ppo(config).directory.parent / "samples.jsonl")
    assert [sample["prompt"] for sample in samples if sample["step"] == 0] == ["say", "name"]
    assert "these figures are of only 2 held-out prompts" in capsys.readouterr().out


def test_a_run_that_makes_the_policy_worse_says_so(policy_dir, tmp_path, capsys):
    config = make_config(policy_dir, tmp_path, num_updates=2, learning_rate=0.1)
    config.evaluation.select_kl_coef = 10.0
    train_ppo(config)
    assert "no evaluated update is better than the policy before training" in (
        capsys.readouterr().err
    )


def test_without_held_out_prompts_the_last_update_is_taken(policy_dir, tmp_path, capsys):
    config = make_config(policy_dir, tmp_path, num_updates=2)
    config.evaluation.num_prompts = 0
    config.dataset.eval_fraction = 0.0  # and so no row is held out
    with open(config.dataset.path, "a") as file:
        file.write('{"prompt": " "}\n')
    result = train_ppo(config)
    assert result.after == {} and result.update == 2
    assert read_record(result.directory).dropped == {"empty prompt": 1}
    assert "the policy after update 2 of 2 (the last)" in capsys.readouterr().out
