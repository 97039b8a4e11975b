"""Formats of named instruction and conversation sets: what each documented row becomes.

Run: python -m pytest tests/data/test_instructions.py
"""

from __future__ import annotations

import json

import pytest
from helpers.rows import assistant, real_file, user, write

from rlhf.config import InputError
from rlhf.data import FORMATS, DropRow, check_row, load_rows

SYSTEM = {"role": "system", "content": "Be brief."}


# --- One documented row of each source ------------------------------------------------------------

DOLLY = {
    "instruction": "When was it built?",
    "context": "The bridge[42] was built in 1902.",
    "response": "In 1902.",
    "category": "closed_qa",
}
SEED_TASK = {
    "id": "seed_task_1",
    "name": "antonym_relation",
    "instruction": "What is the relation?",
    "instances": [{"input": "Night : Day", "output": "Opposites."}],
    "is_classification": False,
}
SHAREGPT = {
    "id": "identity_0",
    "conversations": [
        {"from": "human", "value": "Who are you?"},
        {"from": "gpt", "value": "Vicuna."},
        {"from": "human", "value": "Bye!"},
        {"from": "gpt", "value": "You too!"},
    ],
}
BAIZE = {
    "topic": "How do I boil an egg?",
    "input": "The conversation between human and AI assistant.\n[|Human|] How do I boil an egg?\n"
    "[|AI|] For eight minutes.\nIn water.\n[|Human|] Thanks!\n[|AI|] Welcome.\n[|Human|] ",
}
POST = {"id": "t3_1", "subreddit": "Pets", "title": "Cat", "post": "My cat sleeps.\nAll day."}
COMPARISON = {
    "info": {**POST, "site": None, "article": None},
    "summaries": [
        {"text": " A cat.", "policy": "sup2", "note": ""},
        {"text": " Cat sleeps a lot.", "policy": "ref", "note": "ok"},
    ],
    "choice": 1,
    "worker": "x",
    "query_token": [1, 2, 3],
}
TLDR_PROMPT = "SUBREDDIT: r/Pets\n\nTITLE: Cat\n\nPOST: My cat sleeps.\nAll day.\n\nTL;DR:"
HH = {
    "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: good",
    "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: bad",
}


@pytest.mark.parametrize(
    "format, stage, row, canonical",
    [
        (
            "dolly15k",
            "sft",
            DOLLY,
            {
                "category": "closed_qa",
                "messages": [
                    user("When was it built?\n\nInput:\nThe bridge[42] was built in 1902."),
                    assistant("In 1902."),
                ],
            },
        ),
        (
            "dolly15k",
            "sft",
            {**DOLLY, "context": ""},
            {
                "category": "closed_qa",
                "messages": [user("When was it built?"), assistant("In 1902.")],
            },
        ),
        (
            "self_instruct",
            "sft",
            SEED_TASK,
            {
                "id": "seed_task_1",
                "name": "antonym_relation",
                "is_classification": False,
                "messages": [
                    user("What is the relation?\n\n### Input:\nNight : Day"),
                    assistant("Opposites."),
                ],
            },
        ),
        (
            "sharegpt",
            "sft",
            SHAREGPT,
            {
                "id": "identity_0",
                "messages": [
                    user("Who are you?"),
                    assistant("Vicuna."),
                    user("Bye!"),
                    assistant("You too!"),
                ],
            },
        ),
        (
            "baize",
            "sft",
            BAIZE,
            {
                "topic": "How do I boil an egg?",
                "messages": [
                    user("How do I boil an egg?"),
                    assistant("For eight minutes.\nIn water."),
                    user("Thanks!"),
                    assistant("Welcome."),
                ],
            },
        ),
        (
            "chatllama_actor",
            "sft",
            {"user_input": "Human: Hi\n\n##\n\n", "completion": "Assistant: Yo"},
            {"prompt": "Human: Hi\n\n##\n\n", "completion": "Assistant: Yo"},
        ),
        ("chatllama_rlhf", "ppo", {"user_input": "Human: Hi"}, {"prompt": "Human: Hi"}),
        (
            "tldr",
            "sft",
            {**POST, "summary": "Cat sleeps a lot."},
            {"id": "t3_1", "prompt": TLDR_PROMPT, "completion": " Cat sleeps a lot."},
        ),
        (
            "summarize_from_feedback",
            "reward",
            COMPARISON,
            {
                "prompt": TLDR_PROMPT,
                "responses": [" A cat.", " Cat sleeps a lot."],
                "ranks": [1, 0],
            },
        ),
        (
            "hh_chosen",
            "sft",
            HH,
            {"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("good")]},
        ),
    ],
)
def test_documented_row_becomes_canonical(format, stage, row, canonical):
    formatted = FORMATS[format](row)
    assert formatted == canonical
    check_row(formatted, stage)


@pytest.mark.parametrize(
    "format, row, message",
    [
        ("dolly15k", {**DOLLY, "context": 3}, "field 'context': got 3"),
        ("dolly15k", {**DOLLY, "response": None}, "field 'response': missing or null"),
        ("self_instruct", {**SEED_TASK, "instances": []}, "has 0 instances; write one row"),
        (
            "self_instruct",
            {**SEED_TASK, "instances": SEED_TASK["instances"] * 2},
            "'instances': has 2 instances; write one row per instance",
        ),
        (
            "self_instruct",
            {**SEED_TASK, "instances": [{"input": "a", "output": None}]},
            r"'instances\[0\].output': missing or null",
        ),
        ("sharegpt", {"conversations": ["Hi"]}, r"'conversations\[0\]': got 'Hi'; expected {from"),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": 3}]},
            r"'conversations\[0\].value': got 3; expected text",
        ),
        ("baize", {"input": "[|Human|]"[:8]}, r"field 'input': got .* with \[\|Human\|\]"),
        ("chatllama_actor", {"user_input": "a"}, "field 'completion': missing"),
        ("tldr", {**POST, "title": 3, "summary": "s"}, "field 'title': got 3"),
    ],
)
def test_malformed_row_stops_with_file_row_and_field(tmp_path, format, row, message):
    path = write(tmp_path / "rows.jsonl", [row])
    with pytest.raises(InputError, match=f"rows.jsonl, row 1, .*{message}"):
        load_rows(path, format, "train", "sft")


def test_comparison_without_two_summaries_and_a_choice_stops():
    for change in ({"choice": 2}, {"summaries": ["a", "b"]}, {"info": "post"}):
        with pytest.raises(InputError, match=f"field '{next(iter(change))}'"):
            FORMATS["summarize_from_feedback"]({**COMPARISON, **change})
    with pytest.raises(DropRow, match="no subreddit"):
        FORMATS["summarize_from_feedback"]({**COMPARISON, "info": {"article": "News."}})


def test_an_empty_summary_is_dropped_although_answers_begin_with_a_space(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{**POST, "summary": " "}, {**POST, "summary": "s"}])
    rows, dropped = load_rows(path, "tldr", "train", "sft")
    assert [row["completion"] for row in rows] == [" s"] and dropped == {"empty response": 1}


# --- Cleaning -------------------------------------------------------------------------------------


def sharegpt(*turns):
    return {"conversations": [{"from": speaker, "value": text} for speaker, text in turns]}


def test_sharegpt_keeps_a_conversation_from_its_first_question_to_its_last_answer():
    turns = [("system", "s"), ("gpt", "x"), ("human", "a"), ("human", "a"), ("chatgpt", "b")]
    row = sharegpt(*turns, ("gpt", "b"), ("user", "c"))
    kept = FORMATS["sharegpt"](row)["messages"]
    assert kept == [{"role": "system", "content": "s"}, user("a"), assistant("b")]
    conversations = row["conversations"]
    assert FORMATS["sharegpt"]({"items": conversations[1:]})["messages"] == kept[1:]


def test_sharegpt_drops_and_counts_what_is_no_conversation(tmp_path):
    good = sharegpt(("human", "a"), ("gpt", "b"))
    rows = [
        good,
        sharegpt(),
        sharegpt(("gpt", "b")),
        sharegpt(("human", "a"), ("human", "c"), ("gpt", "b")),
        sharegpt(("human", "a"), ("gpt", "b"), ("gpt", "c")),
        sharegpt(("human", "a"), ("bing", "b")),
        sharegpt(("human", "a"), ("gpt", " ")),
    ]
    kept, dropped = load_rows(write(tmp_path / "a.jsonl", rows), "sharegpt", "train", "sft")
    assert kept == [{"messages": [user("a"), assistant("b")]}]
    assert dropped == {
        "no question with an answer": 2,
        "speakers do not alternate": 2,
        "a speaker other than human, gpt and system": 1,
        "empty turn": 1,
    }


def test_all_500_conversations_of_the_real_file_are_kept():
    rows, dropped = load_rows(
        str(real_file("sharegpt_dummy_conversation.json")), "sharegpt", "train", "sft"
    )
    assert len(rows) == 500 and not dropped
    raw = json.loads(real_file("sharegpt_dummy_conversation.json").read_text())
    assert [[m["content"] for m in row["messages"]] for row in rows] == [
        [turn["value"] for turn in row["conversations"]] for row in raw
    ]


def test_real_files_of_self_instruct_and_chatllama_load_in_full():
    tasks, dropped = load_rows(
        str(real_file("self_instruct_seed_tasks.jsonl")), "self_instruct", "train", "sft"
    )
    assert len(tasks) == 175 and not dropped
    with_input = ["\n\n### Input:\n" in row["messages"][0]["content"] for row in tasks]
    assert sum(with_input) == 125  # counted from the file, see its paper's repository
    for name, stage in (("actor", "sft"), ("rlhf", "ppo")):
        path = real_file(f"chatllama_{name}_dataset.json")
        rows, dropped = load_rows(str(path), f"chatllama_{name}", "train", stage)
        assert len(rows) == 1 and not dropped


def message(role, text, *replies, rank=None):
    return {"role": role, "text": text, "rank": rank, "replies": list(replies), "lang": "en"}


def test_a_tree_becomes_one_ranking_per_turn_with_ranked_answers(tmp_path):
    deeper = message(
        "prompter",
        "Why?",
        message("assistant", "So.", rank=2),
        message("assistant", "It is ripe.", rank=0),
        message("assistant", "unranked"),
    )
    root = message(
        "prompter",
        "A fruit?",
        message("assistant", "A car.", rank=1),
        message("assistant", "Apple.", deeper, message("prompter", "Thanks!"), rank=0),
    )
    alone = message("prompter", "Hi", message("assistant", "Yo", rank=0))
    path = write(tmp_path / "trees.jsonl", [{"prompt": root}, {"prompt": alone}])
    rows, dropped = load_rows(path, "oasst", "train", "reward")
    assert rows == [
        {"prompt": [user("A fruit?")], "responses": ["A car.", "Apple."], "ranks": [1, 0]},
        {
            "prompt": [user("A fruit?"), assistant("Apple."), user("Why?")],
            "responses": ["So.", "It is ripe."],
            "ranks": [1, 0],
        },
    ]
    assert dropped == {"no turn with two ranked answers": 1}
    for wrong in (message("human", "Hi"), message("prompter", 3)):
        path = write(tmp_path / "wrong.jsonl", [{"prompt": wrong}])
        with pytest.raises(InputError, match="wrong.jsonl, row 1, field '(role|text)': got"):
            load_rows(path, "oasst", "train", "reward")
