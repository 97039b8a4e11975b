"""Entry point of `python -m rlhf.reward`."""

from __future__ import annotations

from rlhf.command_line import hydra_main
from rlhf.config import RewardStageConfig


def run(config: RewardStageConfig) -> int | None:
    """Import the stage only once the configuration is known to be good.

    Returns:
        Number of the signal that interrupted training, if one did.
    """
    from rlhf.reward.stage import train_reward

    return train_reward(config).stopped_by


if __name__ == "__main__":
    hydra_main("reward", run)
