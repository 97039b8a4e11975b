"""Batches of the Trainer by tokens: what each pass and process gets; that a step stays the same,
and makes the logits of few tokens at a time.

Run: pytest tests/sft/test_token_batches.py
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from helpers.stages import WORLD, reward_config, sft_config
from safetensors.torch import load_file
from torch.testing import assert_close
from torch.utils.data import BatchSampler, DataLoader
from transformers import Trainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from rlhf import train_reward, train_sft
from rlhf.hf_trainer import finite_trainer
from rlhf.hf_trainer.token_batches import (
    SharedBatches,
    WithWeightlessRow,
    level,
    split_batch,
    together,
)
from rlhf.metrics import read_jsonl
from rlhf.sft.stage import FiniteSFTTrainer


def test_neighbours_join_while_they_fit():
    rows = [(1, 5), (1, 4), (1, 2), (1, 1), (1, 9), (1, 1)]
    assert together(rows, 9, padded=False) == [(0, 2), (2, 4), (4, 5), (5, 6)]
    assert together(rows, 100, padded=False) == [(0, 6)]
    assert together([(1, 5), (1, 4), (1, 2), (1, 1)], 10, padded=True) == [(0, 2), (2, 4)]
    assert together([(2, 5), (3, 2), (1, 1)], 10, padded=True) == [(0, 1), (1, 3)]
    assert together([(1, 50)], 10, padded=True) == [(0, 1)]  # it cannot be divided


def test_rows_after_one_another_are_those_that_the_collator_makes_of_fewer_rows():
    collator = DataCollatorForLanguageModeling(0, padding_free=True)
    rows = [{"input_ids": ids, "labels": ids} for ids in ([1, 2, 3], [4, 5], [6], [7, 8, 9])]
    parts = split_batch(collator(rows), 5)
    assert len(parts) == 2
    for part, expected in zip(parts, (collator(rows[:2]), collator(rows[2:])), strict=True):
        assert part.keys() == expected.keys() > {"cu_seq_lens_q", "max_length_q", "seq_idx"}
        for name, value in expected.items():
            assert_close(part[name], value, rtol=0, atol=0)


def test_padded_rows_are_sorted_and_lose_padding_and_groups_stay_together():
    lengths = torch.tensor([2, 1, 5, 4, 1])
    mask = (torch.arange(5) < lengths[:, None]).long()
    ids = torch.arange(25).view(5, 5)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    parts = split_batch(inputs, 10)
    assert [part["input_ids"][:, 0].tolist() for part in parts] == [[10, 15], [0, 5, 20]]
    assert [part["labels"].shape for part in parts] == [(2, 5), (3, 2)]
    groups = {"groups": torch.tensor([0, 0, 1, 1, 1]), "ranks": torch.arange(5)}
    parts = split_batch(inputs | groups, 10)
    assert [part["ranks"].tolist() for part in parts] == [[2, 3, 4], [0, 1]]
    assert [part["groups"].tolist() for part in parts] == [[1, 1, 1], [0, 0]]
    assert parts[1]["input_ids"].shape == (2, 2)


def test_a_step_is_dealt_so_that_processes_have_similar_numbers_of_tokens():
    lengths = [9, 1, 8, 2, 7, 3]
    assert level([0, 2, 1, 3], lengths, 2) == [[0, 1], [2, 3]]
    assert level([0, 1, 2, 3, 4, 5], [10, 1, 1, 1, 1, 1], 2) == [[0, 4, 5], [1, 2, 3]]
    assert level([4, 5, 0], lengths, 3) == [[0], [4], [5]]
    assert level([0, 1, 2], lengths, 2) == [[0, 1], [2]], "the last rows of an epoch"
    assert level([3], lengths, 2) == [[3], []]


def test_a_process_without_a_row_of_the_last_step_gets_one_that_is_no_row():
    rows = [*range(5)]
    batches = SharedBatches(BatchSampler(rows, 2, False), [1] * 5, 2)
    assert [*batches] == [[0, 2], [1, 3], [4], [5]] and len(batches) == 4
    with_another = WithWeightlessRow(rows, {"none": 0})
    assert with_another[5] == {"none": 0}
    assert [*with_another] == rows, "group_by_length takes the lengths of these"


def test_processes_share_the_rows_of_each_step_of_one_process(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 100, (23,), generator=draw).tolist()
    found = [{"row": i, "input_ids": [0] * n, "labels": [0] * n} for i, n in enumerate(lengths)]
    rows = Dataset.from_list(found)

    def batches_of(process, trainer=FiniteSFTTrainer):
        loader = DataLoader(rows.with_format("torch", ["row"]), 4, shuffle=True)
        loader = prepare_data_loader(
            *(loader, None, 2, process), put_on_device=False, use_seedable_sampler=True, data_seed=0
        )
        monkeypatch.setattr(Trainer, "get_train_dataloader", lambda _: loader)
        stub = object.__new__(trainer)
        stub.train_dataset, stub.accelerator = rows, SimpleNamespace(num_processes=2)
        loader = stub.get_train_dataloader()
        epochs = []
        for epoch in range(2):
            loader.set_epoch(epoch)
            epochs.append([batch["row"].tolist() for batch in loader])
        return epochs

    def apart(step):  # in tokens
        one, two = (sum(lengths[row] for row in batch) for batch in step)
        return abs(one - two)

    dealt, drawn = ([batches_of(i, t) for i in range(2)] for t in (FiniteSFTTrainer, Trainer))
    for epoch in range(2):
        ours = list(zip(dealt[0][epoch], dealt[1][epoch], strict=True))
        theirs = list(zip(drawn[0][epoch], drawn[1][epoch], strict=True))
        assert len(ours) == len(theirs) == 3
        for step, expected in zip(ours[:2], theirs[:2], strict=True):
            assert sorted(sum(step, [])) == sorted(sum(expected, []))
        # the last step lacks a row: accelerate repeats one of the first
        assert sorted(sum(ours[2], [])) == sorted(theirs[2][0] + theirs[2][1][:3])
        assert sum(map(apart, ours[:2])) < sum(map(apart, theirs[:2])) / 3
    assert dealt[0][0] != dealt[0][1]


@pytest.mark.parametrize(
    ("stage", "changes", "tokens"),
    [
        ("sft", {"forward": "padded"}, 100),
        ("sft", {"forward": "padding_free", "packing": True}, 40),
        pytest.param("reward", {"forward": "padding_free"}, 200, marks=pytest.mark.slow),
    ],
)
def test_steps_are_the_same_in_several_passes(tmp_path, monkeypatch, stage, changes, tokens):
    number_of_parts = []

    def counted(inputs, tokens):
        parts = split_batch(inputs, tokens)
        number_of_parts.append(len(parts))
        return parts

    monkeypatch.setattr(finite_trainer, "split_batch", counted)
    rows = dataclasses.replace(WORLD, max_rows=24, max_eval_rows=4)
    results = []
    if stage == "reward":
        train_sft(sft_config(tmp_path, dataset=rows, num_samples=0, trainer={"max_steps": 1}))
    for limit in (None, tokens):
        config = (sft_config if stage == "sft" else reward_config)(tmp_path, dataset=rows)
        config.model.forward, config.micro_batch_tokens = changes["forward"], limit
        config.trainer = config.trainer | {"max_steps": 2, "logging_steps": 1, "eval_steps": 2}
        if stage == "sft":
            config.num_samples, config.trainer["packing"] = 0, changes.get("packing", False)
        config.overwrite = True
        (train_sft if stage == "sft" else train_reward)(config)
        directory = config.stage_dir(stage)
        weights = load_file(directory / "final/model.safetensors")
        results.append((read_jsonl(directory / "metrics.jsonl"), weights))
    assert len(number_of_parts) == 2 and min(number_of_parts) > 1
    (whole, expected), (parts, actual) = results
    for one, other in zip(whole, parts, strict=True):
        for key in one.keys() & {"loss", "grad_norm", "eval_loss", "accuracy", "margin"}:
            assert other[key] == pytest.approx(one[key], rel=1e-4, abs=1e-6), key
    for key, weight in expected.items():
        assert_close(actual[key], weight, rtol=0, atol=2e-5)


@pytest.mark.parametrize("options", [{}, {"packing": True}])
def test_no_step_makes_the_logits_of_all_tokens(tmp_path, monkeypatch, options):
    """TRL's loss multiplies a few hidden states at a time with the weights of the head."""
    plain, steps, calls = finite_trainer.FiniteTrainer.training_step, [], []

    def step(self, model, *rest):
        steps.append(self.state.global_step)
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        hook = head.register_forward_hook(lambda *_: calls.append(len(steps)))
        try:
            return plain(self, model, *rest)
        finally:
            hook.remove()

    monkeypatch.setattr(finite_trainer.FiniteTrainer, "training_step", step)
    rows = dataclasses.replace(WORLD, max_rows=24, max_eval_rows=4)
    config = sft_config(tmp_path, dataset=rows, num_samples=0)
    config.trainer |= {"max_steps": 2, "logging_steps": 1, "eval_steps": 2} | options
    train_sft(config)
    assert steps == [0, 1] and not calls
