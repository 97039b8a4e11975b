"""The hand-off between stages, `runs/<run_name>/<stage>/final/`: writing, reading, comparing.

It is an ordinary Hugging Face directory (safetensors, config, tokenizer with its chat template)
plus `config.yaml`, the resolved configuration, and `rlhf.json`, a `StageRecord`. `peft.save` says
whether it also holds the adapter of a LoRA run, in `adapter/`, or is that adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rlhf.checkpoint.disk import complete_or_nothing
from rlhf.checkpoint.finite import NonFiniteError
from rlhf.checkpoint.record import (
    RECORD,
    StageRecord,
    hash_weights,
    local_copy,
    parent_weights,
    read_record,
    write_record,
)
from rlhf.config import CONFIG_FILE, InputError, StageConfig, one_line, save_config
from rlhf.console import warn
from rlhf.hub import ADAPTER, read_json
from rlhf.tokenizer import hash_template, hash_tokenizer

ADAPTER_FOLDER = "adapter"  # in a stage directory

# --- Writing --------------------------------------------------------------------------------------


def write_stage(
    directory: Path,
    model: Any,
    tokenizer: Any,
    config: StageConfig,
    record: StageRecord,
    files: Mapping[str, bytes] | None = None,
    write_adapter: Callable[[Path], None] | None = None,
) -> None:
    """Write a stage directory such as `runs/demo/sft/final`, complete or not at all.

    Args:
        model: a plain transformers model (adapters merged).
        files: further files, name -> content.
        write_adapter: writes the model's adapter into a directory; `peft.save=adapter` writes no
            other weights.

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
        if write_adapter is None or config.peft.save != "adapter":
            model.save_pretrained(temporary)
        elif model.can_generate():
            model.generation_config.save_pretrained(temporary)
        if write_adapter is not None:
            write_adapter(
                temporary if config.peft.save == "adapter" else temporary / ADAPTER_FOLDER
            )
        tokenizer.save_pretrained(temporary)
        save_config(config, temporary / CONFIG_FILE)
        for name, content in (files or {}).items():
            (temporary / name).write_bytes(content)
        write_record(temporary, record, model)
        mode = (temporary / RECORD).stat().st_mode
        for weights in temporary.rglob("*.safetensors"):
            weights.chmod(mode)  # safetensors ignores the umask: only the owner could read them


def describe_saved(directory: Path) -> str:
    """Name a stage directory, and its adapter if it has one."""
    adapter = directory / ADAPTER_FOLDER
    if adapter.is_dir():
        size = sum(file.stat().st_size for file in adapter.iterdir()) / 1e6
        return f"{directory} (merged; the adapter, {size:,.1f} MB, is in {ADAPTER_FOLDER}/)"
    if (directory / ADAPTER).is_file():
        return f"{directory} (an adapter on {_base_of(directory)})"
    return f"{directory}"


def _base_of(adapter: Path) -> str | None:
    return read_json(adapter / ADAPTER).get("base_model_name_or_path")


def require_writable(model: Any, tokenizer: Any, config: StageConfig) -> None:
    """Before training, write everything of a stage directory but the weights to a temporary place.

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
                raise InputError(
                    f"model.path={config.model.path}: {name} could not be written into final/ "
                    f"after training ({one_line(error)}); correct it there"
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
    is_model = any((path / name).is_file() for name in configs) or any(path.glob("*.gguf"))
    if path.is_dir() and not is_model:
        inner = [str(final) for final in _finals_in(path.resolve(), stages)]
        hint = f"; did you mean {' or '.join(inner[:3])}?" if inner else ""
        raise InputError(f"{field}={directory} is not a model directory (no config.json){hint}")
    record = read_record(directory, revision)
    if record is not None and record.stage not in stages:
        near = path.parent.parent / stages[0] / "final"
        right = near if near.is_dir() else f"runs/<run_name>/{stages[0]}/final"
        raise InputError(
            f"{field}={directory} was written by the {record.stage} stage, but a directory of the "
            f"{' or '.join(stages)} stage is needed; set {field}={right}"
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

    No record, or one without a hash from an earlier version, accepts any weights.
    """
    if record is None or record.weights is None:
        return
    directory = local_copy(path, revision, weights=True)
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
    if (directory / ADAPTER).is_file():
        _require_same_base(directory, record, field)


def _require_same_base(adapter: Path, record: StageRecord, field: str) -> None:
    """Require that the base of an adapter, a directory, holds the weights of the training."""
    base = Path(str(_base_of(adapter)))
    if record.parent_weights is None or not base.exists():
        return
    if hash_weights(base) != record.parent_weights:
        raise InputError(
            f"{field}={adapter} is an adapter on {base}, but that does not hold the weights any "
            f"more that the adapter was trained on (SHA-256 {hash_weights(base)[:12]}, but "
            f"{adapter / RECORD} says {record.parent_weights[:12]}); set base_model_name_or_path "
            f"in {adapter / ADAPTER} to a copy of the old base"
        )


def adapter_on_base(directory: str, field: str, base: str, revision: str | None = None) -> Path:
    """Return where a stage, or PEFT, keeps its adapter; require that it was trained on a base.

    Args:
        field: the setting that names `directory`.
        base, revision: directory, or Hub id and its revision.

    Raises:
        InputError: there is no adapter, or it was trained on other weights.
    """
    place, kept = local_copy(directory, None), adapters_in(directory)
    command = f"python -m rlhf.reward peft=lora model.path={base}"
    if not kept:
        raise InputError(
            f"ppo.share_base=true: {field}={directory} holds no adapter, so it needs a base of its "
            f"own; train it with `{command}`, or set ppo.share_base=false"
        )
    record, ours = read_record(place), parent_weights(base)
    trained_on = str(record.parent if record else _base_of(kept[0]))
    theirs = record.parent_weights if record else parent_weights(trained_on)
    is_same = theirs == ours
    if ours is None or theirs is None:  # Hub ids
        is_same = trained_on == base and (record is None or record.revision == revision)
    if not is_same:
        raise InputError(
            f"ppo.share_base=true: {field}={directory} is an adapter on "
            f"{_with_hash(trained_on, theirs)}, but the base is model.path="
            f"{_with_hash(base, ours)}; train it on this base with `{command}`, or set "
            "ppo.share_base=false"
        )
    return kept[0]


def adapters_in(directory: str | Path) -> list[Path]:
    """Return where a stage, or PEFT, keeps its adapter in a directory; nothing without one."""
    place = local_copy(directory, None)
    return [f for f in (place / ADAPTER_FOLDER, place) if (f / ADAPTER).is_file()]


def adapter_and_base(directory: str, field: str) -> tuple[Path, str]:
    """Return where a stage, or PEFT, keeps its adapter, and directory or Hub id of the base.

    Args:
        field: the setting that names `directory`.

    Raises:
        InputError: there is no adapter, or its base has changed since.
    """
    kept = adapters_in(directory)
    if not kept:
        raise InputError(
            f"ppo.base=stacked: {field}={directory} holds no adapter that could stay apart from "
            "its base; train it with `python -m rlhf.sft peft=lora`, or set ppo.base=merged"
        )
    base, record = str(_base_of(kept[0])), read_record(directory)
    ours = parent_weights(base)
    if record is not None and ours is not None and ours != record.parent_weights:
        raise InputError(
            f"ppo.base=stacked: {field}={directory} was trained from "
            f"{_with_hash(str(record.parent), record.parent_weights)}, but now the base of its "
            f"adapter is {_with_hash(base, ours)}; set base_model_name_or_path in "
            f"{kept[0] / ADAPTER} to a copy of the old base, or set ppo.base=merged"
        )
    return kept[0], base


# --- Comparing: the user may have meant it (a warning), or it cannot work (an error) --------------


def warn_about_sft_model(reward_model: str, policy: str) -> None:
    """Warn if a reward model was not trained from the policy's own SFT model.

    Both arguments are directories or Hub ids.
    """
    record = read_record(reward_model)
    if record is None or record.parent is None:
        return
    ours, weights = _sft_model(policy)
    if weights is not None and record.parent_weights is not None:
        is_same = weights == record.parent_weights
    else:
        is_same = ours == record.parent
    if not is_same:
        theirs = _with_hash(record.parent, record.parent_weights)
        warn(
            f"the reward model {reward_model} was trained from {theirs}, but the SFT model of the "
            f"policy is {_with_hash(ours, weights)}: it may misjudge what this policy says; train "
            "both from the same SFT directory"
        )


def _sft_model(policy: str) -> tuple[str, str | None]:
    """Follow a policy through its PPO runs to the model that the first one started from; return its
    name and the hash of its weights (None for a Hub id)."""
    path = policy
    weights = hash_weights(Path(path)) if Path(path).exists() else None
    seen: set[str] = set()
    while (record := read_record(path)) is not None and path not in seen:
        if record.stage != "ppo" or record.parent is None:
            break
        seen.add(path)
        path, weights = record.parent, record.parent_weights
    return path, weights


def _with_hash(path: str, weights: str | None) -> str:
    return path if weights is None else f"{path} (weights {weights[:12]})"


def warn_about_prompts(record: StageRecord | None, prompts: str) -> None:
    """Warn if the previous stage trained on prompts of a different form."""
    if record is not None and record.prompts not in (None, "mixed", prompts):
        fix = "dataset=prompt_completion reads text (dataset.columns.prompt=<column> names it)"
        if prompts == "text":
            fix = "leave dataset.as_conversation=null, which makes them conversations"
        warn(
            f"the {record.stage} stage trained on {record.prompts} prompts, but these are "
            f"{prompts} prompts, which the model has never seen; {fix}"
        )


def warn_about_template(record: StageRecord | None, tokenizer: Any, path: str | None) -> None:
    """Warn if SFT gives a model a chat template that it was not trained with."""
    if record is not None and record.template != hash_template(tokenizer):
        warn(
            f"model.path={path} was trained with a different chat template; leave "
            "model.chat_template and model.stop_strings unset (null) to keep the checkpoint's"
        )


def require_same_tokenizer(
    tokenizer: Any, record: StageRecord | None, ours: str, theirs: str
) -> None:
    """Require that two stages share vocabulary, special tokens but the pad token, and chat
    template."""
    if record is None:
        return
    tokens = {id: token for token, id in tokenizer.get_vocab().items()}
    pad = tokens.get(record.pad_token_id)
    if record.tokenizer != hash_tokenizer(tokenizer, pad_token=pad):
        raise InputError(
            f"tokenizer mismatch: {theirs} (hash {record.tokenizer[:12]}, eos "
            f"{record.eos_token_id}, pad {record.pad_token_id}) and {ours} (hash "
            f"{hash_tokenizer(tokenizer)[:12]}, eos {tokenizer.eos_token_id}, pad "
            f"{tokenizer.pad_token_id}) have different vocabularies; train both from the same SFT "
            "directory"
        )
    if record.template != hash_template(tokenizer):
        raise InputError(
            f"chat template mismatch: {theirs} and {ours} render prompts differently; train both "
            "from the same SFT directory, or leave model.chat_template unset (null)"
        )
