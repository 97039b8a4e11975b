"""Make the report of a reward model: python -m rlhf.reward.report path=runs/mine/reward/final

path=      final/ of a reward stage, or any one-label sequence classifier
compare=   [a,b]: reward models with the same tokenizer, e.g. of other seeds, to agree with
out=       where report.json, report.md and report.png go (default: path)
trust_remote_code=true  Python files of a model, and functions that its config.yaml names, may run
dataset.*  other held-out rows than those of the stage, e.g. dataset.eval_path=new.jsonl; the keys
           are those of conf/dataset
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.checkpoint import require_stage
from rlhf.cli import exit_status
from rlhf.config import (
    InputError,
    RewardStageConfig,
    ScorerConfig,
    explain,
    refuse_named_code,
    schema,
)
from rlhf.console import quiet_libraries, say, warn
from rlhf.data import encode_ranked, load_splits
from rlhf.reward.report.measures import Row, agreement, ranking_report
from rlhf.reward.report.page import NO_PICTURE, PICTURE, page_files, terminal_text
from rlhf.reward.report.verdict import heldout_name, make_report
from rlhf.reward.trainer import score_rows
from rlhf.scorers import RewardModelScorer


def main(arguments: list[str]) -> int:
    """Score, print and write; return the exit status."""

    def task() -> None:
        run(arguments)

    return exit_status(task)


def run(arguments: list[str]) -> dict[str, Any]:
    """Make the report that the arguments ask for, and return it."""
    settings, overrides = _parse(arguments)
    quiet_libraries()
    path = settings["path"]
    out = Path(settings.get("out", path))
    if not out.is_dir():
        raise InputError(f"out={out} is not a directory; give out=<one that exists>")
    require_stage(path, ("reward",), "path")
    code = settings.get("trust_remote_code") == "true"
    config = _load_config(Path(path), overrides, code)
    splits = load_splits(config.dataset, "reward", config.seed)
    scorer = _load(path, code)
    rows, too_long = encode_ranked(
        splits.eval, scorer.tokenizer, config.dataset.max_length, config.dataset.on_bad_row
    )
    data = heldout_name(config.dataset)
    say(f"{len(rows)} held-out prompts of {data}; {splits.describe(too_long)}")
    scores = _score(scorer, rows, config)
    report = make_report(scores, rows, splits.eval, scorer.tokenizer, data)
    others = [other for other in settings.get("compare", "").strip("[] ").split(",") if other]
    if others:
        report["agreement"] = [
            _compare(scorer, scores, _load(other.strip(), code), rows, config) for other in others
        ]
    files = page_files(report, scores, rows)
    for file, content in files.items():
        (out / file).write_bytes(content)
    say("\n" + terminal_text(report))
    for warning in report["warnings"]:
        warn(warning)
    say(f"\nsaved {', '.join(str(out / file) for file in files)}")
    if PICTURE not in files:
        say(NO_PICTURE)
    return report


def _parse(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    settings, overrides = {}, []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in ("path", "compare", "out") or argument.startswith("trust_remote_code="):
            settings[key] = value
        elif key.startswith("dataset.") and "=" in argument:
            overrides.append(argument)
        else:
            raise InputError(f"got {argument!r}; expected\n{__doc__}")
    if settings.get("trust_remote_code", "false") not in ("true", "false"):
        raise InputError(
            f"trust_remote_code must be true or false, got {settings['trust_remote_code']!r}"
        )
    if not settings.get("path"):
        raise InputError(f"path is missing; expected\n{__doc__}")
    return settings, overrides


def _load_config(path: Path, overrides: list[str], code: bool) -> RewardStageConfig:
    """The configuration of the stage, if one made the reward model, with other data; `code`: it may
    name Python functions."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    file = path / "config.yaml"
    try:
        stored: Any = OmegaConf.load(file) if file.is_file() else {}
    except (ValueError, YAMLError) as error:
        raise InputError(f"{file} is damaged ({' '.join(str(error).split())[:200]})") from error
    typed = {override.partition("=")[0] for override in overrides}
    try:
        merged = OmegaConf.merge(
            schema(RewardStageConfig), stored, OmegaConf.from_dotlist(overrides)
        )
        config: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise InputError(explain(error, RewardStageConfig)) from error
    if not code:
        data = config.dataset
        named = {
            "dataset.path": data.path,
            "dataset.eval_path": data.eval_path,
            "dataset.format": f"python:{data.format}" if "." in str(data.format) else None,
        }
        refuse_named_code({key: named[key] for key in named.keys() - typed}, file)
    if config.dataset.path is None:
        raise InputError(
            f"{path} does not say what it was trained on; give dataset.path=<rows> and "
            "dataset.format=ranked (or another format of conf/dataset)"
        )
    return config


def _load(path: str, trust_remote_code: bool) -> RewardModelScorer:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = ScorerConfig(path, normalize="none")
    scorer = RewardModelScorer(config, device, "float32", "path", trust_remote_code)
    if scorer.scores_texts:
        raise InputError(
            f"{path} scores a text as a whole, and the report reads a linear head at the last "
            "token; score the rows instead: python -m rlhf.reward score=<rows> path=<it> out=<file>"
        )
    return scorer


def _score(scorer: RewardModelScorer, rows: list[Row], config: RewardStageConfig) -> list[Tensor]:
    prompts_per_batch = config.trainer["per_device_eval_batch_size"]
    with torch.no_grad():
        return score_rows(scorer.model, rows, prompts_per_batch, config.reward.tokens_per_batch)


def _compare(
    scorer: RewardModelScorer,
    scores: list[Tensor],
    other: RewardModelScorer,
    rows: list[Row],
    config: RewardStageConfig,
) -> dict[str, Any]:
    if other.tokenizer_hash != scorer.tokenizer_hash:
        raise InputError(
            f"compare={other.path} has another tokenizer or chat template than path={scorer.path}; "
            "compare reward models that started from the same SFT stage"
        )
    theirs = _score(other, rows, config)
    accuracy = ranking_report(theirs, rows).accuracy
    return {"model": other.path, "accuracy": accuracy} | agreement(scores, theirs)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
