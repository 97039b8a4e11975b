"""Where the critic of a PPO run starts: at the reward model, at the policy, or at the critic of an
earlier run. With `ppo.share_base`, critic and reward models are adapters on the policy's base.

`actors.py` calls this.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rlhf.checkpoint import (
    adapter_and_base,
    adapter_on_base,
    parent_weights,
    read_record,
    require_same_tokenizer,
    require_same_weights,
)
from rlhf.config import InputError, ModelConfig, PPOStageConfig, ScorerConfig, check, has_weights
from rlhf.models import (
    ScalarModel,
    init_reward_model,
    load_policy,
    load_reward_model,
    require_trainable,
    scalar_role,
    stored_role,
)
from rlhf.scorers import score_statistics


def needs_reward_model(config: PPOStageConfig) -> bool:
    """True if there is a critic that starts from the reward model."""
    return config.ppo.has_critic and config.critic.init == "reward"


def first_scorer(config: PPOStageConfig) -> tuple[ScorerConfig, float]:
    """The scorer, or the first of several, and its weight."""
    scorer = config.scorer
    if not scorer.components:
        return scorer, 1.0
    return scorer.of_component(scorer.components[0]), scorer.components[0].weight


def critic_source(config: PPOStageConfig) -> tuple[ModelConfig, str]:
    """The model that the critic starts from, and the setting that names it."""
    path, field = config.critic.init, "critic.init"
    if path == "policy":
        return config.model, "model.path"
    if path == "reward":
        path, field = str(first_scorer(config)[0].path), "scorer.path"
    return replace(config.model, path=path, tokenizer=None, revision=None), field


def load_critic(config: PPOStageConfig, tokenizer: Any, base: Any = None) -> ScalarModel:
    """Start the critic from the policy, from the first reward model (IG, N+), whose normalised
    scores it then predicts, or from the `critic/` that an earlier PPO run wrote.

    Args:
        base: the policy without adapters, whose layers the critic takes; None loads its own.
    """
    init = str(config.critic.init)  # the stage has set it
    source, field = critic_source(config)
    if init == "policy":
        if base is not None:
            return ScalarModel(scalar_role(base, config.model))
        model = init_reward_model(source, tokenizer, config.seed, in_slices=True)
        head: Any = model.score
        torch.nn.init.zeros_(head.weight)  # random values explain less than a constant does
        return ScalarModel(model)
    if init == "reward":
        scorer, weight = first_scorer(config)
        mean, std = score_statistics(scorer, read_record(str(scorer.path)))
        std = std / weight
    else:
        record = read_record(init)
        if record is None or record.stage != "critic" or record.score_mean is None:
            raise InputError(
                f"critic.init={init} is no critic of a PPO run; give runs/<run_name>/ppo/critic, "
                "critic.init=reward or critic.init=policy"
            )
        require_same_weights(init, record, field)
        require_same_tokenizer(tokenizer, record, str(config.model.path), init)
        mean, std = record.score_mean, record.score_std or 1.0
    if base is not None:
        return ScalarModel(load_on_base(config, base, source, field, trains=True), mean, std)
    return ScalarModel(load_reward_model(source, field, in_slices=True), mean, std)


# --- Adapters on the policy's base ----------------------------------------------------------------


def load_base(config: PPOStageConfig, tokenizer: Any) -> Any:
    """Load the policy without adapters of its own. With `ppo.base=stacked`, that of SFT is apart
    from the base."""
    if config.ppo.base == "merged":
        model = load_policy(config.model, tokenizer, in_slices=True)
        require_trainable(model, config.model, config.peft)
        return model
    adapter, below = adapter_and_base(str(config.model.path), "model.path")
    source = replace(config.model, path=below, revision=None)
    model = load_policy(source, tokenizer, stacked=adapter, in_slices=True)
    model.name_or_path = str(config.model.path)
    return model


def require_same_base(config: PPOStageConfig) -> None:
    """With `ppo.share_base`, require that reward models and critic are adapters on the policy's
    base; nothing is loaded."""
    if not config.ppo.share_base:
        return
    if config.ppo.base == "stacked":
        adapter_and_base(str(config.model.path), "model.path")
    for path, field in _adapted(config):
        _adapter(config, path, field)


def could_share_base(config: PPOStageConfig) -> bool:
    """True if `ppo.share_base=true` would save the memory of a model and be accepted."""
    trial = replace(config, ppo=replace(config.ppo, share_base=True))
    try:
        check(trial)
        require_same_base(trial)
    except InputError:
        return False
    return not config.ppo.share_base and (config.ppo.has_critic or any(_adapted(config)))


def _adapted(config: PPOStageConfig) -> Iterator[tuple[str, str]]:
    """Yield path and setting of what must be an adapter."""
    scorers = {f"scorer.components[{i}]": c.path for i, c in enumerate(config.scorer.components)}
    for name, path in (scorers or {"scorer": config.scorer.path}).items():
        if has_weights(path):
            yield str(path), f"{name}.path"
    if config.ppo.has_critic and config.critic.init not in ("policy", "reward"):
        yield str(config.critic.init), "critic.init"


def _adapter(config: PPOStageConfig, path: str, field: str) -> tuple[Path, str]:
    """Where the adapter is, and the base that it was trained on: `model.path`, or with
    `ppo.base=stacked` also the base below the adapter of SFT."""
    if config.ppo.base == "stacked":
        _, below = adapter_and_base(str(config.model.path), "model.path")
        with suppress(InputError):
            return adapter_on_base(path, field, below), below
    base = str(config.model.path)
    return adapter_on_base(path, field, base, config.model.revision), base


def is_on_stacked_base(config: PPOStageConfig, path: str) -> bool:
    """True if, with `ppo.base=stacked`, a reward model was trained on the base below the adapter of
    SFT, so not on what SFT made."""
    record = read_record(path)
    if config.ppo.base == "merged" or record is None:
        return False
    _, below = adapter_and_base(str(config.model.path), "model.path")
    return (parent_weights(below) or below) in (record.parent_weights, record.parent)


def critic_base(config: PPOStageConfig) -> tuple[str | None, str | None]:
    """The model that the critic's adapter is on, and its revision."""
    source, field = critic_source(config)
    if not config.ppo.share_base:
        return source.path, source.revision
    model = config.model
    base = model.path if field == "model.path" else _adapter(config, str(source.path), field)[1]
    return base, model.revision if base == model.path else None


def load_on_base(
    config: PPOStageConfig, base: Any, source: ModelConfig, field: str, trains: bool = False
) -> Any:
    """Load a reward model or critic as an adapter on the layers of the policy.

    Args:
        base: the policy without adapters.
        source: its path names the stage that keeps the adapter.
        field: the setting that gave the path.
    """
    path = str(source.path)
    adapter, below = _adapter(config, path, field)
    bare = below != config.model.path
    return stored_role(base, config.model, adapter, f"{field}={path}", trains, bare)
