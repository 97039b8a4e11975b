"""Configurations and their files: the schema of a stage, writing `config.yaml` and reading it.

A stage writes `config.yaml` into its directory before it trains, so that `resume=true
run_name=mine` is enough to continue a run. Runs of earlier versions have it only in their
checkpoints.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    OmegaConfBaseException,
    ValidationError,
)
from yaml import YAMLError

from rlhf.config.environment import as_written, change_leaves
from rlhf.config.errors import InputError, nearest
from rlhf.config.fields import yaml_scalar
from rlhf.config.knobs import StageConfig
from rlhf.config.synonyms import suggest

Config = TypeVar("Config", bound=StageConfig)

CONFIG_FILE = "config.yaml"
NUM_SHOWN = 10  # names of runs in a message


def schema(config_class: type) -> Any:
    """Turn a stage's dataclass into the OmegaConf node that everything is merged into."""
    node = OmegaConf.structured(config_class)
    # any key of these mappings may be set without "+"
    mappings = [node.model.config, node.dataset.columns]
    for mapping in [*mappings, *([node.trainer] if "trainer" in node else [])]:
        OmegaConf.set_struct(mapping, False)
    return node


def config_keys(config_class: type, prefix: str = "") -> list[str]:
    """All dotted keys of a stage's dataclass."""
    keys = []
    for field in dataclasses.fields(config_class):
        keys.append(prefix + field.name)
        if "group" in field.metadata:
            keys += config_keys(field.metadata["group"], f"{prefix}{field.name}.")
    return keys


def explain(error: BaseException, config_class: type) -> str:
    """Say what is wrong with a key or value, in one line, with the nearest valid key."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConfigAttributeError | ConfigKeyError):
            key, owner = str(cause.full_key or cause.key or ""), cause.object_type
            if isinstance(owner, type) and dataclasses.is_dataclass(owner) and "." not in key:
                config_class = owner  # inside a list, where the key has no prefix
            hint = suggest(key, config_keys(config_class))
            return f"unknown key {key!r}.{hint} (--help lists the keys)"
        if isinstance(cause, ValidationError):
            reason = str(cause).splitlines()[0]
            return f"{cause.full_key}: {reason}" if cause.full_key else reason
        cause = cause.__cause__ or cause.__context__
    return str(error)


# --- Writing and reading --------------------------------------------------------------------------


def plain_values(config: StageConfig) -> dict[str, Any]:
    """Return a configuration as nested dicts, with references for values from the environment."""
    return as_written(dataclasses.asdict(config))


def dotted(values: dict[str, Any]) -> dict[str, Any]:
    """Return nested dicts as one: {"a": {"b": 1}, "c": {}} -> {"a.b": 1, "c": {}}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = dotted(value) if isinstance(value, dict) else {}
        flat |= {f"{key}.{name}": x for name, x in inner.items()} if inner else {key: value}
    return flat


def config_text(config: StageConfig) -> str:
    """Return the configuration as YAML, with `${oc.env:X}` for what comes from the environment."""
    return OmegaConf.to_yaml(OmegaConf.create(plain_values(config)))


def save_config(config: StageConfig, path: Path) -> None:
    """Write the configuration as YAML."""
    path.write_text(config_text(config), encoding="utf-8")


def read_yaml(file: str | Path, remedy: str = "") -> Any:
    """Read a YAML file as nested dicts and lists, with its references unresolved.

    Raises:
        InputError: the file cannot be read; the message ends with `remedy`.
    """
    try:
        return OmegaConf.to_container(OmegaConf.load(file))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise _damaged(file, error, remedy) from error


def written_settings(file: Path) -> dict[str, Any]:
    """Read the `config.yaml` of a run by dotted key, with its references unresolved.

    Raises:
        InputError: the file is damaged, or names no run.
    """
    values = read_yaml(file)
    names = ("runs_dir", "run_name")
    if not isinstance(values, dict) or not all(isinstance(values.get(x), str) for x in names):
        raise InputError(f"{file} is damaged (it holds no settings of a run)")
    return dotted(values)


def load_config(config_class: type[Config], path: str | Path) -> Config:
    """Read a configuration that `save_config` wrote.

    References to the environment are not resolved: the file may come from somebody else.

    Raises:
        InputError: the file cannot be read, or holds a key that the stage does not have.
    """

    def escaped(value: Any, key: str) -> Any:
        return value.replace("${", "\\${") if isinstance(value, str) else value

    stored = change_leaves(read_yaml(path), escaped)
    try:
        return OmegaConf.to_object(OmegaConf.merge(schema(config_class), stored))  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise InputError(f"{path}: {explain(error, config_class)}") from error


def _damaged(file: str | Path, error: Exception, remedy: str) -> InputError:
    reason = " ".join(str(error).split())[:200]
    return InputError(f"{file} is damaged ({type(error).__name__}: {reason}){remedy}")


# --- The configuration of a run -------------------------------------------------------------------


def config_file_of_run(directory: Path) -> Path | None:
    """Find the configuration of the run in a stage directory; None if there is no run.

    It is searched for in the directory, in the newest complete checkpoint, and in `final/`.
    """
    steps = {
        int(match[1]): path
        for path in directory.glob("checkpoint-*")
        if (match := re.fullmatch("checkpoint-(0|[1-9][0-9]*)", path.name))
        and (path / "manifest.json").is_file()
    }
    newest_first = [steps[step] for step in sorted(steps, reverse=True)]
    files = (holder / CONFIG_FILE for holder in (directory, *newest_first, directory / "final"))
    return next((file for file in files if file.is_file()), None)


def read_run_config(file: Path, config: StageConfig) -> dict[str, Any]:
    """Read the values that a run was started with, as they are in the YAML file.

    Paths inside the run's folder are changed to the place where the run is now: `config` says it.
    Permission to run a model's own code is never taken from a file: it must be typed every time.
    """
    remedy = "; delete it and give the whole configuration on the command line"
    values = read_yaml(file, remedy)
    try:
        was = f"{Path(values['runs_dir']) / values['run_name']}/"
        values["model"].pop("trust_remote_code", None)
    except (LookupError, TypeError, AttributeError) as error:
        raise _damaged(file, error, remedy) from error
    now = f"{Path(config.runs_dir) / config.run_name}/"

    def moved(value: Any, key: str) -> Any:
        is_inside = isinstance(value, str) and value.startswith(was)
        return now + value.removeprefix(was) if is_inside else value

    return change_leaves(values, moved)


def override(key: str, value: Any) -> str:
    """Write an override for Hydra, in a shell."""
    text = yaml_scalar(value)
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z0-9_./:@+-]+", text):
        text = quoted(text)
    return shlex.quote(f"{key}={text}")


def quoted(text: str) -> str:
    """Put a text with special characters into the quotes that Hydra needs."""
    doubled = re.sub(r'(\\+)(?="|$)', r"\1\1", text)  # backslashes before a quote
    return '"' + doubled.replace('"', '\\"') + '"'


def resume_overrides(config: StageConfig, resume: str = "true") -> str:
    """The overrides with which a run is continued, with its own configuration."""
    given = {"resume": resume, "run_name": config.run_name}
    if config.runs_dir != StageConfig.runs_dir:
        given["runs_dir"] = config.runs_dir
    return " ".join(override(key, value) for key, value in given.items())


def nothing_to_resume(config: StageConfig, stage: str) -> InputError:
    """Say why there is no run to continue, and name the runs with the most similar names."""
    directory = config.stage_dir(stage)
    fix = "start it without resume=true; resume=auto continues a run or starts it"
    if config_file_of_run(directory) is not None:
        return InputError(
            f"resume=true: the run in {directory} never reached a checkpoint, so there is nothing "
            f"to continue; {resume_overrides(config, 'auto')} starts it again with its own "
            "configuration"
        )
    if directory.parent.is_dir():
        return InputError(f"resume=true: the run {directory.parent} has no {stage} stage; {fix}")
    runs = sorted(path.parent.name for path in Path(config.runs_dir).glob(f"*/{stage}"))
    hint = nearest(config.run_name, runs)
    if runs and not hint:
        more = f" and {len(runs) - NUM_SHOWN} more" if len(runs) > NUM_SHOWN else ""
        hint = f" Its runs with a {stage} stage: {', '.join(runs[:NUM_SHOWN])}{more}."
    return InputError(
        f"resume=true: there is no run_name={config.run_name} in {config.runs_dir}.{hint} To begin "
        f"a new run, {fix}"
    )
