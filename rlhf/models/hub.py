"""Reading from the Hub or from a directory; pickled weights are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf.config import InputError


def from_hub_or_disk(load: Callable[..., Any], path: Any, field: str, **kwargs: Any) -> Any:
    """Call a `from_pretrained` function.

    Args:
        field: name of the setting that gave the path, for messages.

    Raises:
        InputError: there is nothing to load, or only pickled weights.
    """
    directory = Path(str(path))
    if directory.is_dir():
        names = [file.name for file in directory.iterdir()]
        pickled = [
            n
            for n in names
            if n.endswith((".bin", ".pt", ".pth", ".ckpt")) and n != "training_args.bin"
        ]
        if pickled and not any(n.endswith(".safetensors") for n in names):
            raise InputError(
                f"{field}={path} holds pickled weights only ({', '.join(sorted(pickled))}), which "
                "can run code when loaded; convert them with save_pretrained, which writes "
                "safetensors"
            )
    elif str(path).startswith((".", "/")) or str(path).count("/") > 1:
        raise InputError(f"{field}={path}: no such directory")
    try:
        return load(str(path), **kwargs)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:400]
        raise InputError(
            f"{field}={path} cannot be loaded: it is neither a directory here nor a Hub model that "
            f"can be reached ({type(error).__name__}: {reason})"
        ) from error
