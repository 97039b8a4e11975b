"""Entry point of `python -m rlhf.reward`."""

from __future__ import annotations

from rlhf.command_line import hydra_main
from rlhf.config import RewardStageConfig


def run(config: RewardStageConfig) -> None:
    """Import the stage only once the configuration is known to be good."""
    from rlhf.reward.trainer import train_reward

    train_reward(config)


if __name__ == "__main__":
    hydra_main("reward", run)
