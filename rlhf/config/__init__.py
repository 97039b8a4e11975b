"""Configuration of the three stages: a dataclass per stage, and its checks.

The dataclasses declare every knob: default, range and meaning. `make conf` writes `conf/*.yaml`
from them. Library users build a dataclass; only `rlhf.cli` knows Hydra. What the
mapping `trainer:` may hold is decided by the libraries that receive it (see `build_arguments`).
"""

from rlhf.config.checks import check, check_scorer_config, problems_of
from rlhf.config.environment import as_written, hide, keep_secret, remember_references
from rlhf.config.errors import (
    InputError,
    MissingValues,
    nearest,
    one_line,
    refuse,
    refused_file,
    show,
)
from rlhf.config.fields import knob, sentences, value_problems, yaml_scalar
from rlhf.config.knobs import (
    DTYPES,
    NORMALIZATIONS,
    STAGES,
    CheckpointConfig,
    CriticConfig,
    DatasetConfig,
    EndpointConfig,
    EvaluationConfig,
    MixConfig,
    ModelConfig,
    NormalizationConfig,
    PeftConfig,
    PPOConfig,
    PPOStageConfig,
    PtxConfig,
    RewardConfig,
    RewardStageConfig,
    SamplingConfig,
    ScorerComponent,
    ScorerConfig,
    SFTStageConfig,
    StageConfig,
    TrackerConfig,
    WatchdogConfig,
    groups_of,
)
from rlhf.config.learning_rates import learning_rates, with_learning_rates
from rlhf.config.objects import (
    JUDGE,
    build_arguments,
    has_weights,
    is_judge,
    is_python,
    is_remote,
    load_object,
    refuse_named_code,
)
from rlhf.config.paths import CONF_DIR, default_paths, with_default_paths
from rlhf.config.ppo_checks import has_frozen_models
from rlhf.config.saved_config import (
    CONFIG_FILE,
    config_file_of_run,
    config_keys,
    config_text,
    dotted,
    explain,
    load_config,
    nothing_to_resume,
    override,
    plain_values,
    quoted,
    read_run_config,
    read_yaml,
    resume_overrides,
    save_config,
    schema,
    written_settings,
)
from rlhf.config.stage_command import UNKNOWN, stage_command
from rlhf.config.stage_help import stage_help
from rlhf.config.synonyms import suggest
