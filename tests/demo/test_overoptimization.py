"""The over-optimisation picture: a miniature run from start to picture, and its numbers.

Run: python -m pytest tests/demo/test_overoptimization.py; with -m slow what trains
"""

import itertools
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf import train_reward, train_sft
from rlhf.config import (
    DatasetConfig,
    InputError,
    ModelConfig,
    PPOStageConfig,
    RewardStageConfig,
    SFTStageConfig,
    load_config,
)
from rlhf.demo.world import MODEL_CONFIG

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/overoptimization"
sys.path.insert(0, str(EXAMPLE))
import curves  # noqa: E402
import experiment  # noqa: E402
import picture  # noqa: E402

WORLD = DatasetConfig(
    path="python:rlhf.demo.world.rows", max_length=64, max_rows=64, max_eval_rows=16
)
MINIATURE = [
    "kl_coefs=[0.5,0]",
    *("dataset.max_rows=64", "dataset.max_eval_rows=16", "trainer.learning_rate=1"),
    *("ppo.num_updates=4", "ppo.batch_size=16", "ppo.response_length=8", "evaluation.every=2"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a barely trained SFT policy and reward model, and the command run on them."""
    folder = tmp_path_factory.mktemp("picture")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PYTHONPATH", str(ROOT))
        tokenizer = "python:rlhf.demo.world.build_tokenizer"
        start = ModelConfig(config=MODEL_CONFIG, tokenizer=tokenizer)
        steps = {"max_steps": 16, "learning_rate": 3e-3, "per_device_train_batch_size": 8}
        sft = SFTStageConfig("demo", model=start, dataset=WORLD, num_samples=0)
        sft.trainer |= steps
        train_sft(sft)
        reward = RewardStageConfig("demo", dataset=WORLD)
        reward.trainer |= steps
        train_reward(reward)
        assert experiment.main(MINIATURE) == 0
    return folder


def result_of(folder):
    return json.loads((folder / "runs/demo/overoptimization.json").read_text())


@pytest.mark.slow
def test_curves_are_those_of_the_metrics_files(folder):
    curves = result_of(folder)["ppo"]
    assert [curve["kl_coef"] for curve in curves] == [0, 0.5]
    assert [curve["select_kl_coef"] for curve in curves] == [0.15, 0.5]
    for curve, name in zip(curves, ("demo-kl0", "demo-kl0.5"), strict=True):
        stage = folder / "runs" / name / "ppo"
        rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
        rows = [row for row in rows if "eval_kl" in row]
        assert [p["update"] for p in curve["points"]] == [row["step"] for row in rows] == [0, 2, 4]
        for point, row in zip(curve["points"], rows, strict=True):
            for end in ("", "_low", "_high"):
                assert point["kl" + end] == row["eval_kl" + end]
                assert point["proxy" + end] == row["eval_score" + end]
                assert point["gold" + end] == row["eval_independent_score" + end]
        # chosen by hand: the first evaluation after training began with the best proxy - price x KL
        price = curve["select_kl_coef"]
        value = {p["update"]: p["proxy"] - price * p["kl"] for p in curve["points"][1:]}
        assert curve["chosen"] == max(value, key=value.get)


@pytest.mark.slow
def test_best_of_one_is_what_ppo_starts_from(folder):
    best, start = result_of(folder)["best_of_n"], result_of(folder)["ppo"][0]["points"][0]
    assert [point["n"] for point in best] == [1, 2, 4, 8, 16, 32, 64]
    assert best[0]["kl"] == start["kl"] == 0
    for name in ("proxy", "gold"):  # other random numbers, hence another sample of the same
        margin = start[f"{name}_high"] - start[f"{name}_low"]
        assert abs(best[0][name] - start[name]) < margin
    for point in best:
        assert point["proxy_low"] <= point["proxy"] <= point["proxy_high"]
        assert 0 <= point["gold_low"] <= point["gold"] <= point["gold_high"] <= 1
    proxy = [point["proxy"] for point in best]
    assert proxy == sorted(proxy)


def test_best_of_n_is_the_mean_over_all_subsets():
    generator = torch.Generator().manual_seed(0)
    proxy, gold = (torch.randn(3, 6, generator=generator) for _ in range(2))
    points = curves.best_of_n_points(proxy, gold)
    assert [point["n"] for point in points] == [1, 2, 4]
    for point in points:
        n, picked = point["n"], []
        for row in range(3):
            for subset in itertools.combinations(range(6), n):
                picked.append((row, max(subset, key=lambda i: float(proxy[row, i]))))
        assert point["proxy"] == pytest.approx(statistics.mean(float(proxy[p]) for p in picked))
        assert point["gold"] == pytest.approx(statistics.mean(float(gold[p]) for p in picked))
        assert point["kl"] == pytest.approx(math.log(n) - (n - 1) / n)


@pytest.mark.slow
def test_samples_of_a_prompt_are_in_its_row(folder, monkeypatch):
    monkeypatch.chdir(folder)
    stage = Path("runs/demo-kl0/ppo")
    config = load_config(PPOStageConfig, stage / "final/config.yaml")
    prompts = curves.read_prompts(stage)
    assert len(prompts) == 16
    proxy, gold = curves.sample_scores(config, prompts[:2], num_samples=5)
    assert proxy.shape == gold.shape == (2, 5)
    alone = curves.sample_scores(config, prompts[:1], num_samples=5)
    torch.testing.assert_close(proxy[:1], alone[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gold[:1], alone[1], rtol=0, atol=0)
    assert proxy.std(dim=1).min() > 0


@pytest.mark.slow
def test_picture_is_an_image_with_something_on_it(folder):
    from matplotlib.image import imread

    file = folder / "runs/demo/overoptimization.png"
    pixels = imread(file)
    assert pixels.shape[0] >= 400 and pixels.shape[1] >= 800
    assert pixels[..., :3].std() > 0.05
    assert file.stat().st_size < 120_000


@pytest.mark.slow
def test_second_call_uses_what_is_finished_and_refuses_other_settings(folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    before = result_of(folder)
    files = sorted(folder.rglob("final/rlhf.json"))
    times = [file.stat().st_mtime_ns for file in files]
    (folder / "runs/demo/overoptimization.png").unlink()
    assert experiment.main(MINIATURE) == 0
    out = capfd.readouterr().out
    assert "===" not in out and "using runs/demo-kl0.5/ppo/final" in out
    assert out.count("\n0 ") == out.count("\n0.5 ") == out.count("\nbest of 64 ") == 1
    assert len(files) == 4 and [file.stat().st_mtime_ns for file in files] == times
    assert result_of(folder) == before
    assert (folder / "runs/demo/overoptimization.png").is_file()

    assert experiment.main([*MINIATURE, "ppo.num_updates=5"]) == 2
    error = capfd.readouterr().err
    assert "runs/demo-kl0/ppo/final was trained with ppo.num_updates=4, not 5" in error

    weights = folder / "runs/demo/sft/final/model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content + b" ")
    assert experiment.main(MINIATURE) == 2
    weights.write_bytes(content)
    assert "was not trained from runs/demo/sft/final as it is now" in capfd.readouterr().err


@pytest.mark.parametrize("coefs", [[], [-1.0], [0.1, 0.10], [math.nan], [math.inf]])
def test_bad_coefficients_are_refused(coefs):
    with pytest.raises(InputError, match="kl_coefs must be distinct finite numbers >= 0"):
        experiment.check_coefs(coefs)


@pytest.mark.parametrize("text", ["", "[]", "[0,x]", "[-1]", "[nan]"])
def test_bad_coefficients_on_the_command_line_are_refused(text, capsys):
    assert experiment.main([f"kl_coefs={text}"]) == 2
    assert "error: kl_coefs" in capsys.readouterr().err


def test_title_claims_only_what_the_intervals_bear_out():
    def curve(*golds, width=0.01):
        points = [
            {"gold": gold, "gold_low": gold - width, "gold_high": gold + width}
            | {"proxy": n, "proxy_low": n - 0.1, "proxy_high": n + 0.1}
            for n, gold in enumerate(golds)
        ]
        return {"kl_coef": 0.0, "points": points}

    claim = "Without a KL penalty the reward model's score keeps rising"
    assert picture.title_of([curve(0.5, 0.9, 0.8)]).startswith(claim)
    assert "from 0.90 to 0.80" in picture.title_of([curve(0.5, 0.9, 0.8)])
    assert claim not in picture.title_of([curve(0.5, 0.9, 0.8, width=0.06)])
    assert claim not in picture.title_of([curve(0.5, 0.8, 0.9)])


def test_missing_matplotlib_is_said_before_anything_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    assert experiment.main([]) == 2
    needs = "overoptimization.png needs the matplotlib package: pip install 'rlhf[plot]'"
    assert capsys.readouterr().err == f"error: {needs}\n"
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_against_a_weak_reward_model_gold_falls_without_a_penalty_and_not_with_one(tmp_path):
    settings = ["kl_coefs=[0,0.15]", "reward.dataset.max_rows=400"]
    command = [sys.executable, str(EXAMPLE / "experiment.py"), *settings]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=tmp_path, env=env, timeout=3600, check=True)
    without, chosen = result_of(tmp_path)["ppo"]
    peak, end = curves.peak_of(without), without["points"][-1]
    assert end["gold_high"] < peak["gold_low"] and end["gold"] < peak["gold"] - 0.04
    assert end["proxy_low"] > peak["proxy_high"]
    # the selection rule stops early
    assert curves.chosen_of(without)["gold"] > end["gold"] + 0.03
    peak, end = curves.peak_of(chosen), chosen["points"][-1]
    assert end["gold"] > peak["gold"] - 0.02
    assert end["gold"] > curves.peak_of(without)["gold"] + 0.04
