"""Rows as people have them: message forms of chat APIs and malformed rows.

What is dropped is counted, and what is refused is named by file, row and field.
"""

from __future__ import annotations

import json
from collections import Counter

import pytest
from helpers.rows import assistant, user, write
from helpers.tiny import tiny_model, tiny_tokenizer

from rlhf import train_reward, train_sft
from rlhf.checkpoint import read_record
from rlhf.config import DatasetConfig, InputError, ModelConfig, RewardStageConfig, SFTStageConfig
from rlhf.data import describe_dropped, encode_row, encode_sft, first_cases, load_rows, load_splits
from rlhf.tokenizer import chat_template_text

HI = [user("Hi"), assistant("Hello")]
ROW = {"messages": HI}
CALL = {"type": "function", "function": {"name": "weather", "arguments": "{}"}}
PAIR = {"prompt": "Hi", "chosen": "Hello", "rejected": "No"}


def load(tmp_path, *rows, format="messages", stage="sft", **settings):
    return load_rows(write(tmp_path / "rows.jsonl", rows), format, "train", stage, **settings)


def text_part(text, kind="text"):
    return {"type": kind, "text": text}


# --- Message forms --------------------------------------------------------------------------------


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
        ({"messages": [HI[0], HI[1] | {"tool_calls": None, "function_call": None}]}, HI),
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
    assert row["responses"] == ["a", "b"] and row["ranks"] == [0, 1] and row["scores"] == [1, 0.5]
    path = cells("d.csv", prompt="p", completion='[1, 2] and ["role"]')
    [row], _ = load_rows(path, "prompt_completion", "train", "sft")
    assert row["completion"] == '[1, 2] and ["role"]', "text that is no conversation stays text"
    path = cells("e.csv", prompt="a", chosen="b", rejected="c", margin="high")
    with pytest.raises(InputError, match="e.csv, row 1, field 'margin': got 'high'"):
        load_rows(path, "pair", "train", "reward")


def test_a_csv_cell_holds_lists_as_python_writes_them(tmp_path):
    """pandas and `datasets` write lists into CSV so."""
    import csv

    def read(stage, format, **row):
        with open(tmp_path / "a.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            writer.writeheader()
            writer.writerow(row)
        [found], _ = load_rows(str(tmp_path / "a.csv"), format, "train", stage)
        return found

    assert read("sft", "messages", messages=repr(HI)) == ROW
    chosen, rejected = repr(HI), repr([*HI[:1], {"role": "assistant", "content": "It's no"}])
    row = read("reward", "pair", prompt=HI[0]["content"], chosen=chosen, rejected=rejected)
    assert row["prompt"] == HI[:1] and row["responses"] == [HI[1]["content"], "It's no"]
    assert read("reward", "ranked", prompt="p", responses="['a', 'b']", ranks="[1, 0]")["ranks"]
    with pytest.raises(InputError, match="field 'prompt': got .*; write the conversation as JSON"):
        read("ppo", "prompt_completion", prompt=repr(HI).replace("}, {", "}\n {"))  # NumPy's
    text = "[1, 2], 3 and [{'role'"
    assert read("ppo", "prompt_completion", prompt=text)["prompt"] == text


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


# --- Half a character -----------------------------------------------------------------------------


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


# --- Malformed rows: dropped or refused -----------------------------------------------------------


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
