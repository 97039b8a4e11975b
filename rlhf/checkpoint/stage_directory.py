"""The hand-off between stages: what a stage directory holds, and what the next stage refuses.

`runs/<run_name>/<stage>/final/` is an ordinary Hugging Face directory (safetensors, config,
tokenizer with its chat template) with two files beside: `config.yaml`, the resolved configuration,
and `rlhf.json`, a `StageRecord`. The next stage reads the record and refuses a mismatch by naming
both sides.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import snapshot_download

import rlhf
from rlhf.checkpoint.atomic import complete_or_nothing, files_of
from rlhf.checkpoint.finite import NonFiniteError, read_changes
from rlhf.config import InputError, StageConfig, as_written, save_config
from rlhf.console import is_main_process, warn
from rlhf.hub import is_hub_id
from rlhf.tokenizer import hash_template, hash_tokenizer

RECORD = "rlhf.json"
SAID_ABOVE = 1_000_000_000  # bytes whose reading takes seconds
PACKAGES = ("rlhf", "torch", "transformers", "trl", "peft", "accelerate", "datasets")


@dataclass
class StageRecord:
    """What a stage writes about its result, for the next stage and for people.

    Attributes:
        stage: "sft", "reward" or "ppo"; "critic" for the critic of a PPO run.
        parent: directory or Hub id that training started from (None: from scratch).
        parent_weights: SHA-256 over the parent's safetensors files (None for a Hub id).
        weights: SHA-256 over the directory's own; None: whatever they are.
        tokenizer: hash of vocabulary and special tokens.
        template: hash of the chat template.
        prompts: how training prompts reached the model, "conversation", "text" or "mixed".
        dropped: number of rows that were left out of the data, by reason.
        score_mean: mean of the reward model's scores of `normalization.completions` (raw units); a
            critic's values are (raw - score_mean) / score_std.
        score_std: their standard deviation.
        dtype: of the weights, e.g. "float32".
        attn_implementation: of the model that was trained, e.g. "sdpa".
        metrics: final figures of the stage.
        changes: settings that changed on resume after a number was not finite, oldest first:
            `after_step`, `changed`.
        files: names of the files in the directory, of which this is one.
    """

    stage: str
    parent: str | None
    parent_weights: str | None
    revision: str | None
    tokenizer: str
    template: str
    eos_token_id: int
    pad_token_id: int
    seed: int
    prompts: str | None = None
    dropped: dict[str, int] = field(default_factory=dict)
    score_mean: float | None = None
    score_std: float | None = None
    weights: str | None = None
    dtype: str | None = None
    attn_implementation: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    changes: list[dict[str, Any]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


# --- Writing and reading a stage directory -------------------------------------------------------


def make_record(
    stage: str,
    config: StageConfig,
    parent: str | None,
    tokenizer: Any,
    prompts: str | None = None,
    dropped: Mapping[str, int] | None = None,
    metrics: dict[str, float] | None = None,
) -> StageRecord:
    """Describe a stage's result before it is written; see `StageRecord` for the arguments."""
    is_local = parent is not None and Path(parent).is_dir()
    return StageRecord(
        stage=stage,
        parent=parent,
        parent_weights=hash_weights(Path(str(parent))) if is_local else None,
        revision=config.model.revision,
        tokenizer=hash_tokenizer(tokenizer),
        template=hash_template(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        seed=config.seed,
        prompts=prompts,
        dropped=dict(dropped or {}),
        metrics=metrics or {},
        versions={name: _version(name) for name in PACKAGES},
        changes=read_changes(config.stage_dir(stage)),
    )


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
        record: what `write_record` says is filled in.
        files: name -> content of what else belongs there.

    Raises:
        NonFiniteError: a weight or a number of the record is not finite.
        InputError: something that no stage wrote has the name of `directory`.
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
        save_config(config, temporary / "config.yaml")
        for name, content in (files or {}).items():
            (temporary / name).write_bytes(content)
        write_record(temporary, record, model)
        mode = (temporary / RECORD).stat().st_mode
        for weights in temporary.glob("*.safetensors"):
            weights.chmod(mode)  # safetensors lets only the owner read them, whatever the umask


def check_writable(model: Any, tokenizer: Any, config: StageConfig) -> None:
    """Write all of a stage directory but the weights into a temporary one, before training.

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
            except Exception as error:  # whatever a model's or tokenizer's own code raises
                reason = " ".join(str(error).split())[:300]
                raise InputError(
                    f"model.path={config.model.path}: {name} could not be written into final/ "
                    f"after training ({type(error).__name__}: {reason}); correct it there"
                ) from error
        save_config(config, Path(folder) / "config.yaml")


def write_record(directory: Path, record: StageRecord, model: Any) -> None:
    """Write `rlhf.json` into a directory whose other files are all written.

    Args:
        record: `weights`, `dtype`, `attn_implementation` and `files` are filled in.
        model: whose weights are in the directory.
    """
    record.weights = hash_weights(directory)
    record.dtype = str(model.dtype).removeprefix("torch.")
    record.attn_implementation = model.config._attn_implementation
    names = {file.relative_to(directory).as_posix() for file in files_of(directory)}
    record.files = sorted(names | {RECORD})
    values = as_written(dataclasses.asdict(record))
    text = json.dumps(values, indent=2, allow_nan=False)
    (directory / RECORD).write_text(text, encoding="utf-8")


def read_record(directory: str | Path, revision: str | None = None) -> StageRecord | None:
    """Read `rlhf.json`; None for a directory or Hub id that no stage wrote.

    Args:
        revision: of a Hub id.
    """
    file = _on_disk(directory, revision) / RECORD
    if not file.is_file():
        return None
    try:
        return StageRecord(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{file} is damaged ({error}); run the stage again") from error


def _on_disk(path: str | Path, revision: str | None, *patterns: str) -> Path:
    """The directory that a Hub id has in the Hub's cache; anything else is returned as it is."""
    if not is_hub_id(path):
        return Path(path)
    try:
        # a pattern that fits no file at all is warned about
        names = [RECORD, "config.json", *patterns]
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=names))
    except Exception:  # whatever a network raises; the loader of the model says what is wrong
        return Path(path)


def require_stage(
    directory: str | Path, stages: tuple[str, ...], field: str, revision: str | None = None
) -> StageRecord | None:
    """Read the record of a directory or Hub id, and check that the right stage wrote it and that
    its weights are those that the stage wrote.

    Raises:
        InputError: another stage wrote it, its weights have changed, or the directory is a run or
            stage folder rather than its `final/`.
    """
    path = Path(directory)
    if (
        path.is_dir()
        and not (path / "config.json").is_file()
        and not (path / "adapter_config.json").is_file()
    ):
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
    check_weights(directory, record, field, revision)
    return record


def _finals_in(path: Path, stages: tuple[str, ...]) -> list[Path]:
    """The `final/` directories of these stages in a stage's folder, a run's, or that of all runs;
    nothing else is searched, as the path may be a home or all of a disk."""
    found = [path / "final"] if path.name in stages else []
    for stage in stages:
        for place in (f"{stage}/final", f"*/{stage}/final"):
            found += [file.parent for file in path.glob(f"{place}/{RECORD}")]
    return sorted(final for final in found if (final / RECORD).is_file())


def check_weights(
    path: str | Path, record: StageRecord | None, field: str, revision: str | None = None
) -> None:
    """Check that the weights of a directory or Hub id are those that its record is about.

    Args:
        record: None, and one without a hash, as earlier versions wrote it, fit any weights.
        field: configuration key that gave the path.

    Raises:
        InputError: they are other weights.
    """
    if record is None or record.weights is None:
        return
    directory = _on_disk(path, revision, "*.safetensors")
    if not any(True for _ in directory.glob("*.safetensors")):
        return  # the loader of the model says what is wrong
    weights = hash_weights(directory)
    if weights != record.weights:
        raise InputError(
            f"{field}={path} does not hold the weights that the {record.stage} stage wrote "
            f"(SHA-256 {weights[:12]}, but {RECORD} says {str(record.weights)[:12]}): they were "
            "changed or damaged. Copy the directory again; to adopt them on purpose, set "
            f'"weights": null in {directory / RECORD}'
        )


def warn_about_sft_model(reward_model: str, policy: str) -> None:
    """Warn when a reward model was trained from another model than the policy's SFT model.

    Args:
        reward_model: directory or Hub id.
        policy: directory or Hub id that PPO starts from.
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
    """Follow a policy of the PPO stage to the model that its first run started from: name, hash."""
    path = policy
    weights = hash_weights(Path(path)) if Path(path).is_dir() else None
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
    """Warn when prompts reach the model in another form than the stage before trained on."""
    if record is not None and record.prompts not in (None, "mixed", prompts):
        fix = "set dataset.as_conversation=true" if prompts == "text" else "use a text format"
        warn(
            f"the {record.stage} stage trained on {record.prompts} prompts, but these are "
            f"{prompts} prompts, which the model has never seen; {fix}"
        )


def warn_about_template(record: StageRecord | None, tokenizer: Any, path: str | None) -> None:
    """Warn when SFT gives a checkpoint another chat template than it was trained with."""
    if record is not None and record.template != hash_template(tokenizer):
        warn(
            f"model.path={path} was trained with another chat template than this stage's; leave "
            "model.chat_template and model.stop_strings unset (null) to keep the checkpoint's"
        )


def check_same_tokenizer(
    tokenizer: Any, record: StageRecord | None, ours: str, theirs: str
) -> None:
    """Check that two stages share vocabulary, special tokens and chat template.

    Args:
        ours: description of where `tokenizer` comes from, for the message.
        theirs: description of where `record` comes from.

    Raises:
        InputError: names both sides and what differs.
    """
    if record is None:
        return
    if record.tokenizer != hash_tokenizer(tokenizer):
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


def hash_weights(directory: Path) -> str:
    """SHA-256 over the safetensors files of a directory; a process reads unchanged ones once."""
    files = sorted(directory.resolve().glob("*.safetensors"))
    states = [(file, file.stat()) for file in files]
    facts = [(f, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for f, s in states]
    return _hash_files(tuple(facts))


@cache
def _hash_files(facts: tuple[tuple[Path, int, int, int, int], ...]) -> str:
    """SHA-256 over files one after the other, each given with what changes when it does."""
    size = sum(num_bytes for _, _, num_bytes, *_ in facts)
    if size > SAID_ABOVE and is_main_process():
        where = facts[0][0].parent
        # stdout may be what a model says
        print(f"reading {size / 1e9:.1f} GB in {where} for their SHA-256", file=sys.stderr)
    digest = hashlib.sha256()
    for file, *_ in facts:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def _version(package: str) -> str:
    """Version of a package; a source tree that is not installed has no metadata."""
    try:
        return version(package)
    except PackageNotFoundError:
        return rlhf.__version__ if package == "rlhf" else "not installed"
