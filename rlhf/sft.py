"""Supervised fine-tuning: `python -m rlhf.sft`, or `train_sft(SFTStageConfig(...))`.

A thin layer over TRL's SFTTrainer: our data layer decides which tokens carry loss (`labels`), TRL
trains. Ends with `final/`, the share of sampled answers that end by themselves, and a few of these
answers on held-out prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.command_line import hydra_main
from rlhf.config import SFTStageConfig, check
from rlhf.metrics import append_jsonl, quiet_libraries, say, table

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NUM_SHOWN = 3


@dataclass
class SFTResult:
    """What `train_sft` returns.

    Attributes:
        directory: the stage directory, ready for the next stages; None when training was
            interrupted.
        metrics: `eval_loss`, `eval_mean_token_accuracy`, `eos_rate`, ...
        samples: prompt, response and finished flag of sampled held-out prompts.
    """

    directory: Path | None
    metrics: dict[str, float]
    samples: list[dict[str, Any]]


def train_sft(config: SFTStageConfig) -> SFTResult:
    """Fine-tune a causal language model on demonstrations.

    Args:
        config: see `conf/sft.yaml` for every knob.

    Raises:
        InputError: bad configuration or data; nothing has been trained or overwritten then.
    """
    check(config)
    import torch
    from accelerate import PartialState
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from rlhf.checkpoint import make_record, prepare_run_directory, write_stage
    from rlhf.data import describe_dropped, encode_sft, load_splits
    from rlhf.models import add_lora, load_policy, load_tokenizer, merged, parameter_count
    from rlhf.training import describe_batches, run_trainer, trainer_arguments

    quiet_libraries()
    stage_dir = config.stage_dir("sft")
    args = trainer_arguments(
        SFTConfig,
        config,
        stage_dir,
        max_length=config.dataset.max_length,
        eval_packing=False,
        dataset_num_proc=None,
    )
    tokenizer = load_tokenizer(config.model)
    splits = load_splits(config.dataset, "sft", config.seed)
    train, too_long = encode_sft(
        splits.train, tokenizer, config.dataset.max_length, config.train_on_prompt
    )
    heldout, _ = encode_sft(
        splits.eval, tokenizer, config.dataset.max_length, config.train_on_prompt
    )
    directory = prepare_run_directory(config, "sft")
    torch.manual_seed(config.seed)
    model = load_policy(config.model, tokenizer)
    if config.peft.enabled:
        model = add_lora(model, config.peft, "CAUSAL_LM", config.seed)
    total, trainable = parameter_count(model)
    say(f"sft: {total:,} parameters, {trainable:,} trainable; {len(heldout)} held-out rows")
    say(
        f"     {describe_batches(args, len(train), 'rows')}"
        + (" (fewer with packing)" if args.packing else "")
    )
    say(describe_dropped(splits.dropped + too_long))
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(heldout),
        processing_class=tokenizer,
    )
    if not run_trainer(trainer, config, directory, "sft"):
        return SFTResult(None, {}, [])
    policy = trainer.accelerator.unwrap_model(trainer.model)
    policy.__dict__.pop("forward", None)  # TRL patches forward on the instance
    metrics, samples = _last_eval(trainer), []
    if PartialState().is_main_process:
        policy = merged(policy)
        samples = sample_responses(policy, tokenizer, splits.eval[: config.num_samples], config)
        if samples:
            metrics["eos_rate"] = sum(s["finished"] for s in samples) / len(samples)
        append_jsonl(directory / "samples.jsonl", samples)
        record = make_record("sft", config, config.model.path, tokenizer)
        record.metrics = metrics
        write_stage(directory / "final", policy, tokenizer, config, record)
    PartialState().wait_for_everyone()
    _report(directory, metrics, samples)
    return SFTResult(directory / "final", metrics, samples)


def sample_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    config: SFTStageConfig,
) -> list[dict[str, Any]]:
    """Sample one response to the prompt of each row."""
    from rlhf.data import encode_prompt, prompt_of
    from rlhf.generation import Sampling, generate, stop_token_ids, uniform_noise
    from rlhf.models import forbidden_token_ids

    context = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    prompts = [prompt_of(row) for row in rows]
    ids = [encode_prompt(prompt, tokenizer) for prompt in prompts]
    kept = [
        i for i, prompt_ids in enumerate(ids) if len(prompt_ids) + config.response_length <= context
    ]
    sampling = Sampling(
        max_new_tokens=config.response_length,
        stop_ids=stop_token_ids(model, tokenizer),
        forbidden=forbidden_token_ids(tokenizer, model.get_output_embeddings().weight.shape[0]),
        temperature=config.temperature,
    )
    noise = uniform_noise((config.seed,), range(len(kept)), config.response_length)
    sampled = generate(model, [ids[i] for i in kept], sampling, noise)
    return [
        {
            "prompt": prompts[i],
            "response": tokenizer.decode(response, skip_special_tokens=True),
            "finished": finished,
            "response_length": len(response),
        }
        for i, response, finished in zip(kept, sampled.ids, sampled.finished, strict=True)
    ]


def prompt_text(prompt: Any) -> str:
    """One line of a prompt, for the terminal: the text, or the last message."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return " ".join(text.split())[:300]


def _last_eval(trainer: Any) -> dict[str, float]:
    names = ("eval_loss", "eval_mean_token_accuracy")
    last = next(row for row in reversed(trainer.state.log_history) if "eval_loss" in row)
    return {name: last[name] for name in names if name in last}


def _report(directory: Path, metrics: dict[str, float], samples: list[dict[str, Any]]) -> None:
    for sample in samples[:NUM_SHOWN]:
        say(f"\n> {prompt_text(sample['prompt'])}\n{sample['response'].strip()}")
        say("" if sample["finished"] else "  [no stop token within response_length]")
    say("\n" + table(list(metrics.items()), ("held-out", "value")))
    if metrics.get("eos_rate", 1.0) < 0.5:
        say(
            "fewer than half of the answers end by themselves: train longer, or raise "
            "response_length"
        )
    say(f"\nsaved {directory / 'final'}")


def main() -> None:
    """Entry point of `python -m rlhf.sft`."""
    hydra_main("sft", train_sft)


if __name__ == "__main__":
    main()
