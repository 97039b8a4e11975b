"""Entry point of `python -m rlhf.sft`."""

from __future__ import annotations

from rlhf.command_line import hydra_main
from rlhf.config import SFTStageConfig


def run(config: SFTStageConfig) -> None:
    """Import the stage only once the configuration is known to be good."""
    from rlhf.sft.trainer import train_sft

    train_sft(config)


if __name__ == "__main__":
    hydra_main("sft", run)
