"""A comparison of two answers, as `judgements.jsonl` has it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Judgement:
    """A comparison.

    Attributes:
        winner: a, b or tie; None where the judge gave no verdict.
        verdicts: by=judge: with a shown first, and with b shown first.
        reasons: the judge's whole answers.
        scores: by=scorer: of a and of b.
    """

    prompt: Any
    a: str
    b: str
    winner: str | None
    verdicts: tuple[str | None, str | None] | None = None
    reasons: tuple[str, str] | None = None
    scores: tuple[float, float] | None = None

    @property
    def consistent(self) -> bool:
        return self.verdicts is None or self.verdicts[0] == self.verdicts[1]

    @property
    def row(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None} | {
            "winner": self.winner
        }
