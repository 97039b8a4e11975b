"""Configurations are written and read back; what is wrong with a file is named.

Run: python -m pytest tests/config/test_saved_config.py
"""

import dataclasses
from pathlib import Path

import pytest
from helpers.configs import compose_stage, valid_config

from rlhf.config import (
    STAGES,
    InputError,
    PPOStageConfig,
    ScorerComponent,
    SFTStageConfig,
    config_keys,
    load_config,
    save_config,
)
from rlhf.config.fields import group, knob


@pytest.mark.parametrize("stage", STAGES)
def test_saved_configuration_is_read_back_equal(stage, tmp_path):
    config = valid_config(stage, {"seed": 7, "model.config": {"model_type": "llama"}})
    config.peft.target_modules = ["q_proj"]
    if stage != "ppo":
        config.trainer["weight_decay"] = 0.1  # a key that the default lacks
    save_config(config, tmp_path / "config.yaml")
    loaded = load_config(STAGES[stage], tmp_path / "config.yaml")
    assert type(loaded) is STAGES[stage]
    assert loaded == config


def test_unknown_key_in_a_saved_configuration_is_named(tmp_path):
    path = Path(tmp_path / "config.yaml")
    path.write_text("ppo:\n  kl_coeff: 0.1\n")
    with pytest.raises(InputError) as caught:
        load_config(PPOStageConfig, path)
    assert str(path) in str(caught.value)
    assert "unknown key 'ppo.kl_coeff'. Use ppo.kl_coef" in str(caught.value)


def test_wrong_type_in_a_saved_configuration_is_named(tmp_path):
    path = Path(tmp_path / "config.yaml")
    path.write_text("seed: many\n")
    with pytest.raises(InputError, match="seed: Value 'many' of type 'str' could not be converted"):
        load_config(SFTStageConfig, path)


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("runs/helpful/reward/final", "helpful"),
        ("/data/safe/reward/final/", "safe"),
        ("OpenAssistant/reward-model", "reward-model"),
        ("python:my_module.brevity", "brevity"),
    ],
)
def test_a_component_is_named_by_its_run_or_function(path, label):
    assert ScorerComponent(path).label == label
    assert ScorerComponent(path, name="mine").label == "mine"


def test_components_are_read_from_the_command_line_and_from_a_saved_configuration(tmp_path):
    text = "[{path:runs/helpful/reward/final},{path:python:m.f,weight:-0.5,name:brief}]"
    config = compose_stage("ppo", f"scorer.components={text}")
    expected = [
        ScorerComponent("runs/helpful/reward/final"),
        ScorerComponent("python:m.f", weight=-0.5, name="brief"),
    ]
    assert config.scorer.components == expected
    save_config(config, tmp_path / "config.yaml")
    assert load_config(PPOStageConfig, tmp_path / "config.yaml") == config


def test_config_keys_are_all_dotted_keys():
    @dataclasses.dataclass
    class Inner:
        a: int = 1

    @dataclasses.dataclass
    class Outer:
        b: int = knob(2)
        inner: Inner = group(Inner)
        free: dict = group(Inner, free=True)

    assert config_keys(Outer) == ["b", "inner", "inner.a", "free", "free.a"]
