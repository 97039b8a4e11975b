"""Answers of the trained model to held-out prompts, and what the terminal shows at the end."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.config import SFTStageConfig
from rlhf.console import say, table
from rlhf.data import encode_prompt, prompt_of
from rlhf.sampling import context_length, generate, sampling_for, uniform_noise
from rlhf.tokenizer import RefusedConversation, response_text

NUM_SHOWN = 3


def sample_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    config: SFTStageConfig,
) -> list[dict[str, Any]]:
    """Sample one response to the prompt of each row.

    Prompts that leave no room for a response, and prompts that the chat template refuses, are left
    out.

    Returns:
        prompt, response, finished and response_length of each.
    """
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


def show_result(directory: Path, metrics: dict[str, float], samples: list[dict[str, Any]]) -> None:
    """Print some of the samples, the metrics, and where the stage was saved."""
    for sample in samples[:NUM_SHOWN]:
        prompt = sample["prompt"]
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        say(f"\n> {' '.join(text.split())[:300]}\n{sample['response'].strip()}")
        if not sample["finished"]:
            say("[no stop token within response_length]")
    say("\n" + table(list(metrics.items()), ("held-out", "value")))
    if metrics.get("eos_rate", 1.0) < 0.5:
        say(
            "fewer than half of the answers end with a stop token: train longer, or raise "
            "response_length"
        )
    say(f"\nsaved {directory / 'final'}")
