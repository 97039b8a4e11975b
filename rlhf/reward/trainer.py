"""The Trainer of the reward stage.

One forward pass per response, never one per pair: all K responses of a prompt stand in one
micro-batch, and `functional.ranking_loss` compares them (InstructGPT, arXiv 2203.02155, eq. 1). The
loss of an optimiser step is the mean over all its prompts, however they are spread over processes,
accumulated micro-batches and, with `reward.tokens_per_batch`, batches of unequal size. The
transformers Trainer does the rest.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import TrainingArguments

from rlhf.config import InputError, RewardConfig
from rlhf.functional import ranking_loss
from rlhf.hf_trainer.finite import FiniteTrainer
from rlhf.hf_trainer.stage_callback import describe_batches
from rlhf.models import sequence_scores
from rlhf.reward.report import RankingReport, ranking_report
from rlhf.scorers import score_sequences

Row = dict[str, Any]


class RankingTrainer(FiniteTrainer):
    """A Trainer whose rows are prompts with all their ranked responses."""

    def __init__(
        self,
        *args: Any,
        ranking: RewardConfig,
        heldout: list[Row],
        batches: list[list[int]] | None = None,
        **kwargs: Any,
    ):
        """Take the loss settings, the encoded held-out rows and the batches (`plan_batches`; None:
        per_device_train_batch_size prompts each) beside the Trainer's arguments."""
        super().__init__(*args, **kwargs)
        self.ranking, self.heldout, self.batches = ranking, heldout, batches
        self.model_accepts_loss_kwargs = True  # compute_loss scales for accumulation itself
        self._sums = torch.zeros(3)  # of accuracy, margin and 1 over pairs, since the last log

    def get_train_dataloader(self) -> DataLoader:
        """Read the planned batches, if there are any, in a new order each epoch."""
        if self.batches is None:
            return super().get_train_dataloader()
        assert self.train_dataset is not None
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=PlannedBatches(self.batches, self.args.seed, self._epoch),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)  # gives each process its share

    def _epoch(self) -> int:
        return int(self.state.epoch or 0)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Any]:
        """Count the prompts of an optimiser step over its micro-batches and all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        num_prompts = sum(len(batch["groups"].unique()) for batch in batches)
        total = torch.tensor(num_prompts, device=self.args.device)
        return batches, self.accelerator.reduce(total, reduction="sum")

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Mean over the prompts of the micro-batch of the ranking loss.

        Args:
            num_items_in_batch: prompts of the optimiser step. Given these, the loss is the
                micro-batch's share of the mean over all of them: the Trainer adds up micro-batches,
                and averages processes.
        """
        scores = sequence_scores(model, inputs["input_ids"], inputs["attention_mask"].bool())
        ranking, pairwise = self.ranking, self.ranking.loss == "pairwise"
        loss, stats = ranking_loss(
            scores,
            inputs["ranks"],
            inputs["groups"],
            pair_margins(inputs, ranking),
            kind=ranking.loss,
            targets=inputs["probability"][:, None] if pairwise else None,
            label_smoothing=ranking.label_smoothing,
            center_coef=ranking.center_coef,
        )
        if num_items_in_batch is not None:
            share = stats["num_groups"] / num_items_in_batch
            loss = loss * (share * self.accelerator.num_processes)
        pairs = stats["num_pairs"]
        self._sums += torch.stack([stats["accuracy"] * pairs, stats["margin"] * pairs, pairs]).cpu()
        return (loss, {"scores": scores}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add accuracy and margin over all pairs, of all processes, since the last log."""
        if "loss" in logs:
            sums = self.accelerator.reduce(self._sums.to(self.args.device), reduction="sum")
            accuracy, margin, num_pairs = sums.tolist()
            logs |= {"accuracy": accuracy / num_pairs, "margin": margin / num_pairs}
            self._sums.zero_()
        super().log(logs, *args, **kwargs)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Score the held-out responses; compare with the ranks and the longer-wins rule."""
        metrics = self.report().metrics()
        self.log(dict(metrics))
        return metrics

    def report(self) -> RankingReport:
        """Rank the held-out responses with the model as it is now."""
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        model.eval()
        scores = score_rows(
            model,
            self.heldout,
            self.args.per_device_eval_batch_size,
            self.ranking.tokens_per_batch,
        )
        model.train(was_training)
        return ranking_report(scores, self.heldout)


def pair_margins(inputs: dict[str, Tensor], ranking: RewardConfig) -> Tensor:
    """Add up the margins of all pairs: the constant, that of the row, and the scaled score gap.

    Returns:
        Broadcasts to (N, N), read at [better, worse].
    """
    gaps = inputs["scores"][:, None] - inputs["scores"]  # (N, N)
    return (ranking.margin or 0.0) + inputs["margin"][:, None] + ranking.margin_scale * gaps


# --- Batches under a token budget ---------------------------------------------------------------


def pack(sizes: list[tuple[int, int]], budget: int) -> list[list[int]]:
    """Group items of similar length so that rows x longest stays within a budget.

    sizes (2, 5) (2, 3) (2, 4), budget 16 -> [[1, 2], [0]]: 4 rows x 4 tokens, then 2 x 5

    Args:
        sizes: of each item its number of rows, and the tokens of the longest.
        budget: tokens with padding; an item that exceeds it stands alone.
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
    rows: list[Row], ranking: RewardConfig, num_processes: int
) -> list[list[int]] | None:
    """Check that the training rows fit the settings, and group them under the token budget.

    A batch or two more than the budget needs are split off where the processes would otherwise get
    different numbers of batches.

    Returns:
        Indices of the rows of each batch, each row once; None without `reward.tokens_per_batch`.

    Raises:
        InputError: the settings need what no row has, or cannot use what a row has, or a prompt
            exceeds the budget.
    """
    soft = [row for row in rows if row["probability"] is not None]
    if soft and ranking.loss != "pairwise":
        raise InputError(
            f"reward.loss={ranking.loss} cannot use the field probability that {len(soft)} of "
            f"{len(rows)} rows have; set reward.loss=pairwise, or remove it"
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
            f"reward.tokens_per_batch={budget} does not hold the largest prompt, {largest} tokens "
            f"with its responses and their padding; set it to at least {largest}, or lower "
            "dataset.max_length"
        )
    batches = pack(sizes, budget)
    while len(batches) % num_processes and len(batches) < len(rows):
        batch = max(batches, key=len)
        batches.append([batch.pop() for _ in range(len(batch) // 2)])
    return batches


class PlannedBatches(Sampler[list[int]]):
    """The same batches in each epoch, in an order that (seed, epoch) decides."""

    def __init__(self, batches: list[list[int]], seed: int, epoch: Callable[[], int]):
        """Take the batches of all processes.

        Args:
            epoch: returns the running epoch. (Trainer and accelerate tell a sampler with
                `set_epoch`, but not where it is wrapped twice: resumed on several processes.)
        """
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


# --- Scoring ------------------------------------------------------------------------------------


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
