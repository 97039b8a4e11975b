"""Entry point of `python -m rlhf.reward`; with `score=`, the old spelling of `rlhf.score`."""

from __future__ import annotations

import re
import shlex
import sys

from rlhf.cli import hydra_main
from rlhf.config import RewardStageConfig
from rlhf.next_commands import say_next


def run(config: RewardStageConfig) -> int | None:
    """Run the stage, imported only once the configuration is known to be good; return the number
    of the signal that interrupted it, if one did."""
    from rlhf.reward.stage import train_reward

    result = train_reward(config)
    if result.directory is not None:
        say_next(config)
    return result.stopped_by


def score(arguments: list[str]) -> int:
    """Score a file as `python -m rlhf.score` does, and name that command."""
    from rlhf.score import main

    renamed = [re.sub("^score=", "data=", argument) for argument in arguments]
    print(f"this command is now: python -m rlhf.score {shlex.join(renamed)}", file=sys.stderr)
    return main(renamed)


if __name__ == "__main__":
    if any(argument.startswith("score=") for argument in sys.argv[1:]):
        raise SystemExit(score(sys.argv[1:]))
    hydra_main("reward", run)
