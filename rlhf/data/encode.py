"""The rows of a stage to token ids; rows that are too long or refused are dropped and counted.

In all functions `on_bad_row` is that of `not_refused`, and InputError is raised if no row is left.

Left out: how one row becomes token ids (`segments`), and batches (`collate`).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from rlhf.config import DatasetConfig, InputError
from rlhf.console import warn
from rlhf.data.dropped import Reason
from rlhf.data.rows import Prompt, Row, prompt_of
from rlhf.data.segments import encode_prompt, encode_response, encode_row, encode_samples
from rlhf.tokenizer import RefusedConversation, first_token_ids, render_prompt, token_ids, with_eos

NUM_HISTORIES = 50  # prompts whose earlier turns are compared with what servers see
DROP = DatasetConfig.on_bad_row
REFUSED = "refused by the chat template"

_In = TypeVar("_In")
_Out = TypeVar("_Out")


def not_refused(
    rows: Sequence[_In], encode: Callable[[_In], _Out], on_bad_row: str, dropped: Counter[str]
) -> Iterator[tuple[int, _Out]]:
    """Encode rows, leaving out those that the chat template refuses.

    Args:
        on_bad_row: "drop" counts them while they are fewer than half; "stop" refuses the first.
        dropped: the counts are added to it.

    Yields:
        Index of the row, and its encoded form.

    Raises:
        RefusedConversation: see `on_bad_row`.
    """
    first, count = None, 0
    for index, row in enumerate(rows):
        try:
            encoded = encode(row)
        except RefusedConversation as error:
            if on_bad_row == "stop":
                fix = "; dataset.on_bad_row=drop drops such rows"
                raise RefusedConversation(f"{error}{fix}") from error
            dropped[Reason(REFUSED, str(error))] += 1
            first, count = first or error, count + 1
            continue
        yield index, encoded
    if first is not None and 2 * count >= len(rows):
        rule = "dataset.on_bad_row=drop drops them only while they are fewer than half"
        share = f"{count} of {len(rows)} rows are refused"
        raise RefusedConversation(f"{first} ({share}; {rule})") from first


def encode_sft(
    rows: Iterable[Row],
    tokenizer: Any,
    max_length: int,
    train_on_prompt: bool = False,
    on_bad_row: str = DROP,
) -> tuple[list[dict[str, list[int]]], Counter[str]]:
    """Encode SFT rows; those longer than `max_length` tokens are dropped, never truncated.

    Returns:
        {"input_ids", "labels"} per sequence (`encode_samples` may make several of a row), and the
        number of dropped ones by reason.
    """
    encoded, longest, dropped, rows = [], 0, Counter[str](), list(rows)
    _warn_about_history([prompt_of(row) for row in rows], tokenizer)
    encode = partial(encode_samples, tokenizer=tokenizer, train_on_prompt=train_on_prompt)
    for _, samples in not_refused(rows, encode, on_bad_row, dropped):
        for ids, labels in samples:
            longest = max(longest, len(ids))
            if len(ids) > max_length:
                dropped[_too_long("dataset.max_length", max_length)] += 1
            else:
                encoded.append({"input_ids": ids, "labels": labels})
    _require_some(encoded, "dataset.max_length", max_length, longest)
    return encoded, dropped


def encode_texts(
    rows: Sequence[Row], tokenizer: Any, max_length: int, on_bad_row: str = DROP
) -> tuple[list[list[int]], Counter[str]]:
    """Encode the rows of PPO-ptx: `text` with BOS and EOS, or a whole SFT row.

    Args:
        max_length: longer texts are cut, tokens.

    Returns:
        Token ids per kept row, at least two each (one token has nothing to predict); and the number
        of dropped rows by reason.
    """
    encoded, dropped = [], Counter[str]()
    for _, ids in not_refused(rows, partial(encode_text, tokenizer=tokenizer), on_bad_row, dropped):
        if len(ids[:max_length]) > 1:
            encoded.append(ids[:max_length])
        else:
            dropped["shorter than two tokens"] += 1
    _require_some(encoded, "ptx.max_length", max_length, 1)
    return encoded, dropped


def encode_text(row: Row, tokenizer: Any) -> list[int]:
    """Token ids of one row of PPO-ptx, see `encode_texts`."""
    if "text" in row:
        return with_eos(first_token_ids(row["text"], tokenizer), tokenizer)
    return encode_row(row, tokenizer)[0]


def encode_ranked(
    rows: Sequence[Row], tokenizer: Any, max_length: int, on_bad_row: str = DROP
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Encode ranked rows; a response that with its prompt exceeds `max_length` tokens is dropped.

    A row is kept while it has at least two responses that are not tied.

    Returns:
        Per kept row {"input_ids": K lists of prompt + response, "ranks": K ints, "lengths": K
        response lengths in tokens with their end, "row": index in `rows`, "scores": K floats,
        "margin", "probability": a float each, these three None where the row has none}; and the
        number of dropped rows by reason, with single responses under a reason of their own.
    """
    encoded, longest, dropped = [], 0, Counter[str]()
    too_long = _too_long("dataset.max_length", max_length)
    encode = partial(_prompt_and_responses, tokenizer=tokenizer)
    for index, (prompt_ids, answers) in not_refused(rows, encode, on_bad_row, dropped):
        row, sequences = rows[index], [prompt_ids + ids for ids in answers]
        longest = max(longest, *map(len, sequences))
        fits = [i for i, ids in enumerate(sequences) if len(ids) <= max_length]
        if len({row["ranks"][i] for i in fits}) < 2:
            dropped[too_long] += 1
            continue
        if len(fits) < len(answers):
            dropped[f"single responses {too_long}"] += len(answers) - len(fits)
        encoded.append(
            {
                "input_ids": [sequences[i] for i in fits],
                "ranks": [row["ranks"][i] for i in fits],
                "lengths": [len(answers[i]) for i in fits],
                "row": index,
                "scores": [float(row["scores"][i]) for i in fits] if "scores" in row else None,
                "margin": row.get("margin"),
                "probability": row.get("probability"),
            }
        )
    _require_some(encoded, "dataset.max_length", max_length, longest)
    return encoded, dropped


def _prompt_and_responses(row: Row, tokenizer: Any) -> tuple[list[int], list[list[int]]]:
    prompt = row["prompt"]
    responses = [encode_response(prompt, text, tokenizer) for text in row["responses"]]
    return encode_prompt(prompt, tokenizer), responses


def encode_prompts(
    rows: Iterable[Row], tokenizer: Any, max_prompt_length: int | None, on_bad_row: str = DROP
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Encode the prompts of canonical rows for PPO; prompts that are too long or have no token are
    dropped.

    Args:
        max_prompt_length: tokens; None for no limit.

    Returns:
        {"prompt": canonical prompt, "input_ids"} per kept row, and the dropped rows by reason.
    """
    encoded, longest, dropped = [], 0, Counter[str]()
    prompts = [prompt_of(row) for row in rows]
    _warn_about_history(prompts, tokenizer)
    encode = partial(encode_prompt, tokenizer=tokenizer)
    for index, ids in not_refused(prompts, encode, on_bad_row, dropped):
        longest = max(longest, len(ids))
        if not ids:
            dropped["prompts without a token"] += 1
        elif max_prompt_length is not None and len(ids) > max_prompt_length:
            dropped[_too_long("ppo.max_prompt_length", max_prompt_length)] += 1
        else:
            encoded.append({"prompt": prompts[index], "input_ids": ids})
    _require_some(encoded, "ppo.max_prompt_length", max_prompt_length, longest)
    return encoded, dropped


def _warn_about_history(prompts: Iterable[Prompt], tokenizer: Any) -> None:
    """Warn where a token reaches from one turn into the next: a server, which tokenises the whole
    rendered prompt, then gives earlier turns other token ids than we do."""
    later = (p for p in prompts if isinstance(p, list) and "assistant" in {m["role"] for m in p})
    for prompt in islice(later, NUM_HISTORIES):
        try:
            ids = encode_prompt(prompt, tokenizer)
            served = token_ids(render_prompt(prompt, tokenizer), tokenizer)
        except RefusedConversation:  # counted where the row is encoded
            continue
        if ids != served:
            at = len(os.path.commonprefix([ids, served]))
            theirs, ours = (tokenizer.decode(part[at : at + 3]) for part in (served, ids))
            warn(
                "a token of the tokenizer reaches from one turn into the next, so servers give "
                f"earlier turns other token ids ({theirs!r}) than are trained on ({ours!r}); a "
                "chat template that ends turns with a special token prevents that"
            )
            return


def _too_long(name: str, limit: int) -> str:
    return f"longer than {name}={limit} tokens"


def _require_some(encoded: list[Any], name: str, limit: int | None, longest: int) -> None:
    if not encoded:
        raise InputError(
            f"{name}={limit} leaves no row; raise it: the longest has {longest} tokens"
        )
