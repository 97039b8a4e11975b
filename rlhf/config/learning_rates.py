"""Learning rates by method: adapters need a larger one than all weights together."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

from rlhf.config.knobs import PPOStageConfig, RewardStageConfig, SFTStageConfig, StageConfig

Config = TypeVar("Config", bound=StageConfig)

# stage -> setting -> learning rate of full fine-tuning, of LoRA adapters.
# Full: Alpaca's SFT, InstructGPT's reward model, TRL's PPO. LoRA: about ten times as much ("LoRA
# Without Regret", Thinking Machines 2025; TRL's documentation); in PPO the 3e-4 of Hu et al. 2021
# (arXiv 2106.09685), see docs/first-ppo-run.md.
RATES: dict[type[StageConfig], dict[str, tuple[float, float]]] = {
    SFTStageConfig: {"trainer.learning_rate": (2e-5, 2e-4)},
    RewardStageConfig: {"trainer.learning_rate": (9e-6, 1e-4)},
    PPOStageConfig: {"ppo.learning_rate": (3e-6, 3e-4), "critic.learning_rate": (3e-6, 3e-4)},
}


def learning_rates(config: StageConfig) -> dict[str, float]:
    """The learning rates of a stage by their keys, with the method's default for null."""
    found = {}
    for key, defaults in RATES[type(config)].items():
        given = _group(config, key).get("learning_rate")
        found[key] = defaults[config.peft.enabled] if given is None else given
    return found


def with_learning_rates(config: Config, say: Callable[[str], None]) -> Config:
    """Return a copy in which every learning rate is a number.

    Args:
        say: is told about the defaults of LoRA.
    """
    config, chosen = copy.deepcopy(config), []
    for key, rate in learning_rates(config).items():
        group = _group(config, key)
        if group.get("learning_rate") is None:
            group["learning_rate"] = rate
            chosen.append(f"{key}={rate:g}")
    if config.peft.enabled and chosen:
        say(f"{' '.join(chosen)}: default{'s' * (len(chosen) > 1)} with LoRA adapters")
    return config


def _group(config: StageConfig, key: str) -> dict[str, Any]:
    """The values of the group that a key belongs to; a change of them changes the configuration."""
    group = getattr(config, key.partition(".")[0])
    return group if isinstance(group, dict) else vars(group)
