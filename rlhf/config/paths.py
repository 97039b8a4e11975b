"""Where a stage finds its inputs: the folder of YAML files, and this run's earlier stages."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TypeVar

from rlhf.config.knobs import PPOStageConfig, SFTStageConfig, StageConfig

Config = TypeVar("Config", bound=StageConfig)

_PACKAGE = Path(__file__).resolve().parents[1]
CONF_DIR = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"


def default_paths(config: StageConfig) -> dict[str, Path]:
    """The inputs that are not given, and the `final/` of this run's earlier stage for each.

    Reward model and PPO start from the run's policy, and PPO scores with the run's reward model.
    """
    paths = {}
    if not isinstance(config, SFTStageConfig) and config.model.path is None:
        paths["model.path"] = config.stage_dir("sft") / "final"
    if isinstance(config, PPOStageConfig):
        if config.scorer.path is None and not config.scorer.components:
            paths["scorer.path"] = config.stage_dir("reward") / "final"
    return paths


def with_default_paths(config: Config) -> Config:
    """Return a copy that names the earlier stages of this run, where those exist."""
    config = copy.deepcopy(config)
    for key, path in default_paths(config).items():
        if path.is_dir():
            getattr(config, key.removesuffix(".path")).path = str(path)
    return config
