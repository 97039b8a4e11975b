"""The table of formats: each has a documented configuration and names what a row lacks."""

from __future__ import annotations

import json

import pytest
from helpers.rows import SHARED, assistant, user, write

from rlhf.config import CONF_DIR, InputError
from rlhf.data import FIELDS, FORMATS, load_rows, resolve_format


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


STAGES = {"chatllama_rlhf": "ppo", "instruction": "ppo", "text": "ptx"} | dict.fromkeys(
    "messages prompt_completion alpaca self_instruct dolly15k sharegpt baize chatllama_actor tldr "
    "hh_chosen chosen question_answer".split(),
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


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_without_a_field_stops_with_file_row_and_field(format, tmp_path):
    good = documented_rows(format)[0]
    stage = STAGES.get(format, "reward")
    for field in FIELDS[format]:
        for bad in ({n: v for n, v in good.items() if n != field}, {**good, field: None}):
            path = write(tmp_path / "rows.jsonl", [good, bad])
            with pytest.raises(InputError, match="missing or null|got null|got None") as caught:
                load_rows(path, format, "train", stage)
            name = "completion" if field == "answer" else field  # PPO reads it without
            assert str(caught.value).startswith(f"{path}, row 2, field {name!r}: ")
    path = write(tmp_path / "rows.jsonl", [good, {"something": "else"}])
    with pytest.raises(InputError, match="rows.jsonl, row 2, field '"):
        load_rows(path, format, "train", stage)


def test_a_tree_of_something_else_stops(tmp_path):
    root = {"role": "prompter", "text": "Hi", "replies": []}
    trees = [("prompt", "Hi"), ("replies", root | {"replies": "Yo"})]
    trees += [("replies", root | {"replies": ["Yo"]}), ("role", root | {"role": "bot"})]
    for field, bad in trees:
        path = write(tmp_path / "rows.jsonl", [{"prompt": root}, {"prompt": bad}])
        message = f"row 2, field '{field}': got .*; expected {{text, role"
        with pytest.raises(InputError, match=message):
            load_rows(path, "oasst", "train", "reward")


def test_format_by_name_or_dotted_path():
    assert resolve_format("hh") is FORMATS["hh"]
    assert resolve_format("json.dumps") is json.dumps
    with pytest.raises(InputError, match="messages, prompt_completion.*Did you mean alpaca"):
        resolve_format("alpacca")
    with pytest.raises(InputError, match="dataset.format='no_such_module.x'"):
        resolve_format("no_such_module.x")
