"""Rows as people have them: message forms of chat APIs, damaged rows and files, in process.

What is dropped is counted, what is refused is named by file, row and field, and nothing ends in a
traceback. Run: python -m pytest tests/data/test_rows.py
"""

import gzip
import json
from collections import Counter

import pytest
from helpers.rows import assistant, user, write
from helpers.tiny import tiny_model, tiny_tokenizer

from rlhf.checkpoint import read_record
from rlhf.config import (
    DatasetConfig,
    InputError,
    ModelConfig,
    RewardStageConfig,
    SFTStageConfig,
)
from rlhf.data import describe_dropped, encode_row, encode_sft, first_cases, load_rows, load_splits
from rlhf.reward import train_reward
from rlhf.sft import train_sft
from rlhf.tokenizer import chat_template_text

HI = [user("Hi"), assistant("Hello")]
ROW = {"messages": HI}
CALL = {"type": "function", "function": {"name": "weather", "arguments": "{}"}}
PAIR = {"prompt": "Hi", "chosen": "Hello", "rejected": "No"}


def load(tmp_path, *rows, format="messages", stage="sft", **settings):
    return load_rows(write(tmp_path / "rows.jsonl", rows), format, "train", stage, **settings)


def text_part(text, kind="text"):
    return {"type": kind, "text": text}


# --- Message forms ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"messages": [user([text_part("H"), text_part("i")]), assistant(["Hello"])]}, HI),
        ({"messages": [user([text_part("Hi", "input_text")]), HI[1]]}, HI),
        ({"messages": json.dumps(HI)}, HI),
        ({"conversations": f" {json.dumps(HI)}\n"}, HI),
        (
            {"messages": [{"role": "developer", "content": "Be brief."}, *HI]},
            [{"role": "system", "content": "Be brief."}, *HI],
        ),
        ({"system": "Be brief.", **ROW}, [{"role": "system", "content": "Be brief."}, *HI]),
        ({"messages": [{"role": "User", "content": "Hi"}, HI[1]]}, HI),
        ({"messages": [user("Hi") | {"name": "Ann"}, HI[1] | {"reasoning_content": "?"}]}, HI),
        (
            {"messages": [HI[0], HI[1] | {"tool_calls": None, "function_call": None}]},
            HI,
        ),
        ({"messages": [HI[0], HI[1] | {"refusal": None, "tool_calls": [], "weight": 1}]}, HI),
    ]
    + [
        ({"conversations": [{"from": who, "value": "Hi"}, {"from": bot, "value": "Hello"}]}, HI)
        for who, bot in (("human", "gpt"), ("user", "chatgpt"), ("Human", "bard"))
    ],
)
def test_message_forms_become_role_and_content(tmp_path, row, expected):
    [kept], dropped = load(tmp_path, row)
    assert kept == {"messages": expected} and not dropped


@pytest.mark.parametrize(
    "turn, reason",
    [
        ({"role": "assistant", "content": None, "tool_calls": [CALL]}, "tool calls"),
        ({"role": "assistant", "content": "Wait.", "tool_calls": [CALL]}, "tool calls"),
        ({"role": "assistant", "content": None, "function_call": CALL["function"]}, "tool calls"),
        ({"role": "tool", "content": "sunny"}, "tool calls"),
        ({"from": "observation", "value": "sunny"}, "tool calls"),
        (user([text_part("What?"), {"type": "image_url", "image_url": {}}]), "'image_url'"),
        (user([{"type": "input_audio", "input_audio": {}}]), "parts of type 'input_audio'"),
        ({"role": "assistant", "content": None, "audio": {"id": "a"}}, "parts of type 'audio'"),
        ({"role": "assistant", "content": None, "refusal": "No."}, "a refusal in place of"),
    ],
)
def test_a_row_that_is_more_than_text_is_dropped_with_its_reason_and_place(tmp_path, turn, reason):
    path = str(tmp_path / "rows.jsonl")
    kept, dropped = load(tmp_path, {"messages": [*HI, turn, *HI]}, ROW)
    assert kept == [ROW] and sum(dropped.values()) == 1
    assert reason in next(iter(dropped))
    assert first_cases(dropped) == [f"  first: {path}, row 1: {next(iter(dropped))}"]


def test_sharegpt_with_tools_is_dropped_and_its_text_parts_are_joined(tmp_path):
    def turns(*pairs):
        return {"conversations": [{"from": who, "value": value} for who, value in pairs]}

    rows = [
        turns(("human", "Hi"), ("function_call", "{}"), ("observation", "x"), ("gpt", "Hello")),
        turns(("human", [text_part("Hi")]), ("gpt", "Hello")),
    ]
    kept, dropped = load(tmp_path, *rows, format="sharegpt")
    assert kept == [ROW] and dropped == {"tool calls": 1}


def test_weight_0_leaves_loss_on_the_last_answer_only(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat_template_text("plain")
    first, last = assistant("red") | {"weight": 0}, assistant("blue") | {"weight": 1}
    [row], _ = load(tmp_path, {"messages": [user("dog"), first, user("cat"), last]})
    _, labels = encode_row(row, tokenizer)
    assert tokenizer.decode([label for label in labels if label >= 0]) == "blue<eos>"
    assert row["prompt"] == [user("dog"), assistant("red"), user("cat")]
    _, dropped = load(tmp_path, {"messages": [user("dog"), first]}, ROW)
    assert dropped == {"every answer has weight 0": 1}
    for weights in ((1, 0), (0.5, 1), ("0", 1)):
        turns = [user("dog"), first | {"weight": weights[0]}, user("cat"), last]
        turns[-1] = last | {"weight": weights[1]}
        with pytest.raises(InputError, match=r"row 1, field 'messages\[1\].weight': got"):
            load(tmp_path, {"messages": turns})


def test_a_csv_cell_holds_conversations_lists_and_numbers(tmp_path):
    import csv

    def cells(name, **row):
        with open(tmp_path / name, "w", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            writer.writeheader()
            writer.writerow(row)
        return str(tmp_path / name)

    [row], _ = load_rows(cells("a.csv", messages=json.dumps(HI)), "messages", "train", "sft")
    assert row == ROW
    path = cells("b.csv", prompt=json.dumps(HI[:1]), chosen="a", rejected="b", margin="0.5")
    [row], _ = load_rows(path, "pair", "train", "reward")
    assert row["prompt"] == HI[:1] and row["margin"] == 0.5
    path = cells("c.csv", prompt="p", responses='["a", "b"]', scores="[1, 0.5]")
    [row], _ = load_rows(path, "ranked", "train", "reward")
    assert row["responses"] == ["a", "b"] and row["ranks"] == [0, 1]
    path = cells("d.csv", prompt="p", completion='[1, 2] and ["role"]')
    [row], _ = load_rows(path, "prompt_completion", "train", "sft")
    assert row["completion"] == '[1, 2] and ["role"]', "text that is no conversation stays text"
    path = cells("e.csv", prompt="a", chosen="b", rejected="c", margin="high")
    with pytest.raises(InputError, match="e.csv, row 1, field 'margin': got 'high'"):
        load_rows(path, "pair", "train", "reward")


def test_rows_of_python_functions_may_hold_message_forms(tmp_path, monkeypatch):
    (tmp_path / "my_forms.py").write_text(
        "def rows(stage, split):\n    return [as_it_is({'part': 'Hi'})]\n"
        "def as_it_is(row):\n"
        "    turns = [{'role': 'user', 'content': [{'type': 'text', 'text': row['part']}]}]\n"
        "    return {'messages': [*turns, {'role': 'assistant', 'content': 'Hello'}]}\n"
        "def fails(stage, split):\n    yield {'prompt': 'a'}\n    raise RuntimeError('no disk')\n"
        "def fails_at_once(stage, split):\n    return 1 / 0\n"
        "def fails_on_a_row(row):\n    return row['text'].no_such_method()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_rows("python:my_forms.rows", "", "train", "sft")[0] == [ROW]
    kept, _ = load(tmp_path, {"part": "Hi"}, format="my_forms.as_it_is")
    assert kept == [ROW]
    with pytest.raises(InputError, match="row 2: cannot be read: RuntimeError: no disk"):
        load_rows("python:my_forms.fails", "", "train", "ppo")
    with pytest.raises(InputError, match="the function fails: ZeroDivisionError: division by zero"):
        load_rows("python:my_forms.fails_at_once", "", "train", "ppo")
    with pytest.raises(
        InputError, match="row 1: format 'my_forms.fails_on_a_row' cannot read it: A"
    ):
        load(tmp_path, {"text": "a"}, format="my_forms.fails_on_a_row")


# --- Half a character ---------------------------------------------------------------------------


def test_half_an_emoji_becomes_the_replacement_character_and_is_counted(tmp_path):
    bad = {"messages": [user("Hi \ud83c"), assistant("A \ud83c\udf50 and \udf50")], "id": "\ud83c"}
    kept, dropped = load(tmp_path, ROW, bad)
    assert [m["content"] for m in kept[1]["messages"]] == ["Hi \ufffd", "A \U0001f350 and \ufffd"]
    assert dropped == {"texts with half of a character, now U+FFFD": 2}
    [line] = first_cases(dropped)
    assert line.endswith("rows.jsonl, row 2, field 'messages[0].content': half of a character")
    assert describe_dropped(dropped).startswith("dropped 0 rows; 2 texts with half")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat_template_text("plain")
    assert len(encode_sft(kept, tokenizer, 200)[0]) == 2


@pytest.mark.parametrize(
    "format, stage, row",
    [
        ("messages", "sft", {"messages": json.dumps([user("a\ud83c"), assistant("b")])}),
        ("prompt_completion", "sft", {"prompt": "a", "completion": "b\udf50"}),
        ("prompt_completion", "ppo", {"prompt": "a\ud83c"}),
        ("text", "ptx", {"text": "a\ud83c"}),
        ("pair", "reward", PAIR | {"rejected": "No\ud83c", "subset": "x\ud83c"}),
        ("ranked", "reward", {"prompt": "a\ud83c", "responses": ["b", "c"], "ranks": [0, 1]}),
        ("hh", "reward", {n: f"\n\nHuman: a\n\nAssistant: {n}\ud83c" for n in PAIR if n[0] != "p"}),
        ("alpaca", "sft", {"instruction": "a\ud83c", "output": "b"}),
    ],
)
def test_no_half_of_a_character_is_left_in_any_text_of_any_stage(tmp_path, format, stage, row):
    kept, dropped = load(tmp_path, row, format=format, stage=stage)
    assert json.dumps(kept, ensure_ascii=False).encode(), "half of a pair cannot be encoded"
    assert dropped["texts with half of a character, now U+FFFD"] >= 1


# --- Malformed rows: dropped or refused ---------------------------------------------------------


def test_malformed_rows_are_dropped_counted_and_the_first_of_each_kind_is_shown(tmp_path):
    rows = [ROW] * 5 + [{"messages": [user(3), HI[1]]}, {"messages": [user(4), HI[1]]}, {"x": 1}, 7]
    kept, dropped = load(tmp_path, *rows)
    assert kept == [ROW] * 5
    assert dropped == {
        "malformed field 'messages[].content'": 2,
        "without field 'messages'": 1,
        "not an object": 1,
    }
    path = tmp_path / "rows.jsonl"
    assert first_cases(dropped) == [
        f"  first: {path}, row 6, field 'messages[0].content': got 3; expected text",
        f"  first: {path}, row 8, field 'messages': missing or null; the row has x; is 'messages' "
        "the right format?",
        f"  first: {path}, row 9: got 7; expected an object with named fields",
    ]
    config = DatasetConfig(path=str(path), eval_path=write(tmp_path / "eval.jsonl", [ROW]))
    said = load_splits(config, "sft", 1).describe(Counter())
    assert said.splitlines()[0].startswith("dropped 4 rows: 2 malformed field 'messages[].content'")
    assert said.splitlines()[1:] == first_cases(dropped)
    config.on_bad_row = "stop"
    with pytest.raises(
        InputError, match="row 6, field .*; dataset.on_bad_row=drop drops such rows"
    ):
        load_splits(config, "sft", 1)


def test_stop_refuses_malformed_rows_and_still_drops_unusable_ones(tmp_path):
    unusable = {"messages": [user("Hi"), assistant(" ")]}
    kept, dropped = load(tmp_path, ROW, unusable, on_bad_row="stop")
    assert kept == [ROW] and dropped == {"empty response": 1}


def test_half_of_the_rows_malformed_is_an_error_that_shows_the_first(tmp_path):
    load(tmp_path, ROW, ROW, {"x": 1})
    message = r"row 1, field 'messages': missing .* \(2 of 4 rows are malformed; dataset.on_bad_row"
    with pytest.raises(InputError, match=message):
        load(tmp_path, {"x": 1}, ROW, ROW, {"x": 1})


@pytest.mark.parametrize(
    "row, format, stage, hint",
    [
        (PAIR, "ranked", "reward", " dataset.format=pair reads it"),
        ({"instruction": "a", "output": "b"}, "messages", "sft", "dataset.format=alpaca reads it"),
        (ROW, "prompt_completion", "sft", "dataset.format=messages reads it"),
        (
            {"data": [ROW]},
            "messages",
            "sft",
            " If the file holds a single object, write one object per row.",
        ),
        ({"question": ["a", "b"]}, "prompt_completion", "sft", "If the file holds a single object"),
    ],
)
def test_rows_of_another_format_name_the_nearest_fix(tmp_path, row, format, stage, hint):
    with pytest.raises(InputError) as caught:
        load(tmp_path, row, format=format, stage=stage)
    assert hint in str(caught.value)


def test_a_bad_part_of_a_ranking_is_dropped_and_the_rest_is_ranked(tmp_path):
    rows = [{"user_input": "Hi", "completion": str(i), "score": i} for i in range(4)]
    kept, dropped = load(
        tmp_path, *rows, rows[0] | {"score": "9"}, format="chatllama_reward", stage="reward"
    )
    assert kept[0]["scores"] == [0, 1, 2, 3] and dropped == {"malformed field 'score'": 1}


# --- Damaged files and values -------------------------------------------------------------------

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


def test_the_record_of_a_stage_says_what_was_dropped(tmp_path, capsys):
    model = tmp_path / "model"
    tiny_model("llama", tiny_tokenizer()).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    rows = [{"prompt": f"Hi {i}", "completion": " yes"} for i in range(4)]
    sft = SFTStageConfig(runs_dir=str(tmp_path), num_samples=0, model=ModelConfig(path=str(model)))
    path = write(tmp_path / "rows.jsonl", [*rows, {"prompt": 7}, rows[0] | {"completion": ""}])
    sft.dataset = DatasetConfig(path=path, eval_path=path, format="prompt_completion")
    sft.dataset.max_length = 64
    sft.trainer |= {"max_steps": 1}
    dropped = {"malformed field 'prompt'": 2, "empty response": 2}
    assert read_record(train_sft(sft).directory).dropped == dropped
    assert f"  first: {path}, row 6: empty response" in capsys.readouterr().out.splitlines()
    reward = RewardStageConfig(runs_dir=str(tmp_path))
    pairs = [{"prompt": f"Hi {i}", "chosen": "yes", "rejected": "no"} for i in range(4)]
    path = write(tmp_path / "pairs.jsonl", [*pairs, pairs[0] | {"rejected": "no " * 99}])
    reward.dataset = DatasetConfig(path=path, eval_path=path, format="pair", max_length=64)
    reward.trainer |= {"max_steps": 1}
    dropped = {"longer than dataset.max_length=64 tokens": 2}
    assert read_record(train_reward(reward).directory).dropped == dropped


# --- Held-out rows ------------------------------------------------------------------------------


def test_held_out_rows_are_needed_only_where_they_are_used(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "p"}])
    config = DatasetConfig(path=path, format="prompt_completion", eval_fraction=0.0)
    assert load_splits(config, "ppo", 1, needs_eval=False).train == [{"prompt": "p"}]
    config.eval_path = str(tmp_path / "absent.jsonl")
    assert load_splits(config, "ppo", 1, needs_eval=False).eval == []
    with pytest.raises(InputError, match="dataset.eval_path="):
        load_splits(config, "ppo", 1)
