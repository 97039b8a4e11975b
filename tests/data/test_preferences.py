"""Preference formats: what the documented rows of each source become."""

from __future__ import annotations

import json

import pytest
from helpers.preferences import (
    ALPACA_FARM,
    CHATLLAMA,
    PAIR,
    RANKED,
    RATINGS,
    STACK_EXCHANGE,
    STACK_EXCHANGE_PAIR,
    ULTRAFEEDBACK,
    ULTRAFEEDBACK_PAIR,
    load_ranked,
)
from helpers.rows import assistant, real_file, user
from helpers.tiny import tiny_tokenizer

from rlhf.config import InputError
from rlhf.data import (
    FORMATS,
    DropRow,
    check_row,
    describe_dropped,
    encode_prompt,
    encode_ranked,
    load_rows,
)
from rlhf.tokenizer import chat_template_text

# --- One documented row of each source ------------------------------------------------------------


@pytest.mark.parametrize(
    "format, row, canonical",
    [
        (
            "ultrafeedback",
            ULTRAFEEDBACK,
            {
                "source": "sharegpt",
                "models": ["gpt-4", "starchat", "wizardlm-7b"],
                "prompt": [user("Name a fruit.")],
                "responses": ["An apple.", "A car.", "Pear."],
                "scores": [8.5, 1.0, 8.5],
                "ranks": [0, 1, 0],
            },
        ),
        (
            "ultrafeedback",
            ULTRAFEEDBACK_PAIR,
            {
                "prompt_id": "f0e37e9f",
                "prompt": [user("Name a fruit.")],
                "responses": ["Apple.", "A car."],
                "scores": [8.0, 5.0],
                "ranks": [0, 1],
            },
        ),
        (
            "stack_exchange",
            STACK_EXCHANGE,
            {
                "qid": 4,
                "date": "2012/02/15",
                "metadata": ["https://unix.stackexchange.com"],
                "prompt": [user("How do I list files?")],
                "responses": ["No idea.", "<p>ls</p>", "Why?"],
                "scores": [0, 4, -1],
                "ranks": [1, 0, 2],
            },
        ),
        (
            "stack_exchange",
            STACK_EXCHANGE_PAIR,
            {
                "qid": 4,
                "prompt": [user("How do I list files?")],
                "responses": ["Run ls.", "No idea."],
                "ranks": [0, 1],
            },
        ),
        (
            "alpaca_farm",
            ALPACA_FARM,
            {
                "prompt": [user("Translate.\n\n### Input:\nGood day")],
                "responses": ["Bon", "Bonjour"],
                "ranks": [1, 0],
            },
        ),
        (
            "ratings",
            RATINGS,
            {"prompt": "p", "responses": ["a", "b", "c"], "scores": [3, 5, 3], "ranks": [1, 0, 1]},
        ),
    ],
)
def test_documented_row_becomes_canonical(format, row, canonical):
    formatted = FORMATS[format](row)
    assert formatted == canonical
    check_row(formatted, "reward")


def test_ranked_scores_become_ranks_with_ties_and_zero_is_a_score():
    row = {"prompt": "p", "responses": list("abcd"), "scores": [0.0, 0.5, 0.0, -1], "subset": "s"}
    formatted = FORMATS["ranked"](row)
    assert formatted == {**row, "ranks": [1, 0, 1, 2]}
    check_row(formatted, "reward")
    ranked = FORMATS["ranked"]({"prompt": "p", "responses": list("abc"), "ranks": [3, 1, 3]})
    assert ranked["ranks"] == [1, 0, 1]


def test_ranks_and_scores_may_differ_in_ties_but_not_in_order():
    row = {"prompt": "p", "responses": list("abc")}
    for ranks, scores in [([0, 1, 2], [5, 5, 1]), ([0, 0, 1], [5, 4, 1])]:
        formatted = FORMATS["ranked"]({**row, "ranks": ranks, "scores": scores})
        assert formatted["ranks"] == ranks and formatted["scores"] == scores
        check_row(formatted, "reward")
    wrong = FORMATS["ranked"]({**row, "ranks": [0, 0, 1], "scores": [5, 1, 4]})
    with pytest.raises(InputError, match="field 'ranks': disagree with 'scores'"):
        check_row(wrong, "reward")


def test_pair_accepts_text_and_conversations():
    assert FORMATS["pair"](PAIR) == {"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1]}
    conversation = {"prompt": [user("p")], "responses": ["a", "b"], "ranks": [0, 1]}
    answers = {"chosen": [assistant("a")], "rejected": [assistant("b")]}
    whole = {name: [user("p"), *answer] for name, answer in answers.items()}
    for prompt in ({"prompt": "p"}, {"prompt": [user("p")]}):
        assert FORMATS["pair"]({**prompt, **answers}) == conversation
        assert FORMATS["pair"]({**prompt, **whole}) == conversation
    assert FORMATS["pair"](whole) == conversation
    with pytest.raises(DropRow, match="prompts differ"):
        FORMATS["pair"]({"chosen": whole["chosen"], "rejected": [user("q"), assistant("b")]})
    with pytest.raises(InputError, match="field 'prompt'.*differs"):
        FORMATS["pair"]({"prompt": "q", **whole})
    with pytest.raises(InputError, match="field 'rejected'.*user turn"):
        FORMATS["pair"]({"prompt": "q", "chosen": "a", "rejected": [user("b")]})


def test_pair_keeps_margin_probability_and_scores(tmp_path):
    rows = [
        {**PAIR, "margin": 0},
        {**PAIR, "margin": 2 / 3},
        {**PAIR, "probability": 0.75},
        {**PAIR, "score_chosen": 0.0, "score_rejected": -2},
        {**PAIR, "score_chosen": 3, "score_rejected": 3},  # preferred all the same
    ]
    kept, dropped = load_ranked(tmp_path, "pair", *rows)
    pair = {"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1]}
    assert kept == [
        pair | {"margin": 0},
        pair | {"margin": 2 / 3},
        pair | {"probability": 0.75},
        pair | {"scores": [0.0, -2]},
        pair | {"scores": [3, 3]},
    ]
    assert not dropped


@pytest.mark.parametrize("value, ranks", [(1.0, [0, 1]), (0.51, [0, 1]), (0.25, [1, 0])])
def test_ranks_follow_the_probability_that_the_first_is_preferred(tmp_path, value, ranks):
    row = {"prompt": "p", "responses": ["a", "b"], "probability": value}
    [kept], _ = load_ranked(tmp_path, "ranked", row)
    assert kept == {**row, "ranks": ranks}


@pytest.mark.parametrize(
    "preference, expected",
    [
        (1, {"ranks": [0, 1]}),
        (2, {"ranks": [1, 0]}),
        (1.0, {"ranks": [0, 1]}),
        (2.0, {"ranks": [1, 0]}),
        (1.25, {"ranks": [0, 1], "probability": 0.75}),
        (1.875, {"ranks": [1, 0], "probability": 0.125}),
    ],
)
def test_alpaca_farm_preference_is_the_better_output_or_one_plus_its_probability(
    tmp_path, preference, expected
):
    [row], _ = load_ranked(tmp_path, "alpaca_farm", {**ALPACA_FARM, "preference": preference})
    assert {name: row[name] for name in ("ranks", "probability") if name in row} == expected
    assert row["responses"] == ["Bon", "Bonjour"]


def test_alpaca_farm_prompts_are_those_of_the_alpaca_format():
    for extra in ({}, {"input": ""}, {"input": "Good day"}):
        pair = {name: ALPACA_FARM[name] for name in ("output_1", "output_2", "preference")}
        prompt = FORMATS["alpaca_farm"]({"instruction": "Translate.", **extra, **pair})["prompt"]
        row = FORMATS["alpaca"]({"instruction": "Translate.", **extra, "output": "x"})
        assert prompt == row["messages"][:-1]


def test_hh_prompt_is_the_common_turns():
    chosen = "\n\nHuman: a\n\nb\n\nAssistant: c\n\nHuman: d\n\nAssistant: good"
    row = FORMATS["hh"]({"chosen": chosen, "rejected": chosen.replace("good", "bad ")})
    assert row["prompt"] == [user("a\n\nb"), assistant("c"), user("d")]
    assert row["responses"] == ["good", "bad"] and row["ranks"] == [0, 1]


def test_fine_grained_score_is_read_only_where_no_completion_has_an_overall_score():
    fine = [
        {"response": c["response"], "fine-grained_score": c["fine-grained_score"]}
        for c in ULTRAFEEDBACK["completions"]
    ]
    row = FORMATS["ultrafeedback"]({**ULTRAFEEDBACK, "completions": fine})
    assert row["scores"] == [4.75, 5.0, 1.0] and row["ranks"] == [1, 0, 2]
    zero = [{**c, "overall_score": 0.0} for c in fine]
    row = FORMATS["ultrafeedback"]({**ULTRAFEEDBACK, "completions": zero})
    assert row["scores"] == [0.0, 0.0, 0.0]
    fine[2]["overall_score"] = 3.0
    with pytest.raises(InputError, match=r"'completions\[0\].overall_score': got null; score"):
        FORMATS["ultrafeedback"]({**ULTRAFEEDBACK, "completions": fine})


def test_prompt_may_be_a_conversation_in_every_format_that_has_one(tmp_path):
    prompt = [{"role": "system", "content": "Be brief."}, user("a"), assistant("b"), user("c")]
    rows = {
        "ranked": {**RANKED, "prompt": prompt},
        "ratings": {**RATINGS, "prompt": prompt},
        "pair": {**PAIR, "prompt": prompt},
        "ultrafeedback": {**ULTRAFEEDBACK, "instruction": prompt},
        "stack_exchange": {**STACK_EXCHANGE, "question": prompt},
    }
    for format, row in rows.items():
        [kept], _ = load_ranked(tmp_path, format, row)
        assert kept["prompt"] == prompt, format
    scored = {**CHATLLAMA, "user_input": prompt}
    worse = {**scored, "completion": "A car.", "score": 1}
    [kept], _ = load_ranked(tmp_path, "chatllama_reward", scored, CHATLLAMA, worse)
    assert kept["prompt"] == prompt and kept["scores"] == [4.0, 1]


# --- Scored completions, one per row --------------------------------------------------------------


def test_chatllama_rows_of_one_prompt_become_one_ranking_and_zero_is_a_score(tmp_path):
    rows = [
        {"user_input": "fruit?", "completion": "A car.", "score": 0.0, "id": 1},
        {"user_input": "colour?", "completion": "Red.", "score": 5},
        {"user_input": "fruit?", "completion": "Apple.", "score": 4.5, "id": 2},
        {"user_input": "alone?", "completion": "Yes.", "score": 3},
        {"user_input": "colour?", "completion": "Loud.", "score": 2},
        {"user_input": "fruit?", "completion": "Pear.", "score": 4.5},
        {"user_input": "tied?", "completion": "Yes.", "score": 3},
        {"user_input": "tied?", "completion": "No.", "score": 3.0},
    ]
    kept, dropped = load_ranked(tmp_path, "chatllama_reward", *rows)
    assert kept == [
        {
            "id": 1,
            "prompt": "fruit?",
            "responses": ["A car.", "Apple.", "Pear."],
            "scores": [0.0, 4.5, 4.5],
            "ranks": [1, 0, 0],
        },
        {"prompt": "colour?", "responses": ["Red.", "Loud."], "scores": [5, 2], "ranks": [0, 1]},
    ]
    assert dropped == {"only one response": 1, "all ranks tied": 1}


def test_a_bad_row_after_merging_names_the_prompt(tmp_path):
    rows = [{**CHATLLAMA, "margin": -1}, {**CHATLLAMA, "completion": "A car.", "score": 1}]
    with pytest.raises(InputError, match="rows.jsonl, prompt 'Name a fruit.', field 'margin': got"):
        load_ranked(tmp_path, "chatllama_reward", *rows)


def test_python_source_is_not_merged(tmp_path, monkeypatch):
    (tmp_path / "my_pairs.py").write_text(
        "def rows(stage, split):\n"
        "    row = {'prompt': 'p', 'responses': ['a', 'b'], 'ranks': [0, 1], 'scores': None}\n"
        "    return [row, row | {'responses': ['c', 'd'], 'scores': [1, 0]}]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    rows, _ = load_rows("python:my_pairs.rows", "chatllama_reward", "train", "reward")
    assert rows == [
        {"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1]},
        {"prompt": "p", "responses": ["c", "d"], "ranks": [0, 1], "scores": [1, 0]},
    ]


# --- Real files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("split, rows, responses", [("train", 368, 2519), ("test", 60, 412)])
def test_real_rankings_load_in_full_with_their_scores(split, rows, responses):
    path = str(real_file(f"alpaca_eval_ranked_{split}.jsonl"))
    kept, dropped = load_rows(path, "ranked", "train", "reward")
    assert len(kept) == rows and not dropped
    assert sum(len(row["responses"]) for row in kept) == responses
    for row in kept:
        best = row["responses"][row["ranks"].index(0)]
        assert best == max(zip(row["scores"], row["responses"], strict=True))[1]


def test_hh_file_drops_five_and_four():
    rows, dropped = load_rows(
        str(real_file("hh_harmless_base_test.jsonl.gz")), "hh", "train", "reward"
    )
    assert len(rows) == 2303 and dropped == {"prompts differ": 5, "empty response": 4}
    assert describe_dropped(dropped) == "dropped 9 rows: 5 prompts differ, 4 empty response"
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat_template_text("plain")
    encoded, _ = encode_ranked(rows[:50], tokenizer, 100_000)
    for row, one in zip(rows, encoded, strict=False):
        prompt = encode_prompt(row["prompt"], tokenizer)
        for ids, length in zip(one["input_ids"], one["lengths"], strict=True):
            assert ids[:-length] == prompt and ids[-1] == tokenizer.eos_token_id


def test_chatllama_sample_is_refused_at_its_null_score_and_loads_once_scored(tmp_path):
    file = real_file("chatllama_reward_dataset.json")
    with pytest.raises(InputError, match="chatllama_reward_dataset.json, row 2, field 'score'"):
        load_rows(str(file), "chatllama_reward", "train", "reward")
    rows = json.loads(file.read_text())
    rows[1]["score"] = 0.0
    [kept], dropped = load_ranked(tmp_path, "chatllama_reward", *rows)
    assert kept["prompt"] == "here type the user input" and not dropped
    assert kept["scores"] == [4.0, 0.0] and kept["ranks"] == [0, 1]
    assert kept["responses"] == [row["completion"] for row in rows]
