"""Entry point of `python -m rlhf.ppo`."""

from __future__ import annotations

from rlhf.cli import hydra_main
from rlhf.config import PPOStageConfig
from rlhf.next_commands import say_next


def run(config: PPOStageConfig) -> int | None:
    """Import the stage once the configuration is good; return the signal that stopped it."""
    from rlhf.ppo.preflight import PreflightFailed
    from rlhf.ppo.stage import train_ppo

    try:
        result = train_ppo(config)
    except PreflightFailed:
        if config.preflight != "only":
            raise
        raise SystemExit(1) from None  # the findings are in the terminal
    if result.directory is not None:
        say_next(config)
    return result.stopped_by


if __name__ == "__main__":
    hydra_main("ppo", run)
