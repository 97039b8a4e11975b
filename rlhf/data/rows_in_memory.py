"""Rows that a Python caller passes to a stage: a list, a `datasets.Dataset`, a generator.

They are written to a file in the run's folder, so that a run that is resumed, and the report of a
reward model, read the same rows. Left out: rows that JSON cannot hold.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from rlhf.config import InputError, StageConfig, show

Config = TypeVar("Config", bound=StageConfig)


def with_rows(
    config: Config, rows: Iterable[Any] | None, eval_rows: Iterable[Any] | None = None
) -> Config:
    """Return a copy of a configuration that reads these rows, in any format; None leaves the path.

    Raises:
        InputError: the configuration names a path too, or a row is not an object that JSON holds.
    """
    config = copy.deepcopy(config)
    folder = Path(config.runs_dir) / config.run_name
    for argument, key, given in (("rows", "path", rows), ("eval_rows", "eval_path", eval_rows)):
        if given is None:
            continue
        if (path := getattr(config.dataset, key)) is not None:
            raise InputError(f"give {argument} or dataset.{key}={path}, not both")
        setattr(config.dataset, key, str(_write(given, folder, argument)))
    return config


def _write(rows: Iterable[Any], folder: Path, argument: str) -> Path:
    """Write rows as JSONL to a file whose name depends on them."""
    lines = [_line(row, f"{argument}[{i}]") for i, row in enumerate(rows)]
    content = "".join(lines).encode()
    file = folder / f"rows-{hashlib.sha256(content).hexdigest()[:12]}.jsonl"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f".{file.name}.{os.getpid()}"  # every process writes the same
        unfinished.write_bytes(content)
        unfinished.replace(file)
    return file


def _line(row: Any, name: str) -> str:
    if not isinstance(row, dict):
        fix = "a DataFrame has rows as frame.to_dict('records')"
        raise InputError(f"{name}: got {show(row)}; expected a dict of named fields ({fix})")
    try:
        return json.dumps(row) + "\n"
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: JSON cannot hold it: {error}") from error
