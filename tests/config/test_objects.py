"""Objects that a configuration names, and arguments that a library receives.

Run: python -m pytest tests/config/test_objects.py
"""

import dataclasses
import re

import pytest
from omegaconf import OmegaConf

from rlhf.config import (
    InputError,
    PPOStageConfig,
    RewardStageConfig,
    SFTStageConfig,
    build_arguments,
    load_object,
    nearest,
    schema,
)


@pytest.mark.parametrize("name", ["transformers.TrainingArguments", "trl.SFTConfig"])
def test_typo_among_trainer_arguments_names_the_nearest(name):
    factory = load_object(name, "test")
    with pytest.raises(InputError) as caught:
        build_arguments(factory, {"learning_rat": 1e-3}, {"output_dir": "x"})
    assert f"trainer.learning_rat is not an argument of {factory.__name__}" in str(caught.value)
    assert "Did you mean learning_rate" in str(caught.value)


@dataclasses.dataclass
class Arguments:
    """Stands for a library's argument class."""

    output_dir: str
    steps: int = 1

    def __post_init__(self):
        if self.steps < 0:
            raise ValueError("steps is negative")


def test_trainer_arguments_are_passed_on():
    built = build_arguments(Arguments, {"steps": 5}, {"output_dir": "here"})
    assert built == Arguments("here", 5)


def test_reserved_trainer_argument_is_refused():
    with pytest.raises(InputError, match="trainer.output_dir is set by the stage itself; remove"):
        build_arguments(Arguments, {"output_dir": "there"}, {"output_dir": "here"})


def test_value_that_the_library_refuses_is_an_input_error():
    with pytest.raises(InputError, match="trainer: Arguments refuses these values: steps is neg"):
        build_arguments(Arguments, {"steps": -1}, {"output_dir": "here"})


def test_nearest_says_nothing_without_a_close_name():
    assert nearest("zzz", ["alpha", "beta"]) == ""


@pytest.mark.parametrize(
    "dotted, message",
    [
        ("function", "scorer.path='function' must be a dotted path: my_module.my_function"),
        ("no_such_module.f", "scorer.path='no_such_module.f' cannot be imported"),
        ("python:math.no_such_name", "scorer.path='python:math.no_such_name' cannot be imported"),
    ],
)
def test_object_that_cannot_be_imported_is_named_with_its_key(dotted, message):
    with pytest.raises(InputError, match=re.escape(message)):
        load_object(dotted, "scorer.path")


def test_object_is_found_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "module_of_the_user.py").write_text("def score():\n    return 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nonexistent"])
    assert load_object("python:module_of_the_user.score", "scorer.path")() == 3


# --- From Python ----------------------------------------------------------------------------------


@pytest.mark.parametrize("config_class", [SFTStageConfig, RewardStageConfig])
def test_a_mapping_for_trainer_keeps_the_defaults_that_it_does_not_name(config_class):
    expected = config_class().trainer | {"logging_steps": 3, "adam_beta1": 0.8}
    assert config_class(trainer={"logging_steps": 3, "adam_beta1": 0.8}).trainer == expected
    config = config_class()
    config.trainer = {"logging_steps": 3, "adam_beta1": 0.8}
    assert config.trainer == expected
    assert config_class().trainer != expected


def test_a_mapping_for_a_group_is_the_command_lines():
    written = {"ppo": {"num_updates": 5}, "checkpoint": {"keep_last": 3}, "peft": {"r": 4}}
    from_python = PPOStageConfig(**written)
    merged = OmegaConf.merge(schema(PPOStageConfig), written)
    assert from_python == OmegaConf.to_object(merged)
    assert (from_python.checkpoint.every, from_python.checkpoint.keep_last) == (20, 3)
    with pytest.raises(InputError, match=r"unknown key 'ppo.num_update'. Did you mean num_updates"):
        PPOStageConfig(ppo={"num_update": 5})
