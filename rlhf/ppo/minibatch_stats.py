"""Statistics of an update: from micro-batches and processes to minibatches, and to the update.

The formulas are in `rlhf.functional.ppo_losses`, the meanings of the names in `rlhf.metrics`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor

LOSSES = ("value_loss", "policy_loss")  # sums that are already divided by the number of tokens
# how a statistic of minibatches is combined over the steps of an update; the others are averaged
OVER_STEPS: dict[str, Callable[[list[float]], float]] = {
    "ratio_max_dev": lambda values: values[0],
    "ratio_max": max,
    "ratio_min": min,
}


@dataclass
class MinibatchStats:
    """Statistics of a part of a minibatch, 0-d tensors by name; `+` joins two parts."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    minima: dict[str, Tensor] = field(default_factory=dict)
    maxima: dict[str, Tensor] = field(default_factory=dict)

    def __add__(self, other: MinibatchStats) -> MinibatchStats:
        return MinibatchStats(
            _join(torch.add, self.sums, other.sums),
            _join(torch.minimum, self.minima, other.minima),
            _join(torch.maximum, self.maxima, other.maxima),
        )

    def reduce(self, accelerator: Accelerator, num_tokens: float) -> dict[str, float]:
        """Means over the tokens, and extremes, of the minibatch on all processes."""
        stacked = torch.stack([x.float() for x in self.sums.values()])
        sums = dict(zip(self.sums, accelerator.reduce(stacked, "sum").tolist(), strict=True))
        # every process divided its losses by its share of the tokens
        counts = {name: accelerator.num_processes for name in LOSSES}
        values = {name: total / counts.get(name, num_tokens) for name, total in sums.items()}
        for extremes, extreme in ((self.maxima, torch.max), (self.minima, torch.min)):
            for name, x in extremes.items():
                values[name] = float(extreme(accelerator.gather(x.float()[None])))
        return values


def _join(
    combine: Callable[[Tensor, Tensor], Tensor], one: dict[str, Tensor], two: dict[str, Tensor]
) -> dict[str, Tensor]:
    return one | {name: combine(one[name], x) if name in one else x for name, x in two.items()}


def over_steps(steps: list[dict[str, float]]) -> dict[str, float]:
    """Metrics of an update from the statistics of its steps."""
    result: dict[str, float] = {}
    for name in dict.fromkeys(name for stats in steps for name in stats):
        values = [stats[name] for stats in steps if name in stats]
        combine = OVER_STEPS.get(name, lambda values: sum(values) / len(values))
        result[name] = combine(values)
    if "ratio_max_dev" in result:
        result["first_ratio_deviation"] = result.pop("ratio_max_dev")
    return result
