"""What a run was started from: its rows, and the weights that it reads again when it is resumed.

`inputs.json` in the stage directory holds their hashes, because `config.yaml` names only paths, and
what is there may have changed since. Left out: models on the Hub, and Python scorers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf.checkpoint.disk import write_whole
from rlhf.checkpoint.lock import on_main_process
from rlhf.checkpoint.ownership import INPUTS, latest_checkpoint
from rlhf.checkpoint.record import parent_weights
from rlhf.config import InputError, PPOStageConfig, StageConfig, has_weights
from rlhf.console import on_several_hosts, warn


def note_inputs(directory: Path, config: StageConfig, rows: dict[str, list[Any]]) -> None:
    """Write what a run starts from; where it continues, compare it with what is there now. All
    processes call this.

    Args:
        rows: name -> the rows that the run trains on, or holds out.

    Raises:
        InputError: on all processes, if weights differ: the run would go on with another base,
            reference or scorer.
    """
    on_main_process(lambda: _note(directory, config, rows))


def _note(directory: Path, config: StageConfig, rows: dict[str, list[Any]]) -> None:
    from rlhf.failures import fingerprint  # it imports torch

    now = {name: fingerprint(found) for name, found in rows.items()}
    now |= {name: hash for name, path in _read_again(config) if (hash := parent_weights(path))}
    file = directory / INPUTS
    if latest_checkpoint(directory) is None:
        write_whole(file, json.dumps(now, indent=2) + "\n")
        return
    before = _read(file)
    changed = {n: f"{before[n]} -> {now[n]}" for n in now if before.get(n, now[n]) != now[n]}
    weights = [f"{name}: {line}" for name, line in changed.items() if name not in rows]
    if weights:
        listed = "\n  ".join(weights)
        raise InputError(
            f"{directory} was started from other weights (SHA-256):\n  {listed}\nA resumed run "
            "must end as if it had never stopped: put these weights back, or start a new run with "
            "another run_name"
        )
    for name in changed:
        warn(
            f"the {name} are not those that the run was started with ({changed[name]}): it goes on "
            "with the new ones in another order, so that some rows come again and others never; "
            "put the old rows back, or start a new run with another run_name"
        )


def require_same_models(config: StageConfig) -> None:
    """On several hosts, require the same weights under the paths of the models on each: of hosts
    with a disk each, those that did not write an earlier stage may have an older one. All processes
    call this.

    Raises:
        InputError: on all processes; names the model.
    """
    if not on_several_hosts():
        return
    from rlhf.failures import once_per_host, require_equal  # they import torch

    paths = {"model.path": config.model.path, **dict(_read_again(config))}
    if isinstance(config, PPOStageConfig):  # a directory, or one of two words
        paths["critic.init"] = config.critic.init
    hashes = once_per_host(lambda: {name: parent_weights(path) for name, path in paths.items()})
    require_equal(
        {f"weights of {n}": hash and f"SHA-256 {hash[:12]}" for n, hash in hashes.items()}
    )


def require_same_base(directory: Path, config: StageConfig) -> None:
    """Refuse the adapters of a run whose base has changed since it was started.

    Args:
        directory: of the stage.
    """
    before, now = _read(directory / INPUTS).get("model.path"), parent_weights(config.model.path)
    if config.peft.enabled and None not in (before, now) and before != now:
        raise InputError(
            f"model.path={config.model.path} does not hold the weights any more that the run in "
            f"{directory} was started with (SHA-256 {now} instead of {before}); put them back"
        )


def _read_again(config: StageConfig) -> Iterator[tuple[str, str | None]]:
    """Yield the models that a checkpoint has no copy of: below adapters, and those of PPO that do
    not train."""
    if config.peft.enabled or isinstance(config, PPOStageConfig):
        yield "model.path", config.model.path
    if not isinstance(config, PPOStageConfig):
        return
    yield "ppo.reference", config.ppo.reference
    parts = config.scorer.components
    paths = {f"scorer.components[{i}].path": part.path for i, part in enumerate(parts)}
    for name, path in (paths or {"scorer.path": config.scorer.path}).items():
        if has_weights(path):
            yield name, path


def _read(file: Path) -> dict[str, str]:
    """What a run was started from; {} of a run of an earlier version, or if the file is damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
