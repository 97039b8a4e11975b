"""The numbers of a reward model's report, from scores and ranks; see `rlhf.reward.report`."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf.functional import bootstrap_interval, calibration, correlation, kendall_tau
from rlhf.rubrics import as_dialogue

LENGTH_MATCH = 0.8
NUM_SUBSETS, NUM_MISTAKES, NUM_CHARACTERS = 10, 5, 400
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

Row = dict[str, Any]  # an encoded ranked row
Report = dict[str, Any]  # the keys of `report.json`


class Pairs(NamedTuple):
    """All pairs of responses to one prompt whose ranks differ; every tensor is (N,)."""

    row: Tensor  # index of the prompt
    better: Tensor  # index of the better response within its row
    worse: Tensor  # index of the worse response within its row
    gap: Tensor  # score of the better response minus that of the worse, float64
    rank_gap: Tensor  # rank of the worse minus that of the better, > 0
    length_gap: Tensor  # tokens of the better response minus those of the worse
    similar: Tensor  # the shorter one has at least `LENGTH_MATCH` of the longer's tokens


def ranked_pairs(scores: list[Tensor], rows: list[Row]) -> Pairs:
    """Compare the responses of each prompt.

    Args:
        scores: one (K,) tensor per prompt.
        rows: encoded rows with `ranks` (0 = best) and `lengths` (tokens), K each.
    """
    found = []
    for index, (row_scores, row) in enumerate(zip(scores, rows, strict=True)):
        score, ranks = row_scores.detach().cpu().double(), torch.tensor(row["ranks"])
        lengths = torch.tensor(row["lengths"])
        better, worse = (ranks[:, None] < ranks).nonzero(as_tuple=True)  # (num_pairs,) each
        shorter = torch.minimum(lengths[better], lengths[worse])
        longer = torch.maximum(lengths[better], lengths[worse])
        found.append(
            Pairs(
                row=torch.full_like(better, index),
                better=better,
                worse=worse,
                gap=score[better] - score[worse],
                rank_gap=ranks[worse] - ranks[better],
                length_gap=lengths[better] - lengths[worse],
                similar=shorter >= LENGTH_MATCH * longer,
            )
        )
    return Pairs(*(torch.cat(column) for column in zip(*found, strict=True)))


def heldout_metrics(scores: list[Tensor], rows: list[Row]) -> dict[str, float]:
    """Measure accuracy over all pairs for an evaluation during training.

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
    return (1 + gap.sign()).double() / 2


# --- The report -----------------------------------------------------------------------------------


def measure(scores: list[Tensor], rows: list[Row], subsets: list[str | None]) -> Report:
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
        "scores": {
            name: {"mean": float(values.mean()), "std": float(values.std(unbiased=False))}
            | {f"q{100 * q:02.0f}": float(values.quantile(q)) for q in QUANTILES}
            for name, values in responses_by_rank(scores, rows).items()
        },
    }


def _slices(pairs: Pairs, subsets: list[str | None]) -> dict[str, dict[str, Any]]:
    """Accuracy by kind of pair: group -> name -> numbers."""
    size = pairs.gap.abs()
    quarter = torch.bucketize(size, size.quantile(torch.tensor([0.25, 0.5, 0.75]).double()))
    longer = pairs.length_gap > 0
    subset_of = [subsets[row] for row in pairs.row.tolist()]
    largest = Counter(name for name in subset_of if name).most_common(NUM_SUBSETS)
    masks = {
        ("all", "all"): torch.ones_like(pairs.similar),
        ("length", "similar"): pairs.similar,
        ("length", "better longer"): ~pairs.similar & longer,
        ("length", "better shorter"): ~pairs.similar & ~longer,
        ("ranks apart", "1"): pairs.rank_gap == 1,
        ("ranks apart", "2"): pairs.rank_gap == 2,
        ("ranks apart", "3+"): pairs.rank_gap >= 3,
        **{("score gap", f"quarter {i + 1}"): quarter == i for i in range(4)},
        **{("subset", n): torch.tensor([name == n for name in subset_of]) for n, _ in largest},
    }
    slices: dict[str, dict[str, Any]] = {}
    for (group, name), mask in masks.items():
        if mask.any():
            slices.setdefault(group, {})[name] = _slice(pairs, mask)
    return slices


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
    for kind in ("pearson", "spearman"):
        values[kind] = _number(correlation(torch.cat(scores), torch.cat(lengths), kind))
        within = [correlation(s, n, kind) for s, n in zip(scores, lengths, strict=True)]
        within = [value for value in within if not math.isnan(value)]
        values[f"within_prompt_{kind}"] = sum(within) / len(within) if within else None
    return values | {"num_prompts": len(within)}


def _order(scores: list[Tensor], rows: list[Row]) -> dict[str, float]:
    """Measure how well the scores reproduce each prompt's ranking."""
    order = {"top1": 0.0, "top1_chance": 0.0, "kendall_tau": 0.0}
    for score, row in zip(scores, rows, strict=True):
        ranks = torch.tensor(row["ranks"])
        best, highest = ranks == ranks.min(), score == score.max()
        order["top1"] += float((best & highest).sum() / highest.sum())
        order["top1_chance"] += float(best.double().mean())
        order["kendall_tau"] += _number(kendall_tau(score, -ranks)) or 0.0  # equal scores: 0
    return {name: total / len(rows) for name, total in order.items()}


def responses_by_rank(scores: list[Tensor], rows: list[Row]) -> dict[str, Tensor]:
    """Collect the scores of all responses, and of each prompt's best and worst (with ties)."""
    groups: dict[str, list[Tensor]] = {"all": scores, "best": [], "worst": []}
    for score, row in zip(scores, rows, strict=True):
        ranks = torch.tensor(row["ranks"])
        groups["best"].append(score[ranks == ranks.min()])
        groups["worst"].append(score[ranks == ranks.max()])
    return {name: torch.cat(parts).double().cpu() for name, parts in groups.items()}


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

    def response(index: int, k: int) -> dict[str, Any]:
        row, length = rows[index], rows[index]["lengths"][k]
        text = tokenizer.decode(row["input_ids"][k][-length:], skip_special_tokens=True)
        found = {"score": float(scores[index][k]), "rank": row["ranks"][k], "length": length}
        return found | {"response": shorten(text)}

    pairs = ranked_pairs(scores, rows)
    mistakes: dict[int, dict[str, Any]] = {}
    for i in pairs.gap.argsort(stable=True).tolist():
        if pairs.gap[i] >= 0 or len(mistakes) == NUM_MISTAKES:
            break
        index = int(pairs.row[i])
        if index not in mistakes:
            mistakes[index] = {
                "prompt": shorten(as_dialogue(prompts[index])),
                "better": response(index, int(pairs.better[i])),
                "worse": response(index, int(pairs.worse[i])),
            }
    return list(mistakes.values())


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
        As in `report.json`; a tie in either model counts half, and `pearson` is None where one of
        them has no variance.
    """
    alike = []
    for a, b in zip(scores, others, strict=True):
        i, j = torch.triu_indices(len(a), len(a), offset=1)
        alike.append(_right((a[i] - a[j]).sign() * (b[i] - b[j]).sign()))
    shares = torch.cat(alike)
    return {
        "pearson": _number(correlation(around_prompt_means(scores), around_prompt_means(others))),
        "ordered_alike": float(shares.mean()),
        "num_pairs": len(shares),
    }
