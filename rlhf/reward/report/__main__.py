"""Make the report of a reward model: python -m rlhf.reward.report path=runs/mine/reward/final

Scores held-out rows and writes report.json, report.md and report.png. The rows are those of the
reward stage, unless `dataset.*` names others.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.cli import compose_over
from rlhf.config import (
    CONF_DIR,
    CONFIG_FILE,
    InputError,
    RewardStageConfig,
    ScorerConfig,
    explain,
    read_yaml,
    refuse,
    refuse_named_code,
)
from rlhf.inputs import check_model
from rlhf.option_parser import run_command
from rlhf.overrides import wrong_overrides

if TYPE_CHECKING:
    from rlhf.scorers import RewardModelScorer


@dataclass
class ReportOptions:
    """The command line."""

    path: str
    """final/ of a reward stage, or any sequence classifier with one label."""
    compare: list[str] = field(default_factory=list)
    """[a,b]: reward models with the same tokenizer, e.g. of other seeds, to compare with."""
    out: str | None = None
    """Directory for the report (default: path)."""
    trust_remote_code: bool = False
    """true: the model's own Python files, and functions named in its config.yaml, may run."""
    overrides: list[str] = field(default_factory=list)
    """Other held-out rows, as in the reward stage: dataset.eval_path=new.jsonl dataset=ranked."""


def main(arguments: list[str]) -> int:
    """Run the command; return its exit status."""
    return run_command(str(__doc__), ReportOptions, run, arguments)


def run(options: ReportOptions) -> None:
    """Score, print and write the report."""
    check_model(options.path, "path", ("reward",), code=options.trust_remote_code)
    config = stage_config(options)
    from rlhf.checkpoint import disk_errors, require_stage
    from rlhf.console import quiet_libraries, say
    from rlhf.data import encode_ranked, load_splits
    from rlhf.hf_trainer import row_length
    from rlhf.reward.batches import score_rows
    from rlhf.reward.report.measures import agreement, heldout_metrics
    from rlhf.reward.report.page import page_files, show_report
    from rlhf.reward.report.verdict import heldout_name, make_report

    quiet_libraries()
    out = Path(options.out or options.path)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"out={out} is no directory and cannot be made: {error.strerror}"
        ) from error
    record = require_stage(options.path, ("reward",), "path")
    data, name = config.dataset, heldout_name(config.dataset)
    sizes = config.trainer["per_device_eval_batch_size"], config.reward.tokens_per_batch
    splits = load_splits(
        data, "reward", config.seed, parent_prompts=getattr(record, "prompts", None)
    )
    scorer = _load(options.path, options.trust_remote_code)
    length = row_length(config, scorer.max_length)
    rows, too_long = encode_ranked(splits.eval, scorer.tokenizer, length, data.on_bad_row)
    say(f"{len(rows)} held-out prompts of {name}; {splits.describe(too_long)}")
    scores = score_rows(scorer.model, rows, *sizes)
    report = make_report(scores, rows, splits.eval, scorer.tokenizer, name)
    for path in options.compare:
        other = _load(path, options.trust_remote_code)
        _require_same_tokenizer(other, scorer)
        theirs = score_rows(other.model, rows, *sizes)
        accuracy = {"model": path, "accuracy": heldout_metrics(theirs, rows)["eval_accuracy"]}
        report.setdefault("agreement", []).append(accuracy | agreement(scores, theirs))
    files = page_files(report, scores, rows)
    with disk_errors(out, "give the same command again"):
        for file, content in files.items():
            (out / file).write_bytes(content)
    show_report(report, ", ".join(str(out / file) for file in files), files)


def stage_config(options: ReportOptions) -> RewardStageConfig:
    """The configuration of the stage that made the reward model, with the overrides."""
    from hydra import initialize_config_dir
    from omegaconf.errors import OmegaConfBaseException

    typed = {text.partition("=")[0].lstrip("+"): text for text in options.overrides}
    wrong = wrong_overrides(options.overrides, "reward", own_files=False)
    refuse(
        [
            wrong.get(text, f"{text} changes no report; give dataset.<key>=value for other rows")
            for key, text in typed.items()
            if text in wrong or key.partition(".")[0] != "dataset"
        ]
    )
    file = Path(options.path) / CONFIG_FILE
    stored = read_yaml(file) if file.is_file() else {}
    try:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            config = compose_over(stored, "reward", options.overrides)
    except OmegaConfBaseException as error:
        raise InputError(explain(error, RewardStageConfig)) from error
    data = config.dataset
    if not options.trust_remote_code:
        named = {
            "dataset.path": data.path,
            "dataset.eval_path": data.eval_path,
            "dataset.format": f"python:{data.format}" if "." in str(data.format) else None,
        }
        refuse_named_code({key: named[key] for key in named.keys() - typed.keys()}, file)
    if data.path is None:
        raise InputError(
            f"{options.path} does not say what it was trained on; give dataset.path=<rows> and "
            "dataset.format=ranked (or another format of conf/dataset)"
        )
    return config


def _load(path: str, trust_remote_code: bool) -> RewardModelScorer:
    from rlhf.distributed import default_device
    from rlhf.scorers import RewardModelScorer

    config = ScorerConfig(path, normalize="none")
    scorer = RewardModelScorer(config, default_device(), "float32", "path", trust_remote_code)
    if scorer.scores_texts:
        raise InputError(
            f"{path} scores a whole text, but the report needs a linear head at the last token; "
            f"score the rows instead: python -m rlhf.score path={path} data=<rows>"
        )
    return scorer


def _require_same_tokenizer(other: RewardModelScorer, scorer: RewardModelScorer) -> None:
    if other.tokenizer_hash != scorer.tokenizer_hash:
        raise InputError(
            f"compare={other.path} has a different tokenizer or chat template than path="
            f"{scorer.path}; compare reward models that started from the same SFT stage"
        )


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
