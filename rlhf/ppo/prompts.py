"""Which prompts a PPO run takes: those that leave room for a response.

The response must fit into the context of the policy and of every reward model that scores it. The
other prompts are dropped and counted before training. `stage.py` calls this after `actors.py`;
`rollout.py` takes the prompts in its order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from rlhf.checkpoint import read_record
from rlhf.config import InputError, PPOConfig, PPOStageConfig, has_weights
from rlhf.data import (
    Splits,
    describe_dropped,
    different_prompts,
    encode_prompt,
    encode_prompts,
    not_refused,
    prompt_of,
)
from rlhf.hub import config_directory, read_json
from rlhf.ppo.actors import Actors
from rlhf.sampling import context_length
from rlhf.scorers import RewardModelScorer, Scorer, reward_models
from rlhf.tokenizer import hash_template, hash_tokenizer

Prompts = list[dict[str, Any]]


def refuse_long_rows(config: PPOStageConfig, tokenizer: Any, splits: Splits) -> None:
    """As `require_room_for_rows`, before any model loads, if the configurations of the models show
    which prompts will be taken."""
    ppo = config.ppo
    if not isinstance(ppo.micro_batch_tokens, int):
        return
    room = _stored_context(config, str(config.model.path), "model.path", config.model.revision)
    for path in [part.path for part in config.scorer.components] or [config.scorer.path]:
        if not has_weights(path):
            continue
        record = read_record(str(path))
        ours = hash_tokenizer(tokenizer), hash_template(tokenizer)
        if record is None or (record.tokenizer, record.template) != ours:
            return  # it may count other tokens
        room = min(room, _stored_context(config, str(path), "scorer.path"))
    most = min(room - ppo.response_length, ppo.max_prompt_length or room)
    prompts = [prompt_of(row) for row in splits.train]
    encode = partial(encode_prompt, tokenizer=tokenizer)
    encoded = not_refused(prompts, encode, config.dataset.on_bad_row, Counter())
    lengths = [len(ids) for _, ids in encoded if len(ids) <= most]
    require_room_for_rows(ppo, max(lengths, default=0))


def _stored_context(
    config: PPOStageConfig, path: str, field: str, revision: str | None = None
) -> int:
    """Longest sequence of a model by its `config.json`, tokens; 0 if that does not say."""
    directory = config_directory(path, field, revision, config.model.trust_remote_code)
    return read_json(directory / "config.json").get("max_position_embeddings") or 0


def require_room_for_rows(ppo: PPOConfig, longest: int) -> None:
    """Require that the longest row, with a prompt of `longest` tokens, fits into
    `ppo.micro_batch_tokens`."""
    tokens, length = ppo.micro_batch_tokens, longest + ppo.response_length
    if isinstance(tokens, int) and tokens < length:
        raise InputError(
            f"ppo.micro_batch_tokens={tokens} is less than the longest row: a prompt of {longest} "
            f"tokens and ppo.response_length={ppo.response_length}; set it to {length} or more, or "
            f"drop long prompts with ppo.max_prompt_length"
        )


def choose_prompts(
    config: PPOStageConfig, splits: Splits, actors: Actors, independent: Scorer | None
) -> tuple[Prompts, Prompts, Counter[str]]:
    """Encode training and held-out prompts, and drop those that are too long.

    Returns:
        Training and held-out prompts (`prompt`, `input_ids`), and the dropped ones by reason.
    """
    models = reward_models(actors.scorer)
    prompts, dropped = _prompts_with_room(splits.train, models, config, actors, warns=True)
    if not prompts:
        raise InputError(
            f"no training prompt is left: {describe_dropped(dropped)}; lower ppo.response_length"
        )
    if not config.evaluation.num_prompts:
        return prompts, [], dropped
    if independent is not None:
        models = models + reward_models(independent)
    heldout, dropped_heldout = _prompts_with_room(
        different_prompts(splits.eval), models, config, actors
    )
    if not heldout:
        raise InputError(
            f"no held-out prompt is left: {describe_dropped(dropped_heldout)}; lower "
            "ppo.response_length, or set evaluation.num_prompts=0"
        )
    return prompts, heldout[: config.evaluation.num_prompts], dropped + dropped_heldout


def prompt_budget(config: PPOStageConfig, actors: Actors) -> tuple[int, int]:
    """Longest prompt that is taken, and the longest that leaves room for the response in the
    context of the policy and of every reward model that scores the same ids, tokens."""
    ppo = config.ppo
    same_ids = [
        m for m in reward_models(actors.scorer) if m.tokenizer_hash == actors.tokenizer_hash
    ]
    context = min([context_length(actors.policy), *(model.max_length for model in same_ids)])
    room = _room(ppo.response_length, context, f"the model's context of {context} tokens")
    budget = ppo.max_prompt_length or room
    if budget > room:
        raise InputError(
            f"ppo.max_prompt_length={budget} + ppo.response_length={ppo.response_length} exceed "
            f"the model's context of {context} tokens; lower one of them"
        )
    return budget, room


def _room(response_length: int, context: int, where: str) -> int:
    """Tokens of a context that a response leaves to its prompt, at least 1."""
    if response_length >= context:
        raise InputError(
            f"ppo.response_length={response_length} leaves no room for a prompt in {where}; use at "
            f"most {context - 1}"
        )
    return context - response_length


def _prompts_with_room(
    rows: Sequence[Any],
    models: list[RewardModelScorer],
    config: PPOStageConfig,
    actors: Actors,
    warns: bool = False,
) -> tuple[Prompts, Counter[str]]:
    """Encode the prompts of canonical rows; keep those that leave room for
    `ppo.response_length` tokens, as counted by the policy and by each reward model. `warns`: say so
    if these are few.

    A response that has more tokens for a reward model is cut for scoring.
    """
    bad, response_length = config.dataset.on_bad_row, config.ppo.response_length
    budget, room = prompt_budget(config, actors)
    told = room if warns else None
    prompts, dropped = encode_prompts(rows, actors.tokenizer, budget, bad, told)
    for model in models:
        where = f"the context of {model.max_length} tokens of the reward model {model.path}"
        room = _room(response_length, model.max_length, where)

        def length(prompt: dict[str, Any], model: RewardModelScorer = model) -> int:
            if model.tokenizer_hash == actors.tokenizer_hash:
                return len(prompt["input_ids"])
            return model.prompt_length(prompt["prompt"])

        lengths = list(not_refused(prompts, length, bad, dropped))
        kept = [prompts[row] for row, num_tokens in lengths if num_tokens <= room]
        if len(kept) < len(lengths):
            reason = (
                f"leaving no room for ppo.response_length={response_length} tokens in the context "
                f"of {model.max_length} of {model.path}"
            )
            dropped[reason] += len(lengths) - len(kept)
        prompts = kept
    return prompts, dropped
