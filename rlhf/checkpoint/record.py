"""`rlhf.json`: what a stage records about its result, with the SHA-256 of its weights.

`stage_directory.py` compares the record with the files and with other stages.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import rlhf
from rlhf.checkpoint.disk import files_of
from rlhf.config import InputError, StageConfig, as_written
from rlhf.console import is_main_process
from rlhf.hub import local_directory
from rlhf.metrics import read_jsonl
from rlhf.tokenizer import hash_template, hash_tokenizer

RECORD = "rlhf.json"
CHANGES = "changes.jsonl"  # rows of `after_step` and `changed`, e.g. ["precision: ... -> ..."]
ANNOUNCED_BYTES = 1_000_000_000  # reading more than this takes seconds, so a line says so
TICK_SECONDS = 2.0  # that the clock of a file system may need to tell two changes apart
PACKAGES = ("rlhf", "torch", "transformers", "trl", "peft", "accelerate", "datasets")


@dataclass
class StageRecord:
    """What a stage writes about its result, for the next stage and for people.

    Attributes:
        stage: "sft", "reward" or "ppo"; "critic" for the critic of a PPO run.
        parent: directory or Hub id that training started from (None: from scratch).
        parent_weights: SHA-256 of the parent's safetensors or GGUF file (None for a Hub id).
        reference, reference_weights: the same of the KL reference, where PPO had one of its own.
        tokenizer: hash of vocabulary and special tokens.
        template: hash of the chat template.
        prompts: how training prompts reached the model, "conversation", "text" or "mixed".
        dropped: number of rows that were left out of the data, by reason.
        score_mean: mean of the reward model's scores of `normalization.completions` (raw units); a
            critic's values are (raw - score_mean) / score_std.
        forward: "padding-free", or "padded" and the reason; None for an exported checkpoint.
        other_forwards: which models of PPO read rows otherwise than this one, and how.
        sampling: the engine with which PPO sampled, with the reason where it is "loop".
        scoring: when PPO scored the responses, where the scorer is not in its own processes.
        compiled: which models PPO compiled, where it was asked to.
        optimizer: which models PPO updated in one kernel, if any.
        sharding: how processes shared the weights, where they did.
        shared_base: what PPO kept on one base, where it was asked to.
        frozen: how PPO stored the models that it does not train, where that is special.
        weights: SHA-256 of the directory's own safetensors files; None accepts any weights.
        metrics: final figures of the stage.
        changes: the rows of `CHANGES`.
        files: names of all files in the directory, this one included.
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
    reference: str | None = None
    reference_weights: str | None = None
    prompts: str | None = None
    dropped: dict[str, int] = field(default_factory=dict)
    score_mean: float | None = None
    score_std: float | None = None
    weights: str | None = None
    dtype: str | None = None
    attn_implementation: str | None = None
    forward: str | None = None
    other_forwards: str | None = None
    sampling: str | None = None
    scoring: str | None = None
    frozen: str | None = None
    shared_base: str | None = None
    compiled: str | None = None
    optimizer: str | None = None
    sharding: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    changes: list[dict[str, Any]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


def make_record(
    stage: str,
    config: StageConfig,
    parent: str | None,
    tokenizer: Any,
    prompts: str | None = None,
    dropped: Mapping[str, int] | None = None,
    metrics: dict[str, float] | None = None,
) -> StageRecord:
    """Describe a stage's result before it is written; `StageRecord` explains the arguments."""
    return StageRecord(
        stage=stage,
        parent=parent,
        parent_weights=parent_weights(parent),
        revision=config.model.revision,
        tokenizer=hash_tokenizer(tokenizer),
        template=hash_template(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        seed=config.seed,
        prompts=prompts,
        dropped=dict(dropped or {}),
        metrics=metrics or {},
        versions=versions(),
        changes=read_jsonl(config.stage_dir(stage) / CHANGES),
    )


def parent_weights(parent: str | None) -> str | None:
    """Hash the weights that training starts from; None for a Hub id and a model from scratch."""
    is_local = parent is not None and Path(parent).exists()
    return hash_weights(Path(str(parent))) if is_local else None


def write_record(directory: Path, record: StageRecord, model: Any) -> None:
    """Write `rlhf.json` into a directory whose other files, such as `model`, are all written.

    This fills in what is only known now, such as the record's `weights` and `files`.
    """
    record.weights = hash_weights(directory)
    record.dtype = str(model.dtype).removeprefix("torch.")
    record.forward = getattr(model.base_model, "_rlhf_forward", record.forward)
    replaced = "sdpa" if record.forward == "padding-free" else None  # by our own attention
    record.attn_implementation = replaced or model.config._attn_implementation
    names = {file.relative_to(directory).as_posix() for file in files_of(directory)}
    record.files = sorted(names | {RECORD})
    text = json.dumps(as_written(dataclasses.asdict(record)), indent=2, allow_nan=False)
    (directory / RECORD).write_text(text, encoding="utf-8")


def read_record(directory: str | Path, revision: str | None = None) -> StageRecord | None:
    """Read `rlhf.json`; None for a directory or Hub id that no stage wrote."""
    file = local_copy(directory, revision) / RECORD
    if not file.is_file():
        return None
    try:
        return StageRecord(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{file} is damaged ({error}); run the stage again") from error


def local_copy(path: str | Path, revision: str | None, weights: bool = False) -> Path:
    """Return where a Hub id is in the Hub's cache; any other path is returned unchanged."""
    try:
        return local_directory(path, "path", revision, weights=weights)
    except InputError:  # loading the model fails next and explains it
        return Path(path)


def versions() -> dict[str, str]:
    """The versions of the packages that decide on a run's numbers."""
    return {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    """Return the version of a package; a source tree that is not installed has no metadata."""
    try:
        return version(package)
    except PackageNotFoundError:
        return rlhf.__version__ if package == "rlhf" else "not installed"


def hash_weights(path: Path) -> str:
    """SHA-256 over a directory's safetensors files, or over a GGUF file; unchanged files are read
    once per process, unless they are a moment old."""
    path = path.resolve()
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    files = files or sorted(path.glob("*.gguf"))
    states = [(file, file.stat()) for file in files]
    facts = [(f, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for f, s in states]
    age = time.time_ns() - max((s.st_ctime_ns for _, s in states), default=0)
    # within a tick, a file can change, and its times do not
    read = _hash_files if age >= TICK_SECONDS * 1e9 else _hash_files.__wrapped__
    return read(tuple(facts))


@cache
def _hash_files(facts: tuple[tuple[Path, int, int, int, int], ...]) -> str:
    """SHA-256 over the content of files; the facts about a file that is older than a tick of the
    clock change whenever it changes."""
    size = sum(num_bytes for _, _, num_bytes, *_ in facts)
    if size > ANNOUNCED_BYTES and is_main_process():
        where = facts[0][0].parent
        # to stderr, because stdout may hold a model's answers
        print(f"reading {size / 1e9:.1f} GB in {where} for their SHA-256", file=sys.stderr)
    digest = hashlib.sha256()
    for file, *_ in facts:
        with file.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()
