"""Configuration of the three stages: a dataclass per stage, and its checks.

The dataclasses hold every default; `conf/*.yaml` shows common knobs with their comments, and a test
keeps the two equal. Library users build a dataclass; only `rlhf.command_line` knows Hydra. What the
mapping `trainer:` may hold is decided by the libraries that receive it (see `build_arguments`).
"""

from rlhf.config.checks import check, check_finite, check_scorer_config
from rlhf.config.environment import as_written, hide, remember_references
from rlhf.config.loading import (
    build_arguments,
    config_keys,
    explain,
    load_config,
    load_object,
    nearest,
    plain_values,
    save_config,
    schema,
)
from rlhf.config.runs import (
    CONFIG_FILE,
    config_file_of_run,
    nothing_to_resume,
    read_run_config,
)
from rlhf.config.stages import (
    CONF_DIR,
    STAGES,
    CheckpointConfig,
    CriticConfig,
    DatasetConfig,
    EvaluationConfig,
    InputError,
    MissingValues,
    MixConfig,
    ModelConfig,
    PeftConfig,
    PPOConfig,
    PPOStageConfig,
    PtxConfig,
    RewardConfig,
    RewardStageConfig,
    ScorerComponent,
    ScorerConfig,
    SFTStageConfig,
    StageConfig,
    TrackerConfig,
    WatchdogConfig,
)

__all__ = [
    "CONFIG_FILE",
    "CONF_DIR",
    "STAGES",
    "CheckpointConfig",
    "CriticConfig",
    "DatasetConfig",
    "EvaluationConfig",
    "InputError",
    "MissingValues",
    "MixConfig",
    "ModelConfig",
    "PPOConfig",
    "PPOStageConfig",
    "PeftConfig",
    "PtxConfig",
    "RewardConfig",
    "RewardStageConfig",
    "SFTStageConfig",
    "ScorerComponent",
    "ScorerConfig",
    "StageConfig",
    "TrackerConfig",
    "WatchdogConfig",
    "as_written",
    "build_arguments",
    "check",
    "check_finite",
    "check_scorer_config",
    "config_file_of_run",
    "config_keys",
    "explain",
    "hide",
    "load_config",
    "load_object",
    "nearest",
    "nothing_to_resume",
    "plain_values",
    "read_run_config",
    "remember_references",
    "save_config",
    "schema",
]
