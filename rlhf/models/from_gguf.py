"""What transformers is told so that a GGUF file becomes an ordinary model in floating point."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import transformers

from rlhf.console import is_main_process
from rlhf.gguf_files import is_gguf
from rlhf.hub import Source


def gguf_arguments(source: Source) -> dict[str, Any]:
    """Return arguments of `from_pretrained` that unpack a GGUF file; {} for another source."""
    if not is_gguf(source.directory):
        return {}
    _announce(source.directory)
    _speed_up()
    return {"quantization_config": transformers.GgufConfig(dequantize=True)}


@cache
def _speed_up() -> None:
    """Make a table once that transformers makes for every module, which took longer than reading
    the file; and let its progress bar obey `quiet_libraries`."""
    import gguf
    from transformers import modeling_gguf_pytorch_utils

    gguf.get_tensor_name_map = cache(gguf.get_tensor_name_map)
    modeling_gguf_pytorch_utils.tqdm = transformers.utils.logging.tqdm


@cache
def _announce(file: Path) -> None:
    """Say once why the start takes long."""
    if is_main_process():
        size = file.stat().st_size / 1e6
        # to stderr, because stdout may hold a model's answers
        print(
            f"reading {file} ({size:,.0f} MB): unpacking a GGUF file takes a while; "
            f"python -m rlhf.export path={file} out=<directory> writes one that loads at once",
            file=sys.stderr,
            flush=True,
        )
