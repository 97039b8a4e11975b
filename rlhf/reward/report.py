"""How good is a reward model: pairwise accuracy, beside the rule that the longer response wins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LENGTH_MATCH = 0.8


@dataclass
class RankingReport:
    """Accuracy over all non-tied held-out pairs; ties of the judge's value count one half.

    Attributes:
        accuracy: of the reward model.
        longer_wins: of the rule "the longer response (in tokens) wins", on the same pairs.
        length_matched: of the reward model, where the shorter response has at least `LENGTH_MATCH`
            of the longer's tokens; None without such pairs.
        longer_wins_matched: of the rule, on those.
        margin: mean score of the better response minus that of the worse.
    """

    accuracy: float
    longer_wins: float
    length_matched: float | None
    longer_wins_matched: float | None
    margin: float
    num_pairs: int
    num_matched: int

    def metrics(self) -> dict[str, float]:
        """Names of `metrics.METRICS`."""
        values = {
            "eval_accuracy": self.accuracy,
            "eval_longer_wins_accuracy": self.longer_wins,
            "eval_margin": self.margin,
            "eval_num_pairs": self.num_pairs,
            "eval_num_length_matched_pairs": self.num_matched,
        }
        if self.length_matched is not None:
            values["eval_length_matched_accuracy"] = self.length_matched
        return values

    def rows(self) -> list[tuple[str, float | None, int]]:
        """Rows of the closing table."""
        return [
            ("reward model", self.accuracy, self.num_pairs),
            ("the longer response wins", self.longer_wins, self.num_pairs),
            ("reward model, similar length", self.length_matched, self.num_matched),
            (
                "the longer response wins, similar length",
                self.longer_wins_matched,
                self.num_matched,
            ),
        ]


def ranking_report(scores: list[Tensor], rows: list[dict[str, Any]]) -> RankingReport:
    """Compare scores with ranks over all pairs of each prompt.

    Args:
        scores: one (K,) tensor per prompt.
        rows: encoded rows with `ranks` (0 = best) and `lengths` (tokens), K each.
    """
    gaps, length_gaps, matched = [], [], []
    for row_scores, row in zip(scores, rows, strict=True):
        ranks, lengths = torch.tensor(row["ranks"]), torch.tensor(row["lengths"])
        better, worse = (ranks[:, None] < ranks[None, :]).nonzero(
            as_tuple=True
        )  # (num_pairs,) each
        gaps.append(row_scores[better] - row_scores[worse])
        length_gaps.append(lengths[better] - lengths[worse])
        shorter = torch.minimum(lengths[better], lengths[worse])
        matched.append(shorter >= LENGTH_MATCH * torch.maximum(lengths[better], lengths[worse]))
    gap, length_gap, is_matched = torch.cat(gaps), torch.cat(length_gaps), torch.cat(matched)
    return RankingReport(
        accuracy=_accuracy(gap),
        longer_wins=_accuracy(length_gap),
        length_matched=_accuracy(gap[is_matched]) if is_matched.any() else None,
        longer_wins_matched=_accuracy(length_gap[is_matched]) if is_matched.any() else None,
        margin=float(gap.mean()),
        num_pairs=len(gap),
        num_matched=int(is_matched.sum()),
    )


def _accuracy(gap: Tensor) -> float:
    return float((gap > 0).double().mean() + 0.5 * (gap == 0).double().mean())
