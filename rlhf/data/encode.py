"""The rows of a stage to token ids, and ranked rows to batches.

Rows that are too long or refused are dropped and counted. `on_bad_row` is that of `load_rows`. All
`encode_` functions return the encoded rows and the number of dropped ones by reason, and raise
InputError if no row is left. `segments` makes the token ids of one row.

Left out: the batches of SFT, which TRL makes, and those of PPO, which its rollout makes with `pad`.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from rlhf.config import DatasetConfig, InputError
from rlhf.console import warn
from rlhf.data.dropped import BadRows, Reason
from rlhf.data.rows import Prompt, Row, other_columns, prompt_of
from rlhf.data.segments import encode_prompt, encode_response, encode_row, encode_samples
from rlhf.tokenizer import RefusedConversation, first_token_ids, render_prompt, token_ids, with_eos

if TYPE_CHECKING:  # the data room is imported before torch is needed
    import torch

LONG_SHARE, KEPT_SHARE = 0.1, 0.95  # of rows: dropping more warns; what the named limit keeps
SHORTER = {
    "dataset.max_length": ": shorten the rows, or take a model with a longer context",
    "ppo.max_prompt_length": ": lower ppo.response_length, or shorten the prompts",
}
NUM_HISTORIES = 50  # prompts whose earlier turns are compared with what servers see
DROP = DatasetConfig.on_bad_row

_In = TypeVar("_In")
_Out = TypeVar("_Out")


def not_refused(
    rows: Sequence[_In], encode: Callable[[_In], _Out], on_bad_row: str, dropped: Counter[str]
) -> Iterator[tuple[int, _Out]]:
    """Encode rows; yield the index and the encoded form of each.

    Rows that the chat template refuses are left out and counted in `dropped`; see `BadRows`.
    """
    refused = BadRows(on_bad_row, dropped)
    for index, row in enumerate(rows):
        try:
            encoded = encode(row)
        except RefusedConversation as error:
            refused.add(error, Reason("refused by the chat template", str(error)))
            continue
        yield index, encoded
    refused.require_fewer_than_half(len(rows), "refused")


def encode_sft(
    rows: Iterable[Row],
    tokenizer: Any,
    max_length: int,
    train_on_prompt: bool = False,
    on_bad_row: str = DROP,
    room: int | None = None,
) -> tuple[list[dict[str, list[int]]], Counter[str]]:
    """Encode SFT rows to {"input_ids", "labels"}; `encode_samples` may make several of a row.

    Those longer than `max_length` tokens are dropped, never truncated. `room`: see
    `_require_fitting`.
    """
    encoded, dropped, rows = [], Counter[str](), list(rows)
    lengths: list[int] = []
    _warn_about_history([prompt_of(row) for row in rows], tokenizer)
    encode = partial(encode_samples, tokenizer=tokenizer, train_on_prompt=train_on_prompt)
    for _, samples in not_refused(rows, encode, on_bad_row, dropped):
        for ids, labels in samples:
            lengths.append(len(ids))
            if len(ids) > max_length:
                dropped[_too_long("dataset.max_length", max_length)] += 1
            else:
                encoded.append({"input_ids": ids, "labels": labels})
    _require_fitting(encoded, lengths, "dataset.max_length", max_length, room)
    return encoded, dropped


def encode_texts(
    rows: Sequence[Row], tokenizer: Any, max_length: int, on_bad_row: str = DROP
) -> tuple[list[list[int]], Counter[str]]:
    """Encode the rows of PPO-ptx: `text` with BOS and EOS, or a whole SFT row.

    Rows longer than `max_length` tokens are cut; one token alone is dropped: it predicts nothing.
    """
    encoded, dropped = [], Counter[str]()
    for _, ids in not_refused(rows, partial(encode_text, tokenizer=tokenizer), on_bad_row, dropped):
        if len(ids[:max_length]) > 1:
            encoded.append(ids[:max_length])
        else:
            dropped["shorter than two tokens"] += 1
    _require_fitting(encoded, [1], "ptx.max_length", max_length)
    return encoded, dropped


def encode_text(row: Row, tokenizer: Any) -> list[int]:
    """Token ids of one row of PPO-ptx."""
    if "text" in row:
        return with_eos(first_token_ids(row["text"], tokenizer), tokenizer)
    return encode_row(row, tokenizer)[0]


def encode_ranked(
    rows: Sequence[Row],
    tokenizer: Any,
    max_length: int,
    on_bad_row: str = DROP,
    room: int | None = None,
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Encode ranked rows; a response that with its prompt exceeds `max_length` tokens is dropped.

    A row is kept while it has at least two responses that are not tied. Single responses that are
    dropped have a reason of their own. `room`: see `_require_fitting`.

    Returns:
        Per kept row {"input_ids": K lists of prompt + response, "ranks": K ints, "lengths": K
        response lengths in tokens with their end, "row": index in `rows`, "scores": K floats,
        "margin", "probability": a float each, these three None where the row has none}.
    """
    encoded, dropped = [], Counter[str]()
    lengths: list[int] = []  # of the longest response that the row needs
    too_long = _too_long("dataset.max_length", max_length)
    encode = partial(_prompt_and_answers, tokenizer=tokenizer)
    for index, (prompt_ids, answers) in not_refused(rows, encode, on_bad_row, dropped):
        row, sequences = rows[index], [prompt_ids + ids for ids in answers]
        lengths.append(_needed_length(row["ranks"], list(map(len, sequences))))
        fits = [i for i, ids in enumerate(sequences) if len(ids) <= max_length]
        if _are_equal(answers, row["ranks"]):
            dropped["responses that the chat template makes equal, ranked differently"] += 1
            continue
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
    _require_fitting(encoded, lengths, "dataset.max_length", max_length, room)
    return encoded, dropped


def _prompt_and_answers(row: Row, tokenizer: Any) -> tuple[list[int], list[list[int]]]:
    prompt = row["prompt"]
    answers = [encode_response(prompt, text, tokenizer) for text in row["responses"]]
    return encode_prompt(prompt, tokenizer), answers


def _are_equal(answers: list[list[int]], ranks: list[int]) -> bool:
    """True if two responses have the same ids and different ranks."""
    texts = [tuple(ids) for ids in answers]
    return len(set(zip(texts, ranks, strict=True))) > len(set(texts))


def _needed_length(ranks: list[int], lengths: list[int]) -> int:
    """Shortest limit that keeps two responses that are not tied."""
    order = sorted(zip(lengths, ranks, strict=True))
    return next(length for length, rank in order if rank != order[0][1])


def encode_prompts(
    rows: Iterable[Row],
    tokenizer: Any,
    max_prompt_length: int | None,
    on_bad_row: str = DROP,
    room: int | None = None,
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Encode the prompts of canonical rows for PPO to {"prompt": canonical prompt, "input_ids",
    "columns": all other columns of the row, None where only other rows have one}.

    Prompts of more than `max_prompt_length` tokens and those without a token are dropped. `room`:
    see `_require_fitting`.
    """
    encoded, dropped, rows = [], Counter[str](), list(rows)
    lengths: list[int] = []
    prompts, names = [prompt_of(row) for row in rows], other_columns(rows)
    _warn_about_history(prompts, tokenizer)
    encode = partial(encode_prompt, tokenizer=tokenizer)
    for index, ids in not_refused(prompts, encode, on_bad_row, dropped):
        lengths.append(len(ids))
        if not ids:
            dropped["prompts without a token"] += 1
        elif max_prompt_length is not None and len(ids) > max_prompt_length:
            dropped[_too_long("ppo.max_prompt_length", max_prompt_length)] += 1
        else:
            columns = {name: rows[index].get(name) for name in names}
            encoded.append({"prompt": prompts[index], "input_ids": ids, "columns": columns})
    _require_fitting(encoded, lengths, "ppo.max_prompt_length", max_prompt_length, room)
    return encoded, dropped


def _warn_about_history(prompts: Iterable[Prompt], tokenizer: Any) -> None:
    """Warn if a token reaches from one turn into the next: a server, which tokenises the whole
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


def _require_fitting(
    encoded: list[Any], lengths: list[int], name: str, limit: int | None, room: int | None = None
) -> None:
    """Refuse a limit that leaves no row; warn about one that drops more than `LONG_SHARE`.

    Args:
        room: tokens of a row that the model takes; None, as for held-out rows, gives no warning.
    """
    if not encoded:
        what = f"the longest has {max(lengths, default=0)} tokens"
        raise InputError(f"{name}={limit} leaves no row; raise it: {what}")
    num_long = sum(limit is not None and length > limit for length in lengths)
    if room is None or num_long <= LONG_SHARE * len(lengths):
        return
    enough = sorted(lengths)[math.ceil(KEPT_SHARE * len(lengths)) - 1]
    fix = f"{name}={enough} keeps {KEPT_SHARE:.0%} of them"
    if enough > room:
        fix = f"{KEPT_SHARE:.0%} of them have at most {enough}, but the model has room for {room}"
        fix += SHORTER[name]
    warn(
        f"{num_long:,} of {len(lengths):,} rows ({num_long / len(lengths):.0%}) are longer than "
        f"{name}={limit} tokens and are dropped; {fix}"
    )


def pad(
    rows: Sequence[Sequence[Any]],
    value: Any,
    side: Literal["left", "right"] = "right",
    device: Any = None,
) -> torch.Tensor:
    """Make rows of different lengths one tensor (number of rows, length of the longest).

    pad([[1, 2], [3]], 0) -> [[1, 2], [3, 0]]        side="left" -> [[1, 2], [0, 3]]
    """
    import torch

    width = max(map(len, rows))
    padding = [[value] * (width - len(row)) for row in rows]
    pairs = zip(rows, padding, strict=True)
    filled = [[*row, *rest] if side == "right" else [*rest, *row] for row, rest in pairs]
    return torch.tensor(filled, device=device)


@dataclass
class RankedCollator:
    """Collate encoded ranked rows; a batch has all responses of its prompts, in order.

    Returns:
        input_ids (N, L) right-padded, attention_mask (N, L) from lengths (so that pad may equal
        EOS), ranks (N,), groups (N,): index of the prompt in the batch, -1 where a row is
        "weightless". All int64. (N,) float32: scores of the data (0 where the row has none), margin
        of the response's pair (0), and the probability that the response is preferred (1).
    """

    pad_token_id: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        import torch

        names = ("ranks", "groups", "scores", "margin", "probability")
        columns: dict[str, list[Any]] = {name: [] for name in names}
        for group, row in enumerate(rows):
            num, probability = len(row["ranks"]), row.get("probability")
            columns["ranks"] += row["ranks"]
            columns["groups"] += [-1 if row.get("weightless") else group] * num
            columns["scores"] += row.get("scores") or [0.0] * num
            columns["margin"] += [float(row.get("margin") or 0.0)] * num
            pair = [1.0] * num if probability is None else [probability, 1.0 - probability]
            columns["probability"] += pair
        sequences = [ids for row in rows for ids in row["input_ids"]]
        masks = [[1] * len(ids) for ids in sequences]
        batch = {"input_ids": pad(sequences, self.pad_token_id), "attention_mask": pad(masks, 0)}
        return batch | {name: torch.tensor(values) for name, values in columns.items()}
