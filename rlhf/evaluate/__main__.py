"""Measure whether a model is better than another, or how good a reward model is.

    python -m rlhf.evaluate a=runs/mine/sft/final b=runs/mine/ppo/final prompts=prompts.jsonl by=scorer scorer=runs/gold/reward/final
    python -m rlhf.evaluate a=a.jsonl b=b.jsonl by=judge model=Qwen/Qwen3-8B url=http://127.0.0.1:8000/v1
    python -m rlhf.evaluate a=a.jsonl b=b.jsonl by=people
    python -m rlhf.evaluate mode=rewardbench path=runs/mine/reward/final data=reward_bench.jsonl
    python -m rlhf.evaluate mode=lm_eval path=runs/mine/ppo/final tasks=[arc_easy,mine.yaml]

`mode=pairwise` lets both models answer the prompts, or reads files of answers (`prompt` and
`response`, as rlhf.generate writes them, or AlpacaEval's `instruction` and `output`). A judge is
asked in both orders, and an answer that wins in one order only is a tie. It writes, into out:

    a.jsonl, b.jsonl    the answers of models
    judgements.jsonl    each comparison; `gold=<file>` takes rows of it with `gold` filled in
    report.json, .md    the figures, and the most instructive comparisons
    report.png          the win rates, where matplotlib is there

`mode=rewardbench` gives the accuracy of a reward model by subset, and on pairs of similar length.
`mode=lm_eval` runs tasks of lm-evaluation-harness (`pip install 'rlhf[eval]'`) with the template and
the stop strings of the model's training, and writes lm_eval.json next to the model's rlhf.json. A
stopped command continues when it is given again; lm_eval begins again.
"""  # noqa: E501

from __future__ import annotations

import sys
from pathlib import Path

from rlhf.checkpoint import disk_errors
from rlhf.evaluate.options import EvaluateOptions, check
from rlhf.option_parser import run_command


def run(options: EvaluateOptions) -> None:
    """Run the mode."""
    check(options)
    with disk_errors(Path(options.folder), "give the same command again"):
        if options.mode == "pairwise":
            from rlhf.evaluate.pairwise import compare_models

            compare_models(options)
        elif options.mode == "lm_eval":
            from rlhf.evaluate.harness import run_harness

            run_harness(options)
        else:
            from rlhf.evaluate.rewardbench import measure_scorer

            measure_scorer(options)


def main(arguments: list[str]) -> int:
    """Run the command; return its exit status."""
    again = "interrupted; the same command continues"
    return run_command(str(__doc__), EvaluateOptions, run, arguments, again)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
