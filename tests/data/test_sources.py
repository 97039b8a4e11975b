"""Sources: every kind of file, Python functions, and rows that are refused or dropped."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter

import pytest
from helpers.rows import CONVERSATIONS, assistant, user, write

from rlhf.config import DatasetConfig, InputError
from rlhf.data import describe_dropped, load_rows, load_splits, prompt_of


def test_every_file_type_loads_the_same_rows(tmp_path):
    rows = [
        {"prompt": "2020-01-01", "completion": "1"},  # neither may become a date or a number
        {"prompt": 'a "quoted",\nline\u2028 and é', "completion": "NA"},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    write(tmp_path / "lines.json", rows)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(r) for r in rows) + "\n\n")
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(rows)
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for file in list(tmp_path.iterdir()):
        (tmp_path / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        packed = pyarrow.compress(file.read_bytes(), codec="zstd", asbytes=True)
        (tmp_path / f"{file.name}.zst").write_bytes(packed)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 15
    for file in files:
        loaded, dropped = load_rows(str(file), "prompt_completion", "test", "sft")
        assert loaded == rows and not dropped, file
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "test.jsonl", [{"prompt": "p", "completion": "c"}])
    loaded, _ = load_rows(str(tmp_path / "sub"), "prompt_completion", "test", "sft")
    assert loaded == [{"prompt": "p", "completion": "c"}]
    with pytest.raises(InputError, match="dataset.path=.*nosplit"):
        load_rows(str(tmp_path / "sub"), "prompt_completion", "nosplit", "sft")


def test_a_data_set_that_was_saved_to_disk_is_read(tmp_path):
    import datasets

    rows = [{"prompt": "p", "completion": "c"}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    assert load_rows(str(tmp_path / "saved"), None, "train", "sft")[0] == rows


def test_lists_and_patterns_are_read_in_order(tmp_path, monkeypatch, capsys):
    names = ["b.jsonl", "a.jsonl", "c.csv"]
    for name in names[:2]:
        write(tmp_path / name, [{"prompt": f"{name} {i}", "completion": "c"} for i in range(9)])
    (tmp_path / "c.csv").write_text("prompt,completion\nc.csv 0,c\n")
    monkeypatch.chdir(tmp_path)

    def load(path):
        return [row["prompt"] for row in load_rows(path, None, "train", "sft")[0]]

    first, second, third = map(load, names)
    assert load(names) == first + second + third
    assert load("*.jsonl") == load("**/?.jsonl") == second + first
    config = DatasetConfig(path=names, eval_path=["a.jsonl"])
    assert len(load_splits(config, "sft", 1).train) == 19
    assert capsys.readouterr().out == "b.jsonl, a.jsonl, c.csv: prompt_completion, 19 rows\n"
    write(tmp_path / "bad.jsonl", [{"prompt": "a", "completion": 5}])
    with pytest.raises(InputError, match="bad.jsonl, row 1, field 'completion'"):
        load_rows(["a.jsonl", "bad.jsonl"], None, "train", "sft", on_bad_row="stop")
    with pytest.raises(InputError, match=r"dataset.path='no\*.jsonl' matches no file"):
        load("no*.jsonl")
    with pytest.raises(InputError, match="got 'python:a.b' in a list; expected files"):
        load(["a.jsonl", "python:a.b"])
    (tmp_path / "cut.jsonl.zst").write_bytes(b"cut")
    with pytest.raises(InputError, match="cut.jsonl.zst: not a readable zstd file"):
        load("cut.jsonl.zst")


def test_a_hub_name_is_loaded_with_its_subset_and_split(monkeypatch):
    import datasets

    given = []

    def load_dataset(path, name=None, split=None):
        given.append((path, name, split))
        if name is None:
            raise ValueError("Config name is missing. Please pick one: ['main', 'socratic']")
        return [{"question": f"q{i}", "answer": "a"} for i in range(20)]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = DatasetConfig(path="openai/gsm8k", subset="main", eval_path="openai/gsm8k")
    assert len(load_splits(config, "sft", 1).eval) == 20
    train, test = (("openai/gsm8k", "main", split) for split in ("train", "test"))
    assert set(given) == {train, test}
    with pytest.raises(InputError, match=r"pick one: .*dataset.subset=<name> chooses one"):
        load_splits(DatasetConfig(path="openai/gsm8k"), "sft", 1)


def test_absent_parquet_fields_are_missing_not_none(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": "a", "completion": "b", "tag": None}, {"prompt": "a", "completion": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a.parquet, row 2, field 'completion': missing or null"):
        load_rows(str(tmp_path / "a.parquet"), "prompt_completion", "train", "sft")


def test_python_source_gives_canonical_rows(tmp_path, monkeypatch):
    (tmp_path / "my_rows.py").write_text(
        "def rows(stage, split):\n    return [{'prompt': stage, 'completion': split}]\n"
        "def bad(stage, split):\n    return [{'prompt': stage}]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    splits = load_splits(DatasetConfig(path="python:my_rows.rows", format="hh"), "sft", seed=1)
    assert splits.train == [{"prompt": "sft", "completion": "train"}]
    assert splits.eval == [{"prompt": "sft", "completion": "eval"}]
    assert splits.overlap == 1
    with pytest.raises(InputError, match="python:my_rows.bad, row 1, field 'completion'"):
        load_rows("python:my_rows.bad", "hh", "train", "sft")
    with pytest.raises(InputError, match="dataset.path='python:my_rows.none' cannot be imported"):
        load_rows("python:my_rows.none", "hh", "train", "sft")


def test_what_looks_like_a_path_is_never_sent_to_the_hub(monkeypatch, tmp_path):
    import datasets

    asked = []

    def refuse(path, **arguments):
        asked.append(path)
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    for path in ("no/such.jsonl", "such.csv.gz", "./here", "/there/x", "~/no/x", "a.parquet"):
        with pytest.raises(InputError, match="dataset.eval_path=.*neither a file nor a directory"):
            load_rows(path, "messages", "train", "sft", field="dataset.eval_path")
    assert not asked
    with pytest.raises(InputError, match="some/name.*neither a file nor a directory.*offline"):
        load_rows("some/name", "messages", "train", "sft")
    assert asked == ["some/name"]
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match=r"unknown suffix '.txt'; expected .json"):
        load_rows(str(tmp_path / "a.txt"), "messages", "train", "sft")


GOOD = {
    "messages": {"messages": CONVERSATIONS["one turn"]},
    "prompt_completion": {"prompt": "p", "completion": "c"},
    "alpaca": {"instruction": "a", "input": "", "output": "b"},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
}


@pytest.mark.parametrize(
    "format, change, message",
    [
        (
            "messages",
            {"messages": None},
            "field 'messages': missing or null; the row has no fields",
        ),
        ("messages", {"messages": "Hi"}, "field 'messages': got 'Hi'; expected a list"),
        ("messages", {"messages": []}, r"field 'messages': got \[\]; expected a list"),
        ("messages", {"messages": [7]}, r"field 'messages\[0\]': got 7; expected {role, content}"),
        ("messages", {"messages": [{"role": "users", "content": "x"}]}, "known .* mean user"),
        ("messages", {"messages": [{"role": "user"}]}, r"field 'messages\[0\].content': got None"),
        ("messages", {"messages": [user("x")]}, "field 'messages': has no assistant turn"),
        (
            "messages",
            {"messages": None, "conversations": [{"from": "alien", "value": "x"}]},
            r"field 'conversations\[0\].role': got 'alien'; known roles are",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": None}, assistant("y")]},
            r"field 'messages\[0\].content': got None; expected text",
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "humen", "value": "x"}]},
            r"field 'conversations\[0\].from': got 'humen'; known speakers .* mean human",
        ),
        ("sharegpt", {"conversations": [{"value": "x"}]}, r"\[0\].from': got None; known speak"),
        ("sharegpt", {"conversations": "x"}, "field 'conversations': got 'x'; expected a list"),
        ("prompt_completion", {"prompt": [user("x")], "completion": [user("y")]}, "no assistant"),
        ("prompt_completion", {"completion": None}, "field 'completion': missing or null"),
        ("prompt_completion", {"completion": 3}, "field 'completion': got 3"),
        ("prompt_completion", {"completion": [assistant("c")]}, "make both text or both"),
        (
            "alpaca",
            {"instruction": None},
            "field 'instruction': missing or null; the row has input",
        ),
        ("alpaca", {"output": 3}, "field 'output': got 3; expected text"),
    ],
)
def test_malformed_row_stops_with_file_row_and_field(tmp_path, format, change, message):
    path = write(tmp_path / "rows.jsonl", [GOOD[format], {**GOOD[format], **change}])
    with pytest.raises(InputError, match=f"rows.jsonl, row 2, .*{message}"):
        load_rows(path, format, "train", "sft")


def test_broken_files_stop_with_the_place(tmp_path):
    good = json.dumps(GOOD["messages"])
    cases = {
        "line.jsonl": (
            f"{good}\n\n{good[:-3]}\n{good}",
            r"line.jsonl, row 2 \(line 3\): not valid",
        ),
        "array.json": (f"[{good},\n{good}", "array.json: not a valid JSON array: .*line 2"),
        "list.jsonl": (f"{good}\n7", "list.jsonl, row 2: got 7; expected an object"),
        "empty.jsonl": ("", "empty.jsonl' has no rows"),
        "empty.json": ("[]", "empty.json' has no rows"),
        "empty.csv": ("", "empty.csv' has no rows"),
        "header.csv": ("messages\n", "header.csv' has no rows"),
        "cells.csv": ("prompt,completion\na,b,c\n", "cells.csv, row 1: more cells"),
        "quote.csv": ('prompt,completion\na,b\n"a,b\n', "quote.csv, row 2: not valid CSV"),
    }
    for name, (text, message) in cases.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=message):
            format = "prompt_completion" if name.endswith("csv") else "messages"
            load_rows(str(tmp_path / name), format, "train", "sft", on_bad_row="stop")
    broken = {
        "a.jsonl": (b"\xff\xfe", "a.jsonl: not a UTF-8 text file"),
        "a.jsonl.gz": (b"no gzip", "a.jsonl.gz: not a readable gzip file"),
        "cut.csv.gz": (gzip.compress(b"a,b\n" * 9)[:-9], "cut.csv.gz: not a readable gzip file"),
        "a.parquet": (b"no parquet", "a.parquet: not a readable Parquet file"),
    }
    for name, (data, message) in broken.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=message):
            load_rows(str(tmp_path / name), "messages", "train", "sft")


def test_a_users_format_that_fails_names_the_row(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"x": 1}])
    with pytest.raises(InputError, match="a.jsonl, row 1: format 'math.sqrt' cannot read it"):
        load_rows(path, "math.sqrt", "train", "sft")


def test_unusable_rows_are_dropped_and_counted(tmp_path):
    good = GOOD["prompt_completion"]
    rows = [
        good,
        {**good, "completion": " "},
        {**good, "prompt": ""},
        {"prompt": [assistant("x")], "completion": [assistant("y")]},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    kept, dropped = load_rows(path, "prompt_completion", "train", "sft")
    assert kept == [good]
    assert dropped == {
        "empty response": 1,
        "empty prompt": 1,
        "conversation does not start with a user turn": 1,
    }
    rows = [{**GOOD["alpaca"], "output": ""}, {**GOOD["alpaca"], "instruction": " "}]
    _, dropped = load_rows(write(tmp_path / "b.jsonl", rows), "alpaca", "train", "sft")
    assert dropped == {"empty response": 1, "empty user turn": 1}
    assert describe_dropped(Counter()) == "dropped 0 rows"


def test_a_conversation_that_starts_with_the_assistant_is_cut_or_dropped_by_format(tmp_path):
    turns = [assistant("Hi!"), *CONVERSATIONS["one turn"]]
    system = {"role": "system", "content": "s"}
    rows = [{"messages": turns}, {"messages": [system, *turns]}, {"messages": turns[1:]}]
    kept, dropped = load_rows(write(tmp_path / "a.jsonl", rows), "messages", "train", "sft")
    assert kept == rows[2:]
    assert dropped == {"conversation does not start with a user turn": 2}
    speakers = {"system": "system", "user": "human", "assistant": "gpt"}
    rows = [
        {"conversations": [{"from": speakers[m["role"]], "value": m["content"]} for m in row]}
        for row in (turns, [system, *turns])
    ]
    kept, dropped = load_rows(write(tmp_path / "b.jsonl", rows), "sharegpt", "train", "sft")
    assert [row["messages"] for row in kept] == [turns[1:], [system, *turns[1:]]] and not dropped


def test_ppo_needs_only_a_prompt(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "p"}, {"prompt": [user("q")]}])
    rows, _ = load_rows(path, "prompt_completion", "train", "ppo")
    assert [prompt_of(row) for row in rows] == ["p", [user("q")]]
    messages = CONVERSATIONS["three turns"]
    assert prompt_of({"messages": messages}) == messages[:-1]
    assert prompt_of({"messages": [user("q")]}) == [user("q")]
