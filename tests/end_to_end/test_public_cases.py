"""Situations from public bug reports, each a script that exits 0 where the product is right.

The scripts are not part of the project; the tests are skipped where they are not at hand.
Run: python -m pytest tests/end_to_end/test_public_cases.py
"""

import pytest
from helpers.commands import ROOT, run_forked

SHARED = ROOT.parent / "shared"
CASES = sorted(SHARED.glob("cases/*/repro.py"))
ARGUMENTS = {"sentencepiece_later_turns": [str(SHARED / "tokenizers/llama_tokenizer.model")]}


@pytest.mark.skipif(not CASES, reason=f"{SHARED / 'cases'} is not there")
@pytest.mark.parametrize("script", CASES, ids=lambda script: script.parent.name)
def test_case_is_right(script, tmp_path):
    command = [str(script), *ARGUMENTS.get(script.parent.name, [])]
    done = run_forked(command, tmp_path, PYTHONPATH=str(ROOT), TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
