"""The three stages in sequence, as a user runs them: hand-off, bad input, two processes.

Leaves out runs that are interrupted (test_killed_runs.py).
Run: python -m pytest tests/end_to_end/test_stages.py
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.sharded import command, in_group, text_of
from helpers.stages import ROOT, WORLD, launch, ppo_config, reward_config, sft_config
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf import train_ppo, train_reward, train_sft
from rlhf.checkpoint import find_damage, read_record
from rlhf.config import (
    DatasetConfig,
    InputError,
    ModelConfig,
    PeftConfig,
    PPOStageConfig,
    RewardStageConfig,
    ScorerConfig,
    TrackerConfig,
    default_paths,
    load_config,
)
from rlhf.curves import draw_curves
from rlhf.data import encode_prompt, encode_response
from rlhf.metrics import read_jsonl
from rlhf.scorers import RewardModelScorer, load_scorer, score_sequences


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder in which all three stages have run, fully fine-tuned."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf.curves.draw_curves", draw_curves)
        train_sft(sft_config(folder))
        train_reward(reward_config(folder))
        train_ppo(ppo_config(folder))
    return folder


def test_each_stage_leaves_an_ordinary_directory_that_names_its_parent(runs):
    for stage, auto in (
        ("sft", AutoModelForCausalLM),
        ("reward", AutoModelForSequenceClassification),
        ("ppo", AutoModelForCausalLM),
    ):
        final = runs / "run" / stage / "final"
        auto.from_pretrained(final)
        assert AutoTokenizer.from_pretrained(final).chat_template
        record = json.loads((final / "rlhf.json").read_text())
        assert record["stage"] == stage
        assert (final / "config.yaml").is_file()
        assert (final.parent / "curves.png").read_bytes().startswith(b"\x89PNG")
        modes = {file.stat().st_mode for file in final.iterdir()}
        assert len(modes) == 1  # a server under another account can read the weights as well
        assert not list(final.glob("*.bin")) and not list(final.parent.glob("*.tmp"))
        checkpoints = list(final.parent.glob("checkpoint-*"))
        assert checkpoints and all(find_damage(c) is None for c in checkpoints)
        parent = None if stage == "sft" else str(runs / "run/sft/final")
        assert record["parent"] == parent
    reward = json.loads((runs / "run/reward/final/rlhf.json").read_text())
    assert reward["score_std"] > 0 and 0 <= reward["metrics"]["eval_accuracy"] <= 1
    assert reward["metrics"]["eval_num_pairs"] > reward["metrics"]["eval_num_length_matched_pairs"]


@pytest.mark.parametrize(
    ("stage", "kind"), [("reward", RewardStageConfig), ("ppo", PPOStageConfig)]
)
def test_the_configuration_of_a_run_names_the_earlier_stages_that_it_found(stage, kind, runs):
    """So that rlhf.pipeline, which names them, can continue it."""
    for folder in (runs / "run" / stage, runs / "run" / stage / "final"):
        config = load_config(kind, folder / "config.yaml")
        assert config.model.path == str(runs / "run/sft/final") and default_paths(config) == {}


def test_reward_scores_are_the_same_by_text_by_ids_and_by_transformers_itself(runs):
    path = str(runs / "run/reward/final")
    scorer = load_scorer(ScorerConfig(path=path, normalize="none"))
    assert isinstance(scorer, RewardModelScorer)
    prompt = [{"role": "user", "content": "name three animals"}]
    responses = ["dog cat .", "red dog wolf ."]
    ids = [
        encode_prompt(prompt, scorer.tokenizer) + encode_response(prompt, r, scorer.tokenizer)
        for r in responses
    ]
    plain = AutoModelForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        expected = torch.cat([plain(torch.tensor([row])).logits[:, 0] for row in ids])
    for scores in (scorer([prompt] * 2, responses), score_sequences(scorer.model, ids, 2)):
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    record = json.loads((Path(path) / "rlhf.json").read_text())
    standardised = load_scorer(ScorerConfig(path=path, normalize="standardise"))
    torch.testing.assert_close(
        standardised([prompt] * 2, responses),
        (expected - record["score_mean"]) / record["score_std"],
        rtol=1e-4,
        atol=1e-4,
    )


def test_ppo_writes_metrics_and_fixed_samples_at_every_evaluation(runs):
    folder = runs / "run/ppo"
    metrics = read_jsonl(folder / "metrics.jsonl")
    assert [row["step"] for row in metrics if "eval_score" in row] == [0, 1, 2]
    assert metrics[0]["eval_kl"] == 0.0
    first = next(row for row in metrics if row["step"] == 1 and "score" in row)
    assert first["kl"] == 0.0 and first["first_ratio_deviation"] == 0.0
    assert first["optimizer_steps"] == 4
    samples = read_jsonl(folder / "samples.jsonl")
    prompts = {step: [s["prompt"] for s in samples if s["step"] == step] for step in (0, 1, 2)}
    assert prompts[0] == prompts[1] == prompts[2] and len(prompts[0]) == 8


def test_lora_in_all_three_stages_hands_over_plain_merged_models(runs, tmp_path):
    peft = PeftConfig(enabled=True, r=4, dropout=0.1)
    base = load_file(runs / "run/sft/final/model.safetensors")
    source = ModelConfig(path=str(runs / "run/sft/final"))
    sft = sft_config(tmp_path, run_name="lora", peft=peft, model=source)
    train_sft(sft)
    adapted = load_file(tmp_path / "lora/sft/final/model.safetensors")
    assert base.keys() == adapted.keys()
    assert any(not torch.equal(base[name], adapted[name]) for name in base)
    train_reward(reward_config(tmp_path, run_name="lora", peft=peft))
    scored = load_file(tmp_path / "lora/reward/final/model.safetensors")
    assert "score.weight" in scored and not [name for name in scored if "lora" in name]
    result = train_ppo(ppo_config(tmp_path, run_name="lora", peft=peft))
    assert result.before["eval_kl"] == 0.0  # adapters off = the SFT policy with its adapter merged
    AutoModelForCausalLM.from_pretrained(result.directory)


def test_packing_trains_and_evaluates(tmp_path):
    config = sft_config(tmp_path)
    config.trainer |= {"packing": True, "max_steps": 4, "per_device_train_batch_size": 4}
    assert 0 < train_sft(config).after["eval_loss"] < 10


def test_a_used_run_directory_is_refused_and_kept(runs):
    before = sorted(p.name for p in (runs / "run/sft").iterdir())
    with pytest.raises(InputError, match="already holds a finished run.*overwrite=true"):
        train_sft(sft_config(runs))
    assert sorted(p.name for p in (runs / "run/sft").iterdir()) == before


def test_a_directory_of_the_wrong_stage_is_refused(runs, tmp_path):
    reward = str(runs / "run/reward/final")
    with pytest.raises(InputError, match="written by the reward stage, but .* sft"):
        train_reward(reward_config(tmp_path, model=ModelConfig(path=reward)))
    sft = str(runs / "run/sft/final")
    with pytest.raises(InputError, match="written by the sft stage, but .* reward"):
        train_ppo(ppo_config(tmp_path, model=ModelConfig(path=sft), scorer=ScorerConfig(path=sft)))
    with pytest.raises(InputError, match="did you mean .*final"):
        train_ppo(
            ppo_config(
                tmp_path,
                model=ModelConfig(path=str(runs / "run")),
                scorer=ScorerConfig(path=reward),
            )
        )


def test_a_template_that_is_not_the_checkpoints_is_refused_after_sft(runs, tmp_path):
    sft = str(runs / "run/sft/final")
    model = ModelConfig(path=sft, chat_template="alpaca")
    with pytest.raises(InputError, match=f"chat template mismatch: {sft} and the model settings"):
        train_reward(reward_config(tmp_path, model=model))
    scorer = ScorerConfig(path=str(runs / "run/reward/final"))
    with pytest.raises(InputError, match=f"chat template mismatch: {sft} and the model settings"):
        train_ppo(ppo_config(tmp_path, model=model, scorer=scorer))
    assert not any(tmp_path.iterdir())


def test_sft_warns_of_words_that_the_model_does_not_know(runs, tmp_path, capsys):
    model = ModelConfig(path=str(runs / "run/sft/final"), special_tokens=["### End"])
    for template, warned in ((None, False), ("alpaca", True)):
        config = sft_config(tmp_path / str(template), model=dataclasses.replace(model))
        config.model.chat_template = template
        config.peft.enabled = warned
        train_sft(config)
        text = "".join(capsys.readouterr())
        assert ("was trained with a different chat template" in text) == warned
        assert ("new tokens of model.special_tokens keep the mean" in text) == warned


def test_tokenizer_mismatch_names_both_sides(runs, tmp_path):
    from helpers.tiny import tiny_model, tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tiny_model("llama", tokenizer).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    reward = runs / "run/reward/final"
    config = ppo_config(
        tmp_path,
        model=ModelConfig(path=str(tmp_path / "other")),
        scorer=ScorerConfig(path=str(reward)),
    )
    with pytest.raises(InputError, match=f"tokenizer mismatch: {reward}.*{tmp_path / 'other'}"):
        train_ppo(config)


def test_a_reward_model_with_another_tokenizer_scores_through_text(runs, tmp_path):
    from helpers.tiny import tiny_model, tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tiny_model("gpt_neox", tokenizer).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    config = ppo_config(
        tmp_path,
        model=ModelConfig(path=str(tmp_path / "other")),
        scorer=ScorerConfig(path=str(runs / "run/reward/final")),
    )
    config.critic.init = "policy"
    assert train_ppo(config).directory is not None


def overrides_of(stage: str, runs: Path) -> list[str]:
    """The command line that trains a stage as the fixture `runs` does, in two processes, whose
    batches are read in several passes."""
    world = ["dataset.path=python:rlhf.demo.world.rows", "dataset.max_length=64"]
    world += ["dataset.max_rows=256", "dataset.max_eval_rows=32"]
    trainer = ["trainer.max_steps=16", "trainer.logging_steps=4", "trainer.eval_steps=8"]
    start = f"model.path={runs / 'run/sft/final'}"
    if stage == "sft":
        model = "{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, "
        model += "num_attention_heads: 4, max_position_embeddings: 64, tie_word_embeddings: true}"
        own = [f"model.config={model}", "model.tokenizer=python:rlhf.demo.world.build_tokenizer"]
        own += ["num_samples=8", "response_length=16", "trainer.learning_rate=3e-3"]
        own += ["batch_size=16", "trainer.per_device_train_batch_size=4"]  # accumulates over two
        own += ["micro_batch_tokens=80"]
        return [*world, *trainer, *own]
    if stage == "reward":
        own = ["trainer.learning_rate=1e-3", "batch_size=8", "micro_batch_tokens=80"]
        return [*world, *trainer, *own, "trainer.per_device_train_batch_size=2", start]
    own = ["ppo.num_updates=2", "ppo.batch_size=16", "ppo.response_length=16"]
    own += ["ppo.micro_batch_tokens=100"]
    own += ["ppo.learning_rate=1e-3", "evaluation.every=1", "evaluation.num_prompts=8"]
    own += ["evaluation.scorer=python:rlhf.demo.world.gold_scores", "checkpoint.every=1"]
    own += ["watchdog.eos_rate=null"]  # trained for 16 steps, it seldom ends its answers
    return [*world, *own, f"scorer.path={runs / 'run/reward/final'}", start]


def launch_forks(stage: str, arguments: list[str], folder: Path) -> None:
    """As `launch`, in two forks of a process that has imported torch."""
    log = folder / "log"
    codes = in_group(command, stage, arguments, folder, log=log, shards=False)
    assert codes == [0, 0] and "2 processes" in text_of(log), text_of(log)


@pytest.mark.parametrize(
    "stage, start",
    [
        ("ppo", launch_forks),
        *(
            pytest.param(stage, launch, marks=pytest.mark.slow)
            for stage in ("sft", "reward", "ppo")
        ),
    ],
)
def test_two_processes_give_the_result_of_one_on_the_same_global_batch(
    stage, start, runs, tmp_path
):
    start(stage, overrides_of(stage, runs), tmp_path)
    one = load_file(runs / "run" / stage / "final/model.safetensors")
    two = load_file(tmp_path / "runs/run" / stage / "final/model.safetensors")
    gap = sum(float((one[name] - two[name]).square().sum()) for name in one) ** 0.5
    size = sum(float(one[name].square().sum()) for name in one) ** 0.5
    assert gap < 1e-5 * size, gap / size
    if stage != "ppo":
        return
    metrics = [read_jsonl(root / "run/ppo/metrics.jsonl") for root in (runs, tmp_path / "runs")]
    for one, two in zip(*metrics, strict=True):
        assert one.keys() == two.keys()
        for name in ("score", "kl", "policy_loss", "value_loss", "grad_norm", "eval_score"):
            if name in one:
                assert one[name] == pytest.approx(two[name], rel=1e-3, abs=1e-4), name


def test_text_prompts_after_conversations_become_conversations_unless_told_not_to(
    runs, tmp_path, capsys
):
    rows = [
        {"prompt": f"name {n} animals", "responses": ["dog", "."], "ranks": [0, 1]}
        for n in "abcdefgh"
    ]
    path = tmp_path / "ranked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DatasetConfig(path=str(path), eval_path=str(path), format="ranked", max_length=64)
    source = ModelConfig(path=str(runs / "run/sft/final"))
    config = reward_config(tmp_path, model=source, dataset=data)
    config.trainer["max_steps"] = 1
    final = train_reward(config).directory
    shown = capsys.readouterr()
    assert "so text prompts become user turns (dataset.as_conversation=false" in shown.out
    assert "but these are" not in shown.err and read_record(final).prompts == "conversation"
    config.dataset.as_conversation, config.run_name = False, "text"
    final = train_reward(config).directory
    assert "trained on conversation prompts, but these are text" in capsys.readouterr().err
    assert read_record(final).prompts == "text"


def test_ppo_logs_to_wandb_offline_when_asked(runs, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("X_SERVICE_WAIT", "INIT_TIMEOUT"):  # seconds that its own process may take
        monkeypatch.setenv(f"WANDB_{name}", "300")
    config = ppo_config(
        tmp_path,
        model=ModelConfig(path=str(runs / "run/sft/final")),
        scorer=ScorerConfig(path=str(runs / "run/reward/final")),
        tracker=TrackerConfig(names=["wandb"], mode="offline"),
    )
    result = train_ppo(config)
    assert list((result.directory.parent / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_demo_reaches_its_marks(tmp_path, seed):
    result = subprocess.run(
        [sys.executable, "-m", "rlhf.demo", f"seed={seed}"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=1800,
    )
    assert result.returncode == 0
    run = tmp_path / "runs/demo"
    reward = json.loads((run / "reward/final/rlhf.json").read_text())["metrics"]
    assert reward["eval_accuracy"] >= 0.85
    assert reward["eval_accuracy"] >= reward["eval_longer_wins_accuracy"] + 0.10
    rows = read_jsonl(run / "ppo/metrics.jsonl")
    gold = [row["eval_independent_score"] for row in rows if "eval_score" in row]
    assert 0.35 <= gold[0] <= 0.70
    assert gold[-1] >= 0.85


def test_rows_longer_than_the_context_are_refused_by_setting(runs, tmp_path):
    data = dataclasses.replace(WORLD, max_length=65)
    message = "dataset.max_length=65 exceeds the model's context of 64"
    with pytest.raises(InputError, match=message):
        train_sft(sft_config(tmp_path, dataset=data))
    source = ModelConfig(path=str(runs / "run/sft/final"))
    with pytest.raises(InputError, match=message):
        train_reward(reward_config(tmp_path, dataset=data, model=source))
    assert not (tmp_path / "run").exists()
