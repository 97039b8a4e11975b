"""The examples run. Their pages are in test_pages.py, the over-optimisation in tests/demo."""

from __future__ import annotations

import re
import sys

import pytest
from helpers.commands import ROOT, run

DATA = ROOT.parent / "shared" / "data"


SCRIPT = ROOT / "examples/library_use.py"


def test_library_use_is_short():
    assert len(SCRIPT.read_text().splitlines()) < 60


@pytest.mark.slow
def test_library_use_runs(tmp_path):
    result = run([sys.executable, str(SCRIPT), str(tmp_path)], tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    before, after = re.search(r"^score +([\d.]+) .*?\] +([\d.]+)", result.stdout, re.M).groups()
    assert float(after) > float(before) + 0.15


@pytest.mark.slow
def test_alpaca_eval_example_runs(tmp_path):
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is not there")
    for split in ("train", "test"):
        for kind, count in (("sft", 100), ("ranked", 8)):
            name = f"alpaca_eval_{kind}_{split}.jsonl"
            lines = (DATA / name).read_text(encoding="utf-8").splitlines(keepends=True)
            (tmp_path / name).write_text("".join(lines[:count]), encoding="utf-8")
    result = run(
        ["bash", "examples/alpaca_eval/run.sh"],
        ROOT,
        DATA=str(tmp_path),
        PYTHON=sys.executable,
        RUNS=str(tmp_path / "runs"),
        SFT="trainer.max_steps=2 num_samples=2 response_length=8",
        REWARD="trainer.max_steps=2",
        PPO="ppo.num_updates=1 ppo.batch_size=4 ppo.response_length=8 evaluation.num_prompts=2 "
        "preflight=false",
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    assert (tmp_path / "runs/alpaca_eval/ppo/final/model.safetensors").is_file()
