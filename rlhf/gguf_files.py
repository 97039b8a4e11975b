"""GGUF, the files of llama.cpp, as base models: finding one, checking it before torch is imported.

transformers reads them with the package `gguf`, and their weights become floating point
(`rlhf.models.from_gguf`). Left out: writing them, and models that are split over several files.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

from rlhf.config import InputError

SUFFIX, MAGIC, VERSIONS = ".gguf", b"GGUF", (2, 3)
# Values in the header: kind -> format of `struct`; strings and arrays have no fixed size.
NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
STRING, ARRAY = 8, 9


def is_gguf(path: Path) -> bool:
    """True for the path of a GGUF file."""
    return path.suffix == SUFFIX


def gguf_among(names: Iterable[str], label: str) -> str | None:
    """Return the GGUF file among the files of a model; None if it has none, or has safetensors.

    Args:
        label: the setting and its value, such as "model.path=directory".
    """
    names = sorted(names)
    files = [name for name in names if name.endswith(SUFFIX)]
    if not files or any(name.endswith(".safetensors") for name in names):
        return None
    if len(files) > 1:
        listed = ", ".join(files[:5]) + ", ..." * (len(files) > 5)
        one = f"{label.rstrip('/')}/{files[0]}"
        raise InputError(f"{label} holds {len(files)} GGUF files ({listed}); give one: {one}")
    return files[0]


def require_gguf(file: Path, label: str) -> None:
    """Refuse a file that is not a whole GGUF file of a kind that transformers reads."""
    with file.open("rb") as stream:
        start = stream.read(24)
    if start[:4] != MAGIC:
        raise InputError(
            f"{label} is not a GGUF file: it begins with {start[:4]!r}, not with {MAGIC!r}; "
            "download it again"
        )
    if find_spec("gguf") is None:
        raise InputError(f"{label} needs the gguf package: pip install 'rlhf[gguf]'")
    size = file.stat().st_size
    try:
        metadata, whole = _read_header(file)
    except (struct.error, LookupError, ValueError, OverflowError) as error:
        raise InputError(
            f"{label} is damaged or incomplete (its header cannot be read, {size:,} bytes); "
            "download it again"
        ) from error
    if size < whole:
        raise InputError(
            f"{label} is incomplete: it has {size:,} of {whole:,} bytes; download it again"
        )
    _require_readable(metadata, label)


def _require_readable(metadata: dict[str, Any], label: str) -> None:
    if metadata.get("split.count", 1) > 1:
        raise InputError(
            f"{label} is one of {metadata['split.count']} parts of a model; join them first: "
            "llama-gguf-split --merge <first part> whole.gguf"
        )
    from transformers import __version__
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS

    known = {*GGUF_CONFIG_MAPPING, *GGUF_CONFIG_ARCHS} - {"general", "tokenizer"}
    name = str(metadata.get("general.architecture"))
    if _plain(name) not in map(_plain, known):
        raise InputError(
            f"{label}: transformers {__version__} does not read GGUF files of the architecture "
            f"{name}, only {', '.join(sorted(known))}; give the same model as safetensors"
        )


def _plain(name: str) -> str:
    """Drop what transformers and llama.cpp write differently: gpt_oss, gpt-oss."""
    return name.replace("_", "").replace("-", "")


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """Read the metadata, with only the length of an array, and the size of the whole file in bytes.

    Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    with file.open("rb") as stream:
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    header = _Header(data, at=len(MAGIC))
    version, num_tensors, num_values = header.number("I"), header.number("Q"), header.number("Q")
    if version not in VERSIONS:
        raise ValueError(f"version {version}")
    metadata = {header.string(): header.value(header.number("I")) for _ in range(num_values)}
    end = 0
    for _ in range(num_tensors):
        header.string()
        shape = [header.number("Q") for _ in range(header.number("I"))]
        block, num_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(header.number("I"))]
        end = max(end, header.number("Q") + prod(shape) // block * num_bytes)
    alignment = metadata.get("general.alignment", 32)
    return metadata, -(-header.at // alignment) * alignment + end


@dataclass
class _Header:
    """A header, read from front to back."""

    data: mmap.mmap
    at: int

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return value

    def string(self) -> str:
        length = self.number("Q")
        (value,) = struct.unpack_from(f"<{length}s", self.data, self.at)
        self.at += length
        return value.decode()

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.number(NUMBERS[kind])
        kind, length = self.number("I"), self.number("Q")
        if kind in NUMBERS:
            self.at += length * struct.calcsize(f"<{NUMBERS[kind]}")
        else:
            for _ in range(length):
                self.value(kind)
        return length
