"""PPO against a scorer: `python -m rlhf.ppo`, or `train_ppo(PPOStageConfig(...))`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf.ppo.result import PPOResult
    from rlhf.ppo.stage import train_ppo
    from rlhf.ppo.trainer import PPOTrainer

__all__ = ["PPOResult", "PPOTrainer", "train_ppo"]


def __getattr__(name: str) -> Any:  # keeps `--help` and `--cfg job` free of torch
    if name in __all__:
        from rlhf.ppo import stage, trainer

        return getattr(trainer if name == "PPOTrainer" else stage, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
