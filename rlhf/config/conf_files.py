"""The YAML files in `conf/` that show every knob, made from the dataclasses that declare them.

A stage's file has its own knobs; a group such as `model` has a file per choice, which shows the
group's knobs. Formats, recipes and `none` choices are written by hand.
`make conf` writes the files (`python -m rlhf.config`).
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator
from typing import Any

from rlhf.config.fields import sentences, summary, yaml_scalar
from rlhf.config.knobs import STAGES, StageConfig

# Group -> the choice that is the default of every stage that has the group.
GROUPS = {
    "model": "default",
    "dataset": "none",
    "scorer": "reward_model",
    "peft": "none",
    "tracker": "none",
}
# Choices whose files show all knobs of their group -> the values that the choice changes.
CHOICES: dict[str, dict[str, Any]] = {
    "model/default": {},
    "dataset/none": {},
    "scorer/reward_model": {},
    "peft/lora": {"enabled": True},
    "tracker/wandb": {"name": "wandb"},
}
ORIGIN = "Written by `make conf` from rlhf/config/knobs/; edit the knobs there."
WIDTH = 100


def groups_of(config_class: type[StageConfig]) -> list[str]:
    """The groups of a stage that are chosen as `group=choice`."""
    fields = {field.name for field in dataclasses.fields(config_class)}
    return [name for name in GROUPS if name in fields]


def conf_files() -> dict[str, str]:
    """The text of every generated file: path below `conf/` -> text."""
    files = {f"{stage}.yaml": _stage_file(stage) for stage in STAGES}
    group_classes = {
        field.name: field.metadata["group"]
        for stage in STAGES.values()
        for field in dataclasses.fields(stage)
        if field.name in GROUPS
    }
    for choice, values in CHOICES.items():
        config_class = group_classes[choice.partition("/")[0]]
        lines = [*_comment(f"{summary(config_class)} {ORIGIN}"), ""]
        lines += _knobs(config_class, vars(config_class(**values)))
        files[f"{choice}.yaml"] = _text(lines)
    return files


def _stage_file(stage: str) -> str:
    config_class = STAGES[stage]
    groups = groups_of(config_class)
    values = {name: x for name, x in vars(config_class()).items() if name not in groups}
    lines = [
        *_comment(f"{summary(config_class)} {ORIGIN}"),
        "defaults:",
        f"  - {stage}_schema",
        *(f"  - {group}: {GROUPS[group]}" for group in groups),
        "  - _self_",
        "  - recipe: null",
        f"  - stage: {stage}",
        "  - override hydra/job_logging: none",
        "  - override hydra/hydra_logging: none",
        "",
        *_knobs(config_class, values),
    ]
    return _text(lines)


def _knobs(config_class: type, values: dict[str, Any]) -> Iterator[str]:
    """The lines of these knobs: groups of knobs between blank lines, a comment above each knob."""
    texts = sentences(config_class)
    for field in dataclasses.fields(config_class):
        if field.name not in values:
            continue
        value, inner = values[field.name], field.metadata.get("group")
        if inner is None:
            yield from _comment(texts[field.name])
            yield f"{field.name}: {yaml_scalar(value)}"
        else:
            yield from ("", *_comment(texts[field.name]), f"{field.name}:")
            values_in_group = value if isinstance(value, dict) else vars(value)
            for line in _knobs(inner, values_in_group):
                yield f"  {line}"
            yield ""


def _comment(text: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent="# ",
        subsequent_indent="# ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _text(lines: list[str]) -> str:
    return "\n".join(lines).replace("\n\n\n", "\n\n").strip() + "\n"
