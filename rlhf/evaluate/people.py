"""`by=people`: people compare the answers in the page of `rlhf.rank`, blind and in random order."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rlhf.data import read_rows
from rlhf.evaluate.judgement import Judgement
from rlhf.evaluate.options import EvaluateOptions
from rlhf.evaluate.pairs import Pair, key_of
from rlhf.rank.__main__ import run as rank
from rlhf.rank.options import RankOptions


def by_people(options: EvaluateOptions, pairs: Sequence[Pair], folder: Path) -> list[Judgement]:
    """Serve the pairs until Ctrl-C, and read what people said so far. The majority of the
    annotators of a pair wins; equal answers are a tie that nobody is shown."""
    asked = [pair for pair in pairs if pair.a.strip() != pair.b.strip()]
    rows = [{"prompt": pair.prompt, "responses": [pair.a, pair.b]} for pair in asked]
    shown, ranked = folder / "pairs.jsonl", folder / "people.jsonl"
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if asked:
        if not shown.exists():
            shown.write_text(text, encoding="utf-8")
        rank(
            RankOptions(prompts=str(shown), out=str(ranked), port=options.port, serve=options.serve)
        )
    votes = read_votes(ranked) if ranked.is_file() and ranked.stat().st_size else {}
    return [_judgement(pair, votes) for pair in pairs]


def read_votes(ranked: Path) -> dict[str, list[tuple[str, float]]]:
    """Votes for each prompt: the response that has rank 0 or shares it, and 1 for a win, 0.5 for a
    tie."""
    votes: dict[str, list[tuple[str, float]]] = {}
    for _, row in read_rows(str(ranked), "train", "reward", "people"):
        (first, second), (one, other) = row["responses"], row["ranks"]
        best = first if one <= other else second
        votes.setdefault(key_of(row["prompt"]), []).append((best, 0.5 if one == other else 1.0))
    return votes


def _judgement(pair: Pair, votes: dict[str, list[tuple[str, float]]]) -> Judgement:
    found = votes.get(key_of(pair.prompt), [])
    if pair.a.strip() == pair.b.strip():
        return Judgement(pair.prompt, pair.a, pair.b, "tie")
    if not found:
        return Judgement(pair.prompt, pair.a, pair.b, None)
    for_b = sum(0.5 if vote == 0.5 else float(best == pair.b) for best, vote in found)
    winner = {-1: "a", 0: "tie", 1: "b"}[(2 * for_b > len(found)) - (2 * for_b < len(found))]
    return Judgement(pair.prompt, pair.a, pair.b, winner)
