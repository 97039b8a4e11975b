"""The Trainer of the reward stage.

One forward pass per response, never one per pair: all K responses of a prompt are in one
micro-batch, and `functional.ranking_loss` compares them (InstructGPT, arXiv 2203.02155, eq. 1). The
loss of an optimiser step is the mean over all its prompts. How these are spread over processes,
accumulated micro-batches and batches of unequal size (`reward.tokens_per_batch`) does not matter.
The transformers Trainer does the rest. Left out: the batches themselves (`rlhf.reward.batches`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from rlhf.config import RewardConfig
from rlhf.functional import ranking_loss
from rlhf.hf_trainer import FiniteTrainer
from rlhf.models import sequence_scores
from rlhf.reward.batches import PlannedBatches, score_rows
from rlhf.reward.report.measures import Row, heldout_metrics


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
        """Take the Trainer's arguments, the held-out rows, and the batches of `plan_batches`."""
        super().__init__(*args, **kwargs)
        self.ranking, self.heldout, self.batches = ranking, heldout, batches
        self.model_accepts_loss_kwargs = True  # compute_loss scales for accumulation itself
        self._sums = torch.zeros(3)  # of accuracy, margin and 1 over pairs, since the last log

    def row_lengths(self) -> list[int]:
        """Tokens of all responses of each prompt."""
        assert self.train_dataset is not None
        return [sum(map(len, responses)) for responses in self.train_dataset["input_ids"]]

    def weightless_row(self) -> dict[str, Any]:
        """The first prompt, in no group."""
        assert self.train_dataset is not None
        return self.train_dataset[0] | {"weightless": True}

    def get_train_dataloader(self) -> DataLoader:
        """Read the planned batches, if any, in a new order each epoch."""
        if self.batches is None:
            return super().get_train_dataloader()
        assert self.train_dataset is not None
        seed, epoch = self.args.seed, lambda: int(self.state.epoch or 0)
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=PlannedBatches(self.batches, seed, epoch),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)  # gives each process its share

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Any]:
        """Count the prompts of an optimiser step over its micro-batches and all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        groups = (batch["groups"].unique() for batch in batches)
        num_prompts = sum(int((numbers >= 0).sum()) for numbers in groups)
        total = torch.tensor(num_prompts, device=self.args.device)
        return batches, self.accelerator.reduce(total, reduction="sum")

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the ranking loss, averaged over the prompts of the micro-batch.

        Args:
            num_items_in_batch: prompts of the optimiser step. If given, the loss is the
                micro-batch's share of the mean over all of them: the Trainer adds up micro-batches
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
        if inputs["groups"][0] < 0:
            loss, stats = loss * 0, {name: value * 0 for name, value in stats.items()}
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
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        model.eval()
        per_batch = self.args.per_device_eval_batch_size, self.ranking.tokens_per_batch
        scores = score_rows(model, self.heldout, *per_batch)
        model.train(was_training)
        metrics = heldout_metrics(scores, self.heldout)
        self.log(dict(metrics))
        return metrics


def pair_margins(inputs: dict[str, Tensor], ranking: RewardConfig) -> Tensor:
    """Add up the margins of all pairs: the constant, the row's own, and the scaled score gap.

    Returns:
        Broadcasts to (N, N), read at [better, worse].
    """
    gaps = inputs["scores"][:, None] - inputs["scores"]  # (N, N)
    return (ranking.margin or 0.0) + inputs["margin"][:, None] + ranking.margin_scale * gaps
