"""The hand-off between stages, and the state that a stopped run resumes from.

`runs/<run_name>/<stage>/final/` is an ordinary Hugging Face directory (safetensors, config,
tokenizer with its chat template) with two files beside: `config.yaml`, the resolved configuration,
and `rlhf.json`, a `StageRecord`. The next stage reads the record and refuses a mismatch by naming
both sides. Directories are written under a temporary name and renamed when complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rlhf.config import InputError, StageConfig, save_config
from rlhf.metrics import say, warn

RECORD = "rlhf.json"
PACKAGES = ("rlhf", "torch", "transformers", "trl", "peft", "accelerate", "datasets")


@dataclass
class StageRecord:
    """What a stage writes about its result, for the next stage and for people.

    Attributes:
        stage: "sft", "reward" or "ppo".
        parent: directory or Hub id that training started from (None: from scratch).
        parent_weights: SHA-256 over the parent's safetensors files (None for a Hub id).
        tokenizer: hash of vocabulary and special tokens.
        template: hash of the chat template.
        prompts: how training prompts reached the model, "conversation", "text" or "mixed".
        score_mean: mean of the reward model's scores on reference completions (raw units).
        score_std: their standard deviation.
        metrics: final figures of the stage.
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
    score_mean: float | None = None
    score_std: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


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
        versions={name: version(name) for name in PACKAGES},
    )


def write_stage(
    directory: Path, model: Any, tokenizer: Any, config: StageConfig, record: StageRecord
) -> None:
    """Write a stage directory, complete or not at all.

    Args:
        directory: e.g. `runs/demo/sft/final`.
        model: a plain transformers model (adapters merged).
    """
    with complete_or_nothing(directory) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        save_config(config, temporary / "config.yaml")
        (temporary / RECORD).write_text(
            json.dumps(dataclasses.asdict(record), indent=2), encoding="utf-8"
        )


def read_record(directory: str | Path) -> StageRecord | None:
    """Read `rlhf.json`; None for a directory or Hub id that no stage wrote."""
    file = Path(directory) / RECORD
    if not file.is_file():
        return None
    try:
        return StageRecord(**json.loads(file.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, TypeError) as error:
        raise InputError(f"{file} is damaged ({error}); run the stage again") from error


def require_stage(directory: str | Path, stages: tuple[str, ...], field: str) -> StageRecord | None:
    """Read the record of a directory and check that the right stage wrote it.

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
    record = read_record(path)
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
            "from the same SFT directory, or leave model.chat_template unset"
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


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# --- Run directory -------------------------------------------------------------------------------


def check_run_directory(config: StageConfig, stage: str) -> None:
    """Refuse a directory that holds a run, unless told to resume or to overwrite; changes nothing.

    Raises:
        InputError: the directory is in use, or there is nothing to resume.
    """
    directory = config.stage_dir(stage)
    if config.resume and config.overwrite:
        raise InputError("resume=true and overwrite=true contradict each other; give one of them")
    if _in_use(directory) and not (config.resume or config.overwrite):
        done = "a finished run" if (directory / "final").is_dir() else "an unfinished run"
        raise InputError(
            f"{directory} already holds {done}; use another run_name, resume=true to continue it, "
            "or overwrite=true to delete it"
        )
    if config.resume and (directory / "final").is_dir():
        raise InputError(
            f"{directory} is finished: there is nothing to resume; use another run_name"
        )


def prepare_run_directory(config: StageConfig, stage: str) -> Path:
    """Create the stage's directory, once all else is known to be good; see `check_run_directory`.

    With `overwrite=true`, what it held is deleted here.
    """
    from accelerate import PartialState

    state, directory = PartialState(), config.stage_dir(stage)
    check_run_directory(config, stage)
    state.wait_for_everyone()
    if state.is_main_process:
        if config.overwrite and _in_use(directory):
            shutil.rmtree(directory)
        directory.mkdir(parents=True, exist_ok=True)
    state.wait_for_everyone()
    return directory


def _in_use(directory: Path) -> bool:
    return directory.is_dir() and any(directory.iterdir())


def complete_checkpoints(directory: Path) -> list[Path]:
    """Return every `checkpoint-N` of a stage, oldest first, without those left half-written."""
    found = [p for p in directory.glob("checkpoint-*") if p.name.split("-")[-1].isdigit()]
    return sorted(found, key=step_of)


def latest_checkpoint(directory: Path) -> Path | None:
    """Return the newest complete `checkpoint-N` in a stage directory."""
    return next(reversed(complete_checkpoints(directory)), None)


def step_of(checkpoint: Path | None) -> int:
    """Step number in the name of a checkpoint; 0 without one."""
    return int(checkpoint.name.split("-")[-1]) if checkpoint else 0


def checkpoint_to_resume(config: StageConfig, directory: Path) -> Path | None:
    """Return the newest checkpoint when resuming is asked for, and say which."""
    if not config.resume:
        return None
    checkpoint = latest_checkpoint(directory)
    found = f"resuming from {checkpoint}"
    say(found if checkpoint else "no checkpoint to resume from: starting afresh")
    return checkpoint


@contextmanager
def complete_or_nothing(directory: Path) -> Iterator[Path]:
    """Yield a temporary directory that takes the name of `directory` when the block ends without
    an error."""
    temporary = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    if directory.is_dir():
        shutil.rmtree(directory)
    os.replace(temporary, directory)


# --- State of a PPO run ---------------------------------------------------------------------------


def save_training_state(
    directory: Path,
    modules: dict[str, Any],
    optimizers: dict[str, Any],
    state: dict[str, Any],
    config: StageConfig | None = None,
) -> None:
    """Write trainable weights and optimiser state as safetensors, and plain values as JSON.

    Args:
        modules: name -> module; only parameters that train are written.
        optimizers: name -> optimiser.
        state: JSON values, e.g. the number of finished updates.
        config: written beside, resolved.
    """
    with complete_or_nothing(directory) as temporary:
        for name, module in modules.items():
            save_file(_trainable(module), temporary / f"{name}.safetensors")
        for name, optimizer in optimizers.items():
            content = optimizer.state_dict()
            tensors = {
                f"{index}.{key}": torch.as_tensor(value).contiguous()
                for index, values in content["state"].items()
                for key, value in values.items()
            }
            save_file(tensors, temporary / f"optimizer_{name}.safetensors")
        (temporary / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
        if config is not None:
            save_config(config, temporary / "config.yaml")


def load_training_state(
    directory: Path, modules: dict[str, Any], optimizers: dict[str, Any]
) -> dict:
    """Load what `save_training_state` wrote, in place, and return the JSON values.

    Raises:
        InputError: the checkpoint belongs to another model.
    """
    for name, module in modules.items():
        saved, own = load_file(directory / f"{name}.safetensors"), _trainable(module)
        if {k: v.shape for k, v in saved.items()} != {k: v.shape for k, v in own.items()}:
            raise InputError(
                f"{directory}: the {name} weights there belong to another model or adapter "
                "configuration"
            )
        with torch.no_grad():
            for key, value in own.items():
                value.copy_(saved[key])
    for name, optimizer in optimizers.items():
        content = optimizer.state_dict()
        content["state"] = {}
        for key, value in load_file(directory / f"optimizer_{name}.safetensors").items():
            index, _, entry = key.partition(".")
            content["state"].setdefault(int(index), {})[entry] = value
        optimizer.load_state_dict(content)
    return json.loads((directory / "state.json").read_text(encoding="utf-8"))


def _trainable(module: Any) -> dict[str, torch.Tensor]:
    return {name: p.data for name, p in module.named_parameters() if p.requires_grad}


class GracefulStop:
    """Turns the first Ctrl-C into a flag, so that a loop can save; the second one interrupts.

    Use as a context manager; read `requested()` at the end of each step, on every rank alike.
    """

    def __init__(self) -> None:
        self._flag = False

    def __enter__(self) -> GracefulStop:
        self._previous = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _handle(self, *_: object) -> None:
        if self._flag:
            raise KeyboardInterrupt
        self._flag = True
        print(
            "\nCtrl-C: finishing this step, then saving a checkpoint (again: stop at once)",
            flush=True,
        )

    def requested(self) -> bool:
        """True on every rank as soon as any rank was interrupted."""
        from accelerate import PartialState

        state = PartialState()
        if state.num_processes == 1:
            return self._flag
        from accelerate.utils import reduce

        return bool(reduce(torch.tensor(float(self._flag), device=state.device), "sum").item())
