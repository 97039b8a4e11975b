"""What a path or Hub id holds: a whole model or adapters on one, a language model or a classifier.

Every loader asks here first. Names and headers of files are enough to refuse pickles, missing and
damaged files, and adapters without a base, before any weight is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.config import InputError
from rlhf.hub.snapshot import local_directory, read_json, tensor_names

ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
NO_WEIGHTS = "training_args.bin"
NUM_SHOWN = 3
TOKENIZER = ("tokenizer*", "tekken*", "*vocab*", "merges*", "*.model", "*.tiktoken", "*.spm")


@dataclass(frozen=True)
class Source:
    """What a path or Hub id holds.

    Attributes:
        label: the setting and its value, for messages: "model.path=runs/x".
        path: the path or Hub id that was given.
        directory: of the whole model, below any adapters.
        adapters: directories of the adapters on it, in the order of merging.
        is_classifier: True for a sequence classifier, such as a reward model; False for a language
            model.
    """

    label: str
    path: str
    directory: Path
    adapters: tuple[Path, ...]
    is_classifier: bool


def find_source(path: Any, field: str, revision: str | None = None, code: bool = False) -> Source:
    """Find out what a path or Hub id holds, and check its files.

    Args:
        field: name of the setting that gave the path, for messages.
        code: also download the Python files of a Hub id.

    Raises:
        InputError: there is nothing to load, only pickled weights, a damaged or missing file, or an
            adapter whose base cannot be found or is quantised.
    """
    label, chain = f"{field}={path}", _chain(path, field, revision, code)
    *adapters, directory = chain
    tasks = [_check_adapter(adapter, label).get("task_type") for adapter in adapters]
    _check_model(directory, label if not adapters else f"{label} (an adapter on {directory})")
    config = read_json(directory / "config.json")
    names = config.get("architectures") or []
    if adapters and config.get("quantization_config"):
        raise InputError(
            f"{label}: its base {directory} is stored quantised, and an adapter cannot be merged "
            f"into that; in {adapters[0] / ADAPTER}, set base_model_name_or_path to the base that "
            "is not quantised"
        )
    is_classifier = any(str(name).endswith("ForSequenceClassification") for name in names)
    return Source(
        label, str(path), directory, tuple(reversed(adapters)), is_classifier or "SEQ_CLS" in tasks
    )


def tokenizer_directory(
    path: Any, field: str, revision: str | None = None, code: bool = False
) -> Path:
    """Return the directory that holds the tokenizer of a path or Hub id; an adapter without a
    tokenizer uses that of its base.

    Raises:
        InputError: no such directory or Hub model, or there is no tokenizer.
    """
    for directory in _chain(path, field, revision, code, weights=False):
        if any(True for pattern in TOKENIZER for _ in directory.glob(pattern)):
            return directory
    raise InputError(
        f"{field}={path} has no tokenizer (tokenizer.json and tokenizer_config.json); save one "
        "there with tokenizer.save_pretrained"
    )


def config_directory(path: Any, field: str, revision: str | None, code: bool) -> Path:
    """Return the directory of the whole model below any adapters, without downloading weights.

    Raises:
        InputError: no such directory or Hub model, or an adapter whose base cannot be found.
    """
    return _chain(path, field, revision, code, weights=False)[-1]


def _chain(
    path: Any, field: str, revision: str | None, code: bool, weights: bool = True
) -> list[Path]:
    """Return the directories of an adapter, of the adapter below it, and so on; the whole model's
    directory is the last."""
    chain = [local_directory(path, field, revision, code, weights)]
    while (chain[-1] / ADAPTER).is_file():
        settings, file = read_json(chain[-1] / ADAPTER), chain[-1] / ADAPTER
        base = settings.get("base_model_name_or_path")
        if not base:
            raise InputError(
                f"{field}={path}: {file} does not name the adapter's base model; set its "
                "base_model_name_or_path to the path or Hub id of that model"
            )
        where = f"{field}={path} is an adapter; correct {file}: base_model_name_or_path"
        directory = local_directory(base, where, settings.get("revision"), code, weights)
        if directory.resolve() in [known.resolve() for known in chain]:
            raise InputError(
                f"{field}={path}: {file} names an adapter as its own base, {base}; set its "
                "base_model_name_or_path to the path or Hub id of the model"
            )
        chain.append(directory)
    return chain


def _check_adapter(directory: Path, label: str) -> dict[str, Any]:
    """Check the files of an adapter, and return its configuration."""
    if (directory / WEIGHTS).is_file() or (directory / INDEX).is_file():
        raise InputError(
            f"{label}: {directory} holds both an adapter and a whole model; move one of them to "
            "another directory"
        )
    if not (directory / ADAPTER_WEIGHTS).is_file():
        _refuse_pickles(directory, label)
        raise InputError(
            f"{label}: {directory} has {ADAPTER} but no {ADAPTER_WEIGHTS}; copy or download it"
        )
    tensor_names(directory / ADAPTER_WEIGHTS)
    return read_json(directory / ADAPTER)


def _check_model(directory: Path, label: str) -> None:
    """Check the files of a whole model."""
    config = read_json(directory / "config.json")
    read_json(directory / "generation_config.json")  # transformers ignores a damaged one
    files = weight_files(directory, config)
    if not files:
        _refuse_pickles(directory, label)
        raise InputError(f"{label} has no weights: it holds neither {WEIGHTS} nor {INDEX}")
    if not config:
        raise InputError(f"{label} is not a model directory (no config.json)")
    for file in files:
        if file.suffix != ".safetensors":
            raise InputError(
                f"{label}: {file} is not a safetensors file; convert the weights with "
                "save_pretrained, which writes safetensors"
            )
        if not file.is_file():
            raise InputError(f"{label} is incomplete: {file} is missing; copy or download it")
        tensor_names(file)


def weight_files(directory: Path, config: dict[str, Any]) -> list[Path]:
    """Return the weight files that transformers would load for a whole model; [] if no file has a
    known name.

    Raises:
        InputError: the index of the files cannot be read.
    """
    named = config.get("transformers_weights")
    names = [str(named)] if named else [n for n in (WEIGHTS, INDEX) if (directory / n).is_file()]
    if not names or not names[0].endswith(".index.json"):
        return [directory / name for name in names[:1]]
    shards = read_json(directory / names[0]).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise InputError(f"{directory / names[0]} is damaged (no weight_map); download it again")
    return [directory / name for name in sorted(set(map(str, shards.values())))]


def _refuse_pickles(directory: Path, label: str) -> None:
    names = [file.name for file in directory.iterdir()]
    pickled = sorted(n for n in names if n.endswith(PICKLED) and n != NO_WEIGHTS)
    if pickled:
        raise InputError(
            f"{label} has pickled weights ({', '.join(pickled[:3])}), and loading a pickle can run "
            "code; convert them with save_pretrained, which writes safetensors"
        )


@dataclass
class Misfits:
    """Where the weights in files and the parameters of a model differ; false if nowhere.

    Attributes:
        missing: parameters without weights.
        unexpected: weights without a parameter.
        shapes: name, shape in the file and shape in the model.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    shapes: Sequence[tuple[str, Sequence[int], Sequence[int]]] = ()

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes)

    def __str__(self) -> str:
        parts = []
        if self.missing:
            parts.append(f"there are no weights for {_some(self.missing)}")
        if self.unexpected:
            parts.append(f"the model has no place for {_some(self.unexpected)}")
        if self.shapes:
            named = [
                f"{name} (stored {tuple(theirs)}, expected {tuple(ours)})"
                for name, theirs, ours in self.shapes
            ]
            parts.append(f"other shapes: {_some(named)}")
        return "; ".join(parts)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NUM_SHOWN} more" if len(names) > NUM_SHOWN else ""
    return ", ".join(sorted(names)[:NUM_SHOWN]) + more
