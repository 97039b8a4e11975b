"""Held-out evaluation of a policy, and the choice of the update that becomes `final/`.

`loop.py` calls it. Prompts and random numbers are the same every time, so that two evaluations
differ by the policy alone. Every figure has a bootstrap interval over the prompts. The win rate
compares each response with the one before training, by `evaluation.scorer` if there is one; the
same response is a tie, as its scores in two batches differ by rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

from rlhf.config import PPOStageConfig
from rlhf.failures import on_every_process
from rlhf.functional import bootstrap_interval, wins
from rlhf.ppo.rollout import Responses, collect, component_scores, cut_metric
from rlhf.ppo.scoring import score_sampled, scorer_counts
from rlhf.ppo.trainer import PPOTrainer
from rlhf.scorers import Scorer
from rlhf.tokenizer import response_text

EVALUATION_KEY = 1 << 31  # names the random numbers; no update has this number
# figure -> its name and type in `samples.jsonl`; the others keep their name and are floats
SAMPLE_FIELDS: dict[str, tuple[str, type]] = {
    "eos_rate": ("finished", bool),
    "win_rate": ("win", float),
    "response_length": ("response_length", int),
}


@dataclass
class Evaluator:
    """Evaluates the policy of a trainer on held-out prompts.

    Attributes:
        prompts: encoded held-out prompts.
        independent: a second scorer, which PPO does not train on.
        baseline: scores of the responses before training, for the win rate; from the first call.
        baseline_responses: these responses; none in a run that an earlier version began.
    """

    trainer: PPOTrainer
    prompts: list[dict[str, Any]]
    independent: Scorer | None = None
    baseline: list[float] = field(default_factory=list)
    baseline_responses: list[str] = field(default_factory=list)

    def __call__(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Sample a response to each held-out prompt, by the averaged policy if there is one, and
        score it.

        Returns:
            Metrics `eval_<figure>` with their 95 % bounds under `_low` and `_high`, and one row per
            prompt for `samples.jsonl`.
        """
        scorers = self.trainer.actors.scorer, self.independent
        with scorer_counts(scorers, self.trainer.accelerator) as counts:
            metrics, samples = self._evaluate()
        return metrics | {f"eval_{name}": count for name, count in counts.items()}, samples

    def _evaluate(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        trainer, actors, ppo = self.trainer, self.trainer.actors, self.trainer.config.ppo
        key, accelerator = (trainer.config.seed, EVALUATION_KEY), trainer.accelerator
        shared = with_equal_shares(self.prompts, accelerator.num_processes)
        with trainer.updater.averaged_weights():
            rollout = collect(
                actors, shared, key, trainer.sampling, ppo, accelerator, with_values=False
            )
        if len(shared) > len(self.prompts):
            rollout = rollout.select(torch.arange(len(self.prompts)))
        trainer.require_finite(rollout, "logprobs", "ref_logprobs", "scores")
        responses = response_texts(rollout, actors.tokenizer, self.prompts)
        figures = {
            "score": rollout.final_scores(trainer.config.eos_penalty),
            **component_scores(rollout, actors.scorer),
            "kl": (rollout.logprobs - rollout.ref_logprobs).sum(dim=1),  # 0 at masked positions
            "response_length": rollout.lengths,
            "eos_rate": rollout.finished,
        }
        scorers, cut = [actors.scorer], rollout.cut.cpu()
        if self.independent is not None:
            sampled = actors, self.prompts, response_ids(rollout)
            score = partial(score_sampled, *sampled, self.independent, "evaluation.scorer")
            with accelerator.autocast():  # as the scorer in `collect`
                scores = on_every_process(score, accelerator)
            figures["independent_score"] = scores.total
            scorers.append(self.independent)
            cut = cut if scores.cut is None else cut | scores.cut
        figures = {name: values.float().cpu() for name, values in figures.items()}
        judged = figures.get("independent_score", figures["score"])
        if not self.baseline:
            self.baseline, self.baseline_responses = judged.tolist(), responses
        elif trainer.update:
            figures["win_rate"] = self._wins(judged, responses)
        samples = []
        for row, (prompt, response) in enumerate(zip(self.prompts, responses, strict=True)):
            sample = {"step": trainer.update, "prompt": prompt["prompt"], "response": response}
            for figure, values in figures.items():
                name, convert = SAMPLE_FIELDS.get(figure, (figure, float))
                sample[name] = convert(values[row])
            samples.append(sample)
        return _with_bounds(figures) | cut_metric("eval_", cut, actors, *scorers), samples

    def _wins(self, judged: Tensor, responses: list[str]) -> Tensor:
        baseline = torch.tensor(self.baseline)
        if self.baseline_responses:
            pairs = zip(responses, self.baseline_responses, strict=True)
            baseline = torch.where(torch.tensor([a == b for a, b in pairs]), judged, baseline)
        return wins(judged, baseline)


def with_equal_shares(prompts: list[Any], num_processes: int) -> list[Any]:
    """Repeat the first prompts at the end, so that each process gets as many."""
    number = -len(prompts) % num_processes
    return prompts + list(islice(cycle(prompts), number))


def _with_bounds(figures: dict[str, Tensor]) -> dict[str, float]:
    metrics = {}
    for name, values in figures.items():
        low, high = bootstrap_interval(values)
        metrics[f"eval_{name}"] = float(values.mean())
        metrics |= {f"eval_{name}_low": low, f"eval_{name}_high": high}
    return metrics


def response_ids(rollout: Responses) -> list[list[int]]:
    """The responses as token ids, the stop token included."""
    rows = zip(rollout.response_ids, rollout.response_mask, strict=True)
    return [ids[mask].tolist() for ids, mask in rows]


def response_texts(
    rollout: Responses, tokenizer: Any, prompts: Sequence[dict[str, Any]]
) -> list[str]:
    """The responses as text, without stop token or stop string."""
    rows = zip(response_ids(rollout), prompts, strict=True)
    return [response_text(ids, tokenizer, prompt["prompt"]) for ids, prompt in rows]


def selection_value(config: PPOStageConfig, metrics: dict[str, float]) -> float | None:
    """The figure of an evaluated update that `evaluation.select` compares, larger is better; None
    if the last update is taken."""
    rule = config.evaluation.select
    if rule == "last" or not metrics:
        return None
    if rule == "independent_score":
        return metrics["eval_independent_score"]
    return metrics["eval_score"] - _kl_coef(config) * metrics["eval_kl"]


def describe_selection(config: PPOStageConfig) -> str:
    """The rule of `evaluation.select` in words."""
    if config.evaluation.select == "independent_score":
        return "the highest held-out score by evaluation.scorer"
    return f"the highest held-out score - {_kl_coef(config):g} x KL"


def _kl_coef(config: PPOStageConfig) -> float:
    coef = config.evaluation.select_kl_coef
    return config.ppo.kl_coef if coef is None else coef
