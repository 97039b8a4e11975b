"""The overrides of a stage's command, read one by one before Hydra composes them: all wrong ones
are named at once, and a sweep is known as a whole before its first job runs.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from omegaconf import AnyNode, DictConfig, OmegaConf, StringNode
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from rlhf.config import (
    CONF_DIR,
    STAGES,
    InputError,
    config_keys,
    explain,
    groups_of,
    quoted,
    schema,
    suggest,
)

LONGEST = 32  # characters of a swept value in the name of a run


def with_texts(overrides: Sequence[str], stage: str) -> list[str]:
    """Quote the values of settings that are texts where Hydra would read numbers, or nothing:
    run_name=2026_11_29 would become 20261129, and it does not know é, ; and ~."""
    node = schema(STAGES[stage])
    return [_with_text(override, node) for override in overrides]


def _with_text(text: str, node: Any) -> str:
    from hydra.errors import HydraException

    key, _, value = text.partition("=")
    group, _, name = key.lstrip("+").rpartition(".")
    holder = OmegaConf.select(node, group) if group else node
    if not isinstance(holder, DictConfig) or name not in holder:
        return text
    kind = type(holder._get_node(name))
    try:
        override = _parse(text)
        is_sweep = override.is_sweep_override()
        is_number = not is_sweep and type(override.value()) in (int, float, bool)
    except HydraException:
        is_text = kind in (StringNode, AnyNode) and value[:1] not in tuple("'\"[{(")
        return f"{key}={quoted(value)}" if is_text else text
    return f"{key}={quoted(value.strip())}" if is_number and kind is StringNode else text


def wrong_overrides(overrides: Sequence[str], stage: str, own_files: bool) -> dict[str, str]:
    """Say what is wrong with each wrong override.

    Args:
        own_files: the user has a `--config-dir`, so that choices of groups are not known here.
    """
    node = schema(STAGES[stage])
    found = ((override, _problem(override, stage, node, own_files)) for override in overrides)
    return {override: problem for override, problem in found if problem is not None}


def _problem(text: str, stage: str, node: Any, own_files: bool) -> str | None:
    from hydra.errors import HydraException

    try:
        override = _parse(text)
        values = list(_values(override))
    except HydraException as error:
        return unreadable(text, str(error))
    key = override.key_or_group
    if key in (*groups_of(STAGES[stage]), "recipe"):
        return None if own_files else _wrong_choice(key, values)
    if key.startswith("hydra.") or "/" in key or override.package or override.is_delete():
        return None
    try:
        for value in values:
            OmegaConf.update(copy.deepcopy(node), key, value, merge=True)
    except (ConfigAttributeError, ConfigKeyError):
        hint = suggest(key, [*config_keys(STAGES[stage]), "peft", "tracker"])
        return f"unknown key {key!r}.{hint} (--help lists the keys)"
    except OmegaConfBaseException as error:
        return explain(error, STAGES[stage])
    return None


def _wrong_choice(group: str, values: Sequence[Any]) -> str | None:
    for name in values:
        is_choice = name is None or isinstance(name, list)
        if is_choice or (CONF_DIR / group / f"{name}.yaml").is_file():
            continue
        choices = sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))
        path = f"; for a path, set {group}.path={name}"
        hint = path if group in ("model", "dataset", "scorer") else ""
        return f"{group}={name} does not exist; choose one of {', '.join(choices)}{hint}"
    return None


def unreadable(override: str, message: str) -> str:
    """Say that an override is not written as Hydra reads it."""
    lines = [line for line in message.splitlines() if "override_grammar" not in line]
    fix = "write key=value, and quote a value with special characters twice: 'key=\"a (b)\"'"
    return f"cannot read {override!r} ({lines[-1]}); {fix}"


def _parse(override: str) -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(override)


def _values(override: Any) -> Iterator[Any]:
    """The value of an override; of one that sweeps, all of them."""
    if not override.is_sweep_override():
        yield override.value()
        return
    for text in override.sweep_string_iterator():
        yield _parse(f"x={text}").value()


# --- Sweeps ---------------------------------------------------------------------------------------


def swept_keys(overrides: Sequence[str]) -> list[str]:
    """The keys that have several values."""
    parsed = map(_parse, overrides)
    return [override.key_or_group for override in parsed if override.is_sweep_override()]


def jobs(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of each job of a sweep, in the order in which Hydra runs them."""
    choices = []
    for text, override in zip(overrides, map(_parse, overrides), strict=True):
        key = override.get_key_element()
        sweeps = override.is_sweep_override()
        values = override.sweep_string_iterator() if sweeps else ()
        choices.append([f"{key}={value}" for value in values] if sweeps else [text])
    return [list(job) for job in product(*choices)]


def job_name(run_name: str, swept: Sequence[str], job: Sequence[str]) -> str:
    """Name the run of a job by the run of the sweep and what differs: `sw-kl_coef-0.01`."""
    last = Counter(key.rpartition(".")[2] for key in swept)
    parts = [run_name]
    for override in job:
        key, _, value = override.lstrip("+").partition("=")
        if key in swept:
            short = key.rpartition(".")[2]
            text = re.sub(r"[^\w.+-]+", "_", value).strip("_")[-LONGEST:]
            parts.append(f"{short if last[short] == 1 else key}-{text}")
    return "-".join(parts).replace("/", "_")


def require_distinct(names: Sequence[str]) -> None:
    """Refuse a sweep in which two jobs would write to the same run."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(
            f"{len(names)} jobs of the sweep have {len(set(names))} names: {twice[0]} is given "
            "twice; give each value once, or sweep run_name too"
        )
