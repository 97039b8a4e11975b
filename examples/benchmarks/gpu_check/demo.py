"""The demo world through the three stages, and the true score before and after PPO."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

SMALL = [  # a dry run: a few steps of each stage
    "trainer.max_steps=4",
    "dataset.max_rows=96",
    "dataset.max_eval_rows=8",
    "num_samples=4",
    "ppo.num_updates=2",
    "ppo.batch_size=8",
    "evaluation.num_prompts=4",
]


def main() -> None:
    dry = "--dry" in sys.argv
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "rlhf.demo", f"runs_dir={folder}", "run_name=check"]
        subprocess.run([*command, *(SMALL if dry else [])], check=True)
        lines = (Path(folder) / "check/ppo/metrics.jsonl").read_text().splitlines()
        before = json.loads(lines[0])["eval_independent_score"]
        record = json.loads((Path(folder) / "check/ppo/final/rlhf.json").read_text())
    after = record["metrics"]["eval_independent_score"]
    headline = f"gold score {before:.3f} -> {after:.3f}"
    if not math.isfinite(after) or (not dry and after < before + 0.2):
        raise SystemExit("PPO did not raise the gold score by 0.2")
    print(json.dumps({"headline": headline, "gold_before": before, "gold_after": after}))


if __name__ == "__main__":
    main()
