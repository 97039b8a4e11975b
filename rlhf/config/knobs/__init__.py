"""The dataclasses of the three stages: every knob with its default, range and meaning."""

import dataclasses

from rlhf.config.knobs.endpoint import EndpointConfig
from rlhf.config.knobs.ppo import (
    CriticConfig,
    EvaluationConfig,
    PPOConfig,
    PPOStageConfig,
    PtxConfig,
    SamplingConfig,
    WatchdogConfig,
)
from rlhf.config.knobs.reward import NormalizationConfig, RewardConfig, RewardStageConfig
from rlhf.config.knobs.scorer import NORMALIZATIONS, ScorerComponent, ScorerConfig
from rlhf.config.knobs.sft import MixConfig, SFTStageConfig
from rlhf.config.knobs.shared import (
    DTYPES,
    CheckpointConfig,
    DatasetConfig,
    ModelConfig,
    PeftConfig,
    StageConfig,
    TrackerConfig,
)

STAGES: dict[str, type[StageConfig]] = {
    "sft": SFTStageConfig,
    "reward": RewardStageConfig,
    "ppo": PPOStageConfig,
}
# Groups that are chosen as `group=choice` -> the choice that is the default.
GROUPS = {
    "model": "default",
    "dataset": "none",
    "scorer": "reward_model",
    "peft": "none",
    "tracker": "none",
}


def groups_of(config_class: type[StageConfig]) -> list[str]:
    """The groups of a stage that are chosen as `group=choice`."""
    names = {field.name for field in dataclasses.fields(config_class)}
    return [name for name in GROUPS if name in names]
