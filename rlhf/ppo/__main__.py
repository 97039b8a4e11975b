"""Entry point of `python -m rlhf.ppo`."""

from __future__ import annotations

from rlhf.cli import hydra_main
from rlhf.config import PPOStageConfig


def run(config: PPOStageConfig) -> int | None:
    """Import the stage once the configuration is good; return the signal that stopped it."""
    from rlhf.ppo.preflight import PreflightFailed
    from rlhf.ppo.stage import train_ppo

    try:
        return train_ppo(config).stopped_by
    except PreflightFailed:
        if config.preflight != "only":
            raise
        raise SystemExit(1) from None  # the findings are in the terminal


if __name__ == "__main__":
    hydra_main("ppo", run)
