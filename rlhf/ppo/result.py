"""What `train_ppo` returns, and the table that ends it: held-out scores before and after."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rlhf.config import PPOStageConfig
from rlhf.console import interval_text, table
from rlhf.data import few_rows
from rlhf.metrics import StageResult

Metrics = dict[str, float]

TABLE = (
    ("independent score", "eval_independent_score"),
    ("win rate against the answers before", "eval_win_rate"),
    ("KL to the reference, nats per response", "eval_kl"),
    ("response length, tokens", "eval_response_length"),
    ("share of responses that end with EOS", "eval_eos_rate"),
)


@dataclass(repr=False, kw_only=True)
class PPOResult(StageResult):
    """What `train_ppo` returns; see `StageResult` for the other attributes.

    Attributes:
        before: as `after`, of the policy before the first update.
        update: the policy in `directory` is from after this update.
    """

    before: Metrics = field(default_factory=dict)
    update: int = 0


def finished_result(config: PPOStageConfig, metrics: Metrics, directory: Path) -> PPOResult:
    """The result of a run that was finished before, from its record and `metrics.jsonl`."""
    after = {name: value for name, value in metrics.items() if name != "update"}
    result = PPOResult(directory / "final", after, stage_dir=directory)
    result.update = int(metrics["update"])
    if result.metrics and result.metrics[0]["step"] == 0:
        result.before = {name: x for name, x in result.metrics[0].items() if name != "step"}
    result.table = closing_table(config, result.before, after, result.update, None)
    return result


def closing_table(
    config: PPOStageConfig, before: Metrics, after: Metrics, update: int, num_prompts: int | None
) -> str:
    """The held-out metrics of the first policy and of that in `final/`; empty without any.

    Args:
        update: the policy in `final/` is from after this update.
        num_prompts: None where it is not known any more.
    """
    names = [key.partition("/")[2] for key in after if key.startswith("eval_score/")]
    parts = [(f"score of {name}", f"eval_score/{name}") for name in names]
    rows = [
        (name, _with_interval(before, key), _with_interval(after, key))
        for name, key in (("score", "eval_score"), *parts, *TABLE)
        if key in after and f"{key}_low" in after
    ]
    if not rows:
        return ""
    number = "" if num_prompts is None else f"{num_prompts} "
    lines = [
        f"{number}held-out prompts, 95 % bootstrap intervals over them in brackets:",
        table(rows, ("", "before", f"update {update}")),
        few_rows(num_prompts, "prompt") if num_prompts is not None else "",
        describe_penalty(config.eos_penalty, before, after),
    ]
    return "\n".join(filter(None, lines))


def describe_penalty(penalty: float | None, before: Metrics, after: Metrics) -> str:
    """How often the penalty for a missing EOS replaced the score; empty if it never did."""
    shares = [1 - metrics.get("eval_eos_rate", 1.0) for metrics in (before, after)]
    if penalty is None or not any(shares):
        return ""
    was, now = (f"{share:.0%}" for share in shares)
    return (
        f"ppo.missing_eos_penalty={penalty:g} replaced the score of {was} of these answers before, "
        f"of {now} after; ppo.missing_eos_penalty=null keeps the scorer's own"
    )


def _with_interval(metrics: Metrics, name: str) -> str:
    if name not in metrics:
        return "-"
    return interval_text(metrics[name], metrics[f"{name}_low"], metrics[f"{name}_high"])
