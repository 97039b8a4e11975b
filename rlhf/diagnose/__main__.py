"""Which stage of a run is the weakest link, and where should PPO stop?

    python -m rlhf.diagnose run_name=mine gold=my_module.my_score
    python -m rlhf.diagnose run_name=mine gold=judge:helpfulness model=<name> url=<endpoint>
    python -m rlhf.diagnose run_name=mine samples_per_prompt=64
    python -m rlhf.diagnose sft=<directory> reward=<directory> ppo=<directory> prompts=prompts.jsonl

Held-out prompts are answered by the SFT policy, several times, and by PPO's. The output of one
stage after the other is swapped for a known-good one: best of n by the reward model for PPO's
answers, gold for the reward model's choice, known-good answers for the SFT policy's best. The gain
of each swap, with its interval, says which stage costs most. `gold` is a scorer that you trust;
without it the run's own scorer takes its place and held-out rankings judge that.

Before PPO, the gold score of best of n against the KL says where PPO should stop:
`watchdog.kl_budget`. Nothing is said beyond the largest n.

It writes, into out: diagnosis.json, and diagnosis.png where matplotlib is there. Left out: several
processes.
"""

from __future__ import annotations

import sys

from rlhf.checkpoint import disk_errors
from rlhf.diagnose.diagnosis import diagnose
from rlhf.diagnose.options import DiagnoseOptions
from rlhf.option_parser import run_command


def run(options: DiagnoseOptions) -> None:
    """Diagnose a run."""
    with disk_errors(options.folder, "give the same command again"):
        diagnose(options)


if __name__ == "__main__":
    raise SystemExit(run_command(str(__doc__), DiagnoseOptions, run, sys.argv[1:]))
