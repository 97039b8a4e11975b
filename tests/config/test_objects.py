"""Objects that a configuration names, and arguments that a library receives.

Run: python -m pytest tests/config/test_objects.py
"""

import dataclasses
import re

import pytest
from omegaconf import OmegaConf

from rlhf.config import (
    STAGES,
    InputError,
    PPOConfig,
    PPOStageConfig,
    RewardConfig,
    RewardStageConfig,
    ScorerComponent,
    ScorerConfig,
    SFTStageConfig,
    build_arguments,
    load_object,
    nearest,
    problems_of,
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
    assert (from_python.checkpoint_every, from_python.checkpoint.keep_last) == (20, 3)
    with pytest.raises(InputError, match=r"unknown key 'ppo.num_update'. Did you mean num_updates"):
        PPOStageConfig(ppo={"num_update": 5})


def another_value(field):
    """A value of a knob's type that is not its default."""
    if (limits := field.metadata.get("limits")) is not None and limits.choices:
        default = field.default if field.default_factory is dataclasses.MISSING else []
        other = next(choice for choice in limits.choices if choice not in (default, None))
        return [other] if default == [] else other
    kinds = {
        "dict": {"a": "b"},
        "list[float]": [0.5, 0.6],
        "list": ["a"],
        "bool": not field.default,
    }
    kinds |= {"float": 0.625, "int": 3, "str": "a", "Any": "a"}
    return next(value for kind, value in kinds.items() if kind in field.type)


@pytest.mark.parametrize("config_class", STAGES.values())
def test_of_a_group_made_in_python_only_what_was_given_differs_from_the_defaults(config_class):
    """`PPOStageConfig(checkpoint=CheckpointConfig(keep_last=5))` is `checkpoint.keep_last=5`; the
    defaults are those of the command line, see test_conf_files.py."""
    fields = dataclasses.fields(config_class)
    groups = {f.name: f.metadata["group"] for f in fields if "group" in f.metadata}
    groups.pop("trainer", None)
    knobs = [(name, field) for name in groups for field in dataclasses.fields(groups[name])]
    assert len(knobs) > 30
    for name, field in knobs:
        given = {field.name: another_value(field)}
        expected = config_class()
        setattr(getattr(expected, name), field.name, another_value(field))
        from_python = config_class(**{name: groups[name](**given)})
        assert from_python == expected == config_class(**{name: given}) != config_class()
        if given != {"every": 3}:
            assert from_python.checkpoint_every == config_class().checkpoint_every


@pytest.mark.parametrize(
    "given, message",
    [
        ({"ppo": RewardConfig()}, "ppo must be a PPOConfig or a dict, got RewardConfig("),
        ({"dataset": "a.jsonl"}, "for a path, give dataset={'path': 'a.jsonl'}"),
        ({"peft": True}, "peft must be a PeftConfig or a dict, got True"),
    ],
)
def test_what_is_no_group_is_refused_with_what_is_expected(given, message):
    with pytest.raises(InputError, match=re.escape(message)):
        PPOStageConfig(**given)


def test_a_component_of_the_scorer_may_be_a_dict():
    config = PPOStageConfig(scorer=ScorerConfig(components=[{"path": "a.b", "weight": 2}]))
    assert config.scorer.components == [ScorerComponent("a.b", 2)]


def test_a_number_given_as_text_is_refused_with_its_key():
    problems, _ = problems_of(PPOStageConfig(ppo=PPOConfig(num_updates="50")))
    assert "ppo.num_updates must be >= 1, got '50'" in problems
