"""A path or a Hub id: the files that it holds, checked before any weight is read.

A Hub id becomes the directory of its snapshot in the Hub's cache, so files from the Hub and from
this disk are read alike. Names and headers of files are enough to refuse pickles, missing and
damaged files, and adapters without a base. Pickled files are never downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from rlhf.config import InputError, nearest, one_line
from rlhf.gguf_files import gguf_among, is_gguf, require_gguf

ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER = ("tokenizer*", "tekken*", "*vocab*", "merges*", "*.model", "*.tiktoken", "*.spm")
# What a loader reads besides weights: a file with another name cannot be why it failed.
JSON_FILES = (
    "config.json generation_config.json adapter_config.json model.safetensors.index.json "
    "tokenizer_config.json tokenizer.json special_tokens_map.json added_tokens.json vocab.json"
).split()
DOWNLOADED = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
# Other formats of the same weights, and subfolders, which hold files of other programs.
NOT_DOWNLOADED = ["consolidated*", "*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors"]
CONVERT = "convert the weights with save_pretrained, which writes safetensors"
NUM_SHOWN = 3


# --- Directories and files ----------------------------------------------------------------------


def is_hub_id(path: str | Path) -> bool:
    """True if this can only be a model on the Hub: no path on this disk, and owner/name, or name,
    or a GGUF file of a Hub model, owner/name/file.gguf."""
    name = str(path)
    if not name or name.startswith((".", "/", "~", "python:")) or Path(name).exists():
        return False
    if is_gguf(Path(name)):
        return name.count("/") == 2 and not Path(name).parents[1].is_dir()
    return name.count("/") <= 1


def local_directory(
    path: Any, field: str, revision: str | None = None, code: bool = False, weights: bool = True
) -> Path:
    """Return the directory or GGUF file of a path or a Hub id; download a Hub id that is not in
    the cache. For a directory or Hub id that holds a model as GGUF only, this is the file.

    Args:
        field: name of the setting that gave the path, for messages.
        code, weights: also download Python files, weights. Without weights, the GGUF file of a Hub
            id may not be there yet.
    """
    directory, label = Path(str(path)), f"{field}={path}"
    if directory.is_dir():
        return directory / (gguf_among((f.name for f in directory.glob("*")), label) or "")
    if directory.is_file() and is_gguf(directory):
        return directory
    if directory.is_file():
        raise InputError(f"{label} is a file; give the directory that holds it: {directory.parent}")
    if not is_hub_id(path):
        raise InputError(f"{label}: no such {'file' if is_gguf(directory) else 'directory'}")
    wanted = DOWNLOADED + (["*.safetensors"] if weights else []) + (["*.py"] if code else [])
    try:
        return _snapshot(path, label, revision, wanted, weights)
    except InputError:
        raise
    except Exception as error:  # a network can raise anything
        kind = "file" if is_gguf(directory) else "directory"
        here = map(str, directory.parent.glob("*")) if "/" in str(path) else []
        raise InputError(
            f"{label} cannot be loaded: it is neither a {kind} here nor a Hub model that can be "
            f"reached ({one_line(error)}).{nearest(str(path), here)}"
        ) from error


def _snapshot(
    path: Any, label: str, revision: str | None, wanted: list[str], weights: bool
) -> Path:
    """Return the directory in the Hub's cache, or a GGUF file there."""
    from huggingface_hub import hf_hub_download, snapshot_download

    repository, file = str(path), None
    if is_gguf(Path(repository)):
        repository, _, file = repository.rpartition("/")
    directory = Path(
        snapshot_download(
            repository, revision=revision, allow_patterns=wanted, ignore_patterns=NOT_DOWNLOADED
        )
    )
    names = _names(repository, revision, directory)
    file = file or gguf_among(names, label)
    if file is None:
        return directory
    if file not in names:
        files = ", ".join(name for name in names if is_gguf(Path(name))) or "no GGUF file"
        raise InputError(f"{label}: there is no such file, {repository} has {files}")
    if weights:
        return Path(hf_hub_download(repository, file, revision=revision))
    return directory / file


def _names(repository: str, revision: str | None, directory: Path) -> list[str]:
    """Names of the files of a Hub model, without those in subfolders."""
    names = [file.name for file in directory.glob("*")]
    if not any(name.endswith(".safetensors") for name in names):
        with suppress(Exception):  # without a network, what the cache has is all there is
            names = _listing(repository, revision)
    return names


@cache
def _listing(repository: str, revision: str | None) -> list[str]:
    from huggingface_hub import list_repo_files

    return [name for name in list_repo_files(repository, revision=revision) if "/" not in name]


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; {} if there is no such file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is damaged (not UTF-8, byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is damaged (not JSON: {error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} is damaged (not a JSON object, but a {type(content).__name__})")
    return content


def tensor_names(file: Path) -> list[str]:
    """Return the names of the tensors in a safetensors file; refuse one that is cut short."""
    try:
        with safe_open(file, framework="np") as tensors:
            return list(tensors.keys())
    except (SafetensorError, OSError) as error:
        size = f", {file.stat().st_size:,} bytes" if file.is_file() else ""
        what = f"damaged or incomplete ({error}{size})"
        raise InputError(f"{file} is {what}; copy or download it again") from error


def weight_files(directory: Path, config: dict[str, Any]) -> list[Path]:
    """Return the files that transformers would load; [] if no file has a known name."""
    named = config.get("transformers_weights")
    names = [str(named)] if named else [n for n in (WEIGHTS, INDEX) if (directory / n).is_file()]
    if not names or not names[0].endswith(".index.json"):
        return [directory / name for name in names[:1]]
    shards = read_json(directory / names[0]).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise InputError(f"{directory / names[0]} is damaged (no weight_map); download it again")
    return [directory / name for name in sorted(set(map(str, shards.values())))]


# --- What a path holds --------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """What a path or Hub id holds."""

    label: str  # the setting and its value, for messages: "model.path=runs/x"
    path: str
    directory: Path  # of the whole model, below any adapters; or its GGUF file
    adapters: tuple[Path, ...]  # their directories, in the order of merging
    is_classifier: bool  # a sequence classifier, such as a reward model; else a language model
    in_slices: bool = False  # no weight is read before each process can read its slice


def find_source(path: Any, field: str, revision: str | None = None, code: bool = False) -> Source:
    """Find out what a path or Hub id holds; see `local_directory`. Pickled, damaged and missing
    weights are refused, and adapters whose base cannot be found or is quantised."""
    label = f"{field}={path}"
    *adapters, directory = _chain(path, field, revision, code)
    tasks = [_adapter_settings(adapter, label).get("task_type") for adapter in adapters]
    _require_model(directory, label if not adapters else f"{label} (an adapter on {directory})")
    config = read_json(directory / "config.json")
    if adapters and config.get("quantization_config"):
        raise InputError(
            f"{label}: its base {directory} is stored quantised, and an adapter cannot be merged "
            f"into that; in {adapters[0] / ADAPTER}, set base_model_name_or_path to the base that "
            "is not quantised"
        )
    names = map(str, config.get("architectures") or [])
    is_classifier = any(name.endswith("ForSequenceClassification") for name in names)
    is_classifier = is_classifier or "SEQ_CLS" in tasks
    return Source(label, str(path), directory, tuple(reversed(adapters)), is_classifier)


def tokenizer_directory(path: Any, field: str, revision: str | None, code: bool) -> Path:
    """Return the directory that holds the tokenizer; an adapter without one uses its base's."""
    for directory in _chain(path, field, revision, code, weights=False):
        if is_gguf(directory):
            return _chain(path, field, revision, code)[-1]  # the tokenizer is in that file
        if any(True for p in TOKENIZER for _ in directory.glob(p)):
            return directory
    raise InputError(
        f"{field}={path} has no tokenizer (tokenizer.json and tokenizer_config.json); save one "
        "there with tokenizer.save_pretrained"
    )


def config_directory(path: Any, field: str, revision: str | None, code: bool) -> Path:
    """Return the directory of the whole model below any adapters, without downloading weights."""
    return _chain(path, field, revision, code, weights=False)[-1]


def _chain(
    path: Any, field: str, revision: str | None, code: bool, weights: bool = True
) -> list[Path]:
    """Return the directories of an adapter, of its base, and so on; the whole model comes last."""
    chain = [local_directory(path, field, revision, code, weights)]
    while (chain[-1] / ADAPTER).is_file():
        file = chain[-1] / ADAPTER
        settings = read_json(file)
        base = settings.get("base_model_name_or_path")
        fix = "set its base_model_name_or_path to the path or Hub id of"
        if not base:
            raise InputError(
                f"{field}={path}: {file} does not name the adapter's base model; {fix} that model"
            )
        where = f"{field}={path} is an adapter; correct {file}: base_model_name_or_path"
        directory = local_directory(base, where, settings.get("revision"), code, weights)
        if directory.resolve() in [known.resolve() for known in chain]:
            raise InputError(
                f"{field}={path}: {file} names an adapter as its own base, {base}; {fix} the model"
            )
        chain.append(directory)
    return chain


def _adapter_settings(directory: Path, label: str) -> dict[str, Any]:
    """Return the configuration of an adapter, once its files are known to be good."""
    if (directory / WEIGHTS).is_file() or (directory / INDEX).is_file():
        what = f"{directory} holds both an adapter and a whole model"
        raise InputError(f"{label}: {what}; move one of them to another directory")
    if not (directory / ADAPTER_WEIGHTS).is_file():
        _refuse_pickles(directory, label)
        what = f"{directory} has {ADAPTER} but no {ADAPTER_WEIGHTS}"
        raise InputError(f"{label}: {what}; copy or download it")
    tensor_names(directory / ADAPTER_WEIGHTS)
    settings = read_json(directory / ADAPTER)
    start = str(settings.get("init_lora_weights"))
    if settings.get("layer_replication"):
        raise InputError(
            f"{label}: the adapter in {directory} uses layers of its base several times "
            "(layer_replication), so it cannot be merged into that; give a whole model"
        )
    if start.startswith("pissa_niter"):
        raise InputError(
            f"{label}: the adapter in {directory} belongs to a base from which random numbers were "
            f"taken (init_lora_weights={start}), which no file holds; save it as plain LoRA "
            "(path_initial_model_for_weight_conversion of PEFT), or give a whole model"
        )
    return settings


def _require_model(directory: Path, label: str) -> None:
    if is_gguf(directory):
        return require_gguf(directory, label)
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
            raise InputError(f"{label}: {file} is not a safetensors file; {CONVERT}")
        if not file.is_file():
            raise InputError(f"{label} is incomplete: {file} is missing; copy or download it")
        tensor_names(file)


def _refuse_pickles(directory: Path, label: str) -> None:
    suffixes, no_weights = (".bin", ".pt", ".pth", ".ckpt", ".pkl"), "training_args.bin"
    names = [file.name for file in directory.iterdir()]
    pickled = sorted(n for n in names if n.endswith(suffixes) and n != no_weights)
    if pickled:
        what = f"has pickled weights ({', '.join(pickled[:NUM_SHOWN])})"
        raise InputError(f"{label} {what}, and loading a pickle can run code; {CONVERT}")


# --- Loading it ---------------------------------------------------------------------------------


def call_loader(
    load: Callable[..., Any], directory: Path, label: str, trust_remote_code: bool, **kwargs: Any
) -> Any:
    """Call a `from_pretrained` function on a directory or a GGUF file.

    Raises:
        InputError: it cannot be loaded. The message begins with `label`, and names a damaged file,
            or the override for a model that needs its own code.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import dynamic_module_utils

    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # raise an error instead of asking on stdin
    if is_gguf(directory):
        directory, kwargs["gguf_file"] = directory.parent, directory.name
    try:
        return load(str(directory), trust_remote_code=trust_remote_code, **kwargs)
    except InputError:
        raise
    except Exception as error:
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise _needs_code(label) from error
        damage = _find_damage(directory)
        if damage is not None:
            raise InputError(f"{label} cannot be loaded: {damage}") from error
        # raised for bad values in these files, or for a library that is not installed
        expected = (OSError, ValueError, TypeError, LookupError, AttributeError, ImportError)
        others = (AssertionError, ArithmeticError, StrictDataclassError)
        if not isinstance(error, expected + others):
            raise
        raise InputError(f"{label} cannot be loaded ({one_line(error)})") from error


def _needs_code(label: str) -> InputError:
    is_stage = label.startswith(("model.", "scorer.", "critic.", "evaluation."))
    override = "model.trust_remote_code=true" if is_stage else "trust_remote_code=true"
    return InputError(
        f"{label} needs Python code of its own, which was not run: it could do all that you can. "
        f"If you have read it and trust it, add {override} to this command and to each later one "
        "(also with resume=true and in the next stages): a run's config.yaml never switches it on"
    )


def _find_damage(directory: Path) -> str | None:
    """Say which JSON file of a directory cannot be read, and why; None: all can.

    `find_source` has examined the weights.
    """
    try:
        for name in JSON_FILES:
            read_json(directory / name)
    except InputError as error:
        return str(error)
    from tokenizers import Tokenizer

    tokenizer = directory / "tokenizer.json"
    try:
        if tokenizer.is_file():
            Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # the library raises no narrower one
        return f"{tokenizer} is damaged ({error})"
    return None


@dataclass
class Misfits:
    """Where the weights in files and the parameters of a model differ; false if nowhere."""

    missing: list[str] = field(default_factory=list)  # parameters without weights
    unexpected: list[str] = field(default_factory=list)  # weights without a parameter
    # name, shape in the file and shape in the model
    shapes: Sequence[tuple[str, Sequence[int], Sequence[int]]] = ()

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes)

    def __str__(self) -> str:
        shapes = [f"{n} (stored {tuple(a)}, expected {tuple(b)})" for n, a, b in self.shapes]
        kinds = {
            "there are no weights for ": self.missing,
            "the model has no place for ": self.unexpected,
            "other shapes: ": shapes,
        }
        return "; ".join(kind + _some(names) for kind, names in kinds.items() if names)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NUM_SHOWN} more" if len(names) > NUM_SHOWN else ""
    return ", ".join(sorted(names)[:NUM_SHOWN]) + more
