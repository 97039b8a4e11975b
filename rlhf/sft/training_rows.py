"""From canonical rows to the token ids and labels that the SFT stage trains and evaluates on.

Plain text can be mixed in, as a share of the tokens that are trained on: Falcon-Instruct was
trained on 5 % of RefinedWeb (its model card), and InstructGPT's PPO starts from a model that was
trained on 10 % of pre-training data (arXiv 2203.02155, appendix C.3).

A conversation that is too long can be split at whole rounds:

    round      the user's turns, the answer, and a system message that comes before them
    preamble   the system messages before the first round; each piece repeats them
    preamble, rounds 1 2 3 4 5; 3 alone is too long  ->  preamble 1 2 | preamble 4 5, one dropped

The chat template renders each piece from its beginning, as in FastChat's
`split_long_conversation.py`, which estimates lengths from single turns; here `encode_row` measures
each piece. Rows of `prompt` and `completion` stay as they are.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

from rlhf.config import DatasetConfig, InputError, MixConfig, SFTStageConfig
from rlhf.data import (
    Row,
    Splits,
    count_overlap,
    describe_dropped,
    encode_row,
    encode_sft,
    encode_text,
    first_cases,
    load_rows,
    not_refused,
)
from rlhf.tokenizer import Message, RefusedConversation

Encoded = dict[str, list[int]]  # input_ids, labels


def encode_splits(
    splits: Splits, tokenizer: Any, config: SFTStageConfig, length: int, context: int
) -> tuple[Splits, list[Encoded], list[Encoded], list[str]]:
    """Split long conversations, encode all rows, and mix in text, as the configuration says.

    Args:
        length, context: longest row, and the longest sequence that the model takes, tokens.

    Returns:
        The new splits, the encoded rows to train on, the held-out ones, and lines for the terminal.
    """
    bad, lines = config.dataset.on_bad_row, []
    if config.dataset.split_long:
        splits, line = split_conversations(splits, tokenizer, length)
        lines.append(line)
    on_prompt = config.train_on_prompt
    train, too_long = encode_sft(splits.train, tokenizer, length, on_prompt, bad, context)
    heldout, too_long_heldout = encode_sft(splits.eval, tokenizer, length, on_prompt, bad)
    lines.append(splits.describe(too_long + too_long_heldout))
    num_rows, num_sequences = len(splits.train), len(train) + sum(too_long.values())
    if num_sequences > num_rows:
        lines.append(
            f"{num_rows} training rows become {num_sequences} sequences: the chat template renders "
            "earlier turns differently when more turns follow, so each answer is trained after the "
            "text that comes before it in generation"
        )
    splits.dropped += too_long + too_long_heldout
    if config.mix.fraction:
        train, line = mix_texts(train, config.mix, tokenizer, length, config.seed, bad)
        lines.append(line)
    return splits, train, heldout, lines


# --- Text that is mixed in ----------------------------------------------------------------------


def mix_texts(
    rows: list[Encoded],
    mix: MixConfig,
    tokenizer: Any,
    max_length: int,
    seed: int,
    on_bad_row: str = DatasetConfig.on_bad_row,
) -> tuple[list[Encoded], str]:
    """Add texts to encoded SFT rows until `mix.fraction` of all tokens are theirs.

    Texts longer than `max_length` tokens are cut into pieces. Every token of a text has loss.

    Returns:
        The rows with the texts at equal distances among them; and what to say about the texts.
    """
    assert mix.path is not None  # a rule of the configuration
    texts, dropped = load_rows(mix.path, mix.format, mix.split, "ptx", "mix.path", on_bad_row)
    num_row_tokens = sum(len(row["input_ids"]) for row in rows)
    needed = math.ceil(mix.fraction / (1 - mix.fraction) * num_row_tokens)
    random.Random(f"{seed} mix").shuffle(texts)
    encoded = not_refused(texts, partial(encode_text, tokenizer=tokenizer), on_bad_row, dropped)
    pieces, num_texts = _take((ids for _, ids in encoded), max_length, needed)
    num_tokens = sum(map(len, pieces))
    total = num_row_tokens + num_tokens
    if num_tokens < needed:
        allowed = math.floor(1e4 * num_tokens / total) / 1e4
        raise InputError(
            f"mix.fraction={mix.fraction} needs {needed:,} tokens of text for the "
            f"{num_row_tokens:,} tokens of the rows, but mix.path={mix.path!r} has {num_tokens:,} "
            f"in {num_texts:,} texts; set mix.fraction to at most {allowed}, or give more text"
        )
    text_rows = [{"input_ids": ids, "labels": list(ids)} for ids in pieces]
    share = f"{100 * num_tokens / total:.1f} %"
    line = f"mixed in {num_texts:,} texts: {share} of {total:,} tokens"
    line += f"; {describe_dropped(dropped)}" if dropped else ""
    return interleaved(rows, text_rows), "\n".join([line, *first_cases(dropped)])


def _take(texts: Iterable[list[int]], max_length: int, needed: int) -> tuple[list[list[int]], int]:
    """Cut texts into pieces until these have `needed` tokens; also return how many texts were used.

    The last piece is cut to fit. A piece of one token, which predicts nothing, is left out.
    """
    pieces: list[list[int]] = []
    num_texts, missing = 0, needed
    for ids in texts:
        num_texts += 1
        for start in range(0, len(ids), max_length):
            piece = ids[start : start + min(max_length, max(missing, 2))]
            if missing > 0 and len(piece) > 1:
                pieces.append(piece)
                missing -= len(piece)
        if missing <= 0:
            break
    return pieces, num_texts


def interleaved(rows: list[Encoded], others: list[Encoded]) -> list[Encoded]:
    """Put `others` among `rows` at equal distances, both in their order.

    a b c d, X Y -> a X b c Y d
    """
    placed = [((i + 0.5) / len(rows), 0, row) for i, row in enumerate(rows)]
    placed += [((i + 0.5) / len(others), 1, row) for i, row in enumerate(others)]
    return [row for _, _, row in sorted(placed, key=lambda one: one[:2])]


# --- Long conversations -------------------------------------------------------------------------


def split_conversations(splits: Splits, tokenizer: Any, max_length: int) -> tuple[Splits, str]:
    """Split the conversations of more than `max_length` tokens; also return a line that says how
    many were split and what was dropped."""
    counts = Counter[str]()
    train = split_rows(splits.train, tokenizer, max_length, counts)
    evaluation = split_rows(splits.eval, tokenizer, max_length, counts)
    line = describe_splitting(counts, max_length)
    for name, rows in (("train on", train), ("evaluate on", evaluation)):
        if not rows:
            raise InputError(
                f"dataset.max_length={max_length} leaves no round of any conversation to {name}: "
                f"{line}; raise it"
            )
    overlap = count_overlap(train, evaluation)
    return replace(splits, train=train, eval=evaluation, overlap=overlap), line


def describe_splitting(counts: Counter[str], max_length: int) -> str:
    line = (
        f"split {counts['conversations']} conversations longer than dataset.max_length={max_length}"
        f" tokens into {counts['pieces']} pieces; dropped {counts['dropped_rounds']} single rounds "
        "longer than that"
    )
    lost = counts["lost"]
    return line + (f", and so the whole of {lost} conversations" if lost else "")


def split_rows(rows: list[Row], tokenizer: Any, max_length: int, counts: Counter[str]) -> list[Row]:
    """Split the conversations of more than `max_length` tokens; the other rows stay as they are.

    The pieces of a conversation keep its other columns. `counts` gets the numbers of long
    `conversations`, `pieces`, `dropped_rounds` and `lost` conversations, in which no round fits.
    """
    result = []
    for row in rows:
        if "messages" not in row or _fits(row, tokenizer, max_length):
            result.append(row)
            continue
        pieces, num_dropped = _pieces(row, tokenizer, max_length)
        counts.update(conversations=1, pieces=len(pieces), dropped_rounds=num_dropped)
        counts["lost"] += not pieces
        result += pieces
    return result


def _fits(row: Row, tokenizer: Any, max_length: int) -> bool:
    try:
        return len(encode_row(row, tokenizer)[0]) <= max_length
    except RefusedConversation:  # it is counted where it is encoded
        return True


def _pieces(row: Row, tokenizer: Any, max_length: int) -> tuple[list[Row], int]:
    """The pieces of a conversation, each as long as fits, and the number of dropped rounds."""
    preamble, rounds = rounds_of(row["messages"])

    def fits(turns: list[Message]) -> bool:
        ids, _ = encode_row({"messages": [*preamble, *turns]}, tokenizer)
        return len(ids) <= max_length

    pieces: list[list[Message]] = [[]]
    num_dropped = 0
    for turns in rounds:
        if fits(pieces[-1] + turns):
            pieces[-1] = pieces[-1] + turns
        elif fits(turns):
            pieces.append(turns)
        else:
            num_dropped += 1
            pieces.append([])
    return [row | {"messages": preamble + piece} for piece in pieces if piece], num_dropped


def rounds_of(messages: list[Message]) -> tuple[list[Message], list[list[Message]]]:
    """Cut a conversation into its preamble and its rounds; turns after the last answer are left
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
