"""Splitting: a conversation longer than the model is trained on, cut into pieces at whole rounds.

    round      the user's turn (or turns) and the answer; a system message in between opens one
    preamble   the turns before the first round; each piece repeats it

    preamble, rounds 1 2 3 4 5; 3 fits in no piece  ->  preamble 1 2 | preamble 4 5, one dropped

Each piece is a row of its own: the chat template renders it from its beginning, as in FastChat's
`split_long_conversation.py`. That estimates lengths from single turns and cuts only at an even
number of them; here a piece is as long as `encode_row` makes it. Rows of `prompt` and `completion`
pass through.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from rlhf.config import InputError
from rlhf.data import Row, Splits, count_overlap, encode_row
from rlhf.tokenizer import Message, RefusedConversation


@dataclass
class SplitCounts:
    """What became of the conversations that were too long.

    Attributes:
        conversations: that were too long.
        pieces: that they became.
        dropped_rounds: that do not fit by themselves.
        lost: conversations without any round that fits; they are among `conversations`.
    """

    conversations: int = 0
    pieces: int = 0
    dropped_rounds: int = 0
    lost: int = 0

    def describe(self, max_length: int) -> str:
        """Say it in one line."""
        line = (
            f"split {self.conversations} conversations longer than dataset.max_length={max_length} "
            f"tokens into {self.pieces} pieces; dropped {self.dropped_rounds} single rounds longer "
            "than that"
        )
        return line + (f", and so the whole of {self.lost} conversations" if self.lost else "")


def split_conversations(splits: Splits, tokenizer: Any, max_length: int) -> tuple[Splits, str]:
    """Split what is too long on both sides; no conversation changes sides.

    Args:
        max_length: of a piece, tokens.

    Returns:
        The splits with pieces in place of the conversations they are of, and a line that says how
        many conversations became how many pieces and what was dropped.

    Raises:
        InputError: no round of any training conversation fits.
    """
    counts = SplitCounts()
    train = split_rows(splits.train, tokenizer, max_length, counts)
    evaluation = split_rows(splits.eval, tokenizer, max_length, counts)
    for name, rows in (("train on", train), ("evaluate on", evaluation)):
        if not rows:
            raise InputError(
                f"dataset.max_length={max_length} leaves no round of any conversation to {name}: "
                f"{counts.describe(max_length)}; raise it"
            )
    overlap = count_overlap(train, evaluation)
    split = replace(splits, train=train, eval=evaluation, overlap=overlap)
    return split, counts.describe(max_length)


def split_rows(rows: list[Row], tokenizer: Any, max_length: int, counts: SplitCounts) -> list[Row]:
    """Split the conversations among canonical SFT rows that are too long; the rest stays as it is.

    Args:
        max_length: of a piece, tokens.
        counts: added to.

    Returns:
        Rows in the same order, the pieces of a conversation in a row, with its other columns.
    """
    result = []
    for row in rows:
        if "messages" not in row or _fits(row, tokenizer, max_length):
            result.append(row)
            continue
        pieces, num_dropped = _pieces(row, tokenizer, max_length)
        counts.conversations += 1
        counts.pieces += len(pieces)
        counts.dropped_rounds += num_dropped
        counts.lost += not pieces
        result += pieces
    return result


def _pieces(row: Row, tokenizer: Any, max_length: int) -> tuple[list[Row], int]:
    """The pieces of a conversation, each as long as fits, and the number of dropped rounds."""
    preamble, rounds = rounds_of(row["messages"])
    pieces, num_dropped = [], 0
    while rounds:
        number = _num_fitting(preamble, rounds, tokenizer, max_length)
        if number:
            pieces.append(row | {"messages": [*preamble, *chain(*rounds[:number])]})
        else:
            num_dropped += 1
        rounds = rounds[max(number, 1) :]
    return pieces, num_dropped


def _num_fitting(
    preamble: list[Message], rounds: list[list[Message]], tokenizer: Any, max_length: int
) -> int:
    """How many rounds, from the first on, fit together after the preamble."""

    def length(number: int) -> int:
        return _length({"messages": [*preamble, *chain(*rounds[:number])]}, tokenizer)

    upper = 1  # at most twice what fits: rounds far behind are not encoded for each piece anew
    while upper < len(rounds) and length(upper) <= max_length:
        upper *= 2
    return bisect_right(range(1, min(upper, len(rounds)) + 1), max_length, key=length)


def rounds_of(messages: list[Message]) -> tuple[list[Message], list[list[Message]]]:
    """Cut a conversation into its preamble and its rounds; what has no answer at the end is left
    out.

    S U A U U A A U -> [S], [[U A] [U U A A]]
    """
    first = next((i for i, message in enumerate(messages) if message["role"] != "system"), 0)
    rounds: list[list[Message]] = [[]]
    for message in messages[first:]:
        if message["role"] != "assistant" and rounds[-1] and _is_answered(rounds[-1]):
            rounds.append([])
        rounds[-1].append(message)
    return messages[:first], [turns for turns in rounds if turns and _is_answered(turns)]


def _is_answered(turns: list[Message]) -> bool:
    return turns[-1]["role"] == "assistant"


def _fits(row: Row, tokenizer: Any, max_length: int) -> bool:
    try:
        return _length(row, tokenizer) <= max_length
    except RefusedConversation:  # it is counted where it is encoded
        return True


def _length(row: Row, tokenizer: Any) -> int:
    return len(encode_row(row, tokenizer)[0])
