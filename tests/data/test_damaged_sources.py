"""Damaged files and values: each is named by file, row and field, without a traceback."""

from __future__ import annotations

import gzip
import json

import pytest
from helpers.rows import assistant, user, write

import rlhf.data.read
from rlhf.config import InputError
from rlhf.data import load_rows

HI = [user("Hi"), assistant("Hello")]
ROW = {"messages": HI}
CALL = {"type": "function", "function": {"name": "weather", "arguments": "{}"}}
PAIR = {"prompt": "Hi", "chosen": "Hello", "rejected": "No"}


def load(tmp_path, *rows, format="messages", stage="sft", **settings):
    return load_rows(write(tmp_path / "rows.jsonl", rows), format, "train", stage, **settings)


def text_part(text, kind="text"):
    return {"type": kind, "text": text}


DEEP = "[" * 100_000 + "]" * 100_000
DIGITS = "9" * 5000
LINE = json.dumps(ROW).encode()
RANKED = '{"prompt": "p", "responses": ["a", "b"], "scores": %s}'
BAD_LINES = {
    "not JSON": (LINE[:-3], "row 3: not valid JSON"),
    "two objects in a line": (LINE * 2, "row 3: not valid JSON: Extra data"),
    "nested": (f'{{"messages": {DEEP}}}'.encode(), "row 3: lists or objects are nested too deeply"),
    "Latin-1": (b'{"messages": "caf\xe9"}', r"row 3: not UTF-8 text: .* at b.*caf\\xe9"),
    "a surrogate as bytes": (b'{"messages": "\xed\xa0\xbd"}', "row 3: not UTF-8 text"),
    "NUL": (b'{"messages": "a\0b"}', "row 3: not valid JSON: Invalid control character"),
    "a huge number": (f'{{"messages": {DIGITS}}}'.encode(), "row 3, field 'messages': got inf"),
    "a field twice": (b'{"messages": 1, "messages": 2}', "row 3, field 'messages': given twice"),
    "NaN": (b'{"messages": NaN}', "row 3, field 'messages': got nan"),
    "true": (b'{"messages": true}', "row 3, field 'messages': got True"),
    "null": (b"null", "row 3: got None; expected an object"),
    "a list": (b"[]", "row 3: got .*; expected an object"),
    "an unknown role": (b'{"messages": [{"role": ["x"]}]}', r"row 3, field 'messages\[0\].role'"),
    "an open part": (
        b'{"messages": [{"role": "user", "content": [{"type": "text"}]}]}',
        r"row 3, field 'messages\[0\].content\[0\].text': got None; expected text",
    ),
    "cut at its end": (b'{"messages": [{"role"', "row 3: not valid JSON"),
}


@pytest.mark.parametrize("is_array", [False, True])
def test_a_row_that_no_context_holds_is_dropped_or_named(tmp_path, monkeypatch, is_array):
    long = json.dumps({"messages": [user("x" * 500), assistant("Hello")]}).encode()
    monkeypatch.setattr(rlhf.data.read, "LONGEST_ROW", len(long) - 1)
    path, lines = tmp_path / "rows.json", [LINE, LINE, long]
    path.write_bytes(b"[%b]" % b",\n".join(lines) if is_array else b"\n".join(lines))
    rows, dropped = load_rows(str(path), "messages", "train", "sft")
    assert len(rows) == 2 and dropped == {"longer than a row may be": 1}
    what = f"row 3: it has {len(long)} bytes, and a row at most {len(long) - 1}; is a line break"
    with pytest.raises(InputError, match=what):
        load_rows(str(path), "messages", "train", "sft", on_bad_row="stop")
    monkeypatch.setattr(rlhf.data.read, "LONGEST_ROW", len(long))
    assert len(load_rows(str(path), "messages", "train", "sft")[0]) == 3


def test_a_cell_that_no_context_holds_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(rlhf.data.read, "LONGEST_ROW", 100)
    path = tmp_path / "rows.csv"
    path.write_text(f'prompt,completion\na,b\n"{"x" * 101}",b\n')
    with pytest.raises(InputError, match="row 2: not valid CSV: field larger than field limit"):
        load_rows(str(path), "prompt_completion", "train", "sft")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz"])
@pytest.mark.parametrize("what", BAD_LINES)
def test_a_bad_line_is_dropped_or_named(tmp_path, name, what):
    line, message = BAD_LINES[what]
    data = b"\xef\xbb\xbf" + b"\r\n".join([LINE, LINE, line])
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    kept, dropped = load_rows(str(path), "messages", "train", "sft")
    assert kept == [ROW, ROW] and sum(dropped.values()) == 1
    with pytest.raises(InputError, match=f"{name}, {message}") as caught:
        load_rows(str(path), "messages", "train", "sft", on_bad_row="stop")
    assert "\n" not in str(caught.value)


NUMBERS = [DIGITS, "1" + "0" * 400, "1e39", "NaN", "-Infinity", "true", '"1"', "null", "[1]"]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number[:9])
def test_what_is_no_number_in_scores_ranks_and_margins_is_named(tmp_path, number):
    path = tmp_path / "rows.jsonl"
    fields = {
        "ranked": (RANKED % f"[0, {number}]", r"scores\[1\]"),
        "ratings": ((RANKED % f"[0, {number}]").replace("scores", "ratings"), r"ratings\[1\]"),
        "pair": (json.dumps(PAIR)[:-1] + f', "margin": {number}}}', "margin"),
    }
    for format, (line, field) in fields.items():
        path.write_text(line)
        if (format, number) == ("pair", "null"):
            continue  # an absent margin
        with pytest.raises(InputError, match=f"row 1, field '{field}': got"):
            load_rows(str(path), format, "train", "reward")


def test_ranks_of_a_python_function_fit_the_numbers_they_are_trained_as(tmp_path, monkeypatch):
    (tmp_path / "my_ranks.py").write_text(
        "def rows(stage, split):\n"
        "    return [{'prompt': 'p', 'responses': ['a', 'b'], 'ranks': [0, 10 ** 5000]}]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match="my_ranks.rows, row 1, field 'ranks': got a value that"):
        load_rows("python:my_ranks.rows", "", "train", "reward")


PARQUET = "damaged.parquet"
BAD_FILES = {
    "utf16.jsonl": (LINE.decode().encode("utf-16"), "begins as UTF-16 does; convert it: iconv -f"),
    "utf16.csv": ("a,b\n".encode("utf-16"), "begins as UTF-16 does"),
    "latin1.csv": (b"messages\nx\ncaf\xe9\n", r"line 3: .*caf\\xe9.*iconv -f ISO-8859-1"),
    "latin1.json": (b'[{"messages": "caf\xe9"}]', "latin1.json: not a UTF-8 text file: line 1"),
    "deep.json": (f"[{LINE.decode()}, {DEEP}]".encode(), "deep.json, row 2: lists or objects are"),
    "cut.json": (b"[" + LINE + b",", "cut.json: not a valid JSON array: .*, in row 2"),
    "comma.json": (b"[" + LINE + b",]", "not a valid JSON array: Expecting value.*, in row 2"),
    "gap.json": (b"[" + LINE + LINE + b"]", "not a valid JSON array: Expecting ',' delimiter"),
    "after.json": (b"[" + LINE + b"]]", "not a valid JSON array: Extra data"),
    "twice.csv": (b"messages,messages\na,b\n", "twice.csv: the column 'messages' is given twice"),
    "quote.csv": (b'messages\nx\n"a', "quote.csv, row 2: not valid CSV"),
    "nul.csv": (b"messages\na\0b\n", r"nul.csv, row 1, field 'messages': got 'a\\x00b'"),
    "cut.jsonl.gz": (gzip.compress(LINE)[:-9], "cut.jsonl.gz: not a readable gzip file"),
    "none.jsonl.gz": (b"", "none.jsonl.gz' has no rows|not a readable gzip file"),
    "bom.jsonl": (b"\xef\xbb\xbf", "bom.jsonl' has no rows"),
    "cr.jsonl": (LINE + b"\r" + LINE, "cr.jsonl, row 1: not valid JSON: Extra data"),
    "gzip.jsonl": (gzip.compress(LINE), "gzip.jsonl, row 1: not UTF-8 text"),
    "text.parquet": (LINE, "text.parquet: not a readable Parquet file"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_damaged_file_is_named_in_one_line(tmp_path, name):
    data, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        load_rows(str(tmp_path / name), "messages", "train", "sft")
    assert "\n" not in str(caught.value) and str(tmp_path / name) in str(caught.value)


def test_a_damaged_parquet_file_is_named_in_one_line(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROW] * 20), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    for size in (0, 3, len(whole) // 2, len(whole) - 5):
        (tmp_path / PARQUET).write_bytes(whole[:size])
        with pytest.raises(InputError, match=f"{PARQUET}: not a readable Parquet file") as caught:
            load_rows(str(tmp_path / PARQUET), "messages", "train", "sft")
        assert "\n" not in str(caught.value)
    middle = len(whole) // 3
    (tmp_path / PARQUET).write_bytes(whole[:middle] + b"\xff" * 40 + whole[middle + 40 :])
    try:
        load_rows(str(tmp_path / PARQUET), "messages", "train", "sft")
    except InputError as error:
        assert PARQUET in str(error)


def test_structs_and_dates_of_parquet_are_read_or_named(tmp_path):
    import datetime

    import pyarrow
    import pyarrow.parquet

    part = [{"type": "text", "text": "Hi", "image_url": None}]
    rows = [{"messages": [{"role": "user", "content": part}]}, {"messages": None}]
    rows[0]["messages"].append({"role": "assistant", "content": [text_part("Hello")]})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:1]), tmp_path / "a.parquet")
    assert load_rows(str(tmp_path / "a.parquet"), "messages", "train", "sft")[0] == [ROW]
    row = {"prompt": datetime.date(2020, 1, 1), "completion": "b"}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "b.parquet")
    with pytest.raises(InputError, match="b.parquet, row 1, field 'prompt': got datetime.date"):
        load_rows(str(tmp_path / "b.parquet"), "prompt_completion", "train", "sft")
    text = pyarrow.array(["ok", b"caf\xe9"], pyarrow.binary()).view(pyarrow.string())
    table = pyarrow.table({"prompt": text, "completion": ["a", "b"]})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    with pytest.raises(InputError, match="c.parquet, row 2: cannot be read: UnicodeDecodeError"):
        load_rows(str(tmp_path / "c.parquet"), "prompt_completion", "train", "sft")


def test_what_is_unusual_and_whole_is_read(tmp_path):
    texts = {
        "bom.csv": '\ufeffprompt,completion\na,"b\u2028c"\n',
        "cr.csv": 'prompt,completion\ra,"b\u2028c"\r',
        "bom.json": '\ufeff [ {"prompt": "a", "completion": "b\u2028c"} ] ',
        "pretty.json": '{\n  "prompt": "a",\n  "completion": "b\u2028c"\n}\n',
        "lines.json": '{"prompt": "a", "completion": "b\u2028c"}',
        "array.jsonl": '[{"prompt": "a", "completion": "b\u2028c"}]',
        "ends.jsonl": '{"prompt": "a", "completion": "b\u2028c"}\r\n\r\n',
    }
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode())
        rows, dropped = load_rows(str(tmp_path / name), "prompt_completion", "train", "sft")
        assert rows == [{"prompt": "a", "completion": "b\u2028c"}] and not dropped, name
    huge = texts["lines.json"][:-1] + f', "big": {DIGITS}}}'
    (tmp_path / "huge.jsonl").write_text(huge)
    [row], _ = load_rows(str(tmp_path / "huge.jsonl"), "prompt_completion", "train", "sft")
    assert row["completion"] == "b\u2028c", "a column that no one reads may hold anything"


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.jsonl", [ROW])

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)  # root may read every file
    with pytest.raises(InputError, match="rows.jsonl cannot be read: Permission denied"):
        load_rows(path, "messages", "train", "sft")
