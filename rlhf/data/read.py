"""A source to raw rows, each with its place: files, Hub data sets, Python functions.

A row that cannot be read, such as a line that is not JSON, becomes a `BadRow`, and reading goes on.
The whole source is refused where nothing says where the next row begins: a broken array, an open
quote in CSV, a damaged Parquet file.

JSON and CSV are read here and not by `datasets`, which turns texts that look like dates into dates
and fails on a file over 10 MB whose later rows have other fields or types (5.2.0).

Left out: encodings other than UTF-8, compression other than gzip and zstd, separators other than
the comma.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from rlhf.config import InputError, load_object, one_line
from rlhf.data.rows import BadRow, Row, bad_field

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
LONGEST_ROW = 2**25  # bytes; a file without line breaks is one row, which no context holds
# CSV has only text. Our formats expect a number in these columns, so it is read as one.
CSV_NUMBERS = "score score_chosen score_rejected margin probability preference choice".split()
Rows = Iterator[tuple[str, Any]]  # (source and number of the row from 1, the row or a `BadRow`)


def is_function(path: Any) -> bool:
    """True for a Python function that gives canonical rows."""
    return isinstance(path, str) and path.startswith("python:")


def read_rows(path: Any, split: str, stage: str, field: str, subset: str | None = None) -> Rows:
    """Read the rows of a source; see `load_rows` for the arguments."""
    if is_function(path):
        return _numbered(path, _call(path, split, stage, field))
    if not isinstance(path, str):
        return _read_list(list(path), split, stage, field, subset)
    file = Path(path).expanduser()
    if has_magic(path) and not file.exists():
        files = sorted(glob(str(file), recursive=True))
        if not files:
            raise InputError(f"{field}={path!r} matches no file (looked from {Path.cwd()})")
        return _read_list(files, split, stage, field, subset)
    kind = Path(path.removesuffix(".gz").removesuffix(".zst")).suffix.lower()
    if file.is_file():
        if kind == ".parquet":
            return _numbered(path, _parquet(path, _read_bytes(file)))
        if kind in (".json", ".jsonl"):
            return _read_json(path, _read_text(file))
        if kind == ".csv":
            return _read_csv(path, _decode(path, _read_text(file)))
        expected = f"{', '.join(SUFFIXES)} (each also with .gz or .zst)"
        raise InputError(f"{field}={path!r}: unknown suffix {file.suffix!r}; expected {expected}")
    if not file.is_dir() and (kind in SUFFIXES or path.startswith((".", "/", "~"))):
        raise InputError(
            f"{field}={path!r} is neither a file nor a directory (looked for {file.absolute()})"
        )
    return _numbered(path, _load_dataset(file, field, path, split, subset))


def _read_list(paths: list[str], split: str, stage: str, field: str, subset: str | None) -> Rows:
    """Read sources one after the other."""
    for path in paths:
        if not isinstance(path, str) or is_function(path):
            raise InputError(f"{field}: got {path!r} in a list; expected files, directories, names")
        yield from read_rows(path, split, stage, field, subset)


# --- Bytes and text -----------------------------------------------------------------------------


def _read_bytes(file: Path) -> bytes:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from error
    try:
        return gzip.decompress(data) if file.suffix == ".gz" else _unzstd(file, data)
    except (OSError, EOFError, zlib.error) as error:
        kind = "gzip" if file.suffix == ".gz" else "zstd"
        raise InputError(f"{file}: not a readable {kind} file: {error}") from error


def _unzstd(file: Path, data: bytes) -> bytes:
    if file.suffix != ".zst":
        return data
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd").read()


def _read_text(file: Path) -> bytes:
    """Bytes of a text file, without a byte order mark."""
    data = _read_bytes(file)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        fix = f"convert it: iconv -f UTF-16 -t UTF-8 {file}"
        raise InputError(f"{file}: not a UTF-8 text file: it begins as UTF-16 does; {fix}")
    return data.removeprefix(codecs.BOM_UTF8)


def read_lines(file: Path) -> Iterator[tuple[str, str]]:
    """Read the lines of a text file, each with its place, without blank ones."""
    for number, line in enumerate(_decode(str(file), _read_text(file)).split("\n"), start=1):
        if line.strip():
            yield f"line {number}", line.rstrip("\r")


def _decode(path: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        fix = f"convert it, e.g. iconv -f ISO-8859-1 -t UTF-8 {path}"
        what = f"line {line}: {_wrong_bytes(error)}"
        raise InputError(f"{path}: not a UTF-8 text file: {what}; {fix}") from error


def _wrong_bytes(error: UnicodeDecodeError) -> str:
    shown = error.object[max(0, error.start - 10) : error.end + 10]
    return f"{error.reason} at {bytes(shown)!r}"


# --- JSON ---------------------------------------------------------------------------------------


def _parse(text: str, start: int = 0) -> tuple[Any, int]:
    """Read the JSON value that begins at `start`: the value, or a `BadRow` where a field is
    repeated; and where it ends. Raises BadRow if it is nested too deeply to find its end."""
    repeated: list[str] = []

    def to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            repeated.append(Counter(name for name, _ in pairs).most_common(1)[0][0])
        return value

    decoder = json.JSONDecoder(object_pairs_hook=to_dict, parse_int=_integer)
    try:
        value, end = decoder.raw_decode(text, start)
    except RecursionError:
        raise BadRow("lists or objects are nested too deeply", "nested too deeply") from None
    if repeated:
        return bad_field(repeated[0], "given twice", "remove one of the two"), end
    return value, end


def _integer(digits: str) -> Any:
    try:
        return int(digits)
    except ValueError:  # more digits than Python converts; `as_number` refuses inf
        return float(digits)


def _read_json(path: str, data: bytes) -> Rows:
    start = data.lstrip()[:1]
    if start == b"[":
        yield from _read_array(path, _decode(path, data))
        return
    number = 0
    for line_number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        number += 1
        line_part = "" if line_number == number else f" (line {line_number})"
        where = f"{path}, row {number}{line_part}"
        value = _parse_line(line)
        if number == 1 and isinstance(value, BadRow) and start == b"{":
            whole = _parse_line(data)
            if isinstance(whole, dict):  # one object over several lines
                yield where, whole
                return
        yield where, value


def too_long(size: int) -> BadRow:
    """A row of so many bytes, which is not read."""
    what = f"it has {size:,} bytes, and a row at most {LONGEST_ROW:,}; is a line break missing?"
    return BadRow(what, "longer than a row may be")


def _parse_line(line: bytes) -> Any:
    """Return the value of a line, or a `BadRow` that says why there is none."""
    if len(line) > LONGEST_ROW:
        return too_long(len(line))
    try:
        text = line.decode().strip(" \t\r\n")
        value, end = _parse(text)
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8 text: {_wrong_bytes(error)}", "not UTF-8 text")
    except json.JSONDecodeError as error:
        expected = "expected one object per line, or one array for the whole file"
        return BadRow(f"not valid JSON: {error}; {expected}", "not valid JSON")
    except BadRow as error:
        return error
    return value


def _read_array(path: str, text: str) -> Rows:
    def skip_space(at: int) -> int:
        while at < len(text) and text[at] in " \t\n\r":
            at += 1
        return at

    number, at = 0, skip_space(text.index("[") + 1)
    try:
        while not text.startswith("]", at):
            if number:
                if not text.startswith(",", at):
                    raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
                at = skip_space(at + 1)
            number += 1
            value, end = _parse(text, at)
            yield f"{path}, row {number}", too_long(end - at) if end - at > LONGEST_ROW else value
            at = skip_space(end)
        end = skip_space(at + 1)
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not a valid JSON array: {error}, in row {number}") from error
    except BadRow as error:
        raise InputError(f"{path}, row {number}: {error}") from error


# --- CSV ----------------------------------------------------------------------------------------


def _read_csv(path: str, text: str) -> Rows:
    csv.field_size_limit(LONGEST_ROW)  # the default of 128 KiB is shorter than a long conversation
    number = 0
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        for name, count in Counter(reader.fieldnames or []).items():
            if count > 1:
                raise InputError(f"{path}: the column {name!r} is given twice; rename one of them")
        for number, row in enumerate(reader, start=1):
            value: Any = row | {n: _number(row[n]) for n in CSV_NUMBERS if row.get(n)}
            if None in row:
                value = BadRow("more cells than names; quote the commas", "more cells than names")
            yield f"{path}, row {number}", value
    except csv.Error as error:
        raise InputError(f"{path}, row {number + 1}: not valid CSV: {error}") from error


def _number(text: str) -> float | str:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if type(value) in (int, float) else text


# --- Parquet, `datasets` and Python -------------------------------------------------------------


def _parquet(path: str, data: bytes) -> Iterable[Row]:
    import datasets
    import pyarrow
    import pyarrow.parquet

    try:
        return datasets.Dataset(pyarrow.parquet.read_table(pyarrow.BufferReader(data)))
    except (pyarrow.ArrowException, OSError, ValueError, NotImplementedError) as error:
        what = " ".join(str(error).split())
        raise InputError(f"{path}: not a readable Parquet file: {what}") from error


def _load_dataset(
    file: Path, field: str, path: str, split: str, subset: str | None
) -> Iterable[Any]:
    import datasets

    here = str(file) if file.is_dir() else ""
    try:
        if here and (file / "state.json").is_file():  # of `save_to_disk`, without splits
            return datasets.load_from_disk(here)
        return datasets.load_dataset(here or path, name=subset, split=split)
    except Exception as error:  # the Hub, Arrow or a builder may raise anything
        where = "" if here else "neither a file nor a directory here; "
        cause = error.__cause__ or error
        what = f"{field}={path!r}: {where}`datasets` cannot load it: {cause}"
        if "onfig name is missing" in str(cause):
            what += " (dataset.subset=<name> chooses one)"
        raise InputError(what) from error


def _call(path: str, split: str, stage: str, field: str) -> Iterable[Any]:
    function = load_object(path, field)
    try:
        return function(stage, split)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{field}={path!r}: the function fails: {one_line(error)}") from error


def _numbered(path: str, source: Iterable[Any]) -> Rows:
    """Number the rows of a source that may raise any error."""
    number = 0
    try:
        for number, value in enumerate(source, start=1):
            yield f"{path}, row {number}", value
    except Exception as error:
        what = f"cannot be read: {one_line(error)}"
        raise InputError(f"{path}, row {number + 1}: {what}") from error
