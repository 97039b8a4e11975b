"""Configurations of tests: composed as on the command line, or valid with a few changes."""

import functools
from operator import attrgetter

from omegaconf import OmegaConf

from rlhf.config import CONF_DIR, STAGES, PPOStageConfig, ScorerComponent, schema


def compose_stage(stage, *overrides):
    """What Hydra makes of `python -m rlhf.<stage> recipe=null ...`."""
    return OmegaConf.to_object(_composed(stage, *overrides))


@functools.cache
def _composed(stage, *overrides):
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name=f"{stage}_schema", node=schema(STAGES[stage]))
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
        return compose(stage, overrides=list(overrides))


def valid_config(stage, changes=()):
    """A configuration of `stage` that passes every check, with dotted keys changed."""
    config = STAGES[stage]()
    for key, value in {
        "dataset.path": "rows.jsonl",
        "model.path": "model",
        **dict(changes),
    }.items():
        parent, _, name = key.rpartition(".")
        setattr(attrgetter(parent)(config) if parent else config, name, value)
    if isinstance(config, PPOStageConfig) and not (config.scorer.path or config.scorer.components):
        config.scorer.path = "reward_model"
    return config


def several(*components, **values):
    """Changes that give the PPO stage several scorers."""
    parts = [ScorerComponent(**component) for component in components]
    return {"scorer.components": parts} | {f"scorer.{k}": v for k, v in values.items()}
