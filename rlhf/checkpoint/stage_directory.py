"""The hand-off between stages: `runs/<run_name>/<stage>/final/`.

It is an ordinary Hugging Face directory (safetensors, config, tokenizer with its chat template)
plus `config.yaml`, the resolved configuration, and `rlhf.json`, a `StageRecord`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rlhf.checkpoint.atomic import complete_or_nothing
from rlhf.checkpoint.finite import NonFiniteError
from rlhf.checkpoint.record import RECORD, StageRecord, cached_directory, read_record, write_record
from rlhf.checkpoint.weight_hashes import hash_weights
from rlhf.config import CONFIG_FILE, InputError, StageConfig, save_config

# --- Writing --------------------------------------------------------------------------------------


def write_stage(
    directory: Path,
    model: Any,
    tokenizer: Any,
    config: StageConfig,
    record: StageRecord,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a stage directory, complete or not at all.

    Args:
        directory: e.g. `runs/demo/sft/final`.
        model: a plain transformers model (adapters merged).
        record: completed by `write_record`.
        files: further files, name -> content.

    Raises:
        NonFiniteError: a weight or a number of the record is not finite.
        InputError: `directory` exists and no stage wrote it.
    """
    if directory.is_dir() and any(directory.iterdir()) and not (directory / RECORD).is_file():
        raise InputError(f"{directory} is in the way: no stage wrote it; move it")
    figures = record.metrics | {"score_mean": record.score_mean, "score_std": record.score_std}
    for name, value in figures.items():
        if value is not None and not math.isfinite(value):
            raise NonFiniteError(f"{directory} was not written: {name} is {value}")
    with complete_or_nothing(directory) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        save_config(config, temporary / CONFIG_FILE)
        for name, content in (files or {}).items():
            (temporary / name).write_bytes(content)
        write_record(temporary, record, model)
        mode = (temporary / RECORD).stat().st_mode
        for weights in temporary.glob("*.safetensors"):
            weights.chmod(mode)  # safetensors ignores the umask: only the owner could read them


def require_writable(model: Any, tokenizer: Any, config: StageConfig) -> None:
    """Before training, write everything of a stage directory but the weights to a temporary place.

    Args:
        model: a plain transformers model.

    Raises:
        InputError: something cannot be written, which would lose the trained weights at the end.
    """
    parts = {"config.json": model.config, "the tokenizer": tokenizer}
    if getattr(model, "generation_config", None) is not None:
        parts["generation_config.json"] = model.generation_config
    with TemporaryDirectory(prefix="rlhf-") as folder:
        for name, part in parts.items():
            try:
                part.save_pretrained(folder)
            except Exception as error:  # a model's or tokenizer's own code may raise anything
                reason = " ".join(str(error).split())[:300]
                raise InputError(
                    f"model.path={config.model.path}: {name} could not be written into final/ "
                    f"after training ({type(error).__name__}: {reason}); correct it there"
                ) from error
        save_config(config, Path(folder) / CONFIG_FILE)


# --- Reading --------------------------------------------------------------------------------------


def require_stage(
    directory: str | Path, stages: tuple[str, ...], field: str, revision: str | None = None
) -> StageRecord | None:
    """Read the record of a directory or Hub id; require the right stage and unchanged weights.

    Raises:
        InputError: another stage wrote it, its weights have changed, or the directory is a run or
            stage folder rather than its `final/`.
    """
    path = Path(directory)
    configs = ("config.json", "adapter_config.json")
    if path.is_dir() and not any((path / name).is_file() for name in configs):
        inner = [str(final) for final in _finals_in(path.resolve(), stages)]
        hint = f"; did you mean {' or '.join(inner[:3])}?" if inner else ""
        raise InputError(f"{field}={directory} is not a model directory (no config.json){hint}")
    record = read_record(directory, revision)
    if record is not None and record.stage not in stages:
        raise InputError(
            f"{field}={directory} was written by the {record.stage} stage, but a directory of the "
            f"{' or '.join(stages)} stage is needed; point {field} at "
            f"runs/<run_name>/{stages[0]}/final"
        )
    require_same_weights(directory, record, field, revision)
    return record


def _finals_in(path: Path, stages: tuple[str, ...]) -> list[Path]:
    """Find the `final/` directories of these stages in a stage's folder, a run's, or all runs'.

    Nothing deeper is searched, because the path may be a home directory or a whole disk.
    """
    found = [path / "final"] if path.name in stages else []
    for stage in stages:
        for place in (f"{stage}/final", f"*/{stage}/final"):
            found += [file.parent for file in path.glob(f"{place}/{RECORD}")]
    return sorted(final for final in found if (final / RECORD).is_file())


def require_same_weights(
    path: str | Path, record: StageRecord | None, field: str, revision: str | None = None
) -> None:
    """Require that a directory or Hub id still holds the weights that its stage wrote.

    Args:
        record: None, or a record without a hash from an earlier version, accepts any weights.
        field: configuration key that gave the path.

    Raises:
        InputError: they are other weights.
    """
    if record is None or record.weights is None:
        return
    directory = cached_directory(path, revision, "*.safetensors")
    if not any(directory.glob("*.safetensors")):
        return  # loading the model fails next and explains it
    weights = hash_weights(directory)
    if weights != record.weights:
        raise InputError(
            f"{field}={path} does not hold the weights that the {record.stage} stage wrote "
            f"(SHA-256 {weights[:12]}, but {RECORD} says {str(record.weights)[:12]}): they were "
            "changed or damaged. Copy the directory again; to adopt them on purpose, set "
            f'"weights": null in {directory / RECORD}'
        )
