"""Knobs of what scores a response: one scorer, or several that are combined."""

from __future__ import annotations

from pathlib import Path

from rlhf.config.fields import knob, knobs

NORMALIZATIONS = ("demo_mean_zero", "standardise", "none")
COMBINATIONS = ("weighted_sum", "mean", "min", "mean_minus_std")


@knobs
class ScorerComponent:
    """One of several scorers."""

    path: str | None = None
    """final/ of a reward stage, or python:module.function."""
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
        """Name in metrics: that of the run, of the directory or of the Python function."""
        if self.name is not None:
            return self.name
        path = str(self.path)
        if path.startswith("python:"):
            return path.rpartition(".")[2]
        parts = [part for part in Path(path).parts if part not in ("reward", "final")]
        return parts[-1] if parts else path


@knobs
class ScorerConfig:
    """What scores a response: `path`, or several `components`."""

    path: str | None = None
    """final/ of a reward stage, or python:module.function (null: this run's, or components)."""
    normalize: str = knob("demo_mean_zero", choices=NORMALIZATIONS)
    """demo_mean_zero: subtract the mean score of the reward stage's normalization.completions;
    standardise: also divide by their standard deviation; none. Reward models only."""
    batch_size: int = knob(32, ge=1)
    """Sequences that are scored together; reward models only."""
    components: list[ScorerComponent] = knob([])
    """Several scorers in place of path: [{path: a, weight: 0.5}, {path: b, gate: 0.15}, ...]."""
    combine: str = knob("weighted_sum", choices=COMBINATIONS)
    """How components become one score: weighted_sum, or without weights mean, min or mean_minus_std
    (mean - std_coef x standard deviation)."""
    std_coef: float = knob(1.0, ge=0)
    """Factor of the standard deviation in mean_minus_std."""

    def of_component(self, component: ScorerComponent) -> ScorerConfig:
        """Configuration of one component as a scorer of its own."""
        return ScorerConfig(component.path, component.normalize or self.normalize, self.batch_size)
