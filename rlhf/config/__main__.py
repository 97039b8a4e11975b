"""`make conf`: write the YAML files in `conf/` that show every knob (python -m rlhf.config).

They are made from the dataclasses that declare the knobs. A stage's file has its own knobs; a group
such as `model` has a file that shows the group's knobs. Formats, recipes and `none` choices are
written by hand.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator
from typing import Any

from rlhf.config.fields import sentences, summary, yaml_scalar
from rlhf.config.knobs import GROUPS, STAGES, PPOStageConfig, groups_of
from rlhf.config.paths import CONF_DIR

# Choices whose files show all knobs of their group -> the values that the choice changes.
CHOICES: dict[str, dict[str, Any]] = {
    "model/default": {},
    "dataset/none": {},
    "scorer/reward_model": {},
    "peft/lora": {"enabled": True},
    **{f"tracker/{name}": {"names": [name]} for name in ("wandb", "tensorboard", "trackio")},
}
ORIGIN = "Written by `make conf` from rlhf/config/knobs/; edit the knobs there."


def conf_files() -> dict[str, str]:
    """The text of every generated file: path below `conf/` -> text."""
    files = {f"{stage}.yaml": _text(_stage_lines(stage)) for stage in STAGES}
    fields = {field.name: field for field in dataclasses.fields(PPOStageConfig)}
    for choice, values in CHOICES.items():
        config_class = fields[choice.partition("/")[0]].metadata["group"]
        knobs = _knobs(config_class, vars(config_class(**values)))
        files[f"{choice}.yaml"] = _text([*_title(config_class), "", *knobs])
    return files


def _stage_lines(stage: str) -> list[str]:
    config_class = STAGES[stage]
    groups = groups_of(config_class)
    values = {name: x for name, x in vars(config_class()).items() if name not in groups}
    return [
        *_title(config_class),
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


def _title(config_class: type) -> list[str]:
    return _comment(f"{summary(config_class)} {ORIGIN}")


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
            for line in _knobs(inner, value if isinstance(value, dict) else vars(value)):
                yield f"  {line}"
            yield ""


def _comment(text: str) -> list[str]:
    whole_words: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.wrap(text, 100, initial_indent="# ", subsequent_indent="# ", **whole_words)


def _text(lines: list[str]) -> str:
    return "\n".join(lines).replace("\n\n\n", "\n\n").strip() + "\n"


if __name__ == "__main__":
    for name, text in conf_files().items():
        (CONF_DIR / name).write_text(text, encoding="utf-8")
