"""Held-out evaluation of a policy: the same prompts and random numbers every time."""

from __future__ import annotations

from typing import Any

from rlhf.ppo.trainer import PPOTrainer
from rlhf.rollout import Rollout, collect
from rlhf.scorers import Scorer, checked_scores


def evaluate(
    trainer: PPOTrainer, prompts: list[dict[str, Any]], independent: Scorer | None = None
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Answer the held-out prompts, with the same random numbers each time, and score the answers.

    Args:
        prompts: encoded held-out prompts; their number is a multiple of the number of processes.
        independent: a second scorer, which PPO does not train on.

    Returns:
        Metrics with the prefix `eval_`, and one row per prompt for `samples.jsonl`.
    """
    actors, accelerator = trainer.actors, trainer.accelerator
    key = (trainer.config.seed, 1 << 31)  # no update has this number
    rollout = collect(actors, prompts, key, trainer.settings, accelerator, with_values=False)
    kl = (rollout.logprobs - rollout.ref_logprobs).sum(dim=1)  # 0 at masked positions
    metrics = {
        "eval_score": float(rollout.scores.mean()),
        "eval_kl": float(kl.mean()),
        "eval_response_length": float(rollout.lengths.float().mean()),
        "eval_eos_rate": float(rollout.finished.float().mean()),
    }
    responses = _texts(rollout, actors.tokenizer)
    columns = [[p["prompt"] for p in prompts], responses]
    extra = None
    if independent is not None:
        extra = checked_scores(independent, columns[0], responses, "evaluation.scorer")
        metrics["eval_independent_score"] = float(extra.mean())
    samples = [
        {
            "step": trainer.update,
            "prompt": prompt["prompt"],
            "response": responses[i],
            "score": float(rollout.scores[i]),
            "kl": float(kl[i]),
            "response_length": int(rollout.lengths[i]),
            "finished": bool(rollout.finished[i]),
        }
        | ({} if extra is None else {"independent_score": float(extra[i])})
        for i, prompt in enumerate(prompts)
    ]
    return metrics, samples


def _texts(rollout: Rollout, tokenizer: Any) -> list[str]:
    rows = [
        ids[mask].tolist()
        for ids, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)
    ]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)
