"""Responses of the policy before training: does training read what was sampled, does text survive
the tokenizer, do responses end?"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rlhf.ppo.evaluation import response_ids, response_texts
from rlhf.ppo.preflight.findings import FAIL, OK, WARN, Finding
from rlhf.ppo.rollout import Rollout, collect, policy_logprobs, share_of
from rlhf.ppo.trainer import PPOTrainer
from rlhf.sampling import Generation, Sampling, context_length, generate, uniform_noise

PREFLIGHT_KEY = (1 << 31) + 1  # names the random numbers; no update and no evaluation has this key
NUM_SAMPLES = 16  # to each prompt


@dataclass
class Samples:
    """`NUM_SAMPLES` responses to each prompt, one prompt after the other.

    Attributes:
        prompts: encoded prompts, one per response.
        rollout: their responses, without scores.
        ids, texts: the responses as token ids and as text.
        ratio_off: largest |ratio - 1| of the first minibatch, see `first_ratio_deviation`.
    """

    prompts: list[dict[str, Any]]
    rollout: Rollout
    ids: list[list[int]]
    texts: list[str]
    ratio_off: float


def sample_policy(trainer: PPOTrainer, prompts: Sequence[dict[str, Any]]) -> Samples:
    """Sample `NUM_SAMPLES` responses to each prompt, on all processes together."""
    accelerator, config = trainer.accelerator, trainer.config
    rows = [prompt for prompt in prompts for _ in range(NUM_SAMPLES)]
    padded = rows + rows[-1:] * (-len(rows) % accelerator.num_processes)
    first = min(config.ppo.micro_batch_size * accelerator.num_processes, len(padded))
    order = torch.arange(len(padded), device=accelerator.device)
    minibatches = [part for part in order.tensor_split([first]) if len(part)]
    rollout = collect(
        trainer.actors,
        padded,
        (config.seed, PREFLIGHT_KEY),
        trainer.sampling,
        config.ppo,
        accelerator,
        minibatches,
        with_scores=False,  # the main process calls the scorer later
        with_values=False,
    )
    ratio_off = first_ratio_deviation(trainer, rollout, minibatches[0])
    rollout = rollout.select(order[: len(rows)])
    texts = response_texts(rollout, trainer.actors.tokenizer, rows)
    return Samples(rows, rollout, response_ids(rollout), texts, ratio_off)


def first_ratio_deviation(trainer: PPOTrainer, rollout: Rollout, minibatch: Tensor) -> float:
    """Read the first minibatch as training does: largest |ratio - 1| on any process."""
    policy, accelerator = trainer.actors.policy, trainer.accelerator
    largest = torch.zeros((), device=accelerator.device)
    mine = rollout.select(share_of(minibatch, accelerator))
    with accelerator.autocast():  # with gradients, as in training
        for _, part in mine.micro_batches(trainer.config.ppo.micro_batch_size):
            logprobs, _ = policy_logprobs(policy, part, trainer.sampling)
            log_ratio = (logprobs.detach() - part.logprobs)[part.response_mask]
            largest = torch.maximum(largest, torch.expm1(log_ratio).abs().max())
    return float(accelerator.gather(largest[None]).max())


def examine_policy(trainer: PPOTrainer, samples: Samples) -> list[Finding]:
    """Examine ratio, tokenizer and stop token, on the main process."""
    tokenizer, watchdog = trainer.actors.tokenizer, trainer.config.watchdog
    sampling, prompts = trainer.sampling, samples.prompts[::NUM_SAMPLES]

    def sample_longer() -> tuple[int, Generation]:
        """Four responses to each prompt, with four times the budget or what the context has."""
        ids = [p["input_ids"] for p in prompts for _ in range(4)]
        room = context_length(trainer.actors.policy) - max(map(len, ids))
        budget = min(4 * sampling.max_new_tokens, room)
        noise = uniform_noise((trainer.config.seed, PREFLIGHT_KEY), range(len(ids)), budget)
        longer = replace(sampling, max_new_tokens=budget)
        batch_size = max(1, trainer.config.ppo.rollout_batch_size // 4)  # the cache is longer too
        with trainer.accelerator.autocast():
            return budget, generate(trainer.actors.policy, ids, longer, noise, batch_size)

    return [
        examine_first_ratio(samples.ratio_off, samples.rollout, watchdog.first_ratio),
        examine_tokenizer(tokenizer, [p["prompt"] for p in prompts], samples.texts),
        examine_stop_token(
            tokenizer.eos_token_id, sampling, samples.rollout, watchdog.eos_rate, sample_longer
        ),
    ]


def examine_first_ratio(ratio_off: float, rollout: Rollout, limit: float | None) -> Finding:
    """Examine whether rollout and training read the same policy, and whether it is the reference.

    Args:
        ratio_off: largest |ratio - 1| of the first minibatch.
        limit: largest deviation allowed, also of the ratio to the reference; None: any.
    """
    difference = rollout.logprobs - rollout.ref_logprobs  # 0 at masked positions
    reference_off = float(torch.expm1(difference).abs().max())
    text = (
        f"largest |ratio - 1| {ratio_off:.2g}; KL to the reference "
        f"{float(difference.sum(dim=1).mean()):.2g} nats per response"
    )
    # this way round, so that nan fails too
    if limit is None or (ratio_off <= limit and reference_off <= limit):
        return Finding("first ratio", OK, text)
    return Finding(
        "first ratio",
        FAIL,
        f"{text}: two readings of the same policy differ",
        "switch dropout off in a model of your own code; use precision=float32, or another "
        "model.attn_implementation",
    )


def examine_tokenizer(tokenizer: Any, prompts: Sequence[Any], responses: Sequence[str]) -> Finding:
    """Examine whether text survives tokenisation, and the special tokens."""
    name = "tokenizer"
    if any(not isinstance(p, str) for p in prompts) and not tokenizer.chat_template:
        text = "the prompts are conversations, but the tokenizer has no chat template"
        return Finding(name, FAIL, text, "set model.chat_template")
    rendered = [
        p
        if isinstance(p, str)
        else tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True)
        for p in prompts
    ]
    texts = [*rendered, *responses]
    back = [
        tokenizer.decode(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        for text in texts
    ]
    # word-level and SentencePiece tokenizers do not keep every space
    pairs = [("".join(a.split()), "".join(b.split())) for a, b in zip(texts, back, strict=True)]
    changed = [(a, b) for a, b in pairs if a != b]
    if changed:
        before, after = changed[0]
        at = max(0, len(os.path.commonprefix(changed[0])) - 10)
        text = (
            f"{len(changed)} of {len(texts)} texts change from text -> ids -> text, e.g. "
            f"{before[at : at + 30]!r} -> {after[at : at + 30]!r}"
        )
        fix = "use the tokenizer that the model was trained with (model.tokenizer)"
        return Finding(name, WARN, text, fix)
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad == eos:
        text = f"pad and EOS are the same token ({pad}); other libraries then mask EOS as padding"
        return Finding(name, WARN, text, "give the tokenizer a pad token of its own")
    text = f"{len(prompts)} prompts and {len(responses)} responses survive text -> ids -> text"
    return Finding(name, OK, f"{text}; pad {pad}, EOS {eos}")


def examine_stop_token(
    eos: int,
    sampling: Sampling,
    rollout: Rollout,
    least_share: float | None,
    sample_longer: Callable[[], tuple[int, Generation]],
) -> Finding:
    """Examine whether responses can end, and do.

    If too few end, a larger budget tells a budget that is too small from an SFT stage at fault.

    Args:
        eos: id of the tokenizer's EOS.
        least_share: share of responses that ought to end; None: any.
        sample_longer: returns a larger budget, tokens, and responses within it.
    """
    name = "stop token"
    if eos in sampling.forbidden.tolist():
        return Finding(
            name,
            FAIL,
            f"EOS (id {eos}) is one of the ids that are never sampled: padding, or ids that the "
            "tokenizer does not count",
            "set the eos_token of model.tokenizer to the token that SFT responses end with",
        )
    share = float(rollout.finished.float().mean())
    text = (
        f"{share:.0%} of the responses end, mean length {float(rollout.lengths.float().mean()):.1f}"
        f" of at most {sampling.max_new_tokens} tokens"
    )
    if least_share is None or share >= least_share:
        return Finding(name, OK, text)
    budget, longer = sample_longer()
    ended = [len(ids) for ids, end in zip(longer.ids, longer.finished, strict=True) if end]
    share = len(ended) / len(longer.ids)
    if share >= least_share:
        needed = sorted(ended)[math.ceil(0.95 * len(ended)) - 1]
        fix = f"raise ppo.response_length to about {needed}, where 95 % of these have ended"
    else:
        fix = "the SFT stage is at fault: train it longer, on responses that all end with EOS"
    return Finding(name, WARN, f"{text}; given {budget} tokens, {share:.0%} do", fix)
