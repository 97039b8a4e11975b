"""A model directory as one GGUF file, by llama.cpp's own converter.

The converter is a script of llama.cpp that runs in a process of its own. Left out: reading GGUF
files (`rlhf.gguf_files`), and `llama-quantize`, which makes smaller types than 8 bits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from rlhf.config import InputError

CONVERTER = "convert_hf_to_gguf.py"
TYPES = {"auto": "auto", "float32": "f32", "float16": "f16", "bfloat16": "bf16", "q8_0": "q8_0"}
GET_IT = "git clone --depth 1 https://github.com/ggml-org/llama.cpp"


def find_converter(llama_cpp: str | None) -> Path:
    """Find the converter in a checkout of llama.cpp."""
    if llama_cpp is None:
        raise InputError(
            f"format=gguf needs llama.cpp's converter: {GET_IT}, then add llama_cpp=llama.cpp"
        )
    given = Path(llama_cpp).expanduser()
    file = given if given.name == CONVERTER else given / CONVERTER
    if not file.is_file():
        raise InputError(f"llama_cpp={llama_cpp} has no {CONVERTER}; get llama.cpp: {GET_IT}")
    return file.resolve()


def convert(directory: Path, out: Path, dtype: str, converter: Path) -> None:
    """Write the GGUF file of a model directory; it is whole or not there.

    Args:
        directory: a copy, whose config.json is changed.
        dtype: a key of `TYPES`; auto takes 16 bits.
    """
    _add_old_names(directory / "config.json")
    part = out.with_name(f".{out.name}.{os.getpid()}")
    command = [sys.executable, str(converter), str(directory), "--outfile", str(part)]
    command += ["--outtype", TYPES[dtype], "--model-name", out.stem]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    try:
        if done.returncode or not part.is_file():
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            reason = lines[-1].strip() if lines else f"status {done.returncode}"
            fix = ""
            if "No module named" in reason:
                fix = f"; pip install -r {converter.parent}/requirements.txt has what it needs"
            if "BPE pre-tokenizer was not recognized" in done.stderr:
                fix = "; llama.cpp does not know this tokenizer"
            raise InputError(f"{converter} refuses the model: {reason}{fix}")
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)


def _add_old_names(file: Path) -> None:
    """Add to the config of GPT-NeoX what transformers 5 renamed and the converter still reads.

    transformers would drop the old names again; without `model_type` it refuses the file, and the
    converter reads it as it is.
    """
    config = json.loads(file.read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or {}
    if config.get("model_type") == "gpt_neox" and "partial_rotary_factor" in rope:
        config["rotary_pct"] = rope["partial_rotary_factor"]
        del config["model_type"]
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
