"""The reward stage: a scalar head on the SFT model, trained on ranked responses."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainingArguments

from rlhf.checkpoint import (
    StageRecord,
    check_run_directory,
    finished_run,
    make_record,
    prepare_run_directory,
    require_stage,
    warn_about_prompts,
    write_stage,
)
from rlhf.config import RewardStageConfig, check
from rlhf.data import RankedCollator, encode_ranked, load_splits
from rlhf.metrics import quiet_libraries, say, table, warn
from rlhf.models import (
    ScalarModel,
    add_lora,
    init_reward_model,
    load_tokenizer,
    merged,
    parameter_count,
)
from rlhf.reward.report import RankingReport
from rlhf.reward.trainer import RankingTrainer, score_rows
from rlhf.training import check_max_length, describe_batches, run_trainer, trainer_arguments


@dataclass
class RewardResult:
    """What `train_reward` returns.

    Attributes:
        directory: the stage directory, ready for PPO; None when training was interrupted.
        metrics: `eval_accuracy`, `eval_longer_wins_accuracy`, `eval_length_matched_accuracy`, ...
        stopped_by: number of the signal that interrupted training; None when it was not.
    """

    directory: Path | None
    metrics: dict[str, float]
    stopped_by: int | None = None


def train_reward(config: RewardStageConfig) -> RewardResult:
    """Train a reward model on ranked responses.

    Args:
        config: see `conf/reward.yaml` for every knob; `model.path` defaults to this run's SFT
            directory.

    Raises:
        InputError: bad configuration, directory or data; nothing has been trained or overwritten
            then.
    """
    check(config)
    quiet_libraries()
    done = finished_run(config, "reward")
    if done is not None:
        return RewardResult(config.stage_dir("reward") / "final", done.metrics)
    check_run_directory(config, "reward")
    parent = config.model.path or str(config.stage_dir("sft") / "final")
    source = dataclasses.replace(config.model, path=parent)
    args = trainer_arguments(TrainingArguments, config, "reward")
    record_of_parent = require_stage(parent, ("sft",), "model.path")
    splits = load_splits(config.dataset, "reward", config.seed)
    warn_about_prompts(record_of_parent, splits.prompts)
    tokenizer = load_tokenizer(source)
    model = init_reward_model(source, tokenizer, config.seed)
    check_max_length(config, model)
    train, too_long = encode_ranked(splits.train, tokenizer, config.dataset.max_length)
    heldout, _ = encode_ranked(splits.eval, tokenizer, config.dataset.max_length)
    if config.peft.enabled:
        model = add_lora(model, config.peft, "SEQ_CLS", config.seed)
    directory = prepare_run_directory(config, "reward")
    total, trainable = parameter_count(model)
    say(f"reward: {total:,} parameters, {trainable:,} trainable; {len(heldout)} held-out prompts")
    say(f"        {describe_batches(args, len(train), 'prompts')}; one forward pass per response")
    say(splits.describe(too_long))
    trainer = RankingTrainer(
        model=ScalarModel(model),
        args=args,
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(heldout),
        data_collator=RankedCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
        ranking=config.reward,
        heldout=heldout,
    )
    stopped_by = run_trainer(trainer, config, directory, "reward")
    if stopped_by is not None:
        return RewardResult(None, {}, stopped_by)
    record = make_record("reward", config, parent, tokenizer, splits.prompts)
    return _finish(trainer, tokenizer, train, config, directory, record)


def _finish(
    trainer: RankingTrainer,
    tokenizer: PreTrainedTokenizerBase,
    train: list[dict[str, Any]],
    config: RewardStageConfig,
    directory: Path,
    record: StageRecord,
) -> RewardResult:
    """Rank the held-out responses, store the scale of the scores, write `final/`, show both."""
    report = trainer.report()
    scalar = trainer.accelerator.unwrap_model(trainer.model)
    scalar.eval()
    rows = train[: config.reward.num_normalization_prompts]
    reference = score_rows(scalar, rows, trainer.args.per_device_eval_batch_size)
    record.score_mean = float(torch.cat(reference).mean())
    record.score_std = float(torch.cat(reference).std())
    record.metrics = report.metrics()
    if PartialState().is_main_process:
        write_stage(directory / "final", merged(scalar.model), tokenizer, config, record)
    PartialState().wait_for_everyone()
    _show(report, record.score_mean, record.score_std, directory)
    return RewardResult(directory / "final", record.metrics)


def _show(report: RankingReport, mean: float, std: float, directory: Path) -> None:
    say("\n" + table(report.rows(), ("held-out pairs", "accuracy", "pairs")))
    say(
        f"scores on reference completions: mean {mean:.3f}, std {std:.3f} (stored; PPO subtracts "
        "the mean)"
    )
    if report.accuracy < report.longer_wins + 0.02:
        warn(
            "the reward model is hardly better than `the longer response wins`: PPO against it "
            "will mostly change length; use more or cleaner rankings, or train longer"
        )
    say(f"\nsaved {directory / 'final'}")
