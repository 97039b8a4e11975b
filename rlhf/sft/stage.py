"""The SFT stage: a thin layer over TRL's SFTTrainer.

Our data layer decides which tokens carry loss (`labels`); TRL trains. The stage ends with `final/`,
some sampled answers to held-out prompts, and the share of these answers that end with a stop token.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from rlhf.checkpoint import (
    StageRun,
    describe_saved,
    make_record,
    open_run,
    require_stage,
    require_writable,
    warn_about_template,
    write_stage,
)
from rlhf.config import InputError, ModelConfig, SFTStageConfig, with_learning_rates
from rlhf.console import say, table, warn
from rlhf.data import (
    Row,
    Splits,
    different_prompts,
    encode_prompt,
    few_rows,
    is_text,
    load_splits,
    prompt_of,
    with_rows,
)
from rlhf.distributed import describe_sharding, is_sharded, zero_stage
from rlhf.equivalence import choose_forward, require_cache, require_packing, require_padding
from rlhf.failures import phase, same_rows
from rlhf.hf_trainer import (
    as_in_training,
    best_step,
    describe_batches,
    row_length,
    run_trainer,
    trainer_arguments,
)
from rlhf.metrics import StageResult, append_jsonl, read_jsonl
from rlhf.models import (
    add_lora,
    leave_out_router_logits,
    load_policy,
    mend_sampling_settings,
    new_token_rows,
    parameter_count,
    require_trainable,
    shard_unread,
    try_settings,
    what_to_save,
    without_padding_mask,
)
from rlhf.sampling import context_length, generate, sampling_for, uniform_noise
from rlhf.sft.sft_trainer import FiniteSFTTrainer
from rlhf.sft.training_rows import encode_splits
from rlhf.tokenizer import (
    RefusedConversation,
    answer_frame,
    load_tokenizer,
    response_text,
    stop_strings,
)

NUM_SHOWN = 3  # samples


@dataclass(repr=False, kw_only=True)
class SFTResult(StageResult):
    """What `train_sft` returns; see `StageResult` for the other attributes.

    Attributes:
        samples: `prompt`, `response` and `finished` of answers to held-out prompts.
    """

    samples: list[dict[str, Any]] = field(default_factory=list)


def train_sft(
    config: SFTStageConfig,
    rows: Iterable[Any] | None = None,
    eval_rows: Iterable[Any] | None = None,
) -> SFTResult:
    """Fine-tune a causal language model on demonstrations; see `conf/sft.yaml` for every knob.

    Args:
        rows: a list, `datasets.Dataset` or generator of rows, in place of `dataset.path`.
        eval_rows: the same, in place of `dataset.eval_path`.

    Raises:
        InputError: bad configuration or data, or another process writes to the stage's directory;
            nothing has been trained or overwritten then.
    """
    config = with_learning_rates(with_rows(config, rows, eval_rows), say)
    with open_run(config, "sft") as run:
        if run.finished is not None:
            return SFTResult(
                run.directory / "final",
                run.finished.metrics,
                closing_table(run.finished.metrics, None),
                run.directory,
                samples=read_jsonl(run.directory / "samples.jsonl"),
            )
        return _train(config, run)


def _train(config: SFTStageConfig, run: StageRun) -> SFTResult:
    # Refuse bad settings and paths before anything loads.
    parent, record = config.model.path, None
    args = trainer_arguments(SFTConfig, config, "sft", eval_packing=False)
    if parent is not None:
        record = require_stage(parent, ("sft", "ppo"), "model.path", config.model.revision)
    try_settings(config.model, config.peft)

    # Load the data, the tokenizer and the model.
    before = getattr(record, "prompts", None)
    splits = same_rows(load_splits(config.dataset, "sft", config.seed, parent_prompts=before))
    tokenizer = load_sft_tokenizer(config.model, splits.prompts)
    warn_about_template(record, tokenizer, parent)
    token_rows = _trained_token_rows(config, tokenizer)
    torch.manual_seed(config.seed)
    model = load_policy(config.model, tokenizer, in_slices=True)
    require_trainable(model, config.model, config.peft)
    lines = mend_sampling_settings(model)
    require_writable(model, tokenizer, config)
    args.max_length = row_length(config, context_length(model))
    if config.peft.enabled:
        model = add_lora(model, config.peft, "CAUSAL_LM", config.seed, token_rows)
    shard_unread(model)
    forward = require_promises(config, args, model, tokenizer)

    # Make token ids and labels.
    splits, train, heldout, what = encode_splits(
        splits, tokenizer, config, args.max_length, context_length(model)
    )

    # Train.
    directory = run.begin(splits.train, splits.eval)
    total, trainable = parameter_count(model)
    packing = ", fewer with packing" if args.packing else ""
    sizes = f"{total:,} parameters, {trainable:,} trainable"
    say(f"sft: {sizes}; {len(heldout)} held-out rows; at most {args.max_length} tokens a row")
    say(f"     {describe_batches(args, len(train), 'rows')}{packing}; {forward}")
    say("\n".join(what + lines))
    if forward == "padding-free" and not args.packing and "padding_free" not in config.trainer:
        args.padding_free, args.max_length = True, None  # no row is longer than that
    trainer = _make_trainer(config, args, model, tokenizer, train, heldout)
    with without_padding_mask(model):
        stopped_by = run_trainer(trainer, config, directory, "sft")
    if stopped_by is not None:
        return SFTResult(None, {}, stage_dir=directory, stopped_by=stopped_by)
    return _finish(trainer, tokenizer, splits, config, directory)


def load_sft_tokenizer(config: ModelConfig, prompts: str) -> Any:
    """Load the tokenizer; if its chat template ends every answer with one token, this token becomes
    EOS, so that servers stop there.

    Args:
        prompts: "text" or "conversation"; answers to text end with the model's own EOS.
    """
    tokenizer = load_tokenizer(config)
    frame, eos = answer_frame(tokenizer), tokenizer.eos_token
    if prompts == "text" or frame.end_token == eos or stop_strings(tokenizer):
        return tokenizer
    mark = frame.tail.strip()
    if frame.end_token is None and mark:
        warn(
            f"the chat template ends every answer with {mark!r}, which is not a single token; "
            f"EOS ({eos}) follows after the last answer of a row. To make it the EOS, set "
            f"model.special_tokens=[{mark!r}] model.eos_token={mark!r}"
        )
    elif frame.end_token is not None and config.eos_token is not None:
        warn(
            f"model.eos_token={eos!r}, but the chat template ends every answer with "
            f"{frame.end_token!r}, and the model learns to end with that; set model.eos_token=null"
        )
    elif frame.end_token is not None:
        why = "because the chat template ends every answer with it"
        say(f"sft: EOS is {frame.end_token} instead of {eos}, {why}")
        return load_tokenizer(replace(config, eos_token=frame.end_token))
    return tokenizer


def _make_trainer(
    config: SFTStageConfig, args: SFTConfig, model: Any, tokenizer: Any, train: Any, heldout: Any
) -> FiniteSFTTrainer:
    trainer = FiniteSFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(heldout),
        processing_class=tokenizer,
    )
    leave_out_router_logits(model)  # TRL asks for them itself, and switches them on for good
    trainer.micro_batch_tokens = config.micro_batch_tokens
    if config.model.quantization is not None:
        for parameter in model.parameters():  # TRL rounds such adapters to bfloat16
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return trainer


def require_promises(config: SFTStageConfig, args: SFTConfig, model: Any, tokenizer: Any) -> str:
    """Measure on the model that padding, packing and sampling work, on the device of training.
    Return how the model reads rows."""
    family = f"model.path={config.model.path}"
    with as_in_training(model, config, args):
        require_padding(model, tokenizer, family, "take a model of another family")
        forward = choose_forward(model, tokenizer, config.model.forward)
        if args.packing or args.padding_free:
            _require_packing(config, args, model, tokenizer)
        if config.num_samples:
            fix = "set num_samples=0, or take a model of another family"
            require_cache(model, tokenizer, f"num_samples={config.num_samples}", fix)
    return forward


def _require_packing(config: SFTStageConfig, args: SFTConfig, model: Any, tokenizer: Any) -> None:
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
    assert args.max_length is not None  # see `row_length`
    longest = args.max_length * args.per_device_train_batch_size
    require_packing(model, tokenizer, collator, f"{field}=true", longest, fix)


def _trained_token_rows(config: SFTStageConfig, tokenizer: Any) -> list[int]:
    """Return the rows of new tokens that adapters train; warn if there are none, and refuse them
    where TRL, which reads the head's weights outside of the head, would find them empty."""
    rows = new_token_rows(tokenizer, config.model, config.peft)
    if config.peft.enabled and rows and zero_stage() == 3:
        raise InputError(
            f"peft.train_new_tokens={config.peft.train_new_tokens}: SFT cannot train the rows of "
            "new tokens in DeepSpeed's slices; launch it with zero2 or fsdp2 in place of zero3, or "
            "set peft.train_new_tokens=false"
        )
    if config.peft.enabled and config.model.special_tokens and not rows:
        warn(
            f"peft.train_new_tokens={config.peft.train_new_tokens}: new tokens of "
            "model.special_tokens keep the mean of the old rows, so that the model cannot tell "
            "them apart; set peft.train_new_tokens=true"
        )
    return rows


@phase("after training")
def _finish(
    trainer: FiniteSFTTrainer,
    tokenizer: Any,
    splits: Splits,
    config: SFTStageConfig,
    directory: Path,
) -> SFTResult:
    """Answer some held-out prompts, write `final/`, and show the result."""
    policy: Any = trainer.accelerator.unwrap_model(trainer.model)
    policy.__dict__.pop("forward", None)  # TRL patches forward on the instance
    metrics = _last_evaluation(trainer)
    prompted = [row for row in splits.eval if not is_text(row)]
    rows = different_prompts(prompted)[: config.num_samples]
    samples, is_main = [], PartialState().is_main_process
    if is_main or is_sharded(policy):  # processes gather a sharded policy layer by layer, together
        samples = sample_responses(policy, tokenizer, rows, config)
    parts = policy, config.peft, config.model.path, config.model.revision
    model, adapter = what_to_save(*parts, directory)
    if is_main:
        if num_left_out := len(rows) - len(samples):
            warn(
                f"{num_left_out} of {len(rows)} prompts got no sample: response_length="
                f"{config.response_length} leaves them no room in the model's context of "
                f"{context_length(policy)} tokens, or the chat template refuses them"
            )
        if samples:
            metrics["eos_rate"] = sum(s["finished"] for s in samples) / len(samples)
        append_jsonl(directory / "samples.jsonl", samples)
        origin = config.model.path, tokenizer, splits.prompts
        record = make_record("sft", config, *origin, splits.dropped, metrics)
        record.sharding = describe_sharding(trainer.accelerator)
        final = directory / "final"
        write_stage(final, model, tokenizer, config, record, write_adapter=adapter)
    heldout: Any = trainer.eval_dataset
    text = closing_table(metrics, len(heldout))
    _show_result(directory, metrics, samples, text)
    return SFTResult(directory / "final", metrics, text, directory, samples=samples)


def sample_responses(
    model: Any, tokenizer: Any, rows: list[Row], config: SFTStageConfig
) -> list[dict[str, Any]]:
    """Sample one response to the prompt of each row, except where the prompt leaves no room for it
    or the chat template refuses the prompt."""
    room = context_length(model) - config.response_length
    prompts, ids = [], []
    for prompt in map(prompt_of, rows):
        with suppress(RefusedConversation):
            prompt_ids = encode_prompt(prompt, tokenizer)
            if 0 < len(prompt_ids) <= room:
                prompts.append(prompt)
                ids.append(prompt_ids)
    sampling = sampling_for(
        model, tokenizer, config.response_length, config.temperature, config.top_p
    )
    noise = uniform_noise((config.seed,), range(len(ids)), config.response_length)
    sampled = generate(model, ids, sampling, noise)
    return [
        {
            "prompt": prompt,
            "response": response_text(response, tokenizer, prompt),
            "finished": finished,
            "response_length": len(response),
        }
        for prompt, response, finished in zip(prompts, sampled.ids, sampled.finished, strict=True)
    ]


def _last_evaluation(trainer: FiniteSFTTrainer) -> dict[str, float]:
    """Return the metrics of the weights with which training ended."""
    names = ("eval_loss", "eval_mean_token_accuracy")
    step = best_step(trainer.args, trainer.state) or trainer.state.global_step
    rows = [row for row in trainer.state.log_history if row["step"] == step and "eval_loss" in row]
    return {name: rows[-1][name] for name in names if name in rows[-1]}


def closing_table(metrics: dict[str, float], num_heldout: int | None) -> str:
    """The metrics of the trained model; the number of held-out rows is None where it is not known
    any more."""
    number, few = "", ""
    if num_heldout is not None:
        number, few = f"{num_heldout} ", few_rows(num_heldout, "row")
    text = table(list(metrics.items()), (f"{number}held-out rows", "value"))
    return f"{text}\n{few}".rstrip()


def _show_result(
    directory: Path, metrics: dict[str, float], samples: list[dict[str, Any]], closing: str
) -> None:
    for sample in samples[:NUM_SHOWN]:
        prompt = sample["prompt"]
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        say(f"\n> {' '.join(text.split())[:300]}\n{sample['response'].strip()}")
        if not sample["finished"]:
            say("[no stop token within response_length]")
    say(f"\n{closing}")
    if metrics.get("eos_rate", 1.0) < 0.5:
        fix = "train longer, or raise response_length"
        say(f"fewer than half of the answers end with a stop token: {fix}")
    say(f"\nsaved {describe_saved(directory / 'final')}")
