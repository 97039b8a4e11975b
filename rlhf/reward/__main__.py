"""Entry point of `python -m rlhf.reward`: the stage, or with `score=` the scoring of a file."""

from __future__ import annotations

import sys

from rlhf.cli import hydra_main
from rlhf.config import RewardStageConfig


def run(config: RewardStageConfig) -> int | None:
    """Import the stage only once the configuration is known to be good.

    Returns:
        Number of the signal that interrupted training, if one did.
    """
    from rlhf.reward.stage import train_reward

    return train_reward(config).stopped_by


if __name__ == "__main__":
    if any(argument.startswith("score=") for argument in sys.argv[1:]):
        from rlhf.score import main

        raise SystemExit(main(sys.argv[1:]))
    hydra_main("reward", run)
