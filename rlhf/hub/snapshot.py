"""From a Hub id or a path to a directory, and calls of `from_pretrained` on it.

A Hub id becomes the directory of its snapshot in the Hub's cache first, so that the same files mean
the same thing from either place. Pickled files are never downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from transformers import dynamic_module_utils

from rlhf.config import InputError

# What a loader reads besides weights; a file of another name is not what it failed at.
JSON_FILES = [
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "model.safetensors.index.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
]
TEXT = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
WEIGHTS, CODE = ["*.safetensors"], ["*.py"]
# Other formats of the same weights, and the files of other programs, which lie in folders.
LEFT_OUT = ["consolidated*", "*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors"]


def local_directory(
    path: Any, field: str, revision: str | None = None, code: bool = False, weights: bool = True
) -> Path:
    """Return the directory that a path or a Hub id means; a Hub id is downloaded where it is new.

    Args:
        code: whether Python files are downloaded too.
        weights: whether weights are.

    Raises:
        InputError: no such directory, and no Hub model that can be reached.
    """
    directory, label = Path(str(path)), f"{field}={path}"
    if directory.is_dir():
        return directory
    if directory.is_file():
        raise InputError(f"{label} is a file; give the directory that holds it: {directory.parent}")
    if not is_hub_id(path):
        raise InputError(f"{label}: no such directory")
    patterns = TEXT + (WEIGHTS if weights else []) + (CODE if code else [])
    try:
        snapshot = snapshot_download(
            str(path), revision=revision, allow_patterns=patterns, ignore_patterns=LEFT_OUT
        )
    except Exception as error:  # whatever a network raises
        raise InputError(
            f"{label} cannot be loaded: it is neither a directory here nor a Hub model that can be "
            f"reached ({type(error).__name__}: {one_line(error)})"
        ) from error
    return Path(snapshot)


def call_loader(
    load: Callable[..., Any], directory: Path, label: str, trust_remote_code: bool, **kwargs: Any
) -> Any:
    """Call a `from_pretrained` function on a directory.

    Args:
        label: what to call the directory in messages, as "model.path=runs/x".
        trust_remote_code: whether Python files of the directory may run.

    Raises:
        InputError: it cannot be loaded; a damaged file is named, and so is the override for a model
            that needs its own code.
    """
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # an error where transformers would ask on stdin
    try:
        return load(str(directory), trust_remote_code=trust_remote_code, **kwargs)
    except InputError:
        raise
    except Exception as error:
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise _needs_code(label) from error
        damage = find_damaged_file(directory)
        if damage is not None:
            raise InputError(f"{label} cannot be loaded: {damage}") from error
        # what bad values in these files, or a library that is not installed, end in
        expected = (OSError, ValueError, TypeError, LookupError, AttributeError, ImportError)
        if not isinstance(error, (*expected, StrictDataclassError)):
            raise
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f"{label} cannot be loaded ({reason})") from error


def _needs_code(label: str) -> InputError:
    is_stage = label.startswith(("model.", "scorer.", "critic.", "evaluation."))
    override = "model.trust_remote_code=true" if is_stage else "trust_remote_code=true"
    return InputError(
        f"{label} needs Python code of its own, which was not run: it can do whatever you can do. "
        f"If you have read it and trust it, add {override} to this command, and to each later one "
        "(resume=true and the next stages too): a run's config.yaml never switches it on"
    )


def find_damaged_file(directory: Path) -> str | None:
    """Say which JSON or safetensors file of a directory cannot be read, and why; None if all can
    be."""
    try:
        for name in JSON_FILES:
            read_json(directory / name)
        for file in sorted(directory.glob("*.safetensors")):
            tensor_names(file)
    except InputError as error:
        return str(error)
    tokenizer = directory / "tokenizer.json"
    try:
        if tokenizer.is_file():
            Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # the library raises no narrower one
        return f"{tokenizer} is damaged ({one_line(error)})"
    return None


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; {} where there is no such file.

    Raises:
        InputError: it is not UTF-8, not JSON, or no object.
    """
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is damaged (not UTF-8, byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is damaged (not JSON: {one_line(error)})") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} is damaged (no JSON object, but a {type(content).__name__})")
    return content


def tensor_names(file: Path) -> list[str]:
    """Names of the tensors in a safetensors file, whose header must cover all of the file.

    Raises:
        InputError: it is empty, cut short, or no safetensors file.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except (SafetensorError, OSError) as error:
        size = f", {file.stat().st_size:,} bytes" if file.is_file() else ""
        raise InputError(
            f"{file} is damaged or incomplete ({one_line(error)}{size}); copy or download it again"
        ) from error


def one_line(error: Exception) -> str:
    """The text of an exception in one line, 400 characters at most."""
    return " ".join(str(error).split())[:400]


def is_hub_id(path: str | Path) -> bool:
    """True for what can only be the name of a model on the Hub: no path here, and one / at most."""
    name = str(path)
    is_name = name.count("/") <= 1 and not name.startswith((".", "/", "~", "python:"))
    return bool(name) and is_name and not Path(name).exists()
