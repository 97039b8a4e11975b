"""Reward modelling on ranked responses: `python -m rlhf.reward`, or
`train_reward(RewardStageConfig(...))`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf.reward.stage import RewardResult, train_reward

__all__ = ["RewardResult", "train_reward"]


def __getattr__(name: str) -> Any:  # keeps `--help` and `--cfg job` free of torch
    if name in __all__:
        from rlhf.reward import stage

        return getattr(stage, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
