"""Batches of ranked rows: planned under a token budget for training, packed under it for scoring.

Left out: batches of a fixed number of prompts, which the Trainer makes itself.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import TrainingArguments

from rlhf.config import InputError, RewardConfig
from rlhf.hf_trainer import describe_batches
from rlhf.reward.report.measures import Row
from rlhf.scorers import score_sequences


def pack(sizes: list[tuple[int, int]], budget: int) -> list[list[int]]:
    """Group items of similar length so that rows x longest stays within a budget.

    sizes (2, 5) (2, 3) (2, 4), budget 16 -> [[1, 2], [0]]: 4 rows x 4 tokens, then 2 x 5

    Args:
        sizes: number of rows of each item, and tokens of the longest one.
        budget: tokens with padding; an item that exceeds it is a batch of its own.
    """
    batches: list[list[int]] = []
    num_rows = 0
    for i in sorted(range(len(sizes)), key=lambda i: sizes[i][1]):
        rows, longest = sizes[i]
        if batches and (num_rows + rows) * longest <= budget:
            batches[-1].append(i)
            num_rows += rows
        else:
            batches.append([i])
            num_rows = rows
    return batches


def plan_batches(
    rows: list[Row], ranking: RewardConfig, batches_per_step: int
) -> list[list[int]] | None:
    """Check that the settings fit the training rows, and group these under the token budget.

    Args:
        batches_per_step: those that all processes accumulate; on them alone, and not on how many
            processes there are, depends which rows a step reads.

    Returns:
        Indices of the rows of each batch, each row once; None without `reward.tokens_per_batch`.

    Raises:
        InputError: the settings need a field that no row has, or cannot use one that rows have, or
            a prompt exceeds the budget.
    """
    soft = [row for row in rows if row["probability"] is not None]
    if soft and ranking.loss != "pairwise":
        raise InputError(
            f"reward.loss={ranking.loss} cannot use the field probability that {len(soft)} of "
            f"{len(rows)} rows have; set reward.loss=pairwise, or remove the field"
        )
    if ranking.margin_scale and all(row["scores"] is None for row in rows):
        raise InputError(
            f"reward.margin_scale={ranking.margin_scale} scales the gaps of scores, but no row has "
            "the field scores; add it, or set reward.margin_scale=0"
        )
    budget = ranking.tokens_per_batch
    if budget is None:
        return None
    sizes = [(len(row["input_ids"]), max(map(len, row["input_ids"]))) for row in rows]
    largest = max(num * longest for num, longest in sizes)
    if largest > budget:
        raise InputError(
            f"reward.tokens_per_batch={budget} is too small for the largest prompt, which has "
            f"{largest} tokens with its responses and their padding; set it to at least {largest}, "
            "or lower dataset.max_length"
        )
    batches = pack(sizes, budget)
    # split the largest batches until every step, and so every process, gets the same number
    while len(batches) % batches_per_step and len(batches) < len(rows):
        batch = max(batches, key=len)
        batches.append([batch.pop() for _ in range(len(batch) // 2)])
    return batches


class PlannedBatches(Sampler[list[int]]):
    """The same batches in each epoch, in an order that depends on (seed, epoch) alone."""

    def __init__(self, batches: list[list[int]], seed: int, epoch: Callable[[], int]):
        """Take the batches of all processes, and a function that returns the epoch: a sampler's
        `set_epoch` is not called where it is wrapped twice (resumed on several processes)."""
        self.batches, self.seed, self.epoch = batches, seed, epoch

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.batches)
        random.Random(f"{self.seed} {self.epoch()}").shuffle(order)
        return iter(order)


def describe_plan(args: TrainingArguments, rows: list[Row], plan: list[list[int]] | None) -> str:
    """Spell out the batch arithmetic before training."""
    if plan is None:
        return describe_batches(args, len(rows), "prompts")
    num_tokens = sum(len(ids) for row in rows for ids in row["input_ids"])
    sizes = [[ids for i in batch for ids in rows[i]["input_ids"]] for batch in plan]
    padded = sum(len(batch) * max(map(len, batch)) for batch in sizes)
    per_step = args.gradient_accumulation_steps * args.world_size
    steps_per_epoch = -(-len(plan) // per_step)
    steps = args.max_steps if args.max_steps > 0 else int(steps_per_epoch * args.num_train_epochs)
    return (
        f"{len(rows)} prompts in {len(plan)} batches, {1 - num_tokens / padded:.0%} padding; "
        f"{args.gradient_accumulation_steps} accumulated x {args.world_size} "
        f"process{'es' * (args.world_size > 1)} = {per_step} batches, on average "
        f"{len(rows) / len(plan) * per_step:.1f} prompts, a step; {steps} optimiser steps"
    )


def score_rows(
    model: Any, rows: list[Row], prompts_per_batch: int, tokens_per_batch: int | None = None
) -> list[Tensor]:
    """Score the responses of encoded ranked rows; one (K,) tensor per row.

    Args:
        tokens_per_batch: budget of tokens with padding, in place of `prompts_per_batch`.
    """
    sequences = [ids for row in rows for ids in row["input_ids"]]
    if tokens_per_batch is None:
        per_prompt = max((len(row["input_ids"]) for row in rows), default=1)
        scores = score_sequences(model, sequences, prompts_per_batch * per_prompt)
    else:
        scores = torch.zeros(len(sequences))
        for batch in pack([(1, len(ids)) for ids in sequences], tokens_per_batch):
            scores[batch] = score_sequences(model, [sequences[i] for i in batch], len(batch))
    return list(scores.split([len(row["input_ids"]) for row in rows]))
