"""`dataset.columns`: columns of a source under the names that the formats know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain, islice
from typing import Any

from rlhf.config import InputError, nearest
from rlhf.data.formats import FIELDS
from rlhf.data.read import Rows
from rlhf.data.rows import Row, without_nulls

NUM_LOOKED_AT = 100  # rows that decide which columns there are, and which format they have
OPTIONAL = ("input", "context", "system", "ranks", "scores", "scale", "margin", "probability")
KNOWN = {name for fields in FIELDS.values() for name in fields} | {*OPTIONAL}
KNOWN |= {"score_chosen", "score_rejected"}


def check_names(columns: Mapping[str, str], format: str | None) -> None:
    """Refuse names that no format reads; a format of the user's own may read any."""
    for name in columns:
        if name not in KNOWN and "." not in str(format):
            raise InputError(
                f"dataset.columns.{name}={columns[name]}: no format reads a field {name!r}; they "
                f"read {', '.join(sorted(KNOWN))}.{nearest(name, KNOWN)}"
            )


def with_columns(rows: Rows, columns: Mapping[str, str]) -> Rows:
    """Add to each row the columns under their new names.

    Raises:
        InputError: none of the first rows has a column that is named.
    """
    first = list(islice(rows, NUM_LOOKED_AT))
    raws = [raw for _, raw in first if isinstance(raw, dict)]
    for name, source in columns.items():
        if raws and all(_value(raw, source) is None for raw in raws):
            there = list(dict.fromkeys(column for raw in raws for column in column_names(raw)))
            where = first[0][0].rpartition(", ")[0]
            raise InputError(
                f"dataset.columns.{name}={source}: no row of {where} has it; the columns are "
                f"{', '.join(there)}.{nearest(source, there)}"
            )
    for where, raw in chain(first, rows):
        if isinstance(raw, dict):
            found = {name: _value(raw, source) for name, source in columns.items()}
            raw = raw | without_nulls(found)
        yield where, raw


def _value(raw: Any, source: str) -> Any:
    """The column `source`, where `a.b` is `b` in `a` and `a.0` the first entry of the list `a`."""
    if isinstance(raw, dict) and source in raw:
        return raw[source]
    for part in source.split("."):
        if isinstance(raw, list) and part.isdigit() and int(part) < len(raw):
            raw = raw[int(part)]
        elif isinstance(raw, dict):
            raw = raw.get(part)
        else:
            return None
    return raw


def column_names(raw: Row) -> Iterator[str]:
    """Names of the columns that are not null; those in a column `a` are `a.b`."""
    for name, value in without_nulls(raw).items():
        if isinstance(value, dict) and value:
            yield from (f"{name}.{inner}" for inner in without_nulls(value))
        else:
            yield str(name)
