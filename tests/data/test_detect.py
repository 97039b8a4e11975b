"""The format of a source is found from its columns, and columns are renamed."""

from __future__ import annotations

import pytest
from helpers.rows import assistant, user, write
from helpers.tokenizers import get_tokenizer

from rlhf.config import DatasetConfig, InputError
from rlhf.data import (
    DropRow,
    check_row,
    count_overlap,
    encode_sft,
    encode_text,
    load_rows,
    load_splits,
)
from rlhf.data.detect import ORDER, find_format

SHAREGPT = [{"from": "gpt", "value": "Hm"}, {"from": "human", "value": "Hi"}]
SHAREGPT += [{"from": "gpt", "value": "Yo"}]
TURNS = [user("Hi"), assistant("Yo")]
ALPACA = {"instruction": "Sum up.", "input": "1 2", "output": "3", "text": "### Instruction: ..."}
ULTRAFEEDBACK = {
    "prompt": "Hi",
    "chosen": TURNS,
    "rejected": [user("Hi"), assistant("No")],
    "messages": TURNS,
    "score_chosen": 8.0,
    "score_rejected": 3.0,
}
HH = {"chosen": "\n\nHuman: Hi\n\nAssistant: Yo", "rejected": "\n\nHuman: Hi\n\nAssistant: No"}
PAIR = {"prompt": "Hi", "chosen": "Yo", "rejected": "No"}
RANKED = {"prompt": "Hi", "responses": ["Yo", "No"], "scores": [1.0, 0.5]}
DOLLY = {"instruction": "Sum up.", "context": "1 2", "response": "3", "category": "qa"}


def find(stage, *rows, columns=None):
    numbered = ((f"a.jsonl, row {i}", row) for i, row in enumerate(rows, start=1))
    return find_format(numbered, stage, columns or {})


@pytest.mark.parametrize(
    "row, sft, reward, ppo",
    [
        ({"messages": TURNS, "prompt": "Hi", "text": "Hi"}, "messages", None, "prompt_completion"),
        ({"prompt": "Hi", "completion": "Yo"}, "prompt_completion", None, "prompt_completion"),
        (ALPACA, "alpaca", None, "instruction"),
        (DOLLY, "dolly15k", None, "dolly15k"),
        (PAIR, "chosen", "pair", "prompt_completion"),
        ({"chosen": TURNS, "rejected": [user("Hi"), assistant("No")]}, "chosen", "pair", "chosen"),
        (HH, "hh_chosen", "hh", "hh_chosen"),
        (ULTRAFEEDBACK, "messages", "pair", "prompt_completion"),
        (RANKED, None, "ranked", "prompt_completion"),
        ({**RANKED, "ranks": [0, 1]}, None, "ranked", "prompt_completion"),
        ({**RANKED, "chosen": "Yo", "rejected": "No"}, "chosen", "ranked", "prompt_completion"),
        ({"conversations": SHAREGPT}, "sharegpt", None, "messages"),
        ({"conversations": TURNS}, "messages", None, "messages"),
        ({"question": "Hi", "answer": "Yo"}, "question_answer", None, "question_answer"),
        ({"text": "Once.", "meta": {"id": 1}}, "text", None, None),
        ({"prompt": "Hi"}, None, None, "prompt_completion"),
        ({"prompt": [user("Hi")]}, None, None, "prompt_completion"),
        ({"instruction": "Hi"}, None, None, "instruction"),
    ],
)
def test_each_stage_finds_the_format_that_it_can_read(row, sft, reward, ppo):
    for stage, expected in (("sft", sft), ("reward", reward), ("ppo", ppo)):
        if expected is None:
            with pytest.raises(InputError, match=f"no format of the {stage} stage reads"):
                find(stage, row)
        else:
            assert find(stage, row) == (expected, ""), stage


def test_the_order_of_a_stage_names_each_format_once():
    for stage, names in ORDER.items():
        assert len(set(names)) == len(names), stage


def test_the_format_that_reads_half_of_the_first_rows_is_found_and_the_others_are_named():
    odd = {"messages": "not a conversation", "text": "Hi"}
    found, note = find("sft", odd, *[{"messages": TURNS, "text": "Hi"}] * 3, {"other": 1}, 5)
    assert found == "messages"
    assert note == "; 2 of the first 5 differ, the first is row 1 (messages, text)"
    unusable = {"messages": [user("Hi"), assistant("")]}  # is dropped and counted when it is read
    assert find("sft", unusable, unusable) == ("messages", "")
    assert find("sft") == find("sft", 5) == ("sharegpt", "")


@pytest.mark.parametrize(
    "stage, row, message",
    [
        (
            "sft",
            {"q": {"text": "Hi"}, "Response": "Yo"},
            "a.jsonl, row 1 has the columns q.text, Response, which no format of the sft stage "
            "reads. The nearest is prompt_completion, which needs prompt and completion: give "
            "dataset.columns.prompt=<column> dataset.columns.completion=Response",
        ),
        (
            "sft",
            {"prompt": "Hi", "response": "Yo"},
            "(the ppo stage reads it as prompt_completion). The nearest is prompt_completion, "
            "which needs prompt and completion: give dataset.columns.completion=response",
        ),
        (
            "reward",
            {"question": "Hi", "good": "Yo", "bad": "No"},
            "give dataset.columns.prompt=question dataset.columns.chosen=good "
            "dataset.columns.rejected=bad",
        ),
        (
            "reward",
            {"messages": TURNS},
            "no format of the reward stage reads (the sft stage reads it as messages). The "
            "nearest is pair",
        ),
        (
            "sft",
            {"messages": [{"role": "bot", "content": "Hi"}]},
            "The nearest is dataset.format=messages: field 'messages[0].role': got 'bot'",
        ),
        ("ppo", {"query": "Hi"}, "which needs prompt: give dataset.columns.prompt=query"),
    ],
)
def test_rows_that_no_format_reads_are_refused_with_the_override_that_mends_it(stage, row, message):
    with pytest.raises(InputError) as caught:
        find(stage, row)
    assert message in str(caught.value)


def test_load_splits_says_what_it_found_and_keeps_it_in_the_configuration(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [{**ALPACA, "instruction": f"Say {i}"} for i in range(20)])
    config = DatasetConfig(path=path, eval_fraction=0.2)
    splits = load_splits(config, "sft", 1)
    assert config.format == "alpaca" and "messages" in splits.train[0]
    assert capsys.readouterr().out == f"{path}: alpaca, 20 rows\n"
    load_splits(config, "sft", 1)
    assert capsys.readouterr().out == ""
    given = DatasetConfig(path=path, eval_fraction=0.2, format="instruction")
    assert load_splits(given, "ppo", 1).train and given.format == "instruction"


def test_texts_to_mix_in_are_found_too(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "Hi"}])
    assert load_rows(path, None, "train", "ptx", "mix.path")[0] == [{"text": "Hi"}]
    assert load_rows(write(tmp_path / "b.jsonl", [{"messages": TURNS}]), None, "train", "ptx")[0]
    with pytest.raises(InputError, match="The nearest is text, which needs text$"):
        load_rows(write(tmp_path / "c.jsonl", [{"b": "Hi"}]), None, "train", "ptx", "mix.path")


def test_plain_text_has_loss_on_every_token_and_its_end(tmp_path):
    tokenizer = get_tokenizer("word")
    path = write(tmp_path / "a.jsonl", [{"text": f"text {i}"} for i in range(9)])
    splits = load_splits(DatasetConfig(path=path, eval_fraction=0.3), "sft", 1)
    assert splits.prompts == "text" and not count_overlap(splits.train, splits.eval)
    encoded, _ = encode_sft(splits.train, tokenizer, 20)
    for row, text in zip(encoded, splits.train, strict=True):
        assert row["input_ids"] == encode_text(text, tokenizer) == row["labels"]
        assert row["labels"][-1] == tokenizer.eos_token_id
    with pytest.raises(DropRow, match="empty text"):
        check_row({"text": " "}, "sft")
    with pytest.raises(KeyError, match="prompt"):
        check_row({"text": "Hi"}, "ppo")


def test_a_system_column_begins_the_conversation():
    from rlhf.data import FORMATS, to_conversation

    row = FORMATS["sharegpt"]({"conversations": SHAREGPT, "system": "Be brief."})
    system = {"role": "system", "content": "Be brief."}
    assert row == {"messages": [system, *TURNS]}
    hi = {"role": "user", "content": "Hi"}
    pair = {"chosen": [hi, {"role": "assistant", "content": "Yo"}], "system": "Be brief."}
    row = FORMATS["pair"](pair | {"rejected": [hi, {"role": "assistant", "content": "No"}]})
    assert row["prompt"] == [system, hi] and "system" not in row
    row = FORMATS["alpaca"]({"instruction": "Hi", "output": "Yo", "system": "Be brief."})
    assert row["messages"][:2] == [system, hi]
    text = FORMATS["pair"]({"prompt": "Hi", "chosen": "a", "rejected": "b", "system": "Be brief."})
    assert text["prompt"] == "Hi" and to_conversation(text)["prompt"] == [system, hi]
    assert FORMATS["alpaca"]({"instruction": "Hi", "output": "Yo", "system": " "})["system"] == " "


# --- dataset.columns ----------------------------------------------------------------------------


def test_columns_are_renamed_also_nested_ones_and_their_format_comes_first(tmp_path):
    rows = [{"question": "Hi", "answer": "Yo", "data": {"best": "Hey"}, "list": [{"b": "Ho"}]}]
    path = write(tmp_path / "a.jsonl", rows)

    def load(stage="sft", **columns):
        return load_rows(path, None, "train", stage, columns=columns)[0][0]

    row = load(prompt="question", completion="answer")
    assert (row["prompt"], row["completion"], row["answer"]) == ("Hi", "Yo", "Yo")
    assert load(prompt="question", completion="data.best")["completion"] == "Hey"
    row = load("reward", prompt="question", chosen="data.best", rejected="list.0.b")
    assert row["responses"] == ["Hey", "Ho"]
    assert load("ppo", prompt="answer")["prompt"] == "Yo"
    both = {"messages": TURNS, "q": "Hi", "a": "Yo"}
    assert find("sft", both) == ("messages", "")
    assert find("sft", both, columns={"prompt": "q", "completion": "a"})[0] == "prompt_completion"


def test_wrong_names_of_columns_are_refused_with_those_that_there_are(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "Hi", "data": {"best": "Hey"}}] * 3)

    def load(**columns):
        load_splits(DatasetConfig(path=path, columns=columns), "sft", 1)

    message = r"dataset.columns.completion=best: no row of .*a.jsonl has it; the columns are "
    with pytest.raises(InputError, match=message + "question, data.best"):
        load(prompt="question", completion="best")
    message = "no format reads a field 'promt'; they read answer, .*Did you mean prompt?"
    with pytest.raises(InputError, match=message):
        load(promt="question")


def test_columns_are_given_on_the_command_line_without_quotes():
    from helpers.configs import compose_stage

    given = ("dataset.columns.prompt=question", "dataset.columns.completion=data.best")
    columns = compose_stage("sft", *given).dataset.columns
    assert columns == {"prompt": "question", "completion": "data.best"}
