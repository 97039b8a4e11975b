"""The YAML files in `conf/` are those that the dataclasses make; every knob has its sentence.

Run: python -m pytest tests/config/test_conf_files.py
"""

import dataclasses
import pydoc
import re

import pytest
from helpers.configs import compose_stage
from omegaconf import OmegaConf

from rlhf.config import CONF_DIR, STAGES, PPOConfig, PPOStageConfig
from rlhf.config.__main__ import conf_files
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


# --- YAML and dataclass ---


def flat(values, prefix=""):
    """Dotted key -> repr of the value; repr tells 1 from 1.0 and from True."""
    found = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = repr(value)
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_yaml_without_overrides_equals_the_dataclass_defaults(stage):
    composed = flat(dataclasses.asdict(compose_stage(stage)))
    assert composed == flat(dataclasses.asdict(STAGES[stage]()))


@pytest.mark.parametrize(
    "overrides, section, expected",
    [
        (["peft=lora"], "peft", {"enabled": True}),
        (["tracker=wandb"], "tracker", {"names": ["wandb"]}),
        (["scorer=python"], "scorer", {"path": "python:", "normalize": "none"}),
    ],
)
def test_group_changes_only_what_it_is_for(overrides, section, expected):
    composed = dataclasses.asdict(compose_stage("ppo", *overrides))
    wanted = dataclasses.asdict(PPOStageConfig())
    wanted[section] |= expected
    assert flat(composed) == flat(wanted)


def test_every_dataset_group_names_an_existing_format():
    from rlhf.data.formats import FORMATS

    groups = sorted(path.stem for path in (CONF_DIR / "dataset").glob("*.yaml"))
    assert "messages" in groups
    for group in groups:
        format = OmegaConf.load(CONF_DIR / f"dataset/{group}.yaml").format
        assert format == (None if group == "none" else group) and format in {*FORMATS, None}
    assert compose_stage("ppo", "dataset=messages").dataset.format == "messages"


KNOB_FILES = [
    *sorted(CONF_DIR.glob("*.yaml")),
    *(p for g in ("model", "scorer", "peft", "tracker") for p in sorted((CONF_DIR / g).glob("*"))),
]


def uncommented(text):
    """Knobs with no comment above them or above the unbroken block of lines around them."""
    covered, in_defaults, found = False, False, []
    for line in text.splitlines():
        if not line.strip():
            covered = in_defaults = False
        elif line.startswith("defaults:"):
            in_defaults = True
        elif line.lstrip().startswith("#"):
            covered = True
        elif not in_defaults and line.partition(":")[2] and not covered:
            found.append(line.strip())
    return found


def test_knob_without_a_comment_is_found():
    text = "# of a and b\na: 1\nb: 2\n\nc: 3\ngroup:\n  d: 4\n"
    assert uncommented(text) == ["c: 3", "d: 4"]


@pytest.mark.parametrize("path", KNOB_FILES, ids=lambda path: str(path.relative_to(CONF_DIR)))
def test_every_knob_in_the_yaml_has_a_comment(path):
    assert uncommented(path.read_text()) == []
