"""Mixing: plain text beside the rows of SFT, as a share of the tokens that are trained on.

Falcon-Instruct was trained on 5 % of RefinedWeb (its model card), the model that InstructGPT's PPO
starts from on 10 % of pre-training data (arXiv 2203.02155, appendix C.3). Text is read as PPO-ptx
reads it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from functools import partial
from typing import Any

from rlhf.config import DatasetConfig, InputError, MixConfig
from rlhf.data import describe_dropped, encode_text, first_cases, load_rows, not_refused

Encoded = dict[str, list[int]]


def mix_texts(
    rows: list[Encoded],
    mix: MixConfig,
    tokenizer: Any,
    max_length: int,
    seed: int,
    on_bad_row: str = DatasetConfig.on_bad_row,
) -> tuple[list[Encoded], str]:
    """Add as many texts to encoded SFT rows as make `mix.fraction` of all their tokens.

    Args:
        rows: {"input_ids", "labels"} each, as from `encode_sft`.
        max_length: longer texts become pieces of this many tokens.
        seed: decides the order in which texts are taken.
        on_bad_row: see `load_rows`.

    Returns:
        Rows and pieces, these evenly among them and with loss on every token; and a line that says
        what was mixed in.

    Raises:
        InputError: see `load_rows`; or the texts have fewer tokens than the share needs.
    """
    assert mix.path is not None  # `check` has made sure
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
            f"mix.fraction={mix.fraction} needs {needed:,} tokens of text beside the "
            f"{num_row_tokens:,} of the rows, but mix.path={mix.path!r} has {num_tokens:,} in "
            f"{num_texts:,} texts; set mix.fraction to at most {allowed}, or give more text"
        )
    text_rows = [{"input_ids": ids, "labels": list(ids)} for ids in pieces]
    line = f"mixed in {num_texts:,} texts: {num_tokens / total:.1%} of {_short(total)} tokens"
    line = line.replace("%", " %") + (f"; {describe_dropped(dropped)}" if dropped else "")
    line = "\n".join([line, *first_cases(dropped)])
    return interleaved(rows, text_rows), line


def _take(texts: Iterable[list[int]], max_length: int, needed: int) -> tuple[list[list[int]], int]:
    """Pieces of texts in their order, `needed` tokens in all if there are that many, and the number
    of texts they are of.

    The last piece is cut to the number; a rest of one token, which predicts nothing, is left out.
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


def _short(number: int) -> str:
    """1,234 -> "1.2k", 2,300,000 -> "2.3M"."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(number)
