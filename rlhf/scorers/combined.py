"""Several scorers as one, and loading what `scorer:` names; the formulas are in
`rlhf.functional.scores`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.config import (
    InputError,
    ModelConfig,
    ScorerConfig,
    check_scorer_config,
    is_judge,
    is_python,
    is_remote,
    load_object,
    one_line,
)
from rlhf.functional import combine_scores, component_weights, counting
from rlhf.scorers.call import (
    BuiltInScorer,
    Columns,
    Scorer,
    Scores,
    Tokens,
    counts_of,
    score_responses,
)
from rlhf.scorers.judge import Judge
from rlhf.scorers.remote import RemoteScorer
from rlhf.scorers.reward_model import RewardModelScorer


class CombinedScorer(BuiltInScorer):
    """Several scorers as one."""

    def __init__(
        self,
        parts: dict[str, Scorer],
        weights: Sequence[float],
        combine: str = "weighted_sum",
        std_coef: float = 1.0,
        gates: Sequence[float | None] = (),
    ):
        """Take scorers by name.

        Args:
            weights, combine, std_coef: see `rlhf.functional.combine_scores`.
            gates: see `rlhf.functional.counting`; None for a scorer without one, empty for none.
        """
        self.parts, self.combine, self.std_coef = parts, combine, std_coef
        self.num_at_once = min(getattr(part, "num_at_once", 0) for part in parts.values())
        self.weights = torch.tensor(weights)
        self.gates = torch.tensor([gate or 0.0 for gate in gates or [None] * len(parts)])

    def score(
        self, prompts: Any, responses: Any, field: str, tokens: Tokens | None, columns: Columns
    ) -> Scores:
        """Score by each part, and combine.

        Raises:
            InputError: rewards per token, and a combination that is not linear.
        """
        found = {
            name: score_responses(part, prompts, responses, f"{field}'s {name}", tokens, columns)
            for name, part in sorted(self.parts.items(), key=_may_fail_here)
        }
        scores = {name: found[name] for name in self.parts}
        components = {name: part.total for name, part in scores.items()}
        totals = torch.stack(list(components.values()))  # (K, B)
        weights = component_weights(self.counting(totals), self.weights, self.combine)  # (K, B)
        total = combine_scores(totals, weights, self.combine, self.std_coef)
        cuts = [part.cut for part in scores.values() if part.cut is not None]
        cut = torch.stack(cuts).any(dim=0) if cuts else None
        return Scores(total, self._join_dense(scores, weights), components, cut)

    def _join_dense(self, scores: dict[str, Scores], weights: Tensor) -> list[Tensor] | None:
        """Add up the parts' rewards per token, with (K, B) weights."""
        dense = {name: part.dense for name, part in scores.items() if part.dense is not None}
        if not dense:
            return None
        if self.combine not in ("weighted_sum", "mean"):
            raise InputError(
                f"scorer.combine={self.combine} takes one score per response, but the component "
                f"{next(iter(dense))} gives rewards per token; use weighted_sum or mean"
            )
        weight = dict(zip(scores, weights, strict=True))
        return [
            torch.stack([weight[name][row] * part[row] for name, part in dense.items()]).sum(dim=0)
            for row in range(weights.shape[1])
        ]

    def counts(self) -> dict[str, float]:
        """The counts of all parts together."""
        totals: Counter[str] = Counter()
        for part in self.parts.values():
            totals.update(counts_of(part))
        return dict(totals)

    def counting(self, totals: Tensor) -> Tensor:
        """Tell which components count for which response, (K, B) bool, from their (K, B) scores."""
        raw = totals.clone()
        for row, part in zip(raw, self.parts.values(), strict=True):
            if isinstance(part, RewardModelScorer):
                row.mul_(part.model.std).add_(part.model.mean)
        return counting(raw, self.gates)

    def gated(self, totals: Tensor) -> Tensor | None:
        """Tell which responses a component with a gate scored alone, (B,) bool, from the (K, B)
        scores of the components; None without gates."""
        has_gate = self.gates > 0
        return self.counting(totals)[has_gate].any(dim=0) if has_gate.any() else None


def _may_fail_here(item: tuple[str, Scorer]) -> bool:
    """True for a part that may fail on one process alone. Reward models come before it: where they
    are in slices, the processes read them together, and would wait for the failed one."""
    return not isinstance(item[1], RewardModelScorer)


def component_names(scorer: Scorer) -> tuple[str, ...]:
    """Names of the components of a `CombinedScorer`; empty for any other scorer."""
    return tuple(scorer.parts) if isinstance(scorer, CombinedScorer) else ()


def reward_models(scorer: Scorer) -> list[RewardModelScorer]:
    """The reward models among a scorer and its components."""
    return [part for part in _parts(scorer) if isinstance(part, RewardModelScorer)]


def judges(scorer: Scorer) -> list[Judge]:
    """The judges among a scorer and its components."""
    return [part for part in _parts(scorer) if isinstance(part, Judge)]


def _parts(scorer: Scorer) -> list[Scorer]:
    return [*scorer.parts.values()] if isinstance(scorer, CombinedScorer) else [scorer]


def instance(scorer: Any, label: str = "the scorer") -> Scorer:
    """The scorer; where it is a class, an object of it, which may keep state between calls."""
    if not isinstance(scorer, type):
        return scorer
    try:
        return scorer()
    except Exception as error:
        raise InputError(
            f"{label} is a class that cannot be made without arguments ({one_line(error)}); give "
            "its parameters defaults"
        ) from error


def python_scorers(scorer: Scorer) -> dict[str, Scorer]:
    """The Python scorers among a scorer and its components, by names for messages."""
    if isinstance(scorer, CombinedScorer):
        named = {f"the scorer's {name}": part for name, part in scorer.parts.items()}
    else:
        named = {"the scorer": scorer}
    return {name: part for name, part in named.items() if not isinstance(part, BuiltInScorer)}


def load_scorer(
    config: ScorerConfig,
    device: torch.device | str = "cpu",
    dtype: str = "float32",
    field: str = "scorer.path",
    trust_remote_code: bool = False,
    load: Callable[[ModelConfig, str], Any] | None = None,
) -> Scorer:
    """Load what `scorer:` names: a reward model, a Python function, or several of these.

    Args:
        config: `path` is the `final/` of a reward stage, a Hub id, `module.function`, a URL or
            `judge:<rubric>`; `components` names several.
        dtype: of the weights of reward models.
        field: configuration key of `path`, for messages.
        trust_remote_code: whether Python files of reward models may run.
        load: (model settings, field) -> the reward model; None reads whole models.
    """
    check_scorer_config(config)
    if config.components:
        parts = {}
        for i, part in enumerate(config.components):
            own, field = config.of_component(part), f"scorer.components[{i}].path"
            parts[part.label] = load_scorer(own, device, dtype, field, trust_remote_code, load)
        weights = [part.weight for part in config.components]
        gates = [part.gate for part in config.components]
        return CombinedScorer(parts, weights, config.combine, config.std_coef, gates)
    if config.path is None:
        raise InputError(
            f"{field} is missing: give the final/ of a reward stage, or module.function"
        )
    if is_judge(config.path):
        return Judge(config, field, trust_remote_code)
    if is_remote(config.path):
        return RemoteScorer(config, field)
    if is_python(config.path):
        return instance(load_object(config.path, field), f"{field}={config.path}")
    return RewardModelScorer(config, device, dtype, field, trust_remote_code, load)
