"""From files to canonical rows: formats, sources, bad rows, splits.

Formats of named instruction sets are in test_instructions.py, those of preferences in
test_preferences.py.
"""

import csv
import gzip
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from helpers.rows import CONVERSATIONS, SHARED, assistant, user, write

from rlhf.config import CONF_DIR, DatasetConfig, InputError
from rlhf.data import (
    FORMATS,
    describe_dropped,
    load_rows,
    load_splits,
    prompt_of,
    resolve_format,
    split_by_prompt,
)

# --- Formats ------------------------------------------------------------------------------------


def test_messages_keeps_other_columns_and_reads_sharegpt():
    expected = [user("Hi"), assistant("Yo")]
    row = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}
    assert FORMATS["messages"]({**row, "id": 7}) == {"id": 7, "messages": expected}
    padded = [{"role": None, "from": "human", "value": "Hi"}, {**assistant("Yo"), "name": None}]
    assert FORMATS["messages"]({"messages": padded, "prompt": "Hi"}) == {"messages": expected}


def test_real_files_load_in_full():
    if not (SHARED / "data").is_dir():
        pytest.skip("the real data is not on this machine")
    expected = {
        ("alpaca_eval_sft_test.jsonl", "alpaca", "sft"): 1574,
        ("sharegpt_dummy_conversation.json", "messages", "sft"): 500,
    }
    for (file, format, stage), count in expected.items():
        rows, dropped = load_rows(str(SHARED / "data" / file), format, "train", stage)
        assert len(rows) == count and not dropped


STAGES = {"chatllama_rlhf": "ppo", "text": "ptx"} | dict.fromkeys(
    "messages prompt_completion alpaca self_instruct dolly15k sharegpt baize chatllama_actor tldr "
    "hh_chosen".split(),
    "sft",
)


def documented_rows(format):
    """The example rows in the comments of conf/dataset/<format>.yaml."""
    lines = (CONF_DIR / "dataset" / f"{format}.yaml").read_text().splitlines()
    examples = [line[1:].strip() for line in lines]
    return [json.loads(example) for example in examples if example.startswith("{")]


def test_each_format_has_a_config_whose_example_rows_it_reads(tmp_path):
    files = {file.stem: file.read_text() for file in (CONF_DIR / "dataset").glob("*.yaml")}
    assert set(files) == {*FORMATS, "none"}
    for name in FORMATS:
        assert f"\nformat: {name}\n" in files[name]
        examples = documented_rows(name)
        assert examples
        stage = "ppo" if name == "prompt_completion" else STAGES.get(name, "reward")
        path = write(tmp_path / f"{name}.jsonl", examples)
        rows, dropped = load_rows(path, name, "train", stage)
        assert rows and not dropped


# What a row must have, beside what its documentation calls optional
REQUIRED = {
    "messages": "messages",
    "prompt_completion": "prompt completion",
    "text": "text",
    "alpaca": "instruction output",
    "self_instruct": "instruction instances",
    "dolly15k": "instruction response",
    "sharegpt": "conversations",
    "baize": "input",
    "chatllama_actor": "user_input completion",
    "chatllama_reward": "user_input completion score",
    "chatllama_rlhf": "user_input",
    "tldr": "subreddit title post summary",
    "hh": "chosen rejected",
    "hh_chosen": "chosen",
    "ranked": "prompt responses",
    "ratings": "prompt responses ratings",
    "pair": "prompt chosen rejected",
    "alpaca_farm": "instruction output_1 output_2 preference",
    "ultrafeedback": "instruction",
    "stack_exchange": "question",
    "summarize_from_feedback": "info summaries choice",
    "oasst": "prompt",
}


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_without_a_field_stops_with_file_row_and_field(format, tmp_path):
    good = documented_rows(format)[0]
    stage = STAGES.get(format, "reward")
    for field in REQUIRED[format].split():
        for bad in ({n: v for n, v in good.items() if n != field}, {**good, field: None}):
            path = write(tmp_path / "rows.jsonl", [good, bad])
            with pytest.raises(InputError, match="missing or null|got null|got None") as caught:
                load_rows(path, format, "train", stage)
            assert str(caught.value).startswith(f"{path}, row 2, field {field!r}: ")
    path = write(tmp_path / "rows.jsonl", [good, {"something": "else"}])
    with pytest.raises(InputError, match="rows.jsonl, row 2, field '"):
        load_rows(path, format, "train", stage)


def test_a_tree_of_something_else_stops(tmp_path):
    root = {"role": "prompter", "text": "Hi", "replies": []}
    for bad in ("Hi", {**root, "replies": "Yo"}, {**root, "replies": ["Yo"]}):
        path = write(tmp_path / "rows.jsonl", [{"prompt": root}, {"prompt": bad}])
        with pytest.raises(InputError, match="row 2, field 'prompt': got .*; expected {text, role"):
            load_rows(path, "oasst", "train", "reward")


def test_format_by_name_or_dotted_path():
    assert resolve_format("hh") is FORMATS["hh"]
    assert resolve_format("json.dumps") is json.dumps
    with pytest.raises(InputError, match="messages, prompt_completion.*Did you mean alpaca"):
        resolve_format("alpacca")
    with pytest.raises(InputError, match="dataset.format='no_such_module.x'"):
        resolve_format("no_such_module.x")


# --- Sources ------------------------------------------------------------------------------------


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
    files = sorted(tmp_path.iterdir())
    assert len(files) == 10
    for file in files:
        loaded, dropped = load_rows(str(file), "prompt_completion", "test", "sft")
        assert loaded == rows and not dropped, file
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "test.jsonl", [{"prompt": "p", "completion": "c"}])
    loaded, _ = load_rows(str(tmp_path / "sub"), "prompt_completion", "test", "sft")
    assert loaded == [{"prompt": "p", "completion": "c"}]
    with pytest.raises(InputError, match="dataset.path=.*nosplit"):
        load_rows(str(tmp_path / "sub"), "prompt_completion", "nosplit", "sft")


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

    def refuse(name, **arguments):
        asked.append(name)
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    for path in ("no/such.jsonl", "such.csv.gz", "./here", "/there/x", "~/x", "a.parquet"):
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
        ("prompt_completion", {"completion": [assistant("c")]}, "make both alike"),
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


# --- Splits -------------------------------------------------------------------------------------


def test_split_by_prompt_shares_no_prompt_and_ignores_order():
    rows = [{"prompt": f"p{i % 300}", "n": i} for i in range(900)]
    rows += [{"messages": [user(f"q{i % 50}"), assistant(str(i))]} for i in range(100)]
    train, evaluation = split_by_prompt(rows, 0.2, seed=1)
    keys = [{str(prompt_of(row)) for row in side} for side in (train, evaluation)]
    assert not keys[0] & keys[1] and len(train) + len(evaluation) == 1000
    assert 40 <= len(keys[1]) <= 100  # 350 prompts, 70 expected, sd 7.5
    again = split_by_prompt(rows[::-1], 0.2, seed=1)
    assert again == (train[::-1], evaluation[::-1])
    assert split_by_prompt(evaluation, 0.2, seed=1) == ([], evaluation)
    assert split_by_prompt(rows, 0.2, seed=2)[1] != evaluation
    assert split_by_prompt(rows, 0.0, seed=1)[1] == []


def test_split_is_the_same_in_another_process():
    program = (
        "from rlhf.data import split_by_prompt\n"
        "rows = [{'prompt': str(i)} for i in range(40)]\n"
        "print([r['prompt'] for r in split_by_prompt(rows, 0.3, 5)[1]])\n"
        "import sys\n"
        "assert not {'torch', 'datasets', 'transformers'} & set(sys.modules), 'import is not light'"
    )
    root = Path(__file__).parents[2]
    out = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    here = split_by_prompt([{"prompt": str(i)} for i in range(40)], 0.3, 5)[1]
    assert out.strip() == str([row["prompt"] for row in here])


def test_load_splits_from_one_and_from_two_files(tmp_path):
    rows = [{"prompt": f"p{i}", "completion": "c"} for i in range(100)]
    path = write(tmp_path / "train.jsonl", [*rows, {"prompt": "x", "completion": ""}])
    config = DatasetConfig(path=path, format="prompt_completion", eval_fraction=0.3)
    splits = load_splits(config, "sft", seed=3)
    assert (splits.train, splits.eval) == split_by_prompt(rows, 0.3, 3)
    assert splits.dropped == {"empty response": 1} and splits.overlap == 0
    config.max_rows, config.max_eval_rows = 7, 3
    head = load_splits(config, "sft", seed=3)
    assert head.train == splits.train[:7] and head.eval == splits.eval[:3]
    config.max_rows = config.max_eval_rows = None
    config.eval_path = write(tmp_path / "eval.jsonl", [rows[5], {**rows[0], "prompt": "new"}])
    both = load_splits(config, "sft", seed=3)
    assert both.train == rows and len(both.eval) == 2 and both.overlap == 1
    config.eval_path = str(tmp_path / "absent.jsonl")
    with pytest.raises(InputError, match="dataset.eval_path="):
        load_splits(config, "sft", seed=3)


def test_an_empty_side_is_an_error(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "c"}])
    config = DatasetConfig(path=path, format="prompt_completion", eval_fraction=0.0)
    with pytest.raises(
        InputError, match="raise dataset.eval_fraction=0.0 or give dataset.eval_path"
    ):
        load_splits(config, "sft", seed=1)
    config.path = write(tmp_path / "b.jsonl", [{"prompt": "p", "completion": ""}])
    with pytest.raises(InputError, match="no row to train on; dropped 1 rows: 1 empty response"):
        load_splits(config, "sft", seed=1)


def test_as_conversation_renders_text_prompts_like_the_conversations_of_sft(tmp_path):
    ranked = [{"prompt": "Name a fruit.", "responses": ["Apple.", "Car."], "ranks": [0, 1]}] * 2
    write(tmp_path / "ranked.jsonl", ranked)
    config = DatasetConfig(
        path=str(tmp_path / "ranked.jsonl"),
        eval_path=str(tmp_path / "ranked.jsonl"),
        format="ranked",
    )
    assert load_splits(config, "reward", 1).prompts == "text"
    config.as_conversation = True
    splits = load_splits(config, "reward", 1)
    assert splits.prompts == "conversation"
    assert splits.train[0]["prompt"] == [{"role": "user", "content": "Name a fruit."}]
    assert splits.overlap == 2
    assert "2 held-out rows share their prompt" in splits.describe(Counter())


def test_as_conversation_makes_a_text_completion_the_answer(tmp_path):
    write(tmp_path / "rows.jsonl", [{"prompt": "Hi", "completion": "Hello"}])
    path = str(tmp_path / "rows.jsonl")
    config = DatasetConfig(path=path, eval_path=path, format="prompt_completion")
    config.as_conversation = True
    row = load_splits(config, "sft", 1).train[0]
    assert row["completion"] == [{"role": "assistant", "content": "Hello"}]


def test_empty_texts_are_dropped_and_counted(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a b"}\n{"text": " "}\n')
    rows, dropped = load_rows(str(path), "text", "train", "ptx", field="ptx.path")
    assert [row["text"] for row in rows] == ["a b"] and dropped == {"empty text": 1}
