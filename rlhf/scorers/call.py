"""Loading scorers, calling them, checking and combining what they return."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf.config import InputError, ScorerConfig, check_scorer_config, load_object
from rlhf.scorers.reward_model import RewardModelScorer

Scorer = Callable[..., Any]


class Tokens(NamedTuple):
    """Token ids as a policy saw and sampled them, B lists each.

    Attributes:
        prompts: of the prompts.
        responses: of the responses, stop token included.
        rendering: `hash_rendering` of the tokenizer that they are of.
    """

    prompts: Sequence[Sequence[int]]
    responses: Sequence[Sequence[int]]
    rendering: str


@dataclass
class Scores:
    """What scorers say about B responses; float32 on the CPU, every number finite.

    Attributes:
        total: (B,) scores, rewards per token included.
        dense: the rewards per token, (num_tokens,) for each response; None where there are none.
        components: name -> (B,) total of each component of a `CombinedScorer`.
        cut: (B,) bool, True where a reward model read only the beginning of a response, as prompt
            and response are longer than its context; None where there is no reward model.
    """

    total: Tensor
    dense: list[Tensor] | None = None
    components: dict[str, Tensor] = field(default_factory=dict)
    cut: Tensor | None = None

    @property
    def dense_total(self) -> Tensor:
        """(B,) the part of `total` that is given at the tokens."""
        if self.dense is None:
            return torch.zeros_like(self.total)
        return torch.stack([rewards.sum() for rewards in self.dense])


# --- Several scorers ----------------------------------------------------------------------------


class CombinedScorer:
    """Several scorers as one.

    Attributes:
        parts: name -> scorer.
    """

    def __init__(
        self,
        parts: dict[str, Scorer],
        weights: Sequence[float],
        combine: str = "weighted_sum",
        std_coef: float = 1.0,
        gates: Sequence[float | None] = (),
    ):
        """Take scorers by name; for the rest see `combine_scores` and `counting` (no `gates`: as
        many None)."""
        self.parts, self.combine, self.std_coef = parts, combine, std_coef
        self.weights = torch.tensor(weights)
        self.gates = torch.tensor([gate or 0.0 for gate in gates or [None] * len(parts)])

    def __call__(self, prompts: Sequence[Any], responses: Sequence[str]) -> Tensor:
        """Score responses given as text, (B,) float32 on the CPU."""
        return checked_scores(self, prompts, responses, "the scorer")

    def join(self, scores: dict[str, Scores]) -> Scores:
        """Combine what the parts said.

        Raises:
            InputError: rewards per token, and a combination that is not linear.
        """
        totals = torch.stack([part.total for part in scores.values()])  # (K, B)
        counts = self.counting(totals)
        total = torch.zeros(totals.shape[1])
        for chosen in counts.unique(dim=1).T:  # responses for which the same components count
            rows = (counts == chosen[:, None]).all(dim=0)
            total[rows] = combine_scores(
                totals[chosen][:, rows], self.weights[chosen], self.combine, self.std_coef
            )
        components = {name: part.total for name, part in scores.items()}
        cuts = [part.cut for part in scores.values() if part.cut is not None]
        cut = torch.stack(cuts).any(dim=0) if cuts else None
        dense = [name for name, part in scores.items() if part.dense is not None]
        if not dense:
            return Scores(total, None, components, cut)
        if self.combine not in ("weighted_sum", "mean"):
            raise InputError(
                f"scorer.combine={self.combine} takes scores, but the component {dense[0]} gives "
                "rewards per token; use weighted_sum or mean"
            )
        divisor = counts.sum(dim=0) if self.combine == "mean" else 1
        weights = self.weights[:, None] / divisor * counts  # (K, B)
        pairs = list(zip(weights, scores.values(), strict=True))
        rewards = [
            torch.stack([w[row] * part.dense[row] for w, part in pairs if part.dense]).sum(dim=0)
            for row in range(len(total))
        ]
        return Scores(total, rewards, components, cut)

    def counting(self, totals: Tensor) -> Tensor:
        """Tell which components count for which response, (K, B) bool.

        Args:
            totals: (K, B) of the components, as they return them.
        """
        pairs = zip(self.parts.values(), totals, strict=True)
        return counting(torch.stack([raw_score(part, total) for part, total in pairs]), self.gates)

    def gated(self, totals: Tensor) -> Tensor | None:
        """Tell which responses a component with a gate scored alone, (B,) bool; None without gates.

        Args:
            totals: as of `counting`.
        """
        has_gate = self.gates > 0
        return self.counting(totals)[has_gate].any(dim=0) if has_gate.any() else None


def combine_scores(scores: Tensor, weights: Tensor, combine: str, std_coef: float) -> Tensor:
    """Make one score of several.

        two scorers, two responses:  scores 1 5 | 3 3,  weights 1 0.5,  std_coef 2
        weighted_sum 2.5 6.5   mean 2 4   min 1 3   mean_minus_std 0 2

    Args:
        scores: (K, B) of K scorers.
        weights: (K,); used by "weighted_sum" only.
        combine: "weighted_sum", "mean", "min" or "mean_minus_std".
        std_coef: how many standard deviations (over the K scorers, divisor K) are subtracted.

    Returns:
        (B,).

    Source: Coste et al. 2023 (arXiv 2310.02743): mean is eq. 3, min eq. 4 (WCO). Its eq. 5 (UWO)
        subtracts the variance; we subtract the standard deviation, which has the unit of the score,
        so that scaling all scores changes nothing.
    """
    if combine == "weighted_sum":
        return (weights[:, None] * scores).sum(dim=0)
    if combine == "min":
        return scores.amin(dim=0)
    mean = scores.mean(dim=0)
    return mean if combine == "mean" else mean - std_coef * scores.std(dim=0, unbiased=False)


def counting(raw: Tensor, gates: Tensor) -> Tensor:
    """Tell which of several scorers count for each response.

    One with a gate counts where the sigmoid of its raw score is below the gate, and those without
    then do not; elsewhere only those without count.

        the second has gate 0.15, two responses:  raw 1 4 | -2 1 (sigmoid 0.12 0.73)
        counting:                                 False True | True False

    Args:
        raw: (K, B) scores of K scorers, before normalisation.
        gates: (K,) in (0, 1); 0 for a scorer without one.

    Returns:
        (K, B) bool, at least one True for each response.

    Source: Llama 2 (arXiv 2307.09288), section 3.2.3: the safety score alone where it is below
        0.15, else the helpfulness score. Its prompts tagged as unsafe, for which the safety score
        always counts, are left out.
    """
    below = raw.sigmoid() < gates[:, None]
    return torch.where(below.any(dim=0), below, gates[:, None] == 0)


def raw_score(scorer: Scorer, score: Tensor) -> Tensor:
    """Undo the normalisation of a score; a Python function's has none."""
    if isinstance(scorer, RewardModelScorer):
        return score * scorer.model.std + scorer.model.mean
    return score


def component_names(scorer: Scorer) -> tuple[str, ...]:
    """Names of the components of a scorer; none unless it is a `CombinedScorer`."""
    return tuple(scorer.parts) if isinstance(scorer, CombinedScorer) else ()


def reward_models(scorer: Scorer) -> list[RewardModelScorer]:
    """The reward models that a scorer consists of."""
    parts = scorer.parts.values() if isinstance(scorer, CombinedScorer) else [scorer]
    return [part for part in parts if isinstance(part, RewardModelScorer)]


# --- Loading ------------------------------------------------------------------------------------


def load_scorer(
    config: ScorerConfig,
    device: torch.device | str = "cpu",
    dtype: str = "float32",
    field: str = "scorer.path",
    trust_remote_code: bool = False,
) -> Scorer:
    """Load what `scorer:` names: a reward model, a Python function, or several of these.

    Args:
        config: `path` is the `final/` of a reward stage, a Hub id, or `python:module.function`;
            `components` names several.
        dtype: of the weights of reward models.
        field: configuration key, for messages.
        trust_remote_code: whether Python files of reward models may run.

    Raises:
        InputError: a value out of range, or something that cannot be loaded.
    """
    check_scorer_config(config)
    if config.components:
        parts = {
            part.label: load_scorer(
                config.of_component(part),
                device,
                dtype,
                f"scorer.components[{i}].path",
                trust_remote_code,
            )
            for i, part in enumerate(config.components)
        }
        weights = [part.weight for part in config.components]
        gates = [part.gate for part in config.components]
        return CombinedScorer(parts, weights, config.combine, config.std_coef, gates)
    if config.path is None:
        raise InputError(
            f"{field} is missing: give the final/ of a reward stage, or python:module.function"
        )
    if config.path.startswith("python:"):
        return load_object(config.path, field)
    return RewardModelScorer(config, device, dtype, field, trust_remote_code)


# --- Calling ------------------------------------------------------------------------------------


def checked_scores(
    scorer: Scorer, prompts: Sequence[Any], responses: Sequence[str], field: str
) -> Tensor:
    """Score responses given as text, (B,) float32 on the CPU; see `score_responses`.

    Raises:
        InputError: also where a prompt with its response is longer than a reward model's context.
    """
    scores = score_responses(scorer, prompts, responses, field)
    if scores.cut is not None and scores.cut.any():
        raise InputError(
            f"{int(scores.cut.sum())} of {len(responses)} responses are with their prompt longer "
            f"than the context of {field}; shorten them"
        )
    return scores.total


def score_responses(
    scorer: Scorer,
    prompts: Sequence[Any],
    responses: Sequence[str],
    field: str,
    tokens: Tokens | None = None,
) -> Scores:
    """Call a scorer and check what comes back.

    A reward model scores the token ids where it renders conversations as their tokenizer does, else
    the text as a complete response, by its own tokenizer and template. A Python function with a
    parameter `response_ids` is given the ids of the responses there, and may return for each
    response a list of rewards, one per token. A response that is too long for the context of a
    reward model is cut, and marked in `cut`.

    Args:
        prompts, responses: B each.
        field: what to call the scorer in messages.
        tokens: where the responses were sampled.

    Raises:
        InputError: the scorer failed, or did not return one finite number per response (or per
            token), or a prompt leaves no room in a reward model's context. A failure never becomes
            a score of 0.
    """
    if isinstance(scorer, CombinedScorer):
        return scorer.join(
            {
                name: score_responses(part, prompts, responses, f"{field}'s {name}", tokens)
                for name, part in scorer.parts.items()
            }
        )
    if not isinstance(scorer, RewardModelScorer):
        return _call(scorer, prompts, responses, field, tokens)
    if scorer.scores_texts:
        scores, cut = scorer.score_texts(prompts, responses)
        return Scores(check_scores(scores, responses, field), cut=cut)
    pairs: list[tuple[Sequence[int], Sequence[int]]]
    if tokens is None or tokens.rendering != scorer.tokenizer_hash:
        texts = zip(prompts, responses, strict=True)
        pairs = [scorer.encode_pair(prompt, response) for prompt, response in texts]
    else:
        pairs = list(zip(tokens.prompts, tokens.responses, strict=True))
    sequences, cut = scorer.cut(pairs)
    return Scores(check_scores(scorer.score_ids(sequences), responses, field), cut=cut)


def _call(
    scorer: Scorer,
    prompts: Sequence[Any],
    responses: Sequence[str],
    field: str,
    tokens: Tokens | None,
) -> Scores:
    """Call a Python scorer."""
    arguments: dict[str, Any] = {}
    parameter = _parameters(scorer).get("response_ids")
    if parameter is not None and tokens is not None:
        arguments["response_ids"] = [list(ids) for ids in tokens.responses]
    elif parameter is not None and parameter.default is parameter.empty:
        raise InputError(
            f"{field} needs response_ids, but these responses are text; give the parameter a "
            "default, or score them where they are sampled"
        )
    try:
        result = scorer(prompts, responses, **arguments)
        rows = [torch.as_tensor(row, dtype=torch.float32).detach().cpu() for row in result]
    except Exception as error:
        raise InputError(
            f"{field} failed on a batch of {len(responses)} responses: "
            f"{type(error).__name__}: {error}"
        ) from error
    lists = [row for row in rows if row.dim()]
    if not lists:
        scores = torch.stack(rows) if rows else torch.zeros(0)
        return Scores(check_scores(scores, responses, field))
    if not arguments:
        raise InputError(
            f"{field} must return one score per response: expected shape ({len(responses)},), got "
            f"{(len(rows), *lists[0].shape)}; rewards per token need the parameter response_ids, "
            "and responses that were sampled"
        )
    _check_dense(rows, arguments["response_ids"], responses, field)
    return Scores(torch.stack([row.sum() for row in rows]), rows)


def _parameters(scorer: Scorer) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(scorer).parameters)
    except ValueError:  # of a built-in function: Python does not know
        return {}


def check_scores(scores: Tensor, responses: Sequence[Any], field: str) -> Tensor:
    """Check shape and finiteness of scores; see `score_responses`."""
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


def _check_dense(
    rows: list[Tensor], ids: Sequence[Sequence[int]], responses: Sequence[str], field: str
) -> None:
    """Check that rewards per token are one finite number for each token."""
    if len(rows) != len(ids):
        raise InputError(f"{field} must return {len(ids)} lists of rewards, got {len(rows)}")
    for row, tokens, response in zip(rows, ids, responses, strict=True):
        if row.shape != (len(tokens),):
            raise InputError(
                f"{field} must return one reward per token of response_ids, stop token included: "
                f"expected shape ({len(tokens)},), got {tuple(row.shape)} for {response[:200]!r}"
            )
        if not row.isfinite().all():
            raise InputError(
                f"{field} returned {row.tolist()} for {response[:200]!r}; a reward must be a "
                "finite number"
            )
