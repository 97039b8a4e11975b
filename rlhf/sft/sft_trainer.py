"""The Trainer of the SFT stage: TRL's, whose results do not depend on the number of processes.

Left out: the loss (TRL), and which tokens carry it (`training_rows.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import SFTTrainer

from rlhf.hf_trainer import FiniteTrainer

IGNORED = -100  # label of a token without loss
MEANS = ("mean_token_accuracy", "entropy")  # over the tokens of a pass, as TRL collects them


class FiniteSFTTrainer(FiniteTrainer, SFTTrainer):
    """TRL's Trainer, but it stops at numbers that are not finite, and reads each row once."""

    def row_lengths(self) -> list[int]:
        """Tokens of each training row."""
        rows: Any = self.train_dataset
        return [len(ids) for ids in rows["input_ids"]]

    def weightless_row(self) -> dict[str, Any]:
        """The first row without labels."""
        assert self.train_dataset is not None
        return _without_labels(self.train_dataset[0])

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        """As TRL, which also counts the tokens of a row without labels, on a resumed run."""
        if not self.model.training or self.accelerator.num_processes == 1:
            return super().compute_loss(model, inputs, *args, **options)
        before, number = self._total_train_tokens, _num_tokens(inputs)
        result = super().compute_loss(model, inputs, *args, **options)
        total = self.accelerator.reduce(number.to(self.args.device), reduction="sum").item()
        self._total_train_tokens = before + total
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return result

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Average loss, accuracy and entropy over the tokens of all held-out rows.

        The Trainer's own averages depend on how rows are batched, and repeat rows where the
        processes have unequal shares.
        """
        model, process = self.accelerator.unwrap_model(self.model), self.accelerator.process_index
        rows, size = self.eval_dataset, self.args.per_device_eval_batch_size
        assert isinstance(rows, Dataset)
        found, progress = self._metrics["eval"], self.accelerator.gradient_state
        was_training, loaders = model.training, progress.dataloader_references
        model.eval()
        progress.dataloader_references = [None]  # that of training would cut what TRL gathers
        sums: dict[str, float] = dict.fromkeys(("loss", "tokens", *MEANS), 0.0)
        for first in range(0, len(rows), size * self.accelerator.num_processes):
            mine = range(first + process * size, min(first + (process + 1) * size, len(rows)))
            batch = [rows[row] for row in mine] or [_without_labels(rows[0])]
            loss, tokens = self.accelerator.reduce(self._sum_of_losses(model, batch)).tolist()
            sums["loss"] += loss
            sums["tokens"] += tokens
            for name in MEANS:
                sums[name] += found[name][-1] * tokens
        for name in MEANS:
            found[name] = [sums[name] / sums["tokens"]]
        metrics = {"eval_loss": sums["loss"] / sums["tokens"]}
        self.log(metrics)
        progress.dataloader_references = loaders
        model.train(was_training)
        return metrics

    def _sum_of_losses(self, model: Any, batch: list[dict[str, Any]]) -> Tensor:
        """(2,): the sum of the losses of a batch's tokens, and their number."""
        inputs = self._prepare_inputs(self.data_collator(batch))
        tokens = (inputs["labels"][:, 1:] != IGNORED).sum()
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        # without tokens, the mean of label smoothing is 0 / 0
        return torch.stack([(loss.float() * tokens).where(tokens > 0, 0.0), tokens])


def _without_labels(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"labels": [IGNORED] * len(row["labels"])}


def _num_tokens(inputs: Any) -> Tensor:
    """Tokens of a batch; 0 if none has a label."""
    mask = inputs.get("attention_mask")
    number = torch.tensor(inputs["position_ids"].shape[1]) if mask is None else mask.sum()
    return number * (inputs["labels"] != IGNORED).any().to(number.device)
