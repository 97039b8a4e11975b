"""The configuration that a run was started with: where it is, and how it is read again.

A stage writes `config.yaml` into its directory before it trains, so that `resume=true
run_name=mine` is enough to continue a run. Runs of earlier versions have it in their checkpoints
only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.config.errors import InputError
from rlhf.config.knobs import StageConfig
from rlhf.config.reading import nearest

CONFIG_FILE = "config.yaml"
OWN_CODE = ("python:rlhf.demo.world.", "python:rlhf.demo_world.")  # now, and in older runs
NUM_SHOWN = 10  # names of runs in a message


def config_file_of_run(directory: Path) -> Path | None:
    """Find the configuration of the run in a stage directory; None where there is no run.

    Its own comes first, then that of the newest complete checkpoint, then that of `final/`.
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
    """Read the values that a run was started with, as YAML has them.

    Paths inside the run's own folder are those of where the run is now. Permission to run a
    model's own code is never taken from a file: whoever types the command gives it, each time.

    Args:
        config: says where the run is now, by `runs_dir` and `run_name`.

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


def refuse_named_code(values: Mapping[str, str | None], file: Path) -> None:
    """Refuse Python objects that a stored configuration names: a command that is given somebody's
    model directory would import them.

    Args:
        values: setting -> value, of those that the command would import.
        file: the configuration.

    Raises:
        InputError: a value is `python:module.function`, and not of the embedded demo.
    """
    for name, value in values.items():
        if str(value).startswith("python:") and not str(value).startswith(OWN_CODE):
            raise InputError(
                f"{file} names Python code, {name}={value}, which was not run: it can do whatever "
                "you can do. If you have read it and trust it, add trust_remote_code=true"
            )


def nothing_to_resume(config: StageConfig, stage: str) -> InputError:
    """Say why there is no run to continue, with the names of the runs that are most like it."""
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
        f"{file} is damaged ({type(error).__name__}: {reason}); delete it and give the whole "
        "configuration on the command line"
    )


def _moved(value: Any, was: str, now: str) -> Any:
    if isinstance(value, dict):
        return {key: _moved(inner, was, now) for key, inner in value.items()}
    if isinstance(value, list):
        return [_moved(inner, was, now) for inner in value]
    if isinstance(value, str) and value.startswith(was):
        return now + value.removeprefix(was)
    return value
