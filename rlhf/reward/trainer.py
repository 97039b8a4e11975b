"""The Trainer of the reward stage.

One forward pass per response, never one per pair: all K responses of a prompt stand in one
micro-batch, and `functional.ranking_loss` compares them (InstructGPT, arXiv 2203.02155, eq. 1). The
transformers Trainer does the rest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from rlhf.functional import ranking_loss
from rlhf.models import sequence_scores
from rlhf.reward.report import RankingReport, ranking_report
from rlhf.scorers import score_sequences


class RankingTrainer(Trainer):
    """A Trainer whose rows are prompts with all their ranked responses."""

    def __init__(self, *args: Any, ranking: Any, heldout: list[dict[str, Any]], **kwargs: Any):
        """Take the loss settings (`config.reward`) and the encoded held-out rows beside the
        Trainer's arguments."""
        super().__init__(*args, **kwargs)
        self.ranking, self.heldout = ranking, heldout
        self._sums = torch.zeros(3)  # of accuracy, margin and 1 over pairs, since the last log

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Mean over the prompts of the micro-batch of the ranking loss."""
        scores = sequence_scores(model, inputs["input_ids"], inputs["attention_mask"].bool())
        loss, stats = ranking_loss(
            scores, inputs["ranks"], inputs["groups"], self.ranking.margin, kind=self.ranking.loss
        )
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
        scores = score_rows(model, self.heldout, self.args.per_device_eval_batch_size)
        model.train(was_training)
        return ranking_report(scores, self.heldout)


def score_rows(model: Any, rows: list[dict[str, Any]], prompts_per_batch: int) -> list[Tensor]:
    """Score the responses of encoded ranked rows; one (K,) tensor per row."""
    sequences = [ids for row in rows for ids in row["input_ids"]]
    per_prompt = max((len(row["input_ids"]) for row in rows), default=1)
    scores = score_sequences(model, sequences, prompts_per_batch * per_prompt)
    return list(scores.split([len(row["input_ids"]) for row in rows]))
