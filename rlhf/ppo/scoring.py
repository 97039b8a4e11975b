"""Scoring the responses of a rollout: after sampling, or elsewhere while others are sampled.

`rollout.py` calls it. Left out: what a scorer does (`rlhf.scorers`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from rlhf.config import PPOStageConfig
from rlhf.ppo.actors import Actors
from rlhf.sampling import Generation
from rlhf.scorers import (
    Scorer,
    Scores,
    ScoresInTheBackground,
    Tokens,
    counts_of,
    reward_models,
    score_responses,
)
from rlhf.tokenizer import response_text


def choose_scoring(config: PPOStageConfig, actors: Actors) -> str | None:
    """Have responses scored while others are sampled, where another process does that and vLLM,
    which returns all of them at once, does not sample; return what `describe_scoring` says."""
    elsewhere = getattr(actors.scorer, "num_at_once", 0) > 0
    if elsewhere and config.scorer.while_sampling and config.sampling.engine != "vllm":
        actors.score_group = config.scorer.batch_size
    return describe_scoring(config, actors)


def describe_scoring(config: PPOStageConfig, actors: Actors) -> str | None:
    """When responses are scored, in words; None where this process scores them itself."""
    at_once = getattr(actors.scorer, "num_at_once", 0)
    if not at_once:
        return None
    if not actors.score_group:
        reason = "vLLM" if config.scorer.while_sampling else "scorer.while_sampling=false"
        return f"after sampling ({reason})"
    requests = f"{at_once} group{'s' * (at_once > 1)} at once"
    return f"while others are sampled, in groups of {actors.score_group}, at most {requests}"


def score_while_sampling(
    actors: Actors, prompts: Sequence[dict[str, Any]], sample: Callable[..., Generation]
) -> tuple[Generation, Callable[[], Scores]]:
    """Have responses scored elsewhere while this process samples the others; return these and the
    function that waits for their scores."""

    def score(rows: Sequence[int], responses: Sequence[list[int]]) -> Callable[[], Scores]:
        return _to_score(actors, [prompts[row] for row in rows], responses)

    num_at_once = actors.scorer.num_at_once  # type: ignore[attr-defined]
    with ScoresInTheBackground(score, actors.score_group, num_at_once) as background:
        sampled = sample(ended=background.add)
    return sampled, background.result


def score_sampled(
    actors: Actors,
    prompts: Sequence[dict[str, Any]],
    responses: list[list[int]],
    scorer: Scorer | None = None,
    field: str = "the scorer",
) -> Scores:
    """Score sampled responses, on the CPU, without the penalty for a missing EOS.

    A given `scorer` replaces the one that PPO trains on; messages call it `field`.
    """
    used = actors.scorer if scorer is None else scorer
    with actors.in_use(*(model.model for model in reward_models(used))):
        return _to_score(actors, prompts, responses, used, field)()


def _to_score(
    actors: Actors,
    prompts: Sequence[dict[str, Any]],
    responses: Sequence[list[int]],
    scorer: Scorer | None = None,
    field: str = "the scorer",
) -> Callable[[], Scores]:
    """Read the responses as text; return the function that scores them."""
    tokens = Tokens([p["input_ids"] for p in prompts], responses, actors.tokenizer_hash)
    asked, pairs = [p["prompt"] for p in prompts], zip(responses, prompts, strict=True)
    texts = [response_text(ids, actors.tokenizer, p["prompt"]) for ids, p in pairs]
    names = prompts[0].get("columns", {}) if prompts else {}
    columns = {name: [p["columns"][name] for p in prompts] for name in names}
    used = actors.scorer if scorer is None else scorer
    return partial(score_responses, used, asked, texts, field, tokens, columns)


# --- What scorers were asked ----------------------------------------------------------------------


@contextmanager
def scorer_counts(
    scorers: Sequence[Scorer | None], accelerator: Accelerator
) -> Iterator[dict[str, float]]:
    """Give a dict, and fill it at the end of the block with what the scorers did inside, over all
    processes; nothing for scorers that do not count."""
    before, found = _totals(scorers), dict[str, float]()
    yield found
    mine = {name: value - before[name] for name, value in _totals(scorers).items()}
    if mine:
        parts = gather_object([mine])
        found |= {name: sum(part[name] for part in parts) for name in mine}


def _totals(scorers: Sequence[Scorer | None]) -> Counter[str]:
    totals: Counter[str] = Counter()
    for scorer in scorers:
        totals.update(counts_of(scorer))
    return totals
