"""No setting takes inf or nan, whatever stage or command it belongs to.

Run: python -m pytest tests/config/test_finite_settings.py
"""

import dataclasses
import math
from typing import Any, get_args, get_type_hints

import pytest

from rlhf.chat import ChatOptions
from rlhf.config import (
    STAGES,
    InputError,
    ScorerComponent,
    ScorerConfig,
    StageConfig,
    check,
    check_scorer_config,
)
from rlhf.option_parser import check_options, read_options


def complete(stage: str) -> StageConfig:
    """A configuration that passes its checks."""
    config: Any = STAGES[stage]()
    config.dataset.path = config.model.path = "x"
    if stage == "ppo":
        config.scorer.path = "y"
    return config


def float_settings(config: Any, prefix: str = "") -> list[str]:
    """Dotted names of the settings that hold a float, or may."""
    names = []
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            names += float_settings(value, f"{prefix}{name}.")
        elif float in (kind, *get_args(kind)):
            names.append(prefix + name)
    return names


SETTINGS = [(stage, name) for stage in STAGES for name in float_settings(STAGES[stage]())]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_every_float_setting_refuses_what_is_not_finite(value):
    assert len(SETTINGS) > 50
    for stage, name in SETTINGS:
        config: Any = complete(stage)
        check(config)
        *path, last = name.split(".")
        holder = config
        for part in path:
            holder = getattr(holder, part)
        is_list = isinstance(getattr(holder, last), list)
        setattr(holder, last, [value, 0.9] if is_list else value)
        where = f"{name}[0]" if is_list else name
        with pytest.raises(InputError) as caught:
            check(config)
        first = str(caught.value).splitlines()[0]
        assert first == f"{where} must be a finite number, got {value}"


def test_free_mappings_and_lists_are_looked_into_and_all_is_named_at_once():
    config: Any = complete("sft")
    config.trainer |= {"learning_rate": math.inf, "lr_scheduler_kwargs": {"min_lr": math.nan}}
    with pytest.raises(InputError, match="trainer.learning_rate must .*inf\n.*_kwargs.min_lr must"):
        check(config)
    scorer = ScorerConfig(components=[ScorerComponent("a"), ScorerComponent("b", math.inf)])
    with pytest.raises(InputError, match=r"^scorer.components\[1\].weight must be a finite num"):
        check_scorer_config(scorer)


def test_limits_of_a_model_family_may_be_infinite():
    config: Any = complete("sft")
    config.model.path, config.model.tokenizer = None, "x"
    config.model.config = {"model_type": "mamba2", "time_step_limit": [0.0, math.inf]}
    check(config)


@pytest.mark.parametrize("name", ["temperature", "top_p"])
@pytest.mark.parametrize("value", ["inf", "nan"])
def test_options_of_commands_refuse_what_is_not_finite(name, value):
    message = f"^{name} must be a finite number, got {value}$"
    with pytest.raises(InputError, match=message):
        read_options(ChatOptions, ["path=x", f"{name}={value}"])
    with pytest.raises(InputError, match=message):
        check_options(ChatOptions(path="x", **{name: float(value)}))
