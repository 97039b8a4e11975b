"""The benchmarks at the sizes of a CPU, in one table: `make bench`, minutes on an idle core.

Left out: learning (`ppo_step.py --reward gold-count`), and what needs a GPU (`make gpu-check`).

Run: python examples/benchmarks/run_all.py --out bench [--parts decode,memory]
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from parts import run_all, run_part

HERE = Path(__file__).resolve().parent
SMALL = ["--preset", "small"]
PARTS = {
    "ppo": ["ppo_step.py", *SMALL, "--batch", "16"],
    "ppo-half": ["ppo_step.py", *SMALL, "--batch", "16", "--lengths", "half"],
    "ppo-half-shared-trunk": [
        *("ppo_step.py", *SMALL, "--batch", "16", "--lengths", "half"),
        *("--set", "critic.share_trunk=true"),
    ],
    "decode": ["decode.py", *SMALL, "--rows", "32", "--tokens", "32"],
    "memory": ["memory.py", *SMALL, "--batch", "16"],
    "sft": ["sft_throughput.py", *SMALL, "--batch", "8", "--steps", "6"],
    "reward": ["reward_kwise.py", "--responses", "8"],
}
LIMIT = 3600  # seconds of a part; a busy machine is slow


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--out", type=Path, default=Path("bench"))
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        names = ", ".join(PARTS)
        parser.error(f"--parts={options.parts}: {', '.join(sorted(unknown))} is none of {names}")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    environment = {
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "0",
    }

    def run(part: str) -> dict[str, Any]:
        script, *arguments = PARTS[part]
        command = [sys.executable, str(HERE / script), *arguments]
        return run_part(part, command, out, environment, LIMIT)

    return run_all(parts, run, out)


if __name__ == "__main__":
    raise SystemExit(main())
