"""The reward stage: a scalar head on the SFT model, trained on ranked responses, and a report on
held-out ones. Left out: the Trainer (`rlhf.reward.ranking_trainer`), its batches, the completions
that set the zero of the scores, and the report, each in the file or folder of that name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import TrainingArguments

from rlhf.checkpoint import (
    StageRun,
    describe_saved,
    make_record,
    open_run,
    require_same_tokenizer,
    require_stage,
    require_writable,
    warn_about_prompts,
    write_stage,
)
from rlhf.config import ModelConfig, RewardStageConfig, with_default_paths, with_learning_rates
from rlhf.console import say
from rlhf.data import RankedCollator, Splits, encode_ranked, load_splits, with_rows
from rlhf.distributed import describe_sharding
from rlhf.equivalence import choose_forward, require_padding
from rlhf.failures import phase, same_rows
from rlhf.hf_trainer import as_in_training, row_length, run_trainer, trainer_arguments
from rlhf.metrics import StageResult
from rlhf.models import (
    ScalarModel,
    add_lora,
    init_reward_model,
    new_token_rows,
    parameter_count,
    require_trainable,
    shard_unread,
    stored_stop_ids,
    try_settings,
    what_to_save,
)
from rlhf.reward.batches import describe_plan, plan_batches, score_rows
from rlhf.reward.completions import load_completions
from rlhf.reward.ranking_trainer import RankingTrainer
from rlhf.reward.report.measures import heldout_metrics
from rlhf.reward.report.page import page_files, show_report, stored_text, terminal_text
from rlhf.reward.report.verdict import heldout_name, make_report
from rlhf.sampling import context_length
from rlhf.tokenizer import end_token_ids, load_tokenizer, pad_with_no_stop_id

OTHER_FAMILY = "take a model of another family"  # where padding changes scores


class RewardResult(StageResult):
    """What `train_reward` returns; see `StageResult` for its attributes."""


def train_reward(
    config: RewardStageConfig,
    rows: Iterable[Any] | None = None,
    eval_rows: Iterable[Any] | None = None,
) -> RewardResult:
    """Train a reward model on ranked responses; `conf/reward.yaml` explains every knob.

    Args:
        rows: a list, `datasets.Dataset` or generator of rows, in place of `dataset.path`.
        eval_rows: the same, in place of `dataset.eval_path`.

    Raises:
        InputError: bad configuration, directory or data, or another process writes to the stage's
            directory; nothing has been trained or overwritten then.
    """
    config = with_learning_rates(with_default_paths(with_rows(config, rows, eval_rows)), say)
    with open_run(config, "reward") as run:
        if run.finished is not None:
            final = run.directory / "final"
            return RewardResult(final, run.finished.metrics, stored_text(final), run.directory)
        return _train(config, run)


def _train(config: RewardStageConfig, run: StageRun) -> RewardResult:
    # Refuse early: settings and directories, before anything loads.
    source, parent = config.model, str(config.model.path)
    args = trainer_arguments(TrainingArguments, config, "reward")
    record_of_parent = require_stage(parent, ("sft",), "model.path", source.revision)
    try_settings(source, config.peft, "SEQ_CLS")

    # Load rows, tokenizer and model, and refuse what only they show.
    before = getattr(record_of_parent, "prompts", None)
    splits = same_rows(load_splits(config.dataset, "reward", config.seed, parent_prompts=before))
    warn_about_prompts(record_of_parent, splits.prompts)
    tokenizer = load_tokenizer(source)
    require_same_tokenizer(tokenizer, record_of_parent, "the model settings here", parent)
    choose_pad(tokenizer, source)
    model = init_reward_model(source, tokenizer, config.seed, in_slices=True)
    require_writable(model, tokenizer, config)
    scalar, length = ScalarModel(model), row_length(config, context_length(model))
    if config.peft.enabled:
        rows = new_token_rows(tokenizer, config.model, config.peft)
        scalar.model = add_lora(model, config.peft, "SEQ_CLS", config.seed, rows)
    shard_unread(scalar)
    forward = _check_and_choose_forward(scalar, tokenizer, config, args, f"model.path={parent}")
    limits = length, config.dataset.on_bad_row
    train, too_long = encode_ranked(splits.train, tokenizer, *limits, context_length(model))
    heldout, others = encode_ranked(splits.eval, tokenizer, *limits)
    splits.dropped += too_long + others
    plan = plan_batches(train, config.reward, args.world_size * args.gradient_accumulation_steps)

    # Train.
    directory = run.begin(splits.train, splits.eval)
    sizes = "{:,} parameters, {:,} trainable".format(*parameter_count(scalar.model))
    say(f"reward: {sizes}; {len(heldout)} held-out prompts; at most {length} tokens a response")
    say(f"        {describe_plan(args, train, plan)}; one forward pass per response, {forward}")
    say(splits.describe(Counter()))
    completions = load_completions(config, source, tokenizer, splits.train, train, length)
    trainer = RankingTrainer(
        model=scalar,
        args=args,
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(heldout),
        data_collator=RankedCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
        ranking=config.reward,
        heldout=heldout,
        batches=plan,
    )
    trainer.micro_batch_tokens = config.micro_batch_tokens
    if (signal := run_trainer(trainer, config, directory, "reward")) is not None:
        return RewardResult(None, {}, stage_dir=directory, stopped_by=signal)
    return _finish(trainer, completions, splits, config, parent, directory)


def choose_pad(tokenizer: Any, source: ModelConfig) -> None:
    """Give a reward model a pad token that ends no answer, and say so."""
    pad = tokenizer.pad_token
    pad_with_no_stop_id(tokenizer, end_token_ids(tokenizer) | stored_stop_ids(source))
    if tokenizer.pad_token != pad:
        say(
            f"reward: pad is {tokenizer.pad_token} (id {tokenizer.pad_token_id}) instead of {pad}: "
            "transformers reads a score at the last token that is not pad"
        )


def _check_and_choose_forward(
    scalar: Any, tokenizer: Any, config: RewardStageConfig, args: TrainingArguments, where: str
) -> str:
    """Require that padding changes no score; return how training will read rows."""
    require_trainable(scalar, config.model, config.peft)
    with as_in_training(scalar, config, args):
        require_padding(scalar, tokenizer, where, OTHER_FAMILY)
        return choose_forward(scalar, tokenizer, config.model.forward)


@phase("after training")
def _finish(
    trainer: RankingTrainer,
    completions: list[list[int]],
    splits: Splits,
    config: RewardStageConfig,
    parent: str,
    directory: Path,
) -> RewardResult:
    """Measure the scale of the scores, report on the held-out responses, and write `final/`."""
    scalar, heldout = trainer.accelerator.unwrap_model(trainer.model), trainer.heldout
    tokenizer: Any = trainer.processing_class
    record = make_record("reward", config, parent, tokenizer, splits.prompts, splits.dropped)
    scalar.eval()
    per_batch = trainer.args.per_device_eval_batch_size, config.reward.tokens_per_batch
    each_alone = [{"input_ids": [ids]} for ids in completions]
    reference = torch.cat(score_rows(scalar, each_alone, *per_batch))
    record.score_mean, record.score_std = float(reference.mean()), float(reference.std())
    scores = score_rows(scalar, heldout, *per_batch)
    record.metrics = heldout_metrics(scores, heldout)
    report = make_report(scores, heldout, splits.eval, tokenizer, heldout_name(config.dataset))
    final = directory / "final"
    parts = scalar.model, config.peft, parent, config.model.revision
    model, adapter = what_to_save(*parts, directory)
    record.sharding = describe_sharding(trainer.accelerator)
    if PartialState().is_main_process:
        files = page_files(report, scores, heldout)
        write_stage(final, model, tokenizer, config, record, files, adapter)
        say(
            f"scores of the {config.normalization.completions}: mean {record.score_mean:.3f}, std "
            f"{record.score_std:.3f} (stored for scorer.normalize)"
        )
        shown = " and ".join(name for name in files if name != "report.json")
        show_report(report, f"{describe_saved(final)}, with {shown}", files)
    return RewardResult(final, record.metrics, terminal_text(report), directory)
