"""Situations from public bug reports, each a script that exits 0 where the product is right.

The scripts are not part of the project; the tests are skipped where they are not at hand.
Run: python -m pytest tests/end_to_end/test_public_cases.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
CASES = sorted(SHARED.glob("cases/*/repro.py"))
ARGUMENTS = {"sentencepiece_later_turns": [str(SHARED / "tokenizers/llama_tokenizer.model")]}


@pytest.mark.skipif(not CASES, reason=f"{SHARED / 'cases'} is not there")
@pytest.mark.parametrize("script", CASES, ids=lambda script: script.parent.name)
def test_case_is_right(script, tmp_path):
    command = [sys.executable, str(script), *ARGUMENTS.get(script.parent.name, [])]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
