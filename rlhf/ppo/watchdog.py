"""The watchdog: rules on every update's metrics, each with a threshold and a remedy.

A rule that fires writes a row to `watchdog.jsonl`; the first time, it also warns in the terminal; a
table at the end says how often. Thresholds stand under `watchdog:`; null turns a rule off. Only
`kl_budget` ends the run. Numbers that are not finite stop it in `rlhf.ppo.update`, and
`ppo.target_kl` acts inside an update, there too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config import PPOStageConfig
from rlhf.console import is_main_process, table, warn
from rlhf.metrics import append_jsonl

Metrics = dict[str, float]
# of the update's metrics and of the first update's: the number to judge, None when there is none
Measure = Callable[[Metrics, Metrics], float | None]


@dataclass(frozen=True)
class Rule:
    """A number that must not pass a threshold.

    Attributes:
        measure: see `Measure`.
        above: True where too large is bad, False where too small is.
        message: what it means and what to do; `{value}` and `{limit}` are filled in.
    """

    measure: Measure
    above: bool
    message: str


def _metric(name: str) -> Measure:
    return lambda now, first: now.get(name)


def _largest_ratio(now: Metrics, first: Metrics) -> float | None:
    if "ratio_max" not in now:
        return None
    return max(now["ratio_max"], 1 / max(now["ratio_min"], 1e-30))


def _errors_below_zero(now: Metrics, first: Metrics) -> float | None:
    standard_error = now["kl_std"] / now["num_sequences"] ** 0.5
    return -now["kl"] / standard_error if standard_error > 0 else None


def _share_of_first(name: str) -> Measure:
    return lambda now, first: now[name] / first[name] if first.get(name) and name in now else None


def _drift_of_length(now: Metrics, first: Metrics) -> float | None:
    lengths = (now["response_length"], first["response_length"])
    return max(lengths) / min(lengths)


def _largest_norm(now: Metrics, first: Metrics) -> float | None:
    norms = [now[name] for name in ("grad_norm", "critic_grad_norm") if name in now]
    return max(norms, default=None)


LESS = "lower ppo.learning_rate or ppo.num_ppo_epochs, or set ppo.target_kl (e.g. 0.02)"
RULES: dict[str, Rule] = {
    "kl_budget": Rule(
        _metric("kl"),
        True,
        "KL to the reference is {value:.3g} nats per response, over the budget of {limit:g}: the "
        "run ends here. Raise ppo.kl_coef, or watchdog.kl_budget",
    ),
    "first_ratio": Rule(
        _metric("first_ratio_deviation"),
        True,
        "the first minibatch's ratio is off 1 by {value:.2g}: rollout and training disagree about "
        "the policy. Use precision=float32 and another model.attn_implementation to find out why",
    ),
    "ratio": Rule(
        _largest_ratio, True, f"a token's probability changed by a factor of {{value:.3g}}: {LESS}"
    ),
    "clip_fraction": Rule(
        _metric("clip_fraction"), True, f"{{value:.0%}} of the tokens are clipped: {LESS}"
    ),
    "negative_kl": Rule(
        _errors_below_zero,
        True,
        "the k1 estimate of KL is {value:.1f} standard errors below 0. A little below is chance, "
        "this is not: the log-probs are not of the distribution that was sampled from. Leave "
        "ppo.top_p=1 and ppo.top_k=0, and see the metric sampler_gap",
    ),
    "entropy_drop": Rule(
        _share_of_first("entropy"),
        False,
        "entropy fell to {value:.0%} of the first update's: responses become all alike. Raise "
        "ppo.kl_coef or ppo.entropy_coef, or lower ppo.learning_rate",
    ),
    "explained_variance": Rule(
        _metric("explained_variance"),
        False,
        "the critic predicts returns worse than a constant would (explained variance "
        "{value:.2f}): its error steers the policy. Set critic.warmup_updates=5 or more, or raise "
        "critic.learning_rate",
    ),
    "missing_eos_penalty": Rule(
        _metric("finished_score"),
        False,
        "finished responses score {value:.2f} on average, less than ppo.missing_eos_penalty="
        "{limit:g}: not ending pays. Lower the penalty, or set scorer.normalize=standardise",
    ),
    "eos_rate": Rule(
        _metric("eos_rate"),
        False,
        "only {value:.0%} of the responses end with a stop token: raise ppo.response_length, lower "
        "ppo.missing_eos_penalty, or train the SFT stage longer",
    ),
    "length_drift": Rule(
        _drift_of_length,
        True,
        "the mean response length changed by a factor of {value:.1f} since the first update: the "
        "scorer may pay for length. Read samples.jsonl, and the reward stage's length-matched "
        "accuracy; raise ppo.kl_coef",
    ),
    "score_std": Rule(
        _metric("score_std"),
        False,
        "the scores of a rollout hardly differ (standard deviation {value:.2g}): there is nothing "
        "to learn from. Check the scorer, and ppo.temperature",
    ),
    "grad_norm": Rule(
        _largest_norm,
        True,
        "gradient norm {value:.3g} before clipping: lower the learning rates, or set "
        "scorer.normalize=standardise if scores are large",
    ),
    "sampler_gap": Rule(
        _metric("sampler_gap"),
        True,
        "sampler and training forward differ by {value:.2g} nats at a token: use precision=float32 "
        "or another model.attn_implementation",
    ),
}


class Watchdog:
    """Judges every update by `RULES`.

    Attributes:
        first: metrics of the first update that had them, which later ones are compared with.
        fired: rule -> how often, in which update first, and its worst value.
    """

    def __init__(self, config: PPOStageConfig, directory: Path):
        self.limits: dict[str, float | None] = dataclasses.asdict(config.watchdog)
        # whitened scores have another scale than `finished_score`
        penalty = None if config.ppo.whiten_scores else config.ppo.missing_eos_penalty
        self.limits["missing_eos_penalty"] = penalty
        self.path = directory / "watchdog.jsonl"
        self.warmup_updates = config.critic.warmup_updates
        self.num_sequences = config.ppo.batch_size
        self.first: Metrics = {}
        self.fired: dict[str, dict[str, float]] = {}

    def check(self, update: int, metrics: Metrics) -> set[str]:
        """Judge one update's metrics; write and say what fires.

        Args:
            update: number of the update, from 1.

        Returns:
            Names of the rules that fired.
        """
        self.first = metrics | self.first
        now = metrics | {"num_sequences": self.num_sequences}
        found = {}
        for name, rule in RULES.items():
            limit, value = self.limits[name], rule.measure(now, self.first)
            if limit is None or value is None:
                continue
            if name == "explained_variance" and update <= self.warmup_updates:
                continue
            if value > limit if rule.above else value < limit:
                found[name] = value
                self._fire(update, name, value)
        return set(found)

    def _fire(self, update: int, name: str, value: float) -> None:
        rule, limit = RULES[name], self.limits[name]
        text = rule.message.format(value=value, limit=limit)
        if name not in self.fired:
            warn(f"update {update}, watchdog.{name}: {text}")
            self.fired[name] = {"updates": 0, "first": update, "worst": value}
        entry = self.fired[name]
        entry["updates"] += 1
        entry["worst"] = (max if rule.above else min)(entry["worst"], value)
        if is_main_process():
            row = {"step": update, "rule": name, "value": value, "limit": limit, "message": text}
            append_jsonl(self.path, [row])

    def summary(self) -> str:
        """Table of the rules that fired; empty when none did."""
        rows = [
            (name, entry["updates"], entry["first"], entry["worst"], self.limits[name])
            for name, entry in self.fired.items()
        ]
        header = ("watchdog", "updates", "first in", "worst", "limit")
        return f"\n{table(rows, header)}\nmessages: {self.path}" if rows else ""

    def state(self) -> dict[str, Any]:
        """What resuming needs, as JSON values."""
        return {"first": self.first, "fired": self.fired}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` returned."""
        self.first, self.fired = state["first"], state["fired"]
