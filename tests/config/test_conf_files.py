"""The YAML files in `conf/` are those that the dataclasses make; every knob has its sentence.

Run: python -m pytest tests/config/test_conf_files.py
"""

import dataclasses
import pydoc
import re

import pytest

from rlhf.config import CONF_DIR, STAGES, PPOConfig
from rlhf.config.conf_files import conf_files
from rlhf.config.fields import sentences


def classes_of(config_class):
    """A dataclass and those of its groups."""
    yield config_class
    for field in dataclasses.fields(config_class):
        if "group" in field.metadata:
            yield from classes_of(field.metadata["group"])


@pytest.mark.parametrize("name, text", conf_files().items(), ids=lambda x: x.partition("\n")[0])
def test_yaml_file_is_up_to_date(name, text):
    assert (CONF_DIR / name).read_text("utf-8") == text, "run make conf"


@pytest.mark.parametrize("stage", STAGES)
def test_every_knob_has_a_sentence(stage):
    for config_class in classes_of(STAGES[stage]):
        texts = sentences(config_class)
        assert list(texts) == [field.name for field in dataclasses.fields(config_class)]
        for name, text in texts.items():
            assert re.match(r"[A-Za-z|].*[.\]]$", text), f"{config_class.__name__}.{name}: {text}"


def test_help_of_a_dataclass_shows_its_knobs():
    text = pydoc.plain(pydoc.render_doc(PPOConfig))
    assert "kl_coef: Weight of the KL penalty, score units per nat. Must be >= 0." in text
    assert "gamma: Discount per token. Must lie in [0, 1]." in text
    assert "kl_estimator: Estimator of the KL penalty per token. Must be one of k1, k2, k3." in text


def test_choices_that_the_sentence_explains_are_not_listed_again():
    assert sentences(PPOConfig)["lr_schedule"].endswith("for policy and critic.")
