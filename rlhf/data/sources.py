"""Sources to canonical rows: the format is applied, each row is checked, bad ones are counted, and
the rows are split by prompt."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rlhf.config import DatasetConfig, InputError, one_line, show
from rlhf.console import say, warn
from rlhf.data.columns import check_names, with_columns
from rlhf.data.detect import find_format, reads
from rlhf.data.dropped import REPAIRED, BadRows, Reason, describe_dropped, first_cases
from rlhf.data.formats import FORMATS, ONE_RESPONSE_PER_ROW, Format, merge_by_prompt, resolve_format
from rlhf.data.read import is_function, read_rows
from rlhf.data.rows import (
    TEXTS,
    BadRow,
    DropRow,
    Row,
    as_messages,
    as_prompt,
    as_rows,
    check_row,
    prompt_key,
    prompt_of,
    repaired,
    with_system,
    without_nulls,
    without_repeats,
)

AS_PARENT = (
    "the model was trained on conversations, so text prompts become user turns "
    "(dataset.as_conversation=false keeps them text)"
)
FEW = 20  # held-out rows: figures of fewer say so

# --- Training and held-out rows -----------------------------------------------------------------


@dataclass
class Splits:
    """Canonical rows for training and evaluation."""

    train: list[Row]
    eval: list[Row]
    dropped: Counter[str] = field(default_factory=Counter)  # rows that were left out, by reason
    overlap: int = 0  # evaluation rows whose prompt is also in `train`, if the user gives both

    @property
    def prompts(self) -> str:
        """How the training prompts reach the model: "conversation", "text" or "mixed"."""
        are_texts = {isinstance(prompt_of(row), str) for row in self.train}
        return "mixed" if len(are_texts) != 1 else "text" if are_texts.pop() else "conversation"

    def describe(self, too_long: Counter[str]) -> str:
        """Say what was dropped, here and because of `too_long`, and whether the sides overlap; then
        the first case of each reason, a line each."""
        dropped = self.dropped + too_long
        line = describe_dropped(dropped)
        if self.overlap:
            line += f"; {self.overlap} held-out rows share their prompt with a training row"
        return "\n".join([line, *first_cases(dropped)])


def load_splits(
    config: DatasetConfig,
    stage: str,
    seed: int,
    needs_eval: bool = True,
    parent_prompts: str | None = None,
) -> Splits:
    """Load the training and evaluation rows of a stage.

    `eval_path` gives the evaluation rows; else a `python:` path is called for split "eval"; else
    the rows of `path` are split by prompt. `max_rows` and `max_eval_rows` keep the first rows.
    If `format` is null, it becomes the format that the rows of `path` have.

    Args:
        needs_eval: False reads no evaluation source; rows held out of `path` are still returned.
        parent_prompts: `prompts` of the record of the stage that this one starts from.
    """
    train, evaluation, dropped = _load_sides(config, stage, seed, needs_eval)
    train, evaluation = train[: config.max_rows], evaluation[: config.max_eval_rows]
    if config.as_conversation or (
        config.as_conversation is None and parent_prompts == "conversation"
    ):
        texts, train = train, [to_conversation(row) for row in train]
        evaluation = [to_conversation(row) for row in evaluation]
        if config.as_conversation is None and texts != train:
            say(AS_PARENT)
    if not train:
        raise InputError(
            f"dataset.path={config.path!r}: no row to train on; {describe_dropped(dropped)}"
            + "".join(f"; {line.strip()}" for line in first_cases(dropped)[:1])
        )
    is_split = config.eval_fraction > 0 and not config.eval_path and not is_function(config.path)
    if not evaluation and needs_eval and is_split:
        warn(
            "the rows have a single prompt, which is trained on and evaluated on: the figures of "
            "held-out rows say nothing; give dataset.eval_path"
        )
        evaluation = train[: config.max_eval_rows]
    if not evaluation and needs_eval:
        raise InputError(
            f"no row to evaluate on ({len(train)} to train on; {describe_dropped(dropped)}): raise "
            f"dataset.eval_fraction={config.eval_fraction} or give dataset.eval_path"
        )
    return Splits(train, evaluation, dropped, count_overlap(train, evaluation))


def _load_sides(
    config: DatasetConfig, stage: str, seed: int, needs_eval: bool
) -> tuple[list[Row], list[Row], Counter[str]]:
    """Read the rows to train on and to evaluate on, and say which format was found."""
    assert config.path is not None
    path = config.eval_path or config.path
    from_python = is_function(config.path)
    split, note = "train" if from_python else config.split, None
    check_names(config.columns, config.format)
    if config.format is None and not from_python:
        found = read_rows(config.path, split, stage, "dataset.path", config.subset)
        config.format, note = find_format(found, stage, config.columns)
    names = ("on_bad_row", "columns", "subset")
    options: dict[str, Any] = {name: getattr(config, name) for name in names}
    train, dropped = load_rows(config.path, config.format, split, stage, **options)
    if note is not None:
        say(f"{_shown(config.path)}: {config.format}, {len(train):,} rows{note}")
    evaluation: list[Row] = []
    if not config.eval_path and not from_python:
        train, evaluation = split_by_prompt(train, config.eval_fraction, seed)
    elif needs_eval:
        name = "dataset.eval_path" if config.eval_path else "dataset.path"
        split = "eval" if is_function(path) else config.eval_split
        evaluation, dropped_eval = load_rows(path, config.format, split, stage, name, **options)
        dropped = dropped + dropped_eval
    return train, evaluation, dropped


def _shown(path: Any) -> str:
    return path if isinstance(path, str) else ", ".join(path)


def split_by_prompt(
    rows: list[Row], eval_fraction: float, seed: int
) -> tuple[list[Row], list[Row]]:
    """Split rows by a hash of seed and prompt: (train, eval), sharing no prompt.

    The side of a prompt does not depend on the order or number of the rows. So the share of the
    evaluation prompts is `eval_fraction` in expectation only. If all prompts had the same side, the
    nearest one to the boundary gets the other side.
    """
    keys = [prompt_key(row) for row in rows]
    places = {key: _place(seed, key) for key in keys}
    held_out = {key for key, place in places.items() if place < eval_fraction}
    if eval_fraction and places and not held_out:
        held_out = {min(places, key=places.__getitem__)}
    if len(held_out) == len(places) > 0:  # a single prompt is trained on
        held_out.remove(max(places, key=places.__getitem__))
    sides: tuple[list[Row], list[Row]] = ([], [])
    for row, key in zip(rows, keys, strict=True):
        sides[key in held_out].append(row)
    return sides


def _place(seed: int, key: str) -> float:
    """A number in [0, 1) that depends on seed and prompt alone."""
    digest = hashlib.sha256(f"{seed}\n{key}".encode(errors="replace")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def few_rows(number: int, unit: str) -> str:
    """A remark on figures of fewer than `FEW` held-out rows or prompts; empty for more."""
    if number >= FEW:
        return ""
    return (
        f"these figures are of only {number} held-out {unit}{'s' * (number > 1)} and say little; "
        "raise dataset.eval_fraction, or give dataset.eval_path"
    )


def count_overlap(train: list[Row], evaluation: list[Row]) -> int:
    """Count the evaluation rows that share their prompt with a training row."""
    seen = {prompt_key(row) for row in train}
    return sum(prompt_key(row) in seen for row in evaluation)


def to_conversation(row: Row) -> Row:
    """Make a text prompt a user turn and a text completion an assistant turn; see `with_system`."""
    turns = {}
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(row.get(name), str):
            turns[name] = [{"role": role, "content": row[name]}]
    return with_system(row | turns)


# --- Canonical rows -----------------------------------------------------------------------------


def load_rows(
    path: Any,
    format: str | None,
    split: str,
    stage: str,
    field: str = "dataset.path",
    on_bad_row: str = DatasetConfig.on_bad_row,
    columns: Mapping[str, str] | None = None,
    subset: str | None = None,
) -> tuple[list[Row], Counter[str]]:
    """Read a source and make its rows canonical for a stage.

    Args:
        path: see `DatasetConfig`; `datasets.load_dataset` reads a directory or Hub name; a Python
            function is called as function(stage, split) for canonical rows.
        format: see `resolve_format`; None: see `find_format`. Not for a Python function's rows.
        split, subset: for a Hub name; `split` also for a directory or function.
        stage: sft, reward, ppo or ptx.
        field: configuration key of `path`, for messages.
        on_bad_row: see `BadRows`.
        columns: new names of columns, see `with_columns`; not for the rows of a Python function.

    Returns:
        Canonical rows in the order of the source; and what was dropped, a count for each `Reason`.

    Raises:
        InputError: no such source, no rows, or malformed rows: file, row number (1-based), field.
    """
    from_python = is_function(path)
    group, columns = field.partition(".")[0], columns if columns and not from_python else {}
    if format is None and not from_python:
        found = read_rows(path, split, stage, field, subset)
        format, _ = find_format(found, stage, columns, group)
    format = format or "canonical"
    apply = dict if from_python else resolve_format(format)
    if from_python or format not in FORMATS:
        apply = partial(_with_plain_turns, apply)
    merges = format in ONE_RESPONSE_PER_ROW and not from_python
    setting = f"{group}.format"
    rows = _Canonical(apply, format, stage, on_bad_row, setting, checks=not merges)
    rows.take_all(with_columns(read_rows(path, split, stage, field, subset), columns))
    if rows.num_read == 0:
        raise InputError(f"{field}={path!r} has no rows; expected at least one")
    kept, dropped = rows.kept, rows.dropped
    if merges:
        whole = _Canonical(dict, format, stage, on_bad_row, setting)
        merged = merge_by_prompt(kept)
        whole.take_all((f"{path}, prompt {show(row['prompt'])}", row) for row in merged)
        kept, dropped = whole.kept, dropped + whole.dropped
    return (_distinct(kept, dropped) if stage == "reward" else kept), dropped


def _distinct(kept: list[Row], dropped: Counter[str]) -> list[Row]:
    """Leave out and count the responses of each row that repeat another."""
    rows = [without_repeats(row) for row in kept]
    num_repeats = sum(len(row["responses"]) for row in kept)
    num_repeats -= sum(len(row["responses"]) for row in rows)
    if num_repeats:
        dropped["single responses that repeat another"] = num_repeats
    return rows


def _with_plain_turns(apply: Format, raw: Row) -> list[Row]:
    """Apply a format of the user's own, and give its conversations the form of those of ours."""
    turns = {"messages": as_messages, "prompt": as_prompt, "completion": as_prompt}
    return [
        row | {name: read(row[name], name) for name, read in turns.items() if name in row}
        for row in as_rows(apply(raw))
    ]


@dataclass
class _Canonical:
    """The usable rows of a source, and counts of the others."""

    apply: Format
    format: str
    stage: str
    on_bad_row: str
    setting: str  # the setting that names the format
    checks: bool = True  # False where a row is only a part of a canonical row
    num_read: int = 0

    def __post_init__(self) -> None:
        self.kept: list[Row] = []
        self.dropped = Counter[str]()
        self.bad = BadRows(self.on_bad_row, self.dropped)

    def take_all(self, source: Iterable[tuple[str, Any]]) -> None:
        """Take raw rows, each with its place; refuse the source if half of them are malformed."""
        for where, raw in source:
            self.num_read += 1
            try:
                self._take(where, raw)
            except DropRow as reason:
                self._drop(where, reason)
            except Exception as error:  # a format of the user's own may raise anything
                self._refuse(where, raw, _as_bad_row(error, self.format, raw))
        hint = ""
        if self.num_read == 1 and isinstance(raw, dict):
            if any(isinstance(value, (list, dict)) and value for value in raw.values()):
                hint = " If the file holds a single object, write one object per row."
        self.bad.require_fewer_than_half(self.num_read, "malformed", hint)

    def _take(self, where: str, raw: Any) -> None:
        if isinstance(raw, BadRow):
            raise raw
        if not isinstance(raw, dict):
            raise BadRow(f"got {show(raw)}; expected an object with named fields", "not an object")
        for row in as_rows(self.apply(without_nulls(raw))):
            changed: list[str] = []
            if self.stage == "ppo":  # a scorer may ask for any column, also one that a format reads
                row = {name: value for name, value in raw.items() if name != "messages"} | row
            row = row | {name: repaired(row[name], name, changed) for name in TEXTS if name in row}
            try:
                if self.checks:
                    check_row(row, self.stage)
            except DropRow as reason:  # the other rows of a list stay
                self._drop(where, reason)
                continue
            self.kept.append(row)
            for name in changed:
                case = f"{where}, field {name!r}: half of a character"
                self.dropped[Reason(REPAIRED, case)] += 1

    def _drop(self, where: str, reason: DropRow) -> None:
        self.dropped[Reason(str(reason), f"{where}: {reason}")] += 1

    def _refuse(self, where: str, raw: Any, error: BadRow) -> None:
        case = f"{where}{', ' if str(error).startswith('field') else ': '}{error}"
        hint = self._other_formats(error, raw) if self.bad.first is None else ""
        self.bad.add(InputError(case + hint), Reason(error.reason, case))

    def _other_formats(self, error: BadRow, raw: Any) -> str:
        """Name the formats that read a row in which a field is missing."""
        if not isinstance(raw, dict) or "missing or null" not in str(error):
            return ""
        others = [name for name in FORMATS if reads(name, raw, self.stage)]
        fits = " or ".join(f"{self.setting}={name}" for name in others)
        return f"{'' if str(error).endswith('?') else ';'} {fits} reads it" if others else ""


def _as_bad_row(error: Exception, format: str, raw: Any) -> BadRow:
    """Turn any error of a format or a check into a `BadRow` that says what to do."""
    if isinstance(error, BadRow):
        return error
    if isinstance(error, KeyError):
        given = ", ".join(map(str, without_nulls(raw))) or "no fields"
        what = f"missing or null; the row has {given}; is {format!r} the right format?"
        return BadRow(f"field {error}: {what}", f"without field {error}")
    if isinstance(error, InputError):
        return BadRow(str(error), f"refused by format {format!r}")
    what = f"format {format!r} cannot read it: {one_line(error)}"
    return BadRow(what, f"unreadable to format {format!r}")
