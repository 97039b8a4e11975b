"""Situations from public bug reports, each a script that exits 0 where the product is right.

The scripts are not part of the project; the tests are skipped where they are not at hand.
Run: python -m pytest tests/end_to_end/test_public_cases.py; `-m slow` for those that train long
"""

import pytest
from helpers.commands import ROOT, run_forked

SHARED = ROOT.parent / "shared"
CASES = sorted(SHARED.glob("cases/*/repro.py"))
# They train for long, and tests of the rooms hold the same claims in less time.
SLOW = """generation_config_loses_the_run lora_new_tokens nan_weights_saved packing_mixes_rows
    reward_context_ends_run""".split()
ARGUMENTS = {"sentencepiece_later_turns": [str(SHARED / "tokenizers/llama_tokenizer.model")]}


@pytest.mark.skipif(not CASES, reason=f"{SHARED / 'cases'} is not there")
@pytest.mark.parametrize(
    "script",
    [
        pytest.param(file, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
        for file in CASES
        for name in [file.parent.name]
    ],
)
def test_case_is_right(script, tmp_path):
    command = [str(script), *ARGUMENTS.get(script.parent.name, [])]
    done = run_forked(command, tmp_path, PYTHONPATH=str(ROOT), TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
