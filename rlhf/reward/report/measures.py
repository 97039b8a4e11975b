"""The numbers of a reward model's report, from scores and ranks; see `rlhf.reward.report`."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.functional import bootstrap_interval, calibration, correlation, kendall_tau, wins

LENGTH_MATCH = 0.8
NUM_SUBSETS, NUM_MISTAKES, NUM_CHARACTERS = 10, 5, 400
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

Row = dict[str, Any]  # an encoded ranked row
Report = dict[str, Any]  # the keys of `report.json`


@dataclass
class Pairs:
    """All pairs of responses to one prompt whose ranks differ; every tensor is (N,).

    Attributes:
        row: index of the prompt.
        better, worse: index of the response within its row.
        gap: score of the better response minus that of the worse, float64.
        rank_gap: rank of the worse minus that of the better, > 0.
        length_gap: tokens of the better response minus those of the worse.
        similar: the shorter one has at least `LENGTH_MATCH` of the longer's tokens.
    """

    row: Tensor
    better: Tensor
    worse: Tensor
    gap: Tensor
    rank_gap: Tensor
    length_gap: Tensor
    similar: Tensor


def ranked_pairs(scores: list[Tensor], rows: list[Row]) -> Pairs:
    """Compare the responses of each prompt.

    Args:
        scores: one (K,) tensor per prompt.
        rows: encoded rows with `ranks` (0 = best) and `lengths` (tokens), K each.
    """
    columns: list[list[Tensor]] = []
    for index, (row_scores, row) in enumerate(zip(scores, rows, strict=True)):
        score, ranks = row_scores.detach().cpu().double(), torch.tensor(row["ranks"])
        lengths = torch.tensor(row["lengths"])
        better, worse = (ranks[:, None] < ranks).nonzero(as_tuple=True)  # (num_pairs,) each
        shorter = torch.minimum(lengths[better], lengths[worse])
        columns.append(
            [
                torch.full_like(better, index),
                better,
                worse,
                score[better] - score[worse],
                ranks[worse] - ranks[better],
                lengths[better] - lengths[worse],
                shorter >= LENGTH_MATCH * torch.maximum(lengths[better], lengths[worse]),
            ]
        )
    return Pairs(*(torch.cat(column) for column in zip(*columns, strict=True)))


# --- During training ------------------------------------------------------------------------------


def heldout_metrics(scores: list[Tensor], rows: list[Row]) -> dict[str, float]:
    """Measure accuracy over all pairs for an evaluation during training; arguments as of
    `ranked_pairs`.

    Returns:
        Values by their names in `metrics.METRICS`; without pairs of similar length, no accuracy of
        these.
    """
    pairs = ranked_pairs(scores, rows)
    right = _right(pairs.gap)
    metrics = {
        "eval_accuracy": float(right.mean()),
        "eval_longer_wins_accuracy": float(_right(pairs.length_gap).mean()),
        "eval_margin": float(pairs.gap.mean()),
        "eval_num_pairs": len(pairs.gap),
        "eval_num_length_matched_pairs": int(pairs.similar.sum()),
    }
    if pairs.similar.any():
        metrics["eval_length_matched_accuracy"] = float(right[pairs.similar].mean())
    return metrics


def _right(gap: Tensor) -> Tensor:
    """1 where the better response is ahead, 0.5 where it is level, else 0; (N,) float64."""
    return wins(gap, torch.zeros_like(gap)).double()


# --- The report -----------------------------------------------------------------------------------


def measure(scores: list[Tensor], rows: list[Row], subsets: list[str | None]) -> dict[str, Any]:
    """Measure everything of `report.json` that follows from scores and ranks.

    Args:
        scores, rows: as of `ranked_pairs`; scores finite.
        subsets: name of each prompt's subset, if it has one.
    """
    pairs = ranked_pairs(scores, rows)
    bins = calibration(pairs.gap)
    return {
        "num_prompts": len(rows),
        "num_responses": sum(len(row["ranks"]) for row in rows),
        "num_pairs": len(pairs.gap),
        "slices": _slices(pairs, subsets),
        "calibration": {
            "ece": bins.ece,
            "brier": bins.brier,
            "bins": [
                {"predicted": float(p), "observed": float(o), "num_pairs": int(n)}
                for p, o, n in zip(bins.predicted, bins.observed, bins.counts, strict=True)
                if n
            ],
        },
        "length": _length_correlation(scores, rows),
        "order": _order(scores, rows),
        "scores": _score_distribution(scores, rows),
    }


def _slices(pairs: Pairs, subsets: list[str | None]) -> dict[str, dict[str, Any]]:
    """Accuracy by kind of pair."""
    size = pairs.gap.abs()
    quarter = torch.bucketize(size, size.quantile(torch.tensor([0.25, 0.5, 0.75]).double()))
    longer = pairs.length_gap > 0
    chosen: dict[str, dict[str, Tensor]] = {
        "all": {"all": torch.ones_like(pairs.similar)},
        "length": {
            "similar": pairs.similar,
            "better longer": ~pairs.similar & longer,
            "better shorter": ~pairs.similar & ~longer,
        },
        "ranks apart": {
            "1": pairs.rank_gap == 1,
            "2": pairs.rank_gap == 2,
            "3+": pairs.rank_gap >= 3,
        },
        "score gap": {f"quarter {i + 1}": quarter == i for i in range(4)},
    }
    names = [subsets[row] for row in pairs.row.tolist()]
    most = [n for n, _ in Counter(name for name in names if name).most_common(NUM_SUBSETS)]
    chosen["subset"] = {n: torch.tensor([name == n for name in names]) for n in most if n}
    return {
        group: {name: _slice(pairs, mask) for name, mask in masks.items() if mask.any()}
        for group, masks in chosen.items()
        if masks
    }


def _slice(pairs: Pairs, mask: Tensor) -> dict[str, float]:
    gap, length_gap, row = pairs.gap[mask], pairs.length_gap[mask], pairs.row[mask]
    values: dict[str, float] = {}
    for name, right in (("accuracy", _right(gap)), ("longer_wins", _right(length_gap))):
        low, high = bootstrap_interval(right, clusters=row)
        values |= {name: float(right.mean()), f"{name}_low": low, f"{name}_high": high}
    values["score_gap"] = float(gap.abs().mean())
    return values | {"num_pairs": len(gap), "num_prompts": len(row.unique())}


def _length_correlation(scores: list[Tensor], rows: list[Row]) -> dict[str, float | None]:
    lengths = [torch.tensor(row["lengths"]) for row in rows]
    values: dict[str, float | None] = {}
    num_prompts = 0
    for kind in ("pearson", "spearman"):
        values[kind] = _number(correlation(torch.cat(scores), torch.cat(lengths), kind))
        within = [correlation(s, n, kind) for s, n in zip(scores, lengths, strict=True)]
        within = [value for value in within if not math.isnan(value)]
        num_prompts = len(within)
        values[f"within_prompt_{kind}"] = _mean(within)
    return values | {"num_prompts": num_prompts}


def _order(scores: list[Tensor], rows: list[Row]) -> dict[str, float | None]:
    """Measure how well the scores reproduce each prompt's ranking."""
    top1, chance, taus = [], [], []
    for score, row in zip(scores, rows, strict=True):
        ranks = torch.tensor(row["ranks"])
        best, highest = ranks == ranks.min(), score == score.max()
        top1.append(float((best & highest).sum() / highest.sum()))
        chance.append(float(best.double().mean()))
        tau = kendall_tau(score, -ranks)
        taus.append(0.0 if math.isnan(tau) else tau)  # equal scores order nothing
    return {"top1": _mean(top1), "top1_chance": _mean(chance), "kendall_tau": _mean(taus)}


def _score_distribution(scores: list[Tensor], rows: list[Row]) -> dict[str, dict[str, float]]:
    return {
        name: {"mean": float(values.mean()), "std": float(values.std(unbiased=False))}
        | {f"q{100 * q:02.0f}": float(values.quantile(q)) for q in QUANTILES}
        for name, values in responses_by_rank(scores, rows).items()
    }


def responses_by_rank(scores: list[Tensor], rows: list[Row]) -> dict[str, Tensor]:
    """Collect the scores of all responses, and of each prompt's best and worst (with ties)."""
    best, worst = [], []
    for score, row in zip(scores, rows, strict=True):
        ranks = torch.tensor(row["ranks"])
        best.append(score[ranks == ranks.min()])
        worst.append(score[ranks == ranks.max()])
    groups = {"all": scores, "best": best, "worst": worst}
    return {name: torch.cat(parts).double().cpu() for name, parts in groups.items()}


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


# --- Mistakes and agreement -----------------------------------------------------------------------


def find_mistakes(
    scores: list[Tensor], rows: list[Row], prompts: list[Any], tokenizer: Any
) -> list[dict[str, Any]]:
    """Find the pairs with the largest wrong score gaps, at most one per prompt.

    Args:
        scores, rows: as of `ranked_pairs`; rows with `input_ids` too.
        prompts: canonical prompt of each row.
        tokenizer: that encoded the rows.
    """
    pairs = ranked_pairs(scores, rows)
    found: dict[int, dict[str, Any]] = {}
    for i in pairs.gap.argsort(stable=True).tolist():
        index = int(pairs.row[i])
        if pairs.gap[i] >= 0 or len(found) == NUM_MISTAKES:
            break
        if index in found:
            continue
        row, sides = rows[index], {"better": int(pairs.better[i]), "worse": int(pairs.worse[i])}
        found[index] = {"prompt": shorten(prompt_text(prompts[index]))} | {
            side: {
                "score": float(scores[index][k]),
                "rank": row["ranks"][k],
                "length": row["lengths"][k],
                "response": shorten(
                    tokenizer.decode(
                        row["input_ids"][k][-row["lengths"][k] :], skip_special_tokens=True
                    )
                ),
            }
            for side, k in sides.items()
        }
    return list(found.values())


def prompt_text(prompt: Any) -> str:
    """Write a prompt as text; the turns of a conversation with their roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def shorten(text: str) -> str:
    """Write a text on one line; leave out the middle of a long one."""
    text, half = " ".join(text.split()), NUM_CHARACTERS // 2
    if len(text) <= NUM_CHARACTERS:
        return text
    return f"{text[:half].rstrip()} [...] {text[-half:].lstrip()}"


def around_prompt_means(values: list[Tensor]) -> Tensor:
    """Subtract the prompt's mean from each value, and join all; (N,) float64."""
    return torch.cat([(x.double() - x.double().mean()).cpu() for x in values])


def agreement(scores: list[Tensor], others: list[Tensor]) -> dict[str, float | None]:
    """Measure how far two reward models agree on the same responses; ranks play no part.

    Args:
        scores, others: one (K,) tensor per prompt each.

    Returns:
        `pearson`: of the scores around the mean of their prompt, None where one has no variance.
        `ordered_alike`: share of pairs of responses to one prompt that both order alike; a tie in
        either counts half. `num_pairs`.
    """
    first, second = around_prompt_means(scores), around_prompt_means(others)
    alike: list[Tensor] = []
    for a, b in zip(scores, others, strict=True):
        i, j = torch.triu_indices(len(a), len(a), offset=1)
        alike.append((1 + torch.sign(a[i] - a[j]) * torch.sign(b[i] - b[j])).double() / 2)
    shares = torch.cat(alike)
    return {
        "pearson": _number(correlation(first, second)),
        "ordered_alike": float(shares.mean()),
        "num_pairs": len(shares),
    }
