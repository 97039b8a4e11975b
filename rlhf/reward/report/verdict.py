"""The verdict of a report: a summary of one line, and warnings. PPO prints both unchanged."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlhf.config import DatasetConfig, InputError
from rlhf.console import interval_text
from rlhf.data import few_rows
from rlhf.reward.report.measures import Report, Row, find_mistakes, measure

ENOUGH = 5  # prompts, for a verdict
LENGTH_DRIVEN = 0.6  # correlation (Spearman) of score and length within prompts


def heldout_name(data: DatasetConfig) -> str:
    """Name the source of a stage's held-out rows."""
    return data.eval_path or f"{data.path} (a held-out part of it)"


def make_report(
    scores: list[Tensor], rows: list[Row], canonical: list[Row], tokenizer: Any, data: str
) -> Report:
    """Make the report of a reward model; its keys are in docs/reward-models.md.

    Args:
        scores: raw, one (K,) tensor per row.
        rows: held-out rows as `encode_ranked` returns them.
        canonical: the rows before encoding.
        tokenizer: the one that encoded the rows.
        data: source of the rows, see `heldout_name`.

    Raises:
        InputError: a score is not finite.
    """
    bad = [i for i, row_scores in enumerate(scores) if not row_scores.isfinite().all()]
    if bad:
        raise InputError(
            f"the reward model gives {scores[bad[0]].tolist()} to the responses of held-out prompt "
            f"{bad[0] + 1}; expected finite scores: use precision=float32 and model.dtype=float32"
        )
    origin = [canonical[row["row"]] for row in rows]
    subsets = [str(row["subset"]) if row.get("subset") is not None else None for row in origin]
    numbers = measure(scores, rows, subsets)
    mistakes = find_mistakes(scores, rows, [row["prompt"] for row in origin], tokenizer)
    verdict = {"data": data, "summary": summarise(numbers), "warnings": judge(numbers)}
    return verdict | numbers | {"mistakes": mistakes}


def summarise(report: Report) -> str:
    """Put the main numbers into one line."""
    all_pairs, similar = report["slices"]["all"]["all"], report["slices"]["length"].get("similar")
    parts = [
        f"accuracy {_interval(all_pairs)} on {all_pairs['num_pairs']} held-out pairs of "
        f"{report['num_prompts']} prompts (longer wins: {all_pairs['longer_wins']:.3f})"
    ]
    if similar:
        parts.append(
            f"at similar length {_interval(similar)} (longer wins: {similar['longer_wins']:.3f})"
        )
    within = report["length"]["within_prompt_spearman"]
    if within is not None:
        parts.append(f"correlation of score and length within prompts {within:+.2f}")
    return "; ".join(parts)


def judge(report: Report) -> list[str]:
    """List the warnings, with remedies.

    An accuracy is near chance if its 95 % interval reaches down to 0.5. Without pairs of similar
    length, the rule "the longer response wins" must be below the interval of all pairs. Fewer than
    `ENOUGH` prompts say nothing: the interval of one prompt has no width.
    """
    all_pairs, similar = report["slices"]["all"]["all"], report["slices"]["length"].get("similar")
    found, num = f"accuracy {_interval(all_pairs)}", report["num_prompts"]
    warnings = [remark] if (remark := few_rows(num, "prompt")) else []
    if num < ENOUGH:
        return warnings
    if all_pairs["accuracy_high"] < 0.5:
        warnings.append(
            f"the reward model orders held-out pairs the wrong way round ({found}): check that "
            "rank 0, or the highest score, is the best response of the data, or train it longer"
        )
    elif all_pairs["accuracy_low"] <= 0.5:
        warnings.append(
            f"the reward model is near chance on {num} held-out prompts ({found}): PPO against it "
            "follows noise. Train it longer or with another trainer.learning_rate, start it from a "
            "better SFT model, give it more or cleaner comparisons, or hold out more prompts to see"
        )
    elif similar and similar["accuracy_low"] <= 0.5:
        warnings.append(
            "the reward model is not shown to know more than length: on held-out pairs of similar "
            f"length its accuracy is {_interval(similar)}. Add comparisons of similar length, or "
            "more and cleaner ones; or hold out more prompts to see"
        )
    elif not similar and all_pairs["accuracy_low"] <= all_pairs["longer_wins"]:
        warnings.append(
            "the reward model is not shown to know more than length: no held-out pair has similar "
            f"lengths, and `the longer response wins` is right on {all_pairs['longer_wins']:.3f} "
            f"of the pairs ({found}). Add comparisons of similar length"
        )
    within = report["length"]["within_prompt_spearman"]
    if within is not None and abs(within) > LENGTH_DRIVEN:
        more, less = ("longer", "shorter") if within > 0 else ("shorter", "longer")
        warnings.append(
            f"the reward model's scores follow length: correlation {within:+.2f} within prompts. "
            f"PPO against it will mostly write {more}: add comparisons whose better response is "
            f"the {less} one or as long, and watch response_length and the KL"
        )
    return warnings


def _interval(piece: dict[str, float]) -> str:
    ends = piece["accuracy_low"], piece["accuracy_high"]
    return interval_text(piece["accuracy"], *ends, digits=".3f")
