"""A Hub id or a path becomes a directory, and `from_pretrained` reads it.

A Hub id first becomes the directory of its snapshot in the Hub's cache, so files from the Hub and
from a local directory are read alike. Pickled files are never downloaded.
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

# What a loader reads besides weights: a file with another name cannot be why it failed.
JSON_FILES = (
    "config.json generation_config.json adapter_config.json model.safetensors.index.json "
    "tokenizer_config.json tokenizer.json special_tokens_map.json added_tokens.json vocab.json"
).split()
TEXT = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
WEIGHTS, CODE = ["*.safetensors"], ["*.py"]
# Other formats of the same weights, and subfolders, which hold files of other programs.
LEFT_OUT = ["consolidated*", "*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors"]


def local_directory(
    path: Any, field: str, revision: str | None = None, code: bool = False, weights: bool = True
) -> Path:
    """Return the directory of a path or a Hub id; download a Hub id that is not in the cache.

    Args:
        field: name of the setting that gave the path, for messages.
        code: also download Python files.
        weights: also download weights.

    Raises:
        InputError: it is neither a directory nor a Hub model that can be reached.
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
    except Exception as error:  # a network can raise anything
        raise InputError(
            f"{label} cannot be loaded: it is neither a directory here nor a Hub model that can be "
            f"reached ({one_line(error)})"
        ) from error
    return Path(snapshot)


def call_loader(
    load: Callable[..., Any], directory: Path, label: str, trust_remote_code: bool, **kwargs: Any
) -> Any:
    """Call a `from_pretrained` function on a directory.

    Args:
        label: name of the directory in messages, e.g. "model.path=runs/x".
        trust_remote_code: whether Python files of the directory may run.

    Raises:
        InputError: it cannot be loaded. The message names a damaged file, or the override for a
            model that needs its own code.
    """
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # raise an error instead of asking on stdin
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
        # raised for bad values in these files, or for a library that is not installed
        expected = (OSError, ValueError, TypeError, LookupError, AttributeError, ImportError)
        if not isinstance(error, (*expected, StrictDataclassError)):
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


def find_damaged_file(directory: Path) -> str | None:
    """Say which JSON or safetensors file of a directory cannot be read, and why; None: all can."""
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
        return f"{tokenizer} is damaged ({error})"
    return None


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; {} if there is no such file.

    Raises:
        InputError: it is not UTF-8, not JSON, or not an object.
    """
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
    """Return the names of the tensors in a safetensors file.

    Raises:
        InputError: it is empty, cut short, or not a safetensors file.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except (SafetensorError, OSError) as error:
        size = f", {file.stat().st_size:,} bytes" if file.is_file() else ""
        raise InputError(
            f"{file} is damaged or incomplete ({error}{size}); copy or download it again"
        ) from error


def one_line(error: Exception) -> str:
    """Describe an exception in one line: its type, and at most 400 characters of its text."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def is_hub_id(path: str | Path) -> bool:
    """True if this can only be a model on the Hub: no path on this disk, and at most one slash."""
    name = str(path)
    is_name = name.count("/") <= 1 and not name.startswith((".", "/", "~", "python:"))
    return bool(name) and is_name and not Path(name).exists()
