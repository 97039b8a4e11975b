"""The watchdog: rules on every update's metrics, each with a threshold and a remedy.

`loop.py` asks it after every update. A rule that fires writes a row to `watchdog.jsonl`; the first
time, it also warns. The thresholds are the settings under `watchdog:`; null turns a rule off. Only
`kl_budget` ends the run. `update.py` acts on numbers that are not finite, and on `ppo.target_kl`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rlhf.config import PPOStageConfig
from rlhf.console import is_main_process, table, warn
from rlhf.functional import normal_score
from rlhf.metrics import append_jsonl

Metrics = dict[str, float]


LESS = "lower ppo.learning_rate or ppo.num_ppo_epochs, or set ppo.target_kl (e.g. 0.02)"
# rule -> what it means that the rule fires, and the remedy
RULES = {
    "kl_budget": (
        "KL to the reference is {value:.3g} nats per response, over the budget of {limit:g}: the "
        "run ends here. Raise ppo.kl_coef, or watchdog.kl_budget"
    ),
    "first_ratio": (
        "the first minibatch's ratio differs from 1 by {value:.2g}: rollout and training disagree "
        "about the policy. Use precision=float32, or another model.attn_implementation, to find "
        "out why"
    ),
    "ratio": f"a token's probability changed by a factor of {{value:.3g}}: {LESS}",
    "clip_fraction": f"{{value:.0%}} of the tokens are clipped: {LESS}",
    "negative_kl": (
        "the k1 estimate of KL is {value:.1f} standard errors below 0, allowing for the number of "
        "responses. A little below is chance, this is not: the log-probs are not those of the "
        "sampled distribution. Keep "
        "ppo.top_p=1 and ppo.top_k=0, and see the metric sampler_gap"
    ),
    "entropy_drop": (
        "entropy fell to {value:.0%} of the first update's: responses become alike. Raise "
        "ppo.kl_coef or ppo.entropy_coef, or lower ppo.learning_rate"
    ),
    "explained_variance": (
        "the critic predicts returns worse than a constant would (explained variance "
        "{value:.2f}): its error steers the policy. Set critic.must_explain=true, or raise "
        "critic.learning_rate"
    ),
    "missing_eos_penalty": (
        "finished responses score {value:.2f} on average, less than ppo.missing_eos_penalty="
        "{limit:g}: not ending pays. Lower the penalty, or set scorer.normalize=standardise"
    ),
    "eos_rate": (
        "only {value:.0%} of the responses end with a stop token: raise ppo.response_length, or "
        "train the policy longer with SFT{penalty}"
    ),
    "length_drift": (
        "the mean response length changed by a factor of {value:.1f} since the first update: the "
        "scorer may pay for length. Read samples.jsonl, and the reward stage's length-matched "
        "accuracy; raise ppo.kl_coef"
    ),
    "score_std": (
        "the scores of a rollout hardly differ (standard deviation {value:.2g}): there is nothing "
        "to learn from. Check the scorer, and ppo.temperature"
    ),
    "grad_norm": (
        "gradient norm {value:.3g} before clipping: lower the learning rates, or set "
        "scorer.normalize=standardise if scores are large"
    ),
    "sampler_gap": (
        "sampler and training forward differ by {value:.2g} nats at a token: use precision=float32 "
        "or another model.attn_implementation"
    ),
}


# rules that fire if the number is below the threshold; the others fire above it
BELOW = ("entropy_drop", "explained_variance", "missing_eos_penalty", "eos_rate", "score_std")
# rules that judge a metric of another name
METRIC_OF = {
    "kl_budget": "kl",
    "first_ratio": "first_ratio_deviation",
    "missing_eos_penalty": "finished_score",
}


def measure(now: Metrics, first: Metrics, num_sequences: int) -> Metrics:
    """Compute the number that each rule judges; rules whose metrics are missing have none."""
    metric_of = {rule: METRIC_OF.get(rule, rule) for rule in RULES}
    values = {rule: now[metric] for rule, metric in metric_of.items() if metric in now}
    if now.get("critic_steers") == 0:
        values.pop("explained_variance", None)
    if "ratio_max" in now:
        values["ratio"] = max(now["ratio_max"], 1 / max(now["ratio_min"], 1e-30))
    degrees = num_sequences - 1  # kl_std divides by num_sequences: its unbiased error, by this
    if degrees and now["kl_std"] > 0:
        t = -now["kl"] / (now["kl_std"] / degrees**0.5)
        values["negative_kl"] = normal_score(t, degrees)
    if first.get("entropy") and "entropy" in now:
        values["entropy_drop"] = now["entropy"] / first["entropy"]
    lengths = now["response_length"], first["response_length"]
    values["length_drift"] = max(lengths) / min(lengths)
    norms = [now[name] for name in ("grad_norm", "critic_grad_norm") if name in now]
    if norms:
        values["grad_norm"] = max(norms)
    return values


class Watchdog:
    """Judges every update by `RULES`.

    Attributes:
        first: metrics of the first update that had them; later updates are compared with these.
        fired: rule -> how often it fired, in which update first, and its worst value.
    """

    def __init__(self, config: PPOStageConfig, directory: Path):
        self.limits: dict[str, float | None] = dataclasses.asdict(config.watchdog)
        # whitened scores are not on the scale of `finished_score`
        penalty = None if config.ppo.whiten_scores else config.eos_penalty
        self.limits["missing_eos_penalty"] = penalty
        self.path = directory / "watchdog.jsonl"
        self.warmup_updates = config.critic.warmup_updates
        self.num_sequences = config.ppo.batch_size
        self.first: Metrics = {}
        self.fired: dict[str, dict[str, float]] = {}

    def check(self, update: int, metrics: Metrics) -> set[str]:
        """Judge the metrics of an update (counted from 1); return the names of the rules that
        fired."""
        self.first = metrics | self.first
        values = measure(metrics, self.first, self.num_sequences)
        fired = set()
        for name in RULES:
            limit, value = self.limits[name], values.get(name)
            warms_up = name == "explained_variance" and update <= self.warmup_updates
            if limit is None or value is None or warms_up:
                continue
            if value < limit if name in BELOW else value > limit:
                fired.add(name)
                self._fire(update, name, value)
        return fired

    def _fire(self, update: int, name: str, value: float) -> None:
        limit = self.limits[name]
        penalty = self.limits["missing_eos_penalty"]
        stricter = "" if penalty is None else ", or lower ppo.missing_eos_penalty={:g}"
        more = stricter.format(penalty)
        text = RULES[name].format(value=value, limit=limit, penalty=more)
        if name not in self.fired:
            warn(f"update {update}, watchdog.{name}: {text}")
            self.fired[name] = {"updates": 0, "first": update, "worst": value}
        entry = self.fired[name]
        entry["updates"] += 1
        entry["worst"] = (min if name in BELOW else max)(entry["worst"], value)
        if is_main_process():
            row = {"step": update, "rule": name, "value": value, "limit": limit, "message": text}
            append_jsonl(self.path, [row])

    def summary(self) -> str:
        """A table of the rules that fired; empty if none did."""
        rows = [
            (name, entry["updates"], entry["first"], entry["worst"], self.limits[name])
            for name, entry in self.fired.items()
        ]
        header = ("watchdog", "updates", "first in", "worst", "limit")
        return f"\n{table(rows, header)}\nmessages: {self.path}" if rows else ""

    def state(self) -> dict[str, Any]:
        """Return what resuming needs, as JSON values."""
        return {"first": self.first, "fired": self.fired}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.first, self.fired = state["first"], state["fired"]
