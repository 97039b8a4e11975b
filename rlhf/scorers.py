"""Scorers: (prompts, responses) -> one score per response.

A scorer is any callable `(prompts, responses) -> (B,) numbers`, with `prompts` as they stand in the
data (text or messages) and `responses` as text. The same objects serve PPO, evaluation and library
users. Left out: weighted sums, ensembles, remote scorers, per-token rewards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.checkpoint import hash_tokenizer, require_stage
from rlhf.config import InputError, ModelConfig, ScorerConfig, load_object
from rlhf.data import encode_prompt, encode_response
from rlhf.models import ScalarModel, freeze, load_reward_model, load_tokenizer, sequence_scores

Scorer = Callable[[Sequence[Any], Sequence[str]], Any]


class RewardModelScorer:
    """A trained reward model; scores are normalised as its stage recorded."""

    def __init__(
        self, config: ScorerConfig, device: torch.device | str = "cpu", dtype: str = "float32"
    ):
        """Load the model, its tokenizer and its score statistics.

        Args:
            config: `path` is the `final/` of a reward stage, or any one-label sequence classifier;
                `normalize` is "none", "shift" (subtract the mean) or "standardise" (also divide by
                the standard deviation).

        Raises:
            InputError: not a reward model, or a normalisation is asked for and no statistics are
                stored.
        """
        assert config.path is not None
        record = require_stage(config.path, ("reward",), "scorer.path")
        mean, std = score_statistics(config, record)
        source = ModelConfig(path=config.path, dtype=dtype)
        self.tokenizer = load_tokenizer(source)
        self.tokenizer_hash = hash_tokenizer(self.tokenizer)
        self.model = freeze(ScalarModel(load_reward_model(source), mean, std)).to(device)
        self.batch_size = config.batch_size

    def __call__(self, prompts: Sequence[Any], responses: Sequence[str]) -> Tensor:
        """Score complete responses given as text, (B,) float32 on the CPU."""
        return self.score_ids(
            [
                encode_prompt(prompt, self.tokenizer)
                + encode_response(prompt, response, self.tokenizer)
                for prompt, response in zip(prompts, responses, strict=True)
            ]
        )

    @torch.no_grad()
    def score_ids(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Score token sequences (prompt + response) of the reward model's own tokenizer, (B,)
        float32 on the CPU."""
        return score_sequences(self.model, sequences, self.batch_size)


@torch.no_grad()
def score_sequences(model: Any, sequences: Sequence[Sequence[int]], batch_size: int) -> Tensor:
    """Score token sequences with a `ScalarModel` in batches of similar length.

    Returns:
        (len(sequences),) float32 on the CPU, in the order given.
    """
    device = next(model.parameters()).device
    scores = torch.zeros(len(sequences))
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        width = len(sequences[rows[-1]])
        ids = torch.tensor(
            [[*sequences[i], *[0] * (width - len(sequences[i]))] for i in rows], device=device
        )
        mask = torch.tensor(
            [[j < len(sequences[i]) for j in range(width)] for i in rows], device=device
        )
        scores[rows] = sequence_scores(model, ids, mask).cpu()
    return scores


def score_statistics(config: ScorerConfig, record: Any) -> tuple[float, float]:
    """Return (mean, std) to normalise with: score = (raw - mean) / std."""
    if config.normalize == "none":
        return 0.0, 1.0
    if record is None or record.score_mean is None:
        raise InputError(
            f"scorer.normalize={config.normalize} needs the score statistics that the reward stage "
            f"stores, but {config.path} has none; set scorer.normalize=none"
        )
    return record.score_mean, (
        record.score_std or 1.0
    ) if config.normalize == "standardise" else 1.0


def load_scorer(
    config: ScorerConfig, device: torch.device | str = "cpu", dtype: str = "float32"
) -> Scorer:
    """Load what `scorer:` names: a reward model directory, or `python:module.function`."""
    if config.path is None:
        raise InputError(
            "scorer.path is missing: give the final/ of a reward stage, or python:module.function"
        )
    if config.path.startswith("python:"):
        return load_object(config.path, "scorer.path")
    return RewardModelScorer(config, device, dtype)


def checked_scores(
    scorer: Scorer, prompts: Sequence[Any], responses: Sequence[str], field: str
) -> Tensor:
    """Call a scorer and check what comes back.

    Returns:
        (B,) float32 on the CPU.

    Raises:
        InputError: the scorer failed, gave another number of scores, or a score is not finite. A
            failure never becomes a score of 0.
    """
    try:
        result = scorer(prompts, responses)
    except Exception as error:
        raise InputError(
            f"{field} failed on a batch of {len(responses)} responses: {error!r}"
        ) from error
    return check_scores(
        torch.as_tensor(result, dtype=torch.float32).detach().cpu(), responses, field
    )


def check_scores(scores: Tensor, responses: Sequence[Any], field: str) -> Tensor:
    """Check shape and finiteness of scores; see `checked_scores`."""
    if scores.shape != (len(responses),):
        raise InputError(
            f"{field} must return one score per response: expected shape ({len(responses)},), got "
            f"{tuple(scores.shape)}"
        )
    bad = (~scores.isfinite()).nonzero()
    if len(bad):
        row = int(bad[0])
        raise InputError(
            f"{field} returned {scores[row].item()} for {len(bad)} of {len(responses)} responses, "
            f"the first being {str(responses[row])[:200]!r}; a score must be a finite number"
        )
    return scores
