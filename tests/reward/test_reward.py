"""The reward stage's loss, batches and cost: against TRL, against one big batch, resumed, on two
processes.

Leaves out the maths of the loss (tests/functional) and the hand-over to PPO (test_stages.py).
Run: python -m pytest tests/reward/test_reward.py
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers.checkpoints import take_back_end
from helpers.tensors import close, exact, few
from helpers.tiny import tiny_model, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import TrainingArguments

from rlhf import train_reward
from rlhf.config import (
    CheckpointConfig,
    DatasetConfig,
    InputError,
    ModelConfig,
    PeftConfig,
    RewardConfig,
    RewardStageConfig,
)
from rlhf.data import RankedCollator, encode_ranked, load_splits
from rlhf.functional import ranking_loss
from rlhf.models import (
    ScalarModel,
    add_lora,
    init_reward_model,
    is_causal,
    load_reward_model,
    sequence_scores,
    unwrap_peft,
)
from rlhf.reward.batches import PlannedBatches, pack, plan_batches, score_rows
from rlhf.reward.ranking_trainer import RankingTrainer
from rlhf.reward.report.measures import heldout_metrics
from rlhf.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
PAD = 0


def ranked_rows(num_responses: list[int], seed: int = 0, **fields) -> list[dict]:
    """Encoded rows of random ids; `fields` hold one value per row."""
    draw = random.Random(seed)
    rows = []
    for i, num in enumerate(num_responses):
        ids = [[draw.randrange(3, 300) for _ in range(draw.randint(3, 20))] for _ in range(num)]
        row = {"input_ids": ids, "ranks": draw.sample(range(num), num), "lengths": [3] * num}
        row |= {"row": i, "scores": None, "margin": None, "probability": None}
        rows.append(row | {name: values[i] for name, values in fields.items()})
    return rows


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    """A tiny random Llama without dropout, and its tokenizer."""
    directory, tokenizer = tmp_path_factory.mktemp("policy"), tiny_tokenizer()
    tiny_model("llama", tokenizer).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def reward_model(policy: Path, **values):
    config = ModelConfig(path=str(policy), **values)
    return init_reward_model(config, tiny_tokenizer(), seed=1)


def trainer_for(model, rows, folder, ranking=None, batches=None, **arguments) -> RankingTrainer:
    values = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    values |= {"remove_unused_columns": False, "logging_steps": 1, "seed": 1}
    return RankingTrainer(
        model=ScalarModel(model),
        args=TrainingArguments(output_dir=str(folder), **values | arguments),
        train_dataset=Dataset.from_list(rows),
        data_collator=RankedCollator(PAD),
        ranking=ranking or RewardConfig(),
        heldout=rows,
        batches=batches,
    )


def loss_of(trainer, rows) -> torch.Tensor:
    """The loss of one batch, as the Trainer computes it outside of training."""
    return trainer.compute_loss(trainer.model, trainer.data_collator(rows))


# --- TRL ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("center_coef", [None, 0.1])
@pytest.mark.parametrize("with_margin", [False, True])
def test_loss_and_gradients_of_pairs_equal_those_of_trl(center_coef, with_margin, policy, tmp_path):
    import trl

    margins = [0.5, 2.0, 0.0, 1.25, 3.0] if with_margin else [None] * 5
    rows = ranked_rows([2] * 5, margin=margins)
    pairs = []
    for row in rows:
        chosen, rejected = (row["input_ids"][row["ranks"].index(rank)] for rank in (0, 1))
        pair = {"chosen_ids": chosen, "rejected_ids": rejected}
        pairs.append(pair | ({"margin": row["margin"]} if with_margin else {}))
    model = reward_model(policy)
    args = trl.RewardConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        max_length=None,
        center_rewards_coefficient=center_coef,
    )
    theirs = trl.RewardTrainer(
        model, args, train_dataset=Dataset.from_list(pairs), processing_class=tiny_tokenizer()
    )
    expected = theirs.compute_loss(model, theirs.data_collator(pairs))
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    ours = trainer_for(model, rows, tmp_path, RewardConfig(center_coef=center_coef or 0.0))
    loss = loss_of(ours, rows)
    loss.backward()
    close(loss.detach(), expected.detach())
    for name, parameter in model.named_parameters():
        close(parameter.grad, gradients[name], atol=1e-5)


# --- Margins and soft labels ----------------------------------------------------------------------


def test_margins_of_setting_row_and_score_gap_add_up(policy, tmp_path):
    rows = ranked_rows([3, 2, 2], scores=[[1.0, 4.0, 2.5], None, [7.0, 3.0]])
    rows[0]["ranks"], rows[2]["ranks"] = [2, 0, 1], [0, 1]
    rows[1]["margin"] = 0.25
    ranking = RewardConfig(margin=0.5, margin_scale=0.1)
    trainer = trainer_for(reward_model(policy), rows, tmp_path, ranking)
    scores = score_rows(trainer.model, rows, 8)
    expected = []
    for row, own in zip(rows, scores, strict=True):
        losses = []
        for i, better in enumerate(row["ranks"]):
            for j, worse in enumerate(row["ranks"]):
                if better < worse:
                    gap = row["scores"][i] - row["scores"][j] if row["scores"] else 0.0
                    margin = 0.5 + (row["margin"] or 0.0) + 0.1 * gap
                    losses.append(torch.log(1 + torch.exp(margin - own[i] + own[j])))
        expected.append(sum(losses) / len(losses))
    close(loss_of(trainer, rows).detach(), sum(expected) / 3)


@pytest.mark.parametrize("ranks", [[0, 1], [1, 0]])
def test_a_soft_label_is_of_the_first_response_whatever_the_ranks(ranks, policy, tmp_path):
    probability = 0.9 if ranks == [0, 1] else 0.2
    rows = ranked_rows([2, 2], probability=[probability, None])
    rows[0]["ranks"], rows[1]["ranks"] = ranks, [0, 1]
    trainer = trainer_for(reward_model(policy), rows, tmp_path)
    (first, second), (better, worse) = score_rows(trainer.model, rows, 8)
    soft = probability * torch.log(1 + torch.exp(second - first))
    soft += (1 - probability) * torch.log(1 + torch.exp(first - second))
    close(loss_of(trainer, rows).detach(), (soft + torch.log(1 + torch.exp(worse - better))) / 2)


def test_smoothing_and_kind_of_the_configuration_reach_the_loss(policy, tmp_path):
    rows = ranked_rows([3, 4])
    for ranking, options in (
        (RewardConfig(label_smoothing=0.2), {"label_smoothing": 0.2}),
        (RewardConfig(loss="plackett_luce"), {"kind": "plackett_luce"}),
    ):
        trainer = trainer_for(reward_model(policy), rows, tmp_path, ranking)
        batch = RankedCollator(PAD)(rows)
        scores = torch.cat(score_rows(trainer.model, rows, 8))
        expected, _ = ranking_loss(scores, batch["ranks"], batch["groups"], **options)
        close(loss_of(trainer, rows).detach(), expected)


def test_what_says_how_much_better_stays_with_its_response():
    tokenizer = tiny_tokenizer()
    long = "word " * 100
    rows = [
        {"prompt": "a", "responses": ["b", long, "c"], "ranks": [2, 1, 0], "scores": [1, 2, 3]},
        {"prompt": "a", "responses": ["b", "c"], "ranks": [1, 0], "probability": 0.25},
        {"prompt": "a", "responses": ["b", long], "ranks": [0, 1], "probability": 0.75},
        {"prompt": "a", "responses": ["b", "c"], "ranks": [0, 1], "margin": 2},
        {"prompt": "a", "responses": ["b", long], "ranks": [0, 1], "margin": 2},
    ]
    encoded, dropped = encode_ranked(rows, tokenizer, max_length=20)
    assert [row["row"] for row in encoded] == [0, 1, 3]
    assert [row["scores"] for row in encoded] == [[1.0, 3.0], None, None]
    assert [row["probability"] for row in encoded] == [None, 0.25, None]
    assert [row["margin"] for row in encoded] == [None, None, 2]
    assert sorted(dropped.values()) == [1, 2]  # one response, two pairs
    batch = RankedCollator(PAD)(Dataset.from_list(encoded).to_list())
    assert batch["ranks"].tolist() == [2, 0, 1, 0, 0, 1]
    close(batch["scores"], [1.0, 3.0, 0.0, 0.0, 0.0, 0.0])
    close(batch["margin"], [0.0, 0.0, 0.0, 0.0, 2.0, 2.0])
    close(batch["probability"], [1.0, 1.0, 0.25, 0.75, 1.0, 1.0])


@pytest.mark.parametrize(
    "ranking, message",
    [
        (
            RewardConfig(loss="plackett_luce"),
            "reward.loss=plackett_luce cannot use the field probability that 1 of 2 rows have",
        ),
        (RewardConfig(margin_scale=0.5), "no row has the field scores; add it, or set reward.marg"),
        (
            RewardConfig(tokens_per_batch=10),
            "too small for the largest prompt, which has 36 tokens",
        ),
    ],
)
def test_settings_that_do_not_fit_the_rows_are_refused(ranking, message):
    rows = ranked_rows([3, 2], probability=[None, 0.5])
    rows[0]["input_ids"] = [[3] * 12, [4] * 5, [5] * 9]  # 3 x 12 = 36 tokens
    rows[1]["input_ids"] = [[3] * 12, [4] * 5]
    with pytest.raises(InputError, match=re.escape(message)):
        plan_batches(rows, ranking, 1)


# --- Batches --------------------------------------------------------------------------------------


def padded_tokens(rows: list[dict], batch: list[int]) -> int:
    sequences = [ids for i in batch for ids in rows[i]["input_ids"]]
    return len(sequences) * max(map(len, sequences))


def test_items_are_packed_by_length_as_long_as_their_padding_fits():
    # Rows x longest: 4 x 4 = 16 fits, 6 x 5 = 30 does not.
    assert pack([(2, 5), (2, 3), (2, 4)], 16) == [[1, 2], [0]]
    assert pack([(2, 5), (2, 3), (2, 4)], 30) == [[1, 2, 0]]
    assert pack([(1, 9), (1, 2), (1, 2)], 8) == [[1, 2], [0]]  # more than the budget: alone
    assert pack([], 8) == []


@few
@given(
    num_responses=st.lists(st.integers(2, 9), min_size=1, max_size=40),
    budget=st.integers(180, 1000),
    per_step=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_a_plan_holds_every_prompt_once_within_the_budget_and_the_same_number_in_each_step(
    num_responses, budget, per_step, seed
):
    rows = ranked_rows(num_responses, seed)
    plan = plan_batches(rows, RewardConfig(tokens_per_batch=budget), per_step)
    assert sorted(i for batch in plan for i in batch) == list(range(len(rows)))
    assert all(padded_tokens(rows, batch) <= budget for batch in plan)
    assert len(plan) % per_step == 0 or len(plan) == len(rows)
    fewest = pack([(len(r["input_ids"]), max(map(len, r["input_ids"]))) for r in rows], budget)
    assert len(plan) < len(fewest) + per_step


def test_without_a_budget_there_is_no_plan():
    assert plan_batches(ranked_rows([2, 3]), RewardConfig(), 2) is None


def test_the_order_of_batches_depends_on_seed_and_epoch_alone():
    plan = [[i] for i in range(20)]
    orders = {
        (seed, epoch): list(PlannedBatches(plan, seed, lambda epoch=epoch: epoch))
        for seed in (1, 2)
        for epoch in (0, 1)
    }
    for order in orders.values():
        assert sorted(order) == plan
    assert len({str(order) for order in orders.values()}) == 4
    again = PlannedBatches(plan, 1, lambda: 1)
    assert list(again) == list(again) == orders[1, 1]


PLANS = {
    "one prompt and three": [[4], [0, 2, 5], [1, 3]],
    "all at once": [[0, 1, 2, 3, 4, 5]],
    "four and the rest": None,  # per_device_train_batch_size=4: the last batch has two
}


@pytest.mark.parametrize("plan", PLANS)
def test_every_prompt_of_a_step_weighs_the_same_in_batches_of_unequal_size(plan, policy, tmp_path):
    rows = ranked_rows([2, 4, 3, 2, 5, 3])
    model = reward_model(policy)
    batch = RankedCollator(PAD)(rows)
    scores = sequence_scores(ScalarModel(model), batch["input_ids"], batch["attention_mask"].bool())
    expected, _ = ranking_loss(scores, batch["ranks"], batch["groups"])
    expected.backward()
    wanted = {name: (p - 0.1 * p.grad).detach() for name, p in model.named_parameters()}
    model.zero_grad()
    trainer = trainer_for(
        model,
        rows,
        tmp_path,
        batches=PLANS[plan],
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        num_train_epochs=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=3,
    )
    trainer.train()
    assert trainer.state.global_step == 1
    for name, parameter in model.named_parameters():
        close(parameter.detach(), wanted[name])
    logged = trainer.state.log_history[0]
    close(torch.tensor(logged["loss"]), expected.detach(), atol=1e-4)  # the Trainer rounds it
    pairs = sum(len(r["ranks"]) * (len(r["ranks"]) - 1) / 2 for r in rows)
    assert logged["accuracy"] * pairs == pytest.approx(round(logged["accuracy"] * pairs), abs=1e-4)


def test_scores_under_a_token_budget_are_those_without(policy):
    rows = ranked_rows([2, 4, 3, 2, 5, 3])
    model = ScalarModel(reward_model(policy)).eval()
    for budget in (1, 60, 10_000):
        for ours, plain in zip(
            score_rows(model, rows, 2, budget), score_rows(model, rows, 2), strict=True
        ):
            close(ours, plain, atol=1e-5)


def test_a_budget_bounds_what_the_model_sees_in_training_and_evaluation(policy, tmp_path):
    rows = ranked_rows([2, 4, 3, 2, 5, 3, 2, 2])
    ranking = RewardConfig(tokens_per_batch=110)
    plan = plan_batches(rows, ranking, 1)
    trainer = trainer_for(reward_model(policy), rows, tmp_path, ranking, plan)
    seen = {True: [], False: []}
    trainer.model.register_forward_pre_hook(
        lambda model, inputs: seen[model.training].append(inputs[0].numel())
    )
    trainer.args.num_train_epochs = 2
    trainer.train()
    trainer.evaluate()
    planned = sorted(padded_tokens(rows, batch) for batch in plan)
    epochs = seen[True][: len(plan)], seen[True][len(plan) :]
    assert [sorted(epoch) for epoch in epochs] == [planned, planned]
    assert epochs[0] != epochs[1]  # another order
    assert max(seen[True] + seen[False]) <= 110
    assert sum(seen[False]) >= sum(len(ids) for row in rows for ids in row["input_ids"])


@pytest.mark.parametrize("lora", [False, True])
def test_gradient_checkpointing_recomputes_layers_and_trains_the_same(lora, policy, tmp_path):
    rows, weights, calls = ranked_rows([2, 4, 3, 2]), [], []
    for checkpointing in (False, True):
        model = reward_model(policy, gradient_checkpointing=checkpointing)
        if lora:
            model = add_lora(model, PeftConfig(enabled=True, r=4), "SEQ_CLS", seed=1)
        arguments = {"per_device_train_batch_size": 2, "max_steps": 2, "learning_rate": 1e-2}
        trainer = trainer_for(model, rows, tmp_path, **arguments)
        is_causal(unwrap_peft(model).base_model)  # measured once per model, by a pass of its own
        counted = []
        layers = [m for name, m in model.named_modules() if name.endswith("layers.0.mlp")]
        layers[0].register_forward_pre_hook(lambda *_, counted=counted: counted.append(1))
        trainer.train()
        calls.append(len(counted))
        weights.append({name: p.detach() for name, p in model.named_parameters()})
    assert calls == [2, 4]
    for name, weight in weights[0].items():
        exact(weights[1][name], weight)


# --- The stage under a token budget: resumed, saved, on two processes -----------------------------


def stage_config(runs: Path, policy: Path, **values) -> RewardStageConfig:
    """Two epochs of several steps on LoRA adapters with dropout; the last checkpoint falls into the
    second epoch."""
    config = RewardStageConfig(
        runs_dir=str(runs),
        model=ModelConfig(path=str(policy)),
        dataset=DatasetConfig(
            path="python:rlhf.demo.world.rows", max_length=128, max_rows=48, max_eval_rows=12
        ),
        reward=RewardConfig(tokens_per_batch=1300, center_coef=0.01),
        peft=PeftConfig(enabled=True, r=4, dropout=0.2),
        checkpoint=CheckpointConfig(every=2),
    )
    config.trainer |= {"num_train_epochs": 2, "learning_rate": 1e-2, "logging_steps": 1}
    return dataclasses.replace(config, **values)


def outcome(directory: Path) -> dict[str, bytes]:
    files = [*sorted((directory / "final").glob("*.safetensors")), directory / "final/rlhf.json"]
    return {file.name: file.read_bytes() for file in [*files, directory / "metrics.jsonl"]}


@pytest.mark.slow
def test_a_run_under_a_budget_resumes_bit_identically_and_its_directory_scores_as_it_did(
    policy, tmp_path, capsys
):
    config = stage_config(tmp_path, policy)
    result = train_reward(config)
    directory = config.stage_dir("reward")
    said = re.search(
        r"(\d+) prompts in (\d+) batches.* (\d+) optimiser steps", capsys.readouterr().out
    )
    num_batches, steps = int(said[2]), int(said[3])
    assert steps == 2 * num_batches
    checkpoint = max(int(path.name[11:]) for path in directory.glob("checkpoint-*"))
    assert num_batches < checkpoint - 1 and checkpoint == steps
    whole = outcome(directory)

    splits = load_splits(config.dataset, "reward", config.seed)
    tokenizer = load_tokenizer(ModelConfig(path=str(directory / "final")))
    heldout, _ = encode_ranked(splits.eval, tokenizer, 128)
    model = ScalarModel(load_reward_model(ModelConfig(path=str(directory / "final")))).eval()
    metrics = heldout_metrics(score_rows(model, heldout, 4), heldout)
    assert metrics["eval_margin"] == pytest.approx(result.after["eval_margin"], abs=1e-5)
    assert metrics["eval_accuracy"] == result.after["eval_accuracy"]

    take_back_end(directory)
    train_reward(dataclasses.replace(config, resume=True))
    assert outcome(directory) == whole


@pytest.mark.slow
def test_two_processes_under_a_budget_give_the_result_of_one_and_resume_in_any_number(
    policy, tmp_path, monkeypatch
):
    from helpers.stages import launch

    from rlhf.config import save_config

    config = stage_config(tmp_path / "one", policy, peft=PeftConfig())
    config.trainer["gradient_accumulation_steps"] = 2
    config.checkpoint.every = 4
    train_reward(config)
    one = load_file(config.stage_dir("reward") / "final/model.safetensors")
    config.runs_dir = "runs"
    config.trainer["gradient_accumulation_steps"] = 1
    (tmp_path / "recipe").mkdir()
    save_config(config, tmp_path / "recipe/mine.yaml")
    recipe = (tmp_path / "recipe/mine.yaml").read_text()
    (tmp_path / "recipe/mine.yaml").write_text("# @package _global_\n" + recipe)
    arguments = ["--config-dir", str(tmp_path), "recipe=mine"]
    launch("reward", arguments, tmp_path)
    directory = tmp_path / "runs/run/reward"
    two = load_file(directory / "final/model.safetensors")
    for name, weight in one.items():
        close(two[name], weight, atol=1e-5)
    whole = outcome(directory)
    take_back_end(directory)
    launch("reward", [*arguments, "resume=true"], tmp_path)
    assert outcome(directory) == whole
    take_back_end(directory)
    monkeypatch.chdir(tmp_path)
    config.trainer["gradient_accumulation_steps"] = 2
    train_reward(dataclasses.replace(config, run_name="run", resume=True))
    for name, weight in load_file(directory / "final/model.safetensors").items():
        close(two[name], weight, atol=1e-5)


# --- The benchmark --------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_benchmark_compares_the_same_work_and_writes_ratios(tmp_path):
    size = "--responses 3 --prompts 2 --repeats 1 --hidden 32 --layers 1".split()
    command = [sys.executable, str(ROOT / "examples/benchmarks/reward_kwise.py"), *size]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]  # also where the two losses differ
    (result,) = json.loads(done.stdout.splitlines()[-1])["results"]
    seconds = [result[side]["seconds"] for side in ("kwise", "pairs")]
    assert result["time_ratio"] == pytest.approx(seconds[0] / seconds[1])
    assert f"| 3 | 0.50 | {result['time_ratio']:.2f} |" in done.stdout
