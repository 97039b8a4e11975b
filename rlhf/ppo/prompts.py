"""Which prompts a PPO run takes: those that leave room for a response.

The response must fit into the context of the policy and of every reward model that scores it. The
other prompts are dropped and counted before training. Their order is in `rollout.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import Any

from rlhf.config import InputError, PPOStageConfig
from rlhf.data import Splits, describe_dropped, encode_prompts, not_refused
from rlhf.ppo.actors import Actors
from rlhf.sampling import context_length
from rlhf.scorers import RewardModelScorer, Scorer, reward_models

Prompts = list[dict[str, Any]]


def choose_prompts(
    config: PPOStageConfig,
    splits: Splits,
    actors: Actors,
    independent: Scorer | None,
    num_processes: int,
) -> tuple[Prompts, Prompts, Counter[str]]:
    """Encode training and held-out prompts, and drop those that are too long.

    Args:
        independent: scores answers to held-out prompts too.

    Returns:
        Training and held-out prompts (`prompt`, `input_ids`), and the dropped ones by reason.

    Raises:
        InputError: too few are left; or a chat template refuses more than may be dropped.
    """
    budget, bad = prompt_budget(config, actors), config.dataset.on_bad_row
    prompts, dropped = encode_prompts(splits.train, actors.tokenizer, budget, bad)
    models = reward_models(actors.scorer)
    prompts = _with_room(prompts, models, config, actors, dropped)
    needed = config.ppo.batch_size // config.ppo.samples_per_prompt
    if len(prompts) < needed:
        why = f" ({describe_dropped(dropped)})" if dropped else ""
        raise InputError(
            f"ppo.batch_size={config.ppo.batch_size} needs {needed} prompts, which is more than "
            f"the {len(prompts)} training prompts{why}; lower it or give more prompts"
        )
    if not config.evaluation.num_prompts:
        return prompts, [], dropped
    heldout, dropped_heldout = encode_prompts(splits.eval, actors.tokenizer, budget, bad)
    if independent is not None:
        models = models + reward_models(independent)
    heldout = _with_room(heldout, models, config, actors, dropped_heldout)
    if not heldout:
        raise InputError(
            f"no held-out prompt is left: {describe_dropped(dropped_heldout)}; lower "
            "ppo.response_length, or set evaluation.num_prompts=0"
        )
    heldout = heldout[: config.evaluation.num_prompts]
    heldout = heldout[: len(heldout) - len(heldout) % num_processes]
    return prompts, heldout, dropped + dropped_heldout


def prompt_budget(config: PPOStageConfig, actors: Actors) -> int:
    """Longest prompt that leaves room for the response in the context of the policy, and of every
    reward model that scores the same ids."""
    ppo = config.ppo
    context = context_length(actors.policy)
    for reward_model in reward_models(actors.scorer):
        if reward_model.tokenizer_hash == actors.tokenizer_hash:
            context = min(context, reward_model.max_length)
    if ppo.response_length >= context:
        raise InputError(
            f"ppo.response_length={ppo.response_length} leaves no room for a prompt in the model's "
            f"context of {context} tokens; use at most {context - 1}"
        )
    budget = ppo.max_prompt_length or context - ppo.response_length
    if budget + ppo.response_length > context:
        raise InputError(
            f"ppo.max_prompt_length={budget} + ppo.response_length={ppo.response_length} exceed "
            f"the model's context of {context} tokens; lower one of them"
        )
    return budget


def _with_room(
    prompts: Prompts,
    models: Iterable[RewardModelScorer],
    config: PPOStageConfig,
    actors: Actors,
    dropped: Counter[str],
) -> Prompts:
    """Keep the prompts after which each reward model's context has `ppo.response_length` of its own
    tokens left; a response with more of them is cut for scoring.

    Args:
        dropped: added to.

    Raises:
        InputError: that is more than a context.
    """
    response_length = config.ppo.response_length
    for model in models:
        room = model.max_length - response_length
        if room < 1:
            raise InputError(
                f"ppo.response_length={response_length} leaves no room for a prompt in the context "
                f"of {model.max_length} tokens of the reward model {model.path}; use at most "
                f"{model.max_length - 1}"
            )
        measure = partial(_length, model=model, rendering=actors.tokenizer_hash)
        lengths = not_refused(prompts, measure, config.dataset.on_bad_row, dropped)
        readable = [(prompts[i], length) for i, length in lengths]
        kept = [prompt for prompt, length in readable if length <= room]
        if len(kept) < len(readable):
            reason = (
                f"leaving no room for ppo.response_length={response_length} tokens in the context "
                f"of {model.max_length} of {model.path}"
            )
            dropped[reason] += len(readable) - len(kept)
        prompts = kept
    return prompts


def _length(prompt: dict[str, Any], model: RewardModelScorer, rendering: str) -> int:
    """Length of a prompt as a reward model reads it, tokens."""
    if model.tokenizer_hash == rendering:
        return len(prompt["input_ids"])
    return model.prompt_length(prompt["prompt"])
