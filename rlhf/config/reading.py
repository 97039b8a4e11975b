"""Configurations and the objects they name: reading, writing, importing, building."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from rlhf.config.environment import as_written
from rlhf.config.errors import InputError
from rlhf.config.knobs import StageConfig

# --- Objects named in a configuration -----------------------------------------------------------


def load_object(dotted: str, field_name: str) -> Any:
    """Import the Python object that a configuration names, e.g. `my_package.module.function`.

    Args:
        dotted: dotted path; a leading `python:` is dropped.
        field_name: configuration key, for the message.

    Raises:
        InputError: the module or the name in it does not exist.
    """
    module_name, _, name = dotted.removeprefix("python:").rpartition(".")
    if not module_name:
        raise InputError(
            f"{field_name}={dotted!r} is not a dotted path such as my_module.my_function"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"{field_name}={dotted!r} cannot be imported ({error}); the module is looked for in "
            "the working directory and in PYTHONPATH"
        ) from error


def build_arguments(
    factory: Callable[..., Any], values: dict[str, Any], reserved: dict[str, Any]
) -> Any:
    """Build a library's argument object from the free mapping `trainer:`.

    Args:
        factory: a dataclass such as `trl.SFTConfig`.
        values: what the user wrote under `trainer:`.
        reserved: what the stage itself sets; naming one of these under `trainer:` is an error.

    Raises:
        InputError: an unknown or reserved name (with the nearest valid ones), or a value that the
            library refuses.
    """
    known = [f.name for f in dataclasses.fields(factory) if f.init]  # type: ignore[arg-type]
    for name in values:
        if name in reserved:
            raise InputError(f"trainer.{name} is set by the stage itself; remove it from trainer")
        if name not in known:
            raise InputError(
                f"trainer.{name} is not an argument of {factory.__name__}.{nearest(name, known)}"
            )
    try:
        return factory(**values, **reserved)
    except (TypeError, ValueError) as error:
        raise InputError(f"trainer: {factory.__name__} refuses these values: {error}") from error


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean ...?` with the closest known names, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def config_keys(config_class: type, prefix: str = "") -> list[str]:
    """All dotted keys of a stage's dataclass."""
    keys = []
    for f in dataclasses.fields(config_class):
        keys.append(prefix + f.name)
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        if dataclasses.is_dataclass(default):
            keys += config_keys(type(default), f"{prefix}{f.name}.")
        elif isinstance(default, dict):
            keys += [f"{prefix}{f.name}.{key}" for key in default]
    return keys


# --- Reading and writing ------------------------------------------------------------------------

Config = TypeVar("Config", bound=StageConfig)


def plain_values(config: StageConfig) -> dict[str, Any]:
    """Return a configuration as nested dicts, with references in place of what comes from the
    environment."""
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

    References to the environment stay as they are: the file may be somebody else's.

    Raises:
        InputError: it cannot be read, or has a key that the stage does not have.
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
    """Keep OmegaConf from resolving what a file refers to."""
    if isinstance(values, dict):
        return {name: _escaped(value) for name, value in values.items()}
    if isinstance(values, list):
        return [_escaped(value) for value in values]
    return values.replace("${", "\\${") if isinstance(values, str) else values


def schema(config_class: type) -> Any:
    """Turn a stage's dataclass into the OmegaConf node that Hydra merges everything into."""
    from omegaconf import OmegaConf

    node = OmegaConf.structured(config_class)
    # free mappings: any key may be set without "+"
    for mapping in [node.model.config, *([node.trainer] if "trainer" in node else [])]:
        OmegaConf.set_struct(mapping, False)
    return node


def explain(error: BaseException, config_class: type) -> str:
    """Say what is wrong with a key or value, in one line, with the nearest valid key."""
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, ValidationError

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (ConfigAttributeError, ConfigKeyError)):
            key = str(getattr(cause, "full_key", None) or getattr(cause, "key", ""))
            owner = getattr(cause, "object_type", None)
            if isinstance(owner, type) and dataclasses.is_dataclass(owner) and "." not in key:
                config_class = owner  # inside a list, where the key lacks what stands before it
            hint = nearest(key, config_keys(config_class))
            return f"unknown key {key!r}.{hint} (--help lists the keys)"
        if isinstance(cause, ValidationError):
            reason = str(cause).splitlines()[0]
            return f"{cause.full_key}: {reason}" if getattr(cause, "full_key", None) else reason
        cause = cause.__cause__ or cause.__context__
    return str(error)


def show(value: Any) -> str:
    """Shorten a value for an error message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of too many digits; lists nested too deeply
        return f"a value that cannot be shown ({type(value).__name__})"
    return f"{text[:60]}... ({type(value).__name__})" if len(text) > 60 else text
