"""Knobs of what scores responses: one scorer, or several combined."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from rlhf.config.fields import group, knob, knobs
from rlhf.config.knobs.endpoint import EndpointConfig
from rlhf.config.objects import JUDGE, is_judge, is_python, is_remote

NORMALIZATIONS = ("demo_mean_zero", "standardise", "none")
COMBINATIONS = ("weighted_sum", "mean", "min", "mean_minus_std")


@knobs
class ScorerComponent:
    """One of several scorers."""

    path: str | None = None
    """final/ of a reward stage, module.function, a remote scorer's URL, or judge:<rubric>."""
    weight: float = 1.0
    """Factor of its scores in a weighted sum; must not be 0."""
    normalize: str | None = knob(None, choices=NORMALIZATIONS)
    """As scorer.normalize (null: what that says)."""
    name: str | None = None
    """Name in metrics (null: made from path)."""
    gate: float | None = knob(None, gt=0, lt=1)
    """Where sigmoid(its raw score) is below this, the component counts alone, elsewhere not at all
    (Llama 2: safety, 0.15; null: no gate)."""

    @property
    def label(self) -> str:
        """Name in metrics: that of the run, directory, Python function or rubric; or the URL."""
        if self.name is not None:
            return self.name
        path = str(self.path)
        if is_judge(path):
            return Path(path.removeprefix(JUDGE)).name.removesuffix(".yaml")
        if is_remote(path):
            return re.sub(r"[^\w.-]+", "-", path.partition("://")[2]).strip("-")
        if is_python(path):
            return path.rpartition(".")[2]
        parts = [part for part in Path(path).parts if part not in ("reward", "final")]
        return parts[-1] if parts else path


@knobs
class ScorerConfig:
    """What scores a response: `path`, or several `components`."""

    path: str | None = None
    """final/ of a reward stage, a Python function as module.function, the URL of a remote scorer,
    or judge:<rubric> (null: this run's reward model, or components)."""
    normalize: str = knob("demo_mean_zero", choices=NORMALIZATIONS)
    """demo_mean_zero: subtract the mean score of the reward stage's normalization.completions;
    standardise: also divide by their standard deviation; none. Reward models only."""
    batch_size: int = knob(32, ge=1)
    """Sequences that are scored together, or sent in one request; no effect on Python scorers."""
    components: list[ScorerComponent] = knob([])
    """Several scorers in place of path: [{path: a, weight: 0.5}, {path: b, gate: 0.15}, ...]."""
    combine: str = knob("weighted_sum", choices=COMBINATIONS)
    """How components become one score: weighted_sum, or without weights mean, min or mean_minus_std
    (mean - std_coef x standard deviation)."""
    std_coef: float = knob(1.0, ge=0)
    """Factor of the standard deviation in mean_minus_std."""
    while_sampling: bool = True
    """Remote scorers and judges behind an endpoint: score responses that have ended while others
    are sampled, batch_size at a time."""
    endpoint: EndpointConfig = group(EndpointConfig)

    def __post_init__(self) -> None:
        """Accept a dict for a component, as the command line does."""
        self.components = [
            ScorerComponent(**component) if isinstance(component, dict) else component
            for component in self.components
        ]

    def of_component(self, component: ScorerComponent) -> ScorerConfig:
        """Configuration of one component as a scorer of its own."""
        return self.of_path(component.path, component.normalize or self.normalize)

    def of_path(self, path: str | None, normalize: str) -> ScorerConfig:
        """Configuration of another scorer, which is asked in the same way."""
        return ScorerConfig(path, normalize, self.batch_size, endpoint=replace(self.endpoint))
