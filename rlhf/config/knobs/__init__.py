"""The dataclasses of the three stages: every knob with its default, range and meaning."""

from rlhf.config.knobs.ppo import (
    CriticConfig,
    EvaluationConfig,
    PPOConfig,
    PPOStageConfig,
    PtxConfig,
    WatchdogConfig,
)
from rlhf.config.knobs.reward import NormalizationConfig, RewardConfig, RewardStageConfig
from rlhf.config.knobs.scorers import NORMALIZATIONS, ScorerComponent, ScorerConfig
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
