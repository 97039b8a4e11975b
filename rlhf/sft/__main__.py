"""Entry point of `python -m rlhf.sft`."""

from __future__ import annotations

from rlhf.cli import hydra_main
from rlhf.config import SFTStageConfig
from rlhf.next_commands import say_next


def run(config: SFTStageConfig) -> int | None:
    """Return the number of the signal that interrupted training, if one did."""
    from rlhf.sft.stage import train_sft  # only once the configuration is known to be good

    result = train_sft(config)
    if result.directory is not None:
        say_next(config)
    return result.stopped_by


if __name__ == "__main__":
    hydra_main("sft", run)
