"""The format of a source whose `format` is null, found from the columns of its first rows.

A format reads a row if it makes a row of it that the stage can use, or can drop for a reason. The
first format in the stage's order that reads half of the rows is taken: so a row may have more
columns than one format needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

from rlhf.config import InputError, one_line
from rlhf.data.columns import NUM_LOOKED_AT, column_names, with_columns
from rlhf.data.formats import FIELDS, FORMATS
from rlhf.data.read import Rows
from rlhf.data.rows import DropRow, Row, as_rows, check_row, without_nulls

_CONVERSATIONS = ("sharegpt", "messages")
_SFT = (
    *(*_CONVERSATIONS, "prompt_completion", "alpaca", "dolly15k", "self_instruct"),
    *("question_answer", "tldr", "chatllama_actor", "hh_chosen", "chosen", "text"),
)
_REWARD = (
    *("ratings", "ranked", "hh", "pair", "alpaca_farm", "ultrafeedback", "stack_exchange"),
    *("summarize_from_feedback", "oasst"),
)
_PPO = ("prompt_completion", "self_instruct", "dolly15k", "instruction", "messages", *_SFT)
ORDER = {  # stage -> the formats that it reads, the first one first
    "sft": _SFT,
    "reward": _REWARD,
    "ppo": tuple(dict.fromkeys([*_PPO, "chatllama_rlhf", *_REWARD])),
    "ptx": ("text", *_SFT[:-1]),
}


# What an error proposes: the formats, and the fields of the first under names that others use.
_PLAIN = {
    "sft": ("prompt_completion", "messages", "alpaca", "question_answer", "text"),
    "reward": ("pair", "ranked"),
    "ppo": ("prompt_completion", "messages", "question_answer", "instruction"),
    "ptx": ("text", "prompt_completion", "messages"),
}
_SYNONYMS = {
    "prompt": "question query ask instruction problem input context user q title".split(),
    "completion": "response answer output solution target reply assistant summary label a".split(),
    "chosen": "preferred better winner accepted positive good best win".split(),
    "rejected": "dispreferred worse loser declined negative bad worst lose".split(),
    "text": "content document body".split(),
}


def find_format(
    rows: Rows, stage: str, columns: Mapping[str, str], group: str = "dataset"
) -> tuple[str, str]:
    """Find the format of the rows of a source.

    Args:
        rows: each with its place, see `read_rows`.
        columns: `dataset.columns`. Formats that read these names come first.
        group: the group of settings that has `path` and `format`, for messages.

    Returns:
        Name of the format; and a note that names the first row that differs, or "".

    Raises:
        InputError: no format of the stage reads any of the rows.
    """
    first = islice(with_columns(rows, columns), NUM_LOOKED_AT)
    looked_at = [
        (where, raw) for where, raw in first if isinstance(raw, dict) and without_nulls(raw)
    ]
    order = sorted(ORDER[stage], key=lambda name: -len(columns.keys() & {*FIELDS[name]}))
    if not looked_at:
        return order[0], ""  # reading all rows says what is wrong with them
    unread = {name: [one for one in looked_at if not reads(name, one[1], stage)] for name in order}
    least = min(map(len, unread.values()))
    if least == len(looked_at):
        raise _no_reading(*looked_at[0], stage, group)
    enough = max(least, len(looked_at) // 2)
    found = next(name for name in order if len(unread[name]) <= enough)
    if not unread[found]:
        return found, ""
    where, raw = unread[found][0]
    count = f"{len(unread[found])} of the first {len(looked_at)}"
    return found, f"; {count} differ, the first is {where.rpartition(', ')[2]} ({_fields(raw)})"


def reads(format: str, raw: Row, stage: str) -> bool:
    """True if a format makes rows of `raw` that the stage can use, or drops it for a reason."""
    return _fault(format, raw, stage) is None


def _fault(format: str, raw: Row, stage: str) -> Exception | None:
    try:
        for row in as_rows(FORMATS[format](without_nulls(raw))):
            check_row(row, stage)
    except DropRow:
        return None
    except Exception as error:  # any error means no
        return error
    return None


def _fields(raw: Row) -> str:
    return ", ".join(column_names(raw))


def _no_reading(where: str, raw: Row, stage: str, group: str) -> InputError:
    """Say which columns the row has, which format is the nearest, and what to set."""
    found = f"{where} has the columns {_fields(raw)}, which no format of the {stage} stage reads"
    for other in ("sft", "reward", "ppo"):
        name = next((name for name in ORDER[other] if reads(name, raw, other)), None)
        if name and other != stage != "ptx":
            found += f" (the {other} stage reads it as {name})"
            break
    given = without_nulls(raw)
    for name in _PLAIN[stage]:
        fault = _fault(name, raw, stage)
        if fault and all(field in given for field in _needed(name, stage)):
            why = one_line(fault).partition(": ")[2]
            return InputError(f"{found}. The nearest is {group}.format={name}: {why}")
    name = _PLAIN[stage][0]
    needed = _needed(name, stage)
    fix = f"The nearest is {name}, which needs {' and '.join(needed)}"
    if group == "dataset":
        fix += f": give {_renaming(raw, needed)}"
    return InputError(f"{found}. {fix}")


def _needed(format: str, stage: str) -> tuple[str, ...]:
    return FIELDS[format][:1] if stage == "ppo" else FIELDS[format]


def _renaming(raw: Row, needed: tuple[str, ...]) -> str:
    """The settings that name the columns of a row as `needed`, as far as they can be guessed."""
    left = [name for name in column_names(raw) if name not in needed]
    settings = []
    for field in needed:
        if field in raw:
            continue
        last = {name.rpartition(".")[2].lower(): name for name in reversed(left)}
        column = next((last[word] for word in _SYNONYMS[field] if word in last), "<column>")
        left = [name for name in left if name != column]
        settings.append(f"dataset.columns.{field}={column}")
    return " ".join(settings)
