"""Objects that a configuration names, and arguments that a library receives.

Run: python -m pytest tests/config/test_objects.py
"""

import dataclasses
import re

import pytest

from rlhf.config import InputError, build_arguments, load_object, nearest


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
