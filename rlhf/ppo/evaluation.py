"""Held-out evaluation of a policy, and the choice of the update that becomes `final/`.

The same prompts and random numbers every time, so that two evaluations differ by the policy alone.
Every figure has a bootstrap interval over the prompts. The win rate compares each answer with that
of the policy before training to the same prompt, by `evaluation.scorer` where there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf.config import PPOStageConfig
from rlhf.distributed import on_every_process
from rlhf.functional import bootstrap_interval, wins
from rlhf.ppo.rollout import Responses, collect, component_scores, cut_metric, score_sampled
from rlhf.ppo.trainer import PPOTrainer
from rlhf.scorers import Scorer
from rlhf.tokenizer import response_text

EVALUATION_KEY = 1 << 31  # names the random numbers; no update has this number


@dataclass
class Evaluator:
    """Evaluates the policy of a trainer on held-out prompts.

    Attributes:
        prompts: encoded held-out prompts; their number is a multiple of the number of processes.
        independent: a second scorer, which PPO does not train on.
        baseline: score of each answer before training, by the scorer of the win rate; filled by the
            first call.
    """

    trainer: PPOTrainer
    prompts: list[dict[str, Any]]
    independent: Scorer | None = None
    baseline: list[float] = field(default_factory=list)

    def __call__(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Answer the held-out prompts with the (averaged, where asked) policy and score the
        answers.

        Returns:
            Metrics with the prefix `eval_`, with their 95 % bounds under `_low` and `_high`, and
            one row per prompt for `samples.jsonl`.
        """
        trainer, actors = self.trainer, self.trainer.actors
        key = (trainer.config.seed, EVALUATION_KEY)
        with trainer.updater.averaged_weights():
            rollout = collect(
                actors,
                self.prompts,
                key,
                trainer.sampling,
                trainer.config.ppo,
                trainer.accelerator,
                with_values=False,
            )
        trainer.require_finite(rollout, "logprobs", "ref_logprobs", "scores")
        responses = response_texts(rollout, actors.tokenizer, self.prompts)
        figures = {
            "score": rollout.final_scores(trainer.config.ppo.missing_eos_penalty),
            **component_scores(rollout, actors.scorer),
            "kl": (rollout.logprobs - rollout.ref_logprobs).sum(dim=1),  # 0 at masked positions
            "response_length": rollout.lengths,
            "eos_rate": rollout.finished,
        }
        scorers, cut = [actors.scorer], rollout.cut.cpu()
        if self.independent is not None:
            sampled = actors, self.prompts, response_ids(rollout)
            score = partial(score_sampled, *sampled, self.independent, "evaluation.scorer")
            scores = on_every_process(score, trainer.accelerator)
            figures["independent_score"] = scores.total
            scorers.append(self.independent)
            cut = cut if scores.cut is None else cut | scores.cut
        figures = {name: values.float().cpu() for name, values in figures.items()}
        judged = figures.get("independent_score", figures["score"])
        if not self.baseline:
            self.baseline = judged.tolist()
        elif trainer.update:
            figures["win_rate"] = wins(judged, torch.tensor(self.baseline))
        samples = [
            {"step": trainer.update, "prompt": prompt["prompt"], "response": responses[row]}
            | dict(_sample_field(name, values[row]) for name, values in figures.items())
            for row, prompt in enumerate(self.prompts)
        ]
        return _with_bounds(figures) | cut_metric("eval_", cut, actors, *scorers), samples


def _with_bounds(figures: dict[str, Tensor]) -> dict[str, float]:
    metrics = {}
    for name, values in figures.items():
        low, high = bootstrap_interval(values)
        metrics[f"eval_{name}"] = float(values.mean())
        metrics |= {f"eval_{name}_low": low, f"eval_{name}_high": high}
    return metrics


def _sample_field(name: str, value: Tensor) -> tuple[str, float | int | bool]:
    """Name and value of a figure for one response; its mean over responses is the metric."""
    if name == "eos_rate":
        return "finished", bool(value)
    if name == "win_rate":
        return "win", float(value)
    return name, int(value) if name == "response_length" else float(value)


def response_ids(rollout: Responses) -> list[list[int]]:
    """The responses of a rollout as token ids, with what ends them."""
    rows = zip(rollout.response_ids, rollout.response_mask, strict=True)
    return [ids[mask].tolist() for ids, mask in rows]


def response_texts(
    rollout: Responses, tokenizer: Any, prompts: Sequence[dict[str, Any]] | None = None
) -> list[str]:
    """The responses of a rollout as text, without what ends them.

    Args:
        prompts: rows with the `prompt` of each; None: all are conversations.
    """
    ids = response_ids(rollout)
    asked = [row["prompt"] for row in prompts] if prompts is not None else [None] * len(ids)
    return [response_text(row, tokenizer, p) for row, p in zip(ids, asked, strict=True)]


def selection_value(config: PPOStageConfig, metrics: dict[str, float]) -> float | None:
    """How good an evaluated update is by `evaluation.select`; None where the last is taken."""
    rule = config.evaluation.select
    if rule == "last" or not metrics:
        return None
    if rule == "independent_score":
        return metrics["eval_independent_score"]
    return metrics["eval_score"] - _selection_kl_coef(config) * metrics["eval_kl"]


def describe_selection(config: PPOStageConfig) -> str:
    """The rule of `evaluation.select` in words."""
    if config.evaluation.select == "independent_score":
        return "the highest held-out score by evaluation.scorer"
    return f"the highest held-out score - {_selection_kl_coef(config):g} x KL"


def _selection_kl_coef(config: PPOStageConfig) -> float:
    chosen = config.evaluation.select_kl_coef
    return config.ppo.kl_coef if chosen is None else chosen
