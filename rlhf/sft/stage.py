"""The SFT stage: a thin layer over TRL's SFTTrainer.

Our data layer decides which tokens carry loss (`labels`), TRL trains. Ends with `final/`, the share
of sampled answers that end by themselves, and a few of these answers on held-out prompts.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from rlhf.checkpoint import (
    StageRecord,
    StageRun,
    make_record,
    open_run,
    require_stage,
    require_writable,
    warn_about_template,
    write_stage,
)
from rlhf.compatibility import require_cache, require_packing, require_padding
from rlhf.config import ModelConfig, SFTStageConfig
from rlhf.console import say, table, warn
from rlhf.data import (
    Splits,
    encode_prompt,
    encode_sft,
    load_splits,
    prompt_of,
)
from rlhf.hf_trainer import (
    FiniteTrainer,
    as_in_training,
    best_step,
    check_max_length,
    describe_batches,
    is_sharded,
    run_trainer,
    trainer_arguments,
)
from rlhf.metrics import append_jsonl, read_jsonl
from rlhf.models import (
    add_lora,
    check_model_config,
    load_policy,
    mend_sampling_settings,
    merged,
    new_token_rows,
    parameter_count,
    try_settings,
    without_padding_mask,
)
from rlhf.sampling import context_length, generate, sampling_for, uniform_noise
from rlhf.sft.mixing import mix_texts
from rlhf.sft.splitting import split_conversations
from rlhf.tokenizer import (
    RefusedConversation,
    answer_frame,
    load_tokenizer,
    response_text,
    stop_strings,
)

NUM_SHOWN = 3


@dataclass
class SFTResult:
    """What `train_sft` returns.

    Attributes:
        directory: the stage directory, ready for the next stages; None when training was
            interrupted.
        metrics: `eval_loss`, `eval_mean_token_accuracy`, `eos_rate`, ...
        samples: prompt, response and finished flag of sampled held-out prompts.
        stopped_by: number of the signal that interrupted training; None when it was not.
    """

    directory: Path | None
    metrics: dict[str, float]
    samples: list[dict[str, Any]]
    stopped_by: int | None = None


class FiniteSFTTrainer(FiniteTrainer, SFTTrainer):
    """TRL's Trainer, which stops at numbers that are not finite."""


def train_sft(config: SFTStageConfig) -> SFTResult:
    """Fine-tune a causal language model on demonstrations.

    Args:
        config: see `conf/sft.yaml` for every knob.

    Raises:
        InputError: bad configuration or data, or another process writes to the stage's directory;
            nothing has been trained or overwritten then.
    """
    with open_run(config, "sft") as run:
        if run.finished is not None:
            samples = read_jsonl(run.directory / "samples.jsonl")
            return SFTResult(run.directory / "final", run.finished.metrics, samples)
        return _train(config, run)


def _train(config: SFTStageConfig, run: StageRun) -> SFTResult:
    """As `train_sft`, for a run that is not finished."""
    length = config.dataset.max_length
    args = trainer_arguments(SFTConfig, config, "sft", max_length=length, eval_packing=False)
    check_model_config(config.model)
    parent = config.model.path
    record = None
    if parent is not None:
        record = require_stage(parent, ("sft", "ppo"), "model.path", config.model.revision)
    try_settings(config.model, config.peft)
    splits = load_splits(config.dataset, "sft", config.seed)
    tokenizer = _load_tokenizer(config.model, splits.prompts)
    _warn_about_words(config, tokenizer, record)
    torch.manual_seed(config.seed)
    model = load_policy(config.model, tokenizer)
    lines = mend_sampling_settings(model)
    require_writable(model, tokenizer, config)
    check_max_length(config, model)
    _check_promises(config, args, model, tokenizer)
    splits, train, heldout, what = encode_splits(splits, tokenizer, config)
    if config.peft.enabled:
        rows = new_token_rows(tokenizer, config.model, config.peft)
        model = add_lora(model, config.peft, "CAUSAL_LM", config.seed, rows)
    directory = run.begin()
    total, trainable = parameter_count(model)
    say(f"sft: {total:,} parameters, {trainable:,} trainable; {len(heldout)} held-out rows")
    packing = ", fewer with packing" if args.packing else ""
    say(f"     {describe_batches(args, len(train), 'rows')}{packing}")
    say("\n".join(what + lines))
    trainer = FiniteSFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(heldout),
        processing_class=tokenizer,
    )
    if config.model.quantization is not None:
        for parameter in model.parameters():  # TRL rounds such adapters to bfloat16
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    with without_padding_mask(model):
        stopped_by = run_trainer(trainer, config, directory, "sft")
    if stopped_by is not None:
        return SFTResult(None, {}, [], stopped_by)
    return _finish(trainer, tokenizer, splits, config, directory)


def _load_tokenizer(config: ModelConfig, prompts: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer; the token with which its chat template ends every answer becomes EOS, so
    that servers stop there.

    Args:
        prompts: what the rows are; answers to text end with the EOS that the model knows.
    """
    tokenizer = load_tokenizer(config)
    frame, eos = answer_frame(tokenizer), tokenizer.eos_token
    if prompts == "text" or frame.end_token == eos or stop_strings(tokenizer):
        return tokenizer
    mark = frame.tail.strip()
    if frame.end_token is None:
        if mark:
            warn(
                f"the chat template ends every answer with {mark!r}, which is no token of its own; "
                f"EOS ({eos}) follows after the last answer of a row. Make it the EOS: "
                f"model.special_tokens=[{mark!r}] model.eos_token={mark!r}"
            )
        return tokenizer
    if config.eos_token is not None:
        warn(
            f"model.eos_token={eos!r}, but the chat template ends every answer with "
            f"{frame.end_token!r}, which is trained as its end; set model.eos_token=null"
        )
        return tokenizer
    say(
        f"sft: EOS is {frame.end_token}, with which the chat template ends every answer, in place "
        f"of {eos}"
    )
    return load_tokenizer(replace(config, eos_token=frame.end_token))


def _check_promises(config: SFTStageConfig, args: SFTConfig, model: Any, tokenizer: Any) -> None:
    """Measure on the model what this stage promises, on the device where it will be trained."""
    if is_sharded(args):
        return
    family = f"model.path={config.model.path}"
    with as_in_training(model, config, args):
        require_padding(model, tokenizer, family, "take a model of another family")
        if args.packing or args.padding_free:
            _check_packing(config, args, model, tokenizer)
        if config.num_samples:
            fix = "set num_samples=0, or take a model of another family"
            require_cache(model, tokenizer, f"num_samples={config.num_samples}", fix)


def _check_packing(config: SFTStageConfig, args: SFTConfig, model: Any, tokenizer: Any) -> None:
    """Measure that rows in one sequence do not see each other, with the collator of TRL."""
    wrapped = args.packing and args.packing_strategy == "wrapped"
    multiple: Any = args.pad_to_multiple_of
    collator = DataCollatorForLanguageModeling(
        tokenizer.pad_token_id,
        padding_free=args.padding_free or not wrapped,
        pad_to_multiple_of=multiple,
    )
    field = "trainer.packing" if args.packing else "trainer.padding_free"
    fix = f"set {field}=false" + ", or trainer.packing_strategy=bfd" * wrapped
    longest = config.dataset.max_length * args.per_device_train_batch_size
    require_packing(model, tokenizer, collator, f"{field}=true", longest, fix)


def _warn_about_words(
    config: SFTStageConfig, tokenizer: PreTrainedTokenizerBase, record: StageRecord | None
) -> None:
    """Warn where the words of the prompts are not what the model knows or learns; `record`: of the
    stage that wrote the model."""
    warn_about_template(record, tokenizer, config.model.path)
    rows = new_token_rows(tokenizer, config.model, config.peft)
    if config.peft.enabled and config.model.special_tokens and not rows:
        warn(
            f"peft.train_new_tokens={config.peft.train_new_tokens}: new tokens of "
            "model.special_tokens keep the mean of the old rows, so that the model cannot tell "
            "them apart; set peft.train_new_tokens=true"
        )


def encode_splits(
    splits: Splits, tokenizer: PreTrainedTokenizerBase, config: SFTStageConfig
) -> tuple[Splits, list[dict[str, list[int]]], list[dict[str, list[int]]], list[str]]:
    """Make token ids and labels of canonical rows; first split long conversations, last mix in
    text, where the configuration says so.

    Returns:
        The splits with pieces in place of long conversations; the rows to train on and those held
        out; and lines that say what was split, dropped and mixed in.
    """
    length, bad, lines = config.dataset.max_length, config.dataset.on_bad_row, []
    if config.dataset.split_long:
        splits, line = split_conversations(splits, tokenizer, length)
        lines.append(line)
    on_prompt = config.train_on_prompt
    train, too_long = encode_sft(splits.train, tokenizer, length, on_prompt, bad)
    heldout, too_long_heldout = encode_sft(splits.eval, tokenizer, length, on_prompt, bad)
    lines.append(splits.describe(too_long + too_long_heldout))
    num_rows, num_sequences = len(splits.train), len(train) + sum(too_long.values())
    if num_sequences > num_rows:
        lines.append(
            f"{num_rows} training rows are {num_sequences} sequences, as the chat template renders "
            "earlier turns differently once more turns follow: each answer is trained after what "
            "it is generated after"
        )
    splits.dropped += too_long + too_long_heldout
    if config.mix.fraction:
        train, line = mix_texts(train, config.mix, tokenizer, length, config.seed, bad)
        lines.append(line)
    return splits, train, heldout, lines


def _finish(
    trainer: SFTTrainer,
    tokenizer: PreTrainedTokenizerBase,
    splits: Splits,
    config: SFTStageConfig,
    directory: Path,
) -> SFTResult:
    """Answer some held-out prompts, write `final/`, and show both."""
    policy = trainer.accelerator.unwrap_model(trainer.model)
    policy.__dict__.pop("forward", None)  # TRL patches forward on the instance
    metrics, samples = _last_evaluation(trainer), []
    if PartialState().is_main_process:
        rows = splits.eval[: config.num_samples]
        samples = sample_responses(policy, tokenizer, rows, config)
        if samples:
            metrics["eos_rate"] = sum(s["finished"] for s in samples) / len(samples)
        append_jsonl(directory / "samples.jsonl", samples)
        origin = config.model.path, tokenizer, splits.prompts
        record = make_record("sft", config, *origin, splits.dropped, metrics)
        write_stage(directory / "final", merged(policy), tokenizer, config, record)
    _report(directory, metrics, samples)
    return SFTResult(directory / "final", metrics, samples)


def sample_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    config: SFTStageConfig,
) -> list[dict[str, Any]]:
    """Sample one response to the prompt of each row; prompts that leave no room, and those that the
    chat template refuses, are left out."""
    context = context_length(model)
    prompts = [prompt_of(row) for row in rows]
    ids = {}
    for i, prompt in enumerate(prompts):
        with suppress(RefusedConversation):
            ids[i] = encode_prompt(prompt, tokenizer)
    kept = [i for i, row in ids.items() if 0 < len(row) <= context - config.response_length]
    sampling = sampling_for(
        model, tokenizer, config.response_length, config.temperature, config.top_p
    )
    noise = uniform_noise((config.seed,), range(len(kept)), config.response_length)
    sampled = generate(model, [ids[i] for i in kept], sampling, noise)
    return [
        {
            "prompt": prompts[i],
            "response": response_text(response, tokenizer, prompts[i]),
            "finished": finished,
            "response_length": len(response),
        }
        for i, response, finished in zip(kept, sampled.ids, sampled.finished, strict=True)
    ]


def _last_evaluation(trainer: SFTTrainer) -> dict[str, float]:
    """Metrics of the weights that the trainer has ended with."""
    names = ("eval_loss", "eval_mean_token_accuracy")
    step = best_step(trainer.args, trainer.state) or trainer.state.global_step
    rows = [row for row in trainer.state.log_history if row["step"] == step and "eval_loss" in row]
    return {name: rows[-1][name] for name in names if name in rows[-1]}


def _report(directory: Path, metrics: dict[str, float], samples: list[dict[str, Any]]) -> None:
    for sample in samples[:NUM_SHOWN]:
        prompt = sample["prompt"]
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        say(f"\n> {' '.join(text.split())[:300]}\n{sample['response'].strip()}")
        if not sample["finished"]:
            say("[no stop token within response_length]")
    say("\n" + table(list(metrics.items()), ("held-out", "value")))
    if metrics.get("eos_rate", 1.0) < 0.5:
        say("fewer than half of the answers end by themselves: train longer, or raise the budget")
    say(f"\nsaved {directory / 'final'}")
