"""Batches: rows of different lengths as one padded tensor, and ranked rows as a batch.

Left out: the batches of SFT, which TRL makes, and those of PPO, which its rollout makes with `pad`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # the data room is imported before torch is needed
    import torch


def pad(
    rows: Sequence[Sequence[Any]],
    value: Any,
    side: Literal["left", "right"] = "right",
    device: Any = None,
) -> torch.Tensor:
    """Make rows of different lengths one tensor (number of rows, length of the longest).

    pad([[1, 2], [3]], 0) -> [[1, 2], [3, 0]]        side="left" -> [[1, 2], [0, 3]]
    """
    import torch

    width = max(map(len, rows))
    padding = [[value] * (width - len(row)) for row in rows]
    pairs = zip(rows, padding, strict=True)
    filled = [[*row, *rest] if side == "right" else [*rest, *row] for row, rest in pairs]
    return torch.tensor(filled, device=device)


@dataclass
class RankedCollator:
    """Collate encoded ranked rows; a batch has all responses of its prompts, in order.

    Returns:
        input_ids (N, L) right-padded, attention_mask (N, L) from lengths (so that pad may equal
        EOS), ranks (N,), groups (N,): index of the prompt in the batch. All int64. (N,) float32:
        scores of the data (0 where the row has none), margin of the response's pair (0), and the
        probability that the response is preferred (1).
    """

    pad_token_id: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        import torch

        sequences = [ids for row in rows for ids in row["input_ids"]]
        batch = {
            "input_ids": pad(sequences, self.pad_token_id),
            "attention_mask": pad([[1] * len(ids) for ids in sequences], 0),
            "ranks": torch.tensor([rank for row in rows for rank in row["ranks"]]),
            "groups": torch.tensor([i for i, row in enumerate(rows) for _ in row["ranks"]]),
        }
        strengths = [_strengths(row) for row in rows]
        for name in ("scores", "margin", "probability"):
            batch[name] = torch.tensor([value for row in strengths for value in row[name]])
        return batch


def _strengths(row: dict[str, Any]) -> dict[str, list[float]]:
    """How much better each response is; numbers without effect where the row has none."""
    num, probability = len(row["ranks"]), row.get("probability")
    return {
        "scores": row.get("scores") or [0.0] * num,
        "margin": [float(row.get("margin") or 0.0)] * num,
        "probability": [1.0] * num if probability is None else [probability, 1.0 - probability],
    }
