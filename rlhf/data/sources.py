"""Sources: files, Hub data sets and Python functions to canonical rows, split by prompt."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.config import DatasetConfig, InputError, load_object
from rlhf.data.canonical import DropRow, Row, check_row, prompt_of, show, without_repeats
from rlhf.data.formats import GROUPED, resolve_format

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


def load_rows(
    path: str, format: str, split: str, stage: str, field: str = "dataset.path"
) -> tuple[list[Row], Counter[str]]:
    """Read a source and make its rows canonical for a stage.

    Args:
        path: a .json (array, or one object per line), .jsonl, .csv or .parquet file, each also with
            .gz; a directory or Hub name, which `datasets.load_dataset` reads; or
            `python:package.module.function`, called as function(stage, split) for canonical rows.
        format: see `resolve_format`; not applied to the rows of a Python function.
        split: for a directory, Hub name or function; a single file has no splits.
        stage: sft, reward or ppo.
        field: configuration key, for messages.

    Returns:
        Canonical rows in the order of the source, and the number of dropped rows by reason.

    Raises:
        InputError: no such source, no rows, or a malformed row: file, row number (1-based), field.
    """
    apply: Callable[[Row], Row] = dict
    merge = None if path.startswith("python:") else GROUPED.get(format)
    if path.startswith("python:"):
        source: Iterable[Any] = load_object(path, field)(stage, split)
    else:
        apply = resolve_format(format)
        source = _read(path, split, field)
    rows, dropped, number = [], Counter[str](), 0
    for number, raw in enumerate(source, start=1):
        where = f"{path}, row {number}"
        if not isinstance(raw, dict):
            raise InputError(f"{where}: got {show(raw)}; expected an object with named fields")
        # Arrow and CSV fill an absent field with None: both mean "missing".
        raw = {name: value for name, value in raw.items() if value is not None}
        try:
            row = apply(raw)
            if merge is None:
                check_row(row, stage)
        except DropRow as reason:
            dropped[str(reason)] += 1
        except KeyError as error:
            fix = f"the row has {', '.join(raw) or 'no fields'}; is {format!r} the right format?"
            raise InputError(f"{where}, field {error}: missing or null; {fix}") from error
        except TypeError as error:
            raise InputError(f"{where}: format {format!r} cannot read it: {error}") from error
        except InputError as error:
            raise InputError(f"{where}, {error}") from error
        else:
            rows.append(row)
    if number == 0:
        raise InputError(f"{field}={path!r} has no rows; expected at least one")
    if merge is not None:
        rows = _checked(merge(rows), path, stage, dropped)
    if stage == "reward":
        rows = _without_repeats(rows, dropped)
    return rows, dropped


def _checked(rows: list[Row], path: str, stage: str, dropped: Counter[str]) -> list[Row]:
    """Check rows that were merged from several of the source; count the dropped ones."""
    kept = []
    for row in rows:
        try:
            check_row(row, stage)
        except DropRow as reason:
            dropped[str(reason)] += 1
        except InputError as error:
            raise InputError(f"{path}, prompt {show(row['prompt'])}, {error}") from error
        else:
            kept.append(row)
    return kept


def _without_repeats(rows: list[Row], dropped: Counter[str]) -> list[Row]:
    kept = [without_repeats(row) for row in rows]
    num_repeats = sum(len(row["responses"]) for row in rows)
    num_repeats -= sum(len(row["responses"]) for row in kept)
    if num_repeats:
        dropped["single responses that repeat another"] = num_repeats
    return kept


def _read(path: str, split: str, field: str) -> Iterable[Any]:
    file = Path(path).expanduser()
    kind = Path(path.removesuffix(".gz")).suffix.lower()
    if file.is_file():
        if kind == ".parquet":
            return _read_parquet(path, _read_bytes(file))
        if kind in (".json", ".jsonl"):
            return _read_json(path, _read_text(file))
        if kind == ".csv":
            return _read_csv(path, _read_text(file))
        expected = f"{', '.join(SUFFIXES)} (each also with .gz)"
        raise InputError(f"{field}={path!r}: unknown suffix {file.suffix!r}; expected {expected}")
    if file.is_dir():
        return _load_dataset(str(file), field, path, split=split)
    if kind in SUFFIXES or path.startswith((".", "/", "~")):
        raise InputError(
            f"{field}={path!r} is neither a file nor a directory (looked for {file.absolute()})"
        )
    return _load_dataset(path, field, path, split=split)


def _load_dataset(name: str, field: str, path: str, **arguments: Any) -> Iterable[Any]:
    import datasets

    try:
        return datasets.load_dataset(name, **arguments)
    except Exception as error:  # whatever the Hub, Arrow or a builder says, the user must see it
        here = "" if Path(path).expanduser().exists() else "neither a file nor a directory here; "
        cause = error.__cause__ or error
        raise InputError(f"{field}={path!r}: {here}`datasets` cannot load it: {cause}") from error


def _read_bytes(file: Path) -> bytes:
    data = file.read_bytes()
    try:
        return gzip.decompress(data) if file.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{file}: not a readable gzip file: {error}") from error


def _read_text(file: Path) -> str:
    try:
        return _read_bytes(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not a UTF-8 text file: {error}") from error


def _read_parquet(path: str, data: bytes) -> Iterable[Row]:
    import datasets
    import pyarrow
    import pyarrow.parquet

    try:
        return datasets.Dataset(pyarrow.parquet.read_table(pyarrow.BufferReader(data)))
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a readable Parquet file: {error}") from error


# JSON and CSV are read here and not by `datasets`: it turns texts that look like dates into dates,
# and fails on a file over 10 MB whose later rows have other fields or types (5.2.0).


def _read_json(path: str, text: str) -> Iterator[Any]:
    if text.lstrip().startswith("["):
        try:
            yield from json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}: not a valid JSON array: {error}") from error
        return
    number = 0
    for line_number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        number += 1
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}, row {number} (line {line_number}): not valid JSON: {error}; expected one "
                "object per line, or one array for the whole file"
            ) from error


def _read_csv(path: str, text: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is shorter than a long conversation
    number = 0
    try:
        for number, row in enumerate(csv.DictReader(io.StringIO(text, newline=""), strict=True), 1):
            if None in row:
                raise InputError(f"{path}, row {number}: more cells than names; quote the commas")
            yield row
    except csv.Error as error:
        raise InputError(f"{path}, row {number + 1}: not valid CSV: {error}") from error


# --- Splits -------------------------------------------------------------------------------------


@dataclass
class Splits:
    """Canonical rows for training and evaluation.

    `dropped` counts the rows that were left out, by reason; `overlap` the evaluation rows whose
    prompt is also in `train` (only possible where the user gives both).
    """

    train: list[Row]
    eval: list[Row]
    dropped: Counter[str] = field(default_factory=Counter)
    overlap: int = 0

    @property
    def prompts(self) -> str:
        """How the training prompts reach the model: "conversation", "text" or "mixed"."""
        kinds = {
            "text" if isinstance(prompt_of(row), str) else "conversation" for row in self.train
        }
        return kinds.pop() if len(kinds) == 1 else "mixed"

    def describe(self, too_long: Counter[str]) -> str:
        """Say what was dropped, here and because of `too_long`, and whether the sides overlap."""
        line = describe_dropped(self.dropped + too_long)
        if self.overlap:
            line += f"; {self.overlap} held-out rows share their prompt with a training row"
        return line


def _prompt_key(row: Row) -> str:
    prompt = prompt_of(row)
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)


def split_by_prompt(
    rows: list[Row], eval_fraction: float, seed: int
) -> tuple[list[Row], list[Row]]:
    """Split rows by a hash of seed and prompt: (train, eval), sharing no prompt.

    The side of a prompt depends on nothing else: not on the order or number of the rows. So the
    share of the evaluation prompts is `eval_fraction` in expectation only.
    """
    sides: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        digest = hashlib.sha256(f"{seed}\n{_prompt_key(row)}".encode(errors="replace")).digest()
        sides[int.from_bytes(digest[:8], "big") < eval_fraction * 2**64].append(row)
    return sides


def load_splits(config: DatasetConfig, stage: str, seed: int) -> Splits:
    """Load the training and evaluation rows of a stage.

    `eval_path` gives the evaluation rows; else a `python:` path is called for split "eval"; else
    the rows of `path` are split by prompt. `max_rows` and `max_eval_rows` keep the first rows.

    Raises:
        InputError: see `load_rows`; or one side is empty.
    """
    assert config.path is not None
    from_python = config.path.startswith("python:")
    split = "train" if from_python else config.split
    train, dropped = load_rows(config.path, config.format, split, stage)
    if config.eval_path or from_python:
        name = "dataset.eval_path" if config.eval_path else "dataset.path"
        path = config.eval_path or config.path
        split = "eval" if path.startswith("python:") else config.eval_split
        evaluation, dropped_eval = load_rows(path, config.format, split, stage, field=name)
        dropped = dropped + dropped_eval
    else:
        train, evaluation = split_by_prompt(train, config.eval_fraction, seed)
    train, evaluation = train[: config.max_rows], evaluation[: config.max_eval_rows]
    if config.as_conversation:
        train, evaluation = ([to_conversation(row) for row in rows] for rows in (train, evaluation))
    if not train:
        raise InputError(
            f"dataset.path={config.path!r}: no row to train on; {describe_dropped(dropped)}"
        )
    if not evaluation:
        raise InputError(
            f"no row to evaluate on ({len(train)} to train on; {describe_dropped(dropped)}): raise "
            f"dataset.eval_fraction={config.eval_fraction} or give dataset.eval_path"
        )
    return Splits(train, evaluation, dropped, count_overlap(train, evaluation))


def count_overlap(train: list[Row], evaluation: list[Row]) -> int:
    """Count the evaluation rows whose prompt is that of a training row."""
    seen = {_prompt_key(row) for row in train}
    return sum(_prompt_key(row) in seen for row in evaluation)


def to_conversation(row: Row) -> Row:
    """Make a text prompt a user turn and a text completion the assistant's; messages stay."""
    roles = {"prompt": "user", "completion": "assistant"}
    turns = {
        name: [{"role": role, "content": row[name]}]
        for name, role in roles.items()
        if isinstance(row.get(name), str)
    }
    return row | turns


def describe_dropped(dropped: Counter[str]) -> str:
    """One line, such as "dropped 9 rows: 5 prompts differ, 4 empty response".

    Reasons that start with "single responses" count responses of rows that stayed, not rows.
    """
    rows: list[tuple[int, str]] = []
    responses: list[tuple[int, str]] = []
    for reason, count in dropped.most_common():
        (responses if reason.startswith("single responses") else rows).append((count, reason))
    line = f"dropped {sum(count for count, _ in rows)} rows"
    line += ": " + ", ".join(f"{count} {reason}" for count, reason in rows) if rows else ""
    return line + "".join(f"; {count} {reason}" for count, reason in responses)
