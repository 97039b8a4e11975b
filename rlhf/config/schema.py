"""A stage's dataclass as a schema for OmegaConf, and what is wrong with a key or value."""

from __future__ import annotations

import dataclasses
from typing import Any

from rlhf.config.errors import nearest


def schema(config_class: type) -> Any:
    """Turn a stage's dataclass into the OmegaConf node that Hydra merges everything into."""
    from omegaconf import OmegaConf

    node = OmegaConf.structured(config_class)
    # any key of these mappings may be set without "+"
    for mapping in [node.model.config, *([node.trainer] if "trainer" in node else [])]:
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
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, ValidationError

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (ConfigAttributeError, ConfigKeyError)):
            key = str(getattr(cause, "full_key", None) or getattr(cause, "key", ""))
            owner = getattr(cause, "object_type", None)
            if isinstance(owner, type) and dataclasses.is_dataclass(owner) and "." not in key:
                config_class = owner  # inside a list, where the key has no prefix
            hint = nearest(key, config_keys(config_class))
            return f"unknown key {key!r}.{hint} (--help lists the keys)"
        if isinstance(cause, ValidationError):
            reason = str(cause).splitlines()[0]
            return f"{cause.full_key}: {reason}" if getattr(cause, "full_key", None) else reason
        cause = cause.__cause__ or cause.__context__
    return str(error)
