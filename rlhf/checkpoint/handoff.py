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
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import snapshot_download

import rlhf
from rlhf.checkpoint.files import complete_or_nothing, files_of
from rlhf.checkpoint.finite import NonFiniteError, read_changes
from rlhf.config import InputError, StageConfig, as_written, save_config
from rlhf.metrics import warn

RECORD = "rlhf.json"
PACKAGES = ("rlhf", "torch", "transformers", "trl", "peft", "accelerate", "datasets")


@dataclass
class StageRecord:
    """What a stage writes about its result, for the next stage and for people.

    Attributes:
        stage: "sft", "reward" or "ppo"; "critic" for the critic of a PPO run.
        parent: directory or Hub id that training started from (None: from scratch).
        parent_weights: SHA-256 over the parent's safetensors files (None for a Hub id).
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
) -> StageRecord:
    """Describe a stage's result before it is written."""
    is_local = parent is not None and Path(parent).is_dir()
    return StageRecord(
        stage=stage,
        parent=parent,
        parent_weights=hash_weights(Path(str(parent))) if is_local else None,
        revision=config.model.revision,
        tokenizer=hash_tokenizer(tokenizer),
        template=_hash(tokenizer.chat_template or ""),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        seed=config.seed,
        prompts=prompts,
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
        record: `dtype` and `attn_implementation` are filled in.
        files: name -> content of what else belongs there.

    Raises:
        NonFiniteError: a weight or a number of the record is not finite.
        InputError: something that no stage wrote has the name of `directory`.
    """
    if directory.is_dir() and any(directory.iterdir()) and not (directory / RECORD).is_file():
        raise InputError(f"{directory} is in the way: no stage wrote it; move it")
    record.dtype = str(model.dtype).removeprefix("torch.")
    record.attn_implementation = model.config._attn_implementation
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
        write_record(temporary, record)
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


def write_record(directory: Path, record: StageRecord) -> None:
    """Write `rlhf.json` into a directory whose other files are all written."""
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
    except (json.JSONDecodeError, TypeError) as error:
        raise InputError(f"{file} is damaged ({error}); run the stage again") from error


def is_hub_id(path: str | Path) -> bool:
    """True for what can only be the name of a model on the Hub: no path here, and one / at most."""
    name = str(path)
    is_name = name.count("/") <= 1 and not name.startswith((".", "/", "~", "python:"))
    return bool(name) and is_name and not Path(name).exists()


def _on_disk(path: str | Path, revision: str | None) -> Path:
    """The directory that a Hub id has in the Hub's cache; anything else is returned as it is."""
    if not is_hub_id(path):
        return Path(path)
    try:
        names = [RECORD, "config.json"]  # a pattern that fits no file at all is warned about
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=names))
    except Exception:  # whatever a network raises; the loader of the model says what is wrong
        return Path(path)


def require_stage(
    directory: str | Path, stages: tuple[str, ...], field: str, revision: str | None = None
) -> StageRecord | None:
    """Read the record of a directory or Hub id and check that the right stage wrote it.

    Raises:
        InputError: another stage wrote it, or the directory is a run or stage folder rather than
            its `final/`.
    """
    path = Path(directory)
    if (
        path.is_dir()
        and not (path / "config.json").is_file()
        and not (path / "adapter_config.json").is_file()
    ):
        found = sorted(path.resolve().glob(f"**/final/{RECORD}"))
        inner = [str(p.parent) for p in found if p.parts[-3] in stages]
        hint = f"; did you mean {' or '.join(inner[:3])}?" if inner else ""
        raise InputError(f"{field}={directory} is not a model directory (no config.json){hint}")
    record = read_record(directory, revision)
    if record is not None and record.stage not in stages:
        raise InputError(
            f"{field}={directory} was written by the {record.stage} stage, but a directory of the "
            f"{' or '.join(stages)} stage is needed; point {field} at "
            f"runs/<run_name>/{stages[0]}/final"
        )
    return record


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
    if record is not None and record.template != _hash(tokenizer.chat_template or ""):
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
    if record.template != _hash(tokenizer.chat_template or ""):
        raise InputError(
            f"chat template mismatch: {theirs} and {ours} render prompts differently; train both "
            "from the same SFT directory, or leave model.chat_template unset (null)"
        )


def hash_tokenizer(tokenizer: Any) -> str:
    """Hash vocabulary and special tokens."""
    special = sorted((key, str(value)) for key, value in tokenizer.special_tokens_map.items())
    return _hash(json.dumps([sorted(tokenizer.get_vocab().items()), special]))


def hash_weights(directory: Path) -> str:
    """SHA-256 over the safetensors files of a directory."""
    digest = hashlib.sha256()
    for file in sorted(directory.glob("*.safetensors")):
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


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
