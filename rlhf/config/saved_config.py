"""Configurations in files: writing one, and reading that of a run.

A stage writes `config.yaml` into its directory before it trains, so that `resume=true
run_name=mine` is enough to continue a run. Runs of earlier versions have it only in their
checkpoints.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeVar

from rlhf.config.environment import as_written
from rlhf.config.errors import InputError, nearest
from rlhf.config.knobs import StageConfig
from rlhf.config.schema import explain, schema

Config = TypeVar("Config", bound=StageConfig)

CONFIG_FILE = "config.yaml"
NUM_SHOWN = 10  # names of runs in a message


def plain_values(config: StageConfig) -> dict[str, Any]:
    """Return a configuration as nested dicts, with references for values from the environment."""
    from omegaconf import OmegaConf

    return as_written(OmegaConf.to_container(OmegaConf.structured(config)))


def config_text(config: StageConfig) -> str:
    """Return the configuration as YAML, with `${oc.env:X}` for what comes from the environment."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(plain_values(config)))


def save_config(config: StageConfig, path: Path) -> None:
    """Write the configuration as YAML."""
    path.write_text(config_text(config), encoding="utf-8")


def load_config(config_class: type[Config], path: str | Path) -> Config:
    """Read a configuration that `save_config` wrote.

    References to the environment are not resolved: the file may come from somebody else.

    Raises:
        InputError: the file cannot be read, or holds a key that the stage does not have.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        stored = OmegaConf.to_container(OmegaConf.load(path))
        merged = OmegaConf.merge(schema(config_class), _escaped(stored))
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise InputError(f"{path}: {explain(error, config_class)}") from error
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise InputError(f"{path} is damaged ({' '.join(str(error).split())[:200]})") from error


def _escaped(values: Any) -> Any:
    """Escape the references in a file's values, so that OmegaConf does not resolve them."""
    if isinstance(values, dict):
        return {name: _escaped(value) for name, value in values.items()}
    if isinstance(values, list):
        return [_escaped(value) for value in values]
    return values.replace("${", "\\${") if isinstance(values, str) else values


# --- The configuration of a run ------------------------------------------------------------------


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
    holders = [
        directory,
        *(steps[step] for step in sorted(steps, reverse=True)),
        directory / "final",
    ]
    files = (holder / CONFIG_FILE for holder in holders)
    return next((file for file in files if file.is_file()), None)


def read_run_config(file: Path, config: StageConfig) -> dict[str, Any]:
    """Read the values that a run was started with, as they are in the YAML file.

    Paths inside the run's folder are changed to the place where the run is now. Permission to run
    a model's own code is never taken from a file: it must be typed with every command.

    Args:
        config: its `runs_dir` and `run_name` say where the run is now.

    Raises:
        InputError: the file is damaged.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        values: Any = OmegaConf.to_container(OmegaConf.load(file))
        was = f"{Path(values['runs_dir']) / values['run_name']}/"
        values["model"].pop("trust_remote_code", None)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _damaged(file, error) from error
    except (YAMLError, OmegaConfBaseException) as error:
        raise _damaged(file, error) from error
    return _moved(values, was, f"{Path(config.runs_dir) / config.run_name}/")


def nothing_to_resume(config: StageConfig, stage: str) -> InputError:
    """Say why there is no run to continue, and name the runs with the most similar names."""
    directory = config.stage_dir(stage)
    fix = "start it without resume=true; resume=auto continues a run or starts it"
    if directory.is_dir() and any(directory.iterdir()):
        return InputError(
            f"resume=true: the run in {directory} never reached a checkpoint, so there is nothing "
            "to continue; resume=auto starts it again with its own configuration"
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


def _damaged(file: Path, error: Exception) -> InputError:
    reason = " ".join(str(error).split())
    return InputError(
        f"{file} is damaged ({type(error).__name__}: {reason}); delete it and give the "
        "whole configuration on the command line"
    )


def _moved(value: Any, was: str, now: str) -> Any:
    if isinstance(value, dict):
        return {key: _moved(inner, was, now) for key, inner in value.items()}
    if isinstance(value, list):
        return [_moved(inner, was, now) for inner in value]
    if isinstance(value, str) and value.startswith(was):
        return now + value.removeprefix(was)
    return value
