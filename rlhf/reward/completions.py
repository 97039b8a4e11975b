"""The completions that set the zero of the scores: PPO sees each score minus their mean score.

Stiennon et al. 2020 (appendix C) and InstructGPT (section 3.5) shift the reward model so that the
demonstrations score 0 on average. Samples of the SFT policy can be used instead: then a typical
answer scores 0 when PPO begins, and `ppo.missing_eos_penalty` has a scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase

from rlhf.config import InputError, ModelConfig, RewardStageConfig
from rlhf.console import say, warn
from rlhf.data import (
    describe_dropped,
    encode_prompt,
    encode_sft,
    first_cases,
    load_rows,
    to_conversation,
)
from rlhf.distributed import use_bfloat16
from rlhf.engine_choice import choose_engine
from rlhf.models import freeze, load_policy
from rlhf.sampling import context_length, generate, sampling_for, uniform_noise

COMPLETIONS_KEY = (1 << 31) + 2  # names the random numbers; nothing in PPO has this key


def load_completions(
    config: RewardStageConfig,
    source: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    encoded: Sequence[dict[str, Any]],
    max_length: int,
) -> list[list[int]]:
    """Return the completions that `normalization.completions` names, and print what they are.

    Args:
        source: the SFT policy.
        rows: canonical training rows.
        encoded: the same rows as `encode_ranked` returns them.
        max_length: longest demonstration, tokens.

    Returns:
        Token ids of prompt and response, at least two sequences; fewer are an InputError.
    """
    count, kind = config.reward.num_normalization_prompts, config.normalization.completions
    if kind == "ranked":
        sequences = [ids for row in encoded[:count] for ids in row["input_ids"]]
    elif kind == "demonstrations":
        as_conversation = config.dataset.as_conversation
        if as_conversation is None:
            as_conversation = not isinstance(rows[0]["prompt"], str)
        sequences = _demonstrations(config, tokenizer, count, max_length, as_conversation)
    else:
        prompts = [rows[one["row"]]["prompt"] for one in encoded[:count]]
        sequences = _samples(config, source, tokenizer, prompts)
    if len(sequences) < 2:
        raise InputError(
            f"normalization.completions={kind} gives {len(sequences)} completions; give at least "
            "two: raise reward.num_normalization_prompts, or choose other completions"
        )
    return sequences


def _demonstrations(
    config: RewardStageConfig,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    max_length: int,
    as_conversation: bool,
) -> list[list[int]]:
    """Encode the first demonstrations that fit into `max_length`, as SFT does."""
    path, split = config.normalization.path, config.normalization.split
    assert path is not None  # `check` has made sure
    bad, format = config.dataset.on_bad_row, config.normalization.format
    rows, dropped = load_rows(path, format, split, "sft", "normalization.path", bad)
    if as_conversation:
        rows = [to_conversation(row) for row in rows]
    encoded, too_long = encode_sft(rows, tokenizer, max_length, on_bad_row=bad)
    line = f"        scores are 0 on average over {len(encoded[:count])} demonstrations of {path}; "
    say("\n".join([line + describe_dropped(dropped + too_long), *first_cases(dropped + too_long)]))
    return [row["input_ids"] for row in encoded[:count]]


def _samples(
    config: RewardStageConfig,
    source: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
) -> list[list[int]]:
    """Sample an answer of the SFT policy to each prompt; each process samples its share."""
    state = PartialState()
    policy = freeze(load_policy(source, tokenizer)).to(state.device).eval()
    context = context_length(policy)
    length = min(config.normalization.response_length, context // 2)
    room = context - length
    ids = [encode_prompt(prompt, tokenizer) for prompt in prompts]
    ids = [row for row in ids if 0 < len(row) <= room]
    mine = range(state.process_index, len(ids), state.num_processes)
    noise = uniform_noise((config.seed, COMPLETIONS_KEY), mine, length)
    sampling = sampling_for(policy, tokenizer, length, temperature=1.0)
    mixed = use_bfloat16(config.precision)
    with torch.autocast(state.device.type, torch.bfloat16, enabled=mixed):
        engine = choose_engine(policy, tokenizer)
        if state.device.type != "cpu":
            say(f"        sampling: {engine}")
        sampled = generate(policy, [ids[i] for i in mine], sampling, noise)
    own = [
        (i, [*ids[i], *response], finished)
        for i, response, finished in zip(mine, sampled.ids, sampled.finished, strict=True)
    ]
    everything = sorted(gather_object(own))
    ended = [sequence for _, sequence, finished in everything if finished]
    if len(ended) < max(2, len(everything) // 2):
        warn(
            f"only {len(ended)} of {len(everything)} answers of the SFT policy end within {length} "
            "tokens: all of them set the zero of the scores; raise normalization.response_length, "
            "or train SFT longer"
        )
        ended = [sequence for _, sequence, _ in everything]
    say(f"        scores are 0 on average over {len(ended)} answers of the SFT policy")
    return ended
