"""Which settings may change when a run is resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf.checkpoint.nonfinite_stop import stopped_after
from rlhf.checkpoint.ownership import manifest_of, step_of
from rlhf.config import CONFIG_FILE, InputError, StageConfig, config_text
from rlhf.console import num_processes

# Settings, or groups of them, that may change on resume because they do not affect the result.
HARMLESS = (
    *("runs_dir", "run_name", "tracker", "checkpoint", "preflight", "watchdog"),
    *("num_samples", "response_length", "temperature", "top_p", "ppo.save_rollouts"),
    *("reward.num_normalization_prompts", "normalization", "trainer.dataloader_num_workers"),
)
NOT_HARMLESS = ("watchdog.kl_budget",)  # it ends the run
# Settings that decide whether numbers overflow: they may change after a non-finite number.
ADJUSTABLE = (
    *("precision", "model.dtype", "model.attn_implementation", "trainer.fp16"),
    *("trainer.learning_rate", "trainer.warmup_steps", "trainer.max_grad_norm"),
    *("ppo.learning_rate", "critic.learning_rate", "ppo.lr_warmup_updates", "ppo.lr_warmup_start"),
    *("ppo.max_grad_norm", "ppo.adam_epsilon", "ppo.target_kl", "ppo.clip_scores"),
)
TYPED = "model.trust_remote_code"  # a person types it each time; no file can give it


def is_harmless(key: str) -> bool:
    """True for a setting that does not affect what is trained."""
    groups = tuple(f"{name}." for name in HARMLESS)
    return (key in HARMLESS or key.startswith(groups)) and key not in NOT_HARMLESS


def refuse_changes_since_finish(config: StageConfig, final: Path) -> None:
    """Refuse a configuration other than the one in `final/`, except for harmless settings.

    Raises:
        InputError: lists the differences.
    """
    lines = _changed_settings(config, final)
    lines.pop(TYPED, None)  # a finished run loads no model
    _refuse([line for key, line in lines.items() if not is_harmless(key)], final)


def refuse_changes(config: StageConfig, checkpoint: Path) -> dict[str, str]:
    """Refuse a configuration with which a run would not end as if it had never stopped.

    Returns:
        The accepted changes: setting -> "setting: old -> new". They are harmless, or in
        `ADJUSTABLE` if the run stopped at a non-finite number after the checkpoint.

    Raises:
        InputError: lists the other changes.
    """
    lines = _changed_settings(config, checkpoint)
    stopped = stopped_after(checkpoint.parent, step_of(checkpoint)) is not None
    allowed = ADJUSTABLE if stopped else ()
    refused = [line for key, line in lines.items() if not is_harmless(key) and key not in allowed]
    processes = manifest_of(checkpoint)["processes"]
    if processes != num_processes():
        refused.append(f"number of processes: {processes} -> {num_processes()}")
    _refuse(refused, checkpoint, allowed)
    return lines


def _refuse(lines: list[str], directory: Path, allowed: tuple[str, ...] = ()) -> None:
    if lines:
        also = f" (only {', '.join(allowed)} may change after the stop)" if allowed else ""
        raise InputError(
            f"{directory} was written with a different configuration:\n  "
            + "\n  ".join(lines)
            + "\nA resumed run must end as if it had never stopped: set these back to their old "
            f"values{also}, or start a new run with another run_name"
        )


def _changed_settings(config: StageConfig, directory: Path) -> dict[str, str]:
    """Compare with the configuration in a directory: setting -> "setting: old -> new"."""
    was, now = read_settings(directory), _flat(config_text(config))
    lines = {
        key: f"{key}: {_show(was, key)} -> {_show(now, key)}"
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key)
    }
    if TYPED in lines:
        lines[TYPED] += f" (type {TYPED}={_show(was, TYPED)} again: no file can give permission)"
    return lines


def read_settings(directory: Path) -> dict[str, Any]:
    """Read the settings in a directory's `config.yaml`, by dotted key.

    Raises:
        InputError: the file is damaged.
    """
    from yaml import YAMLError

    file = directory / CONFIG_FILE
    try:
        return _flat(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, LookupError, TypeError, YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{file} is damaged ({type(error).__name__}: {reason})") from error


def _flat(text: str) -> dict[str, Any]:
    """ "a: {b: 1}" -> {"a.b": 1}; paths inside the run's own folder become relative to it."""
    from omegaconf import OmegaConf

    values: Any = OmegaConf.to_container(OmegaConf.create(text))
    run = f"{Path(values['runs_dir']) / values['run_name']}/"
    flat: dict[str, Any] = {}
    left = dict(values)
    while left:
        key, value = left.popitem()
        if isinstance(value, dict):
            left |= {f"{key}.{name}": inner for name, inner in value.items()}
        elif key not in ("resume", "overwrite"):
            flat[key] = value.removeprefix(run) if isinstance(value, str) else value
    return flat


def _show(values: dict[str, Any], key: str) -> str:
    return json.dumps(values[key]) if key in values else "(not set)"
