"""Each step of SFT, reward and PPO is checked before its optimiser steps, on all processes.

Leaves out whole runs and their advice (test_finite.py). Run: python -m pytest
tests/end_to_end/test_finite_steps.py
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from accelerate.state import PartialState
from helpers.families import TOKENIZER
from helpers.sharded import in_group, text_of
from helpers.tiny import tiny_model
from helpers.tiny_ppo import make_config, make_trainer
from torch import nn
from transformers import TrainingArguments

from rlhf.checkpoint import NonFiniteError, make_record, write_stage
from rlhf.config import InputError, StageConfig
from rlhf.hf_trainer.finite_trainer import MAX_SKIPPED, FiniteTrainer
from rlhf.metrics import append_jsonl, read_jsonl
from rlhf.ppo.evaluation import Evaluator


class Regression(nn.Module):
    """A linear model whose loss or gradient is spoilt in some micro-batches of some processes."""

    def __init__(self, loss: dict[int, float], gradient: dict[int, float], rank: int = 0):
        super().__init__()
        self.layer, self.calls = nn.Linear(3, 1), 0
        self.loss, self.gradient, self.rank = loss, gradient, rank

    def forward(self, x, **_):
        self.calls += 1
        mine = PartialState().process_index == self.rank
        loss, gradient = (
            spoilt.get(self.calls, 0.0) if mine else 0.0 for spoilt in (self.loss, self.gradient)
        )
        output = self.layer(x)
        if gradient:
            output.register_hook(lambda g: g * gradient)
        # a constant changes the loss alone
        return {"loss": output.square().mean() + loss}


def trainer_of(model, folder, **values) -> FiniteTrainer:
    arguments = {"max_steps": 30, "per_device_train_batch_size": 2, "use_cpu": True}
    arguments |= {"report_to": "none", "disable_tqdm": True, "logging_nan_inf_filter": False}
    arguments |= {"save_strategy": "no", "remove_unused_columns": False, "logging_steps": 100}
    rows = [{"x": torch.tensor([1.0, i, -i])} for i in range(24)]
    args = TrainingArguments(output_dir=str(folder), **arguments | values)
    return FiniteTrainer(model=model, args=args, train_dataset=rows)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_the_first_bad_step_stops_before_it_reaches_the_weights(what, bad, max_grad_norm, tmp_path):
    # two micro-batches a step: the fifth is the first of step 3
    spoilt = {"loss": {}, "gradient": {}} | {what: {5: bad}}
    model, kept = Regression(**spoilt), []
    trainer = trainer_of(
        model, tmp_path, gradient_accumulation_steps=2, max_grad_norm=max_grad_norm
    )
    model.register_forward_pre_hook(lambda *_: kept.append(model.layer.weight.detach().clone()))
    name = "loss" if what == "loss" else "gradient norm"
    with pytest.raises(NonFiniteError, match=f"the {name} is (nan|inf) in step 3; nothing was"):
        trainer.train()
    assert model.calls == 6 and torch.equal(model.layer.weight, kept[5])
    assert not torch.equal(kept[4], kept[3])


def scaled(trainer: FiniteTrainer) -> FiniteTrainer:
    """Give a Trainer a loss scaler, as trainer.fp16 does on a GPU."""
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    return trainer


def test_a_loss_scaler_may_skip_steps_but_not_for_ever(tmp_path):
    some = dict.fromkeys(range(3, 3 + MAX_SKIPPED - 1), math.inf)
    model = Regression({}, some)
    scaled(trainer_of(model, tmp_path, max_grad_norm=0.0)).train()
    assert model.calls == 30 and model.layer.weight.isfinite().all()
    model = Regression({}, some | {3 + MAX_SKIPPED - 1: math.inf})
    with pytest.raises(NonFiniteError, match=f"in step {2 + MAX_SKIPPED}, .* {MAX_SKIPPED} steps"):
        scaled(trainer_of(model, tmp_path, max_grad_norm=0.0)).train()
    assert model.layer.weight.isfinite().all()


def one_of_two(folder: Path) -> None:
    """Train in a process of two, the second of which meets a loss that is not finite."""
    model = Regression({3: math.nan}, {}, rank=1)
    with pytest.raises(NonFiniteError) as stop:
        trainer_of(model, folder, ddp_find_unused_parameters=False).train()
    (folder / f"said-{os.environ['RANK']}").write_text(str(stop.value))


def test_all_processes_stop_at_what_one_of_them_meets(tmp_path):
    log = tmp_path / "log"
    assert in_group(one_of_two, tmp_path, log=log, shards=False) == [0, 0], text_of(log)
    said = [(tmp_path / f"said-{rank}").read_text() for rank in (0, 1)]
    assert said[0] == said[1] and said[0].startswith("the loss is nan in step 3")


# --- PPO ------------------------------------------------------------------------------------------


def test_every_number_of_a_rollout_is_checked(policy_dir, tmp_path):
    trainer = make_trainer(make_config(policy_dir, tmp_path), tmp_path)
    rollout = trainer.collect()
    kl, rewards = trainer.shape_rewards(rollout)
    rewards[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="advantages, returns is not finite in update 1"):
        trainer.estimate_advantages(rollout, kl, rewards)
    rollout.scores[rollout.finished] = math.inf
    with pytest.raises(NonFiniteError, match="rewards is not finite in update 1; got inf"):
        trainer.shape_rewards(rollout)
    assert (tmp_path / "non_finite_batch_0.safetensors").is_file()


def spoil(module, inputs, output):
    return output * math.nan


def test_the_loss_on_ptx_texts_is_checked(policy_dir, tmp_path):
    config = make_config(policy_dir, tmp_path)
    config.ptx.coef, config.ptx.batch_size = 1.0, 2
    trainer = make_trainer(config, tmp_path)
    trainer.updater.texts = [[40, 41, 42], [50, 51]]
    rollout = trainer.collect()
    trainer.actors.policy.lm_head.register_forward_hook(spoil)
    with pytest.raises(NonFiniteError, match="ptx_loss is not finite in update 1"):
        trainer.updater.accumulate_ptx(rollout, 0, 0)


def test_an_evaluation_is_checked(policy_dir, tmp_path):
    trainer = make_trainer(make_config(policy_dir, tmp_path), tmp_path)
    evaluate = Evaluator(trainer, trainer.prompts[:2])
    assert math.isfinite(evaluate()[0]["eval_kl"])
    trainer.actors.reference.lm_head.register_forward_hook(spoil)
    with pytest.raises(NonFiniteError, match="ref_logprobs is not finite"):
        evaluate()


# --- Numbers in files -----------------------------------------------------------------------------


def test_rows_of_a_file_are_valid_json_whatever_the_numbers(tmp_path):
    append_jsonl(tmp_path / "a.jsonl", [{"x": math.nan, "y": [{"z": -math.inf}, 1.5], "n": "nan"}])
    text = (tmp_path / "a.jsonl").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert read_jsonl(tmp_path / "a.jsonl") == [{"x": None, "y": [{"z": None}, 1.5], "n": "nan"}]


@pytest.mark.parametrize("name", ["score_mean", "score_std", "eval_accuracy"])
def test_a_record_with_a_bad_number_is_not_written(name, tmp_path):
    record = make_record("reward", StageConfig(), None, TOKENIZER)
    (vars(record) if name.startswith("score") else record.metrics)[name] = math.nan
    model = tiny_model("llama", TOKENIZER)
    with pytest.raises(InputError, match=f"final was not written: {name} is nan"):
        write_stage(tmp_path / "final", model, TOKENIZER, StageConfig(), record)
    assert not list(tmp_path.iterdir())
