"""Preference formats: what each source's documented rows become, and what is refused or dropped."""

import json

import pytest
from helpers.rows import assistant, real_file, user, write
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

NAN, INF = float("nan"), float("inf")


def load(tmp_path, format, *rows):
    return load_rows(write(tmp_path / "rows.jsonl", rows), format, "train", "reward")


# --- One documented row of each source ----------------------------------------------------------

# openbmb/UltraFeedback, shortened: the fields that are not read stand here as they do there.
ULTRAFEEDBACK = {
    "source": "sharegpt",
    "instruction": "Name a fruit.",
    "models": ["gpt-4", "starchat", "wizardlm-7b"],
    "completions": [
        {
            "model": "gpt-4",
            "principle": "helpfulness",
            "response": "An apple.",
            "annotations": {"honesty": {"Rating": "5", "Rationale": "True."}},
            "overall_score": 8.5,
            "fine-grained_score": 4.75,
        },
        {"response": "A car.", "overall_score": 1.0, "fine-grained_score": 5.0},
        {"response": "Pear.", "overall_score": 8.5, "fine-grained_score": 1.0},
    ],
}
ULTRAFEEDBACK_PAIR = {
    "prompt": "Name a fruit.",
    "prompt_id": "f0e37e9f",
    "chosen": [user("Name a fruit."), assistant("Apple.")],
    "rejected": [user("Name a fruit."), assistant("A car.")],
    "messages": [user("Name a fruit."), assistant("Apple.")],
    "score_chosen": 8.0,
    "score_rejected": 5.0,
}
STACK_EXCHANGE = {
    "qid": 4,
    "question": "How do I list files?",
    "answers": [
        {"answer_id": 7, "author": "x", "pm_score": 0, "selected": False, "text": "No idea."},
        {"answer_id": 8, "author": "y", "pm_score": 4, "selected": True, "text": "<p>ls</p>"},
        {"answer_id": 9, "author": "z", "pm_score": -1, "selected": False, "text": "Why?"},
    ],
    "date": "2012/02/15",
    "metadata": ["https://unix.stackexchange.com"],
}
STACK_EXCHANGE_PAIR = {
    "qid": 4,
    "question": "How do I list files?",
    "response_j": "Run ls.",
    "response_k": "No idea.",
}
ALPACA_FARM = {
    "instruction": "Translate.",
    "input": "Good day",
    "output_1": "Bon",
    "output_2": "Bonjour",
    "preference": 2,
}
CHATLLAMA = {"user_input": "Name a fruit.", "completion": "Apple.", "score": 4.0}
RATINGS = {"prompt": "p", "responses": ["a", "b", "c"], "ratings": [3, 5, 3], "scale": [1, 5]}
RANKED = {"prompt": "p", "responses": ["a", "b"], "scores": [1.0, 0.0]}
PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
HH = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}


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
            {
                "prompt": "p",
                "responses": ["a", "b", "c"],
                "scores": [3, 5, 3],
                "ranks": [1, 0, 1],
            },
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
    kept, dropped = load(tmp_path, "pair", *rows)
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
    [kept], _ = load(tmp_path, "ranked", row)
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
    [row], _ = load(tmp_path, "alpaca_farm", {**ALPACA_FARM, "preference": preference})
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
        [kept], _ = load(tmp_path, format, row)
        assert kept["prompt"] == prompt, format
    scored = {**CHATLLAMA, "user_input": prompt}
    worse = {**scored, "completion": "A car.", "score": 1}
    [kept], _ = load(tmp_path, "chatllama_reward", scored, CHATLLAMA, worse)
    assert kept["prompt"] == prompt and kept["scores"] == [4.0, 1]


# --- Scored completions, one per row ------------------------------------------------------------


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
    kept, dropped = load(tmp_path, "chatllama_reward", *rows)
    assert kept == [
        {
            "id": 1,
            "prompt": "fruit?",
            "responses": ["A car.", "Apple.", "Pear."],
            "scores": [0.0, 4.5, 4.5],
            "ranks": [1, 0, 0],
        },
        {
            "prompt": "colour?",
            "responses": ["Red.", "Loud."],
            "scores": [5, 2],
            "ranks": [0, 1],
        },
    ]
    assert dropped == {"only one response": 1, "all ranks tied": 1}


def test_a_bad_row_after_merging_names_the_prompt(tmp_path):
    rows = [{**CHATLLAMA, "margin": -1}, {**CHATLLAMA, "completion": "A car.", "score": 1}]
    with pytest.raises(InputError, match="rows.jsonl, prompt 'Name a fruit.', field 'margin': got"):
        load(tmp_path, "chatllama_reward", *rows)


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


# --- Bad input ----------------------------------------------------------------------------------

GOOD = {
    "ranked": RANKED,
    "ratings": RATINGS,
    "pair": PAIR,
    "hh": HH,
    "alpaca_farm": ALPACA_FARM,
    "ultrafeedback": ULTRAFEEDBACK,
    "stack_exchange": STACK_EXCHANGE,
    "chatllama_reward": CHATLLAMA,
}
SOFT = {"ranks": None, "scores": None}


def completions(*scores):
    return {"completions": [{"response": str(i), "overall_score": s} for i, s in enumerate(scores)]}


def answers(*scores):
    return {"answers": [{"text": str(i), "pm_score": s} for i, s in enumerate(scores)]}


@pytest.mark.parametrize(
    "format, change, message",
    [
        ("hh", {"chosen": "Hi"}, "field 'chosen': got 'Hi'; expected text that starts with"),
        ("ranked", {"scores": None}, "field 'ranks': missing or null, and so is 'scores'"),
        ("ranked", {"scores": [1, None]}, r"field 'scores\[1\]': got null; give each"),
        ("ranked", {"scores": [NAN, 1]}, r"field 'scores\[0\]': got nan"),
        ("ranked", {"scores": [1, INF]}, r"field 'scores\[1\]': got inf"),
        ("ranked", {"scores": [True, 1]}, r"field 'scores\[0\]': got True"),
        ("ranked", {"scores": ["1", 2]}, r"field 'scores\[0\]': got '1'"),
        ("ranked", {"scores": 1}, "field 'scores': got 1; expected a list"),
        ("ranked", {"scores": [1, 2, 3]}, "field 'ranks': 3 for 2 responses"),
        ("ranked", {"ranks": [0, 1], "scores": [1]}, "field 'scores': 1 for 2 responses"),
        ("ranked", {"ranks": [0, 1], "scores": [1, NAN]}, r"field 'scores\[1\]': got nan"),
        ("ranked", {"ranks": [1, 0]}, "field 'ranks': disagree with 'scores'"),
        ("ranked", {"ranks": [NAN, 0]}, r"field 'ranks\[0\]': got nan"),
        ("ranked", {"responses": ["a", None]}, r"field 'responses\[1\]': got None"),
        ("ranked", {"responses": "ab"}, "field 'responses': got 'ab'; expected a list"),
        ("ranked", {"prompt": None}, "field 'prompt': missing or null"),
        ("ranked", {**SOFT, "probability": 1.5}, "field 'probability': got 1.5; .* from 0 to 1"),
        ("ranked", {**SOFT, "probability": -0.1}, "field 'probability': got -0.1"),
        ("ranked", {**SOFT, "probability": NAN}, "field 'probability': got nan"),
        ("ranked", {"probability": 0.3}, "field 'probability': 0.3 contradicts the ranks"),
        ("ranked", {"probability": 0.5}, "field 'probability': 0.5 contradicts the ranks"),
        ("ranked", {"margin": -1}, "field 'margin': got -1; expected a number >= 0"),
        (
            "ranked",
            {"responses": list("abc"), "scores": [1, 2, 3], "margin": 1},
            "field 'margin': given for 3 responses; only a pair",
        ),
        (
            "ranked",
            {"responses": list("abc"), "scores": [1, 2, 3], "probability": 1},
            "field 'probability': given for 3 responses; only a pair",
        ),
        ("pair", {"margin": "0.5"}, "field 'margin': got '0.5'; expected a number >= 0"),
        ("pair", {"margin": NAN}, "field 'margin': got nan"),
        ("pair", {"margin": INF}, "field 'margin': got inf"),
        ("pair", {"probability": 0.4}, "field 'probability': 0.4 contradicts the ranks"),
        ("pair", {"score_chosen": 1}, "field 'score_rejected': missing or null"),
        (
            "pair",
            {"score_chosen": 1, "score_rejected": NAN},
            "field 'score_rejected': got nan; score both",
        ),
        ("ratings", {"ratings": None}, "field 'ratings': missing or null"),
        ("ratings", {"ratings": [1, 2]}, "field 'ranks': 2 for 3 responses"),
        ("ratings", {"ratings": [1, 2, NAN]}, r"field 'ratings\[2\]': got nan"),
        ("ratings", {"ratings": [1, 6, 2]}, r"field 'ratings\[1\]': got 6; 'scale' is 1 to 5"),
        ("ratings", {"ratings": [0, 2, 2]}, r"field 'ratings\[0\]': got 0; 'scale' is 1 to 5"),
        ("ratings", {"scale": [5, 1]}, r"field 'scale': got \[5, 1\]; expected \[lowest"),
        ("ratings", {"scale": [1, 4, 7]}, "field 'scale': got"),
        ("ratings", {"scale": 5}, "field 'scale': got 5; expected a list"),
        ("alpaca_farm", {"preference": None}, "field 'preference': missing or null"),
        ("alpaca_farm", {"preference": 3}, "field 'preference': got 3; expected 1 or 2"),
        ("alpaca_farm", {"preference": -1}, "field 'preference': got -1; expected 1 or 2"),
        ("alpaca_farm", {"preference": 0.5}, "field 'preference': got 0.5"),
        ("alpaca_farm", {"preference": "output_1"}, "field 'preference': got 'output_1'"),
        ("alpaca_farm", {"preference": NAN}, "field 'preference': got nan"),
        ("alpaca_farm", {"preference": True}, "field 'preference': got True"),
        ("alpaca_farm", {"output_2": None}, "field 'output_2': missing or null"),
        ("alpaca_farm", {"instruction": None}, "field 'instruction': missing or null"),
        ("ultrafeedback", {"completions": None}, "field 'chosen': missing or null"),
        ("ultrafeedback", {"completions": "x"}, "field 'completions': got 'x'; expected a list of"),
        ("ultrafeedback", {"completions": [7]}, r"field 'completions': got \[7\]; expected a list"),
        (
            "ultrafeedback",
            completions(2, None),
            r"field 'completions\[1\].overall_score': got null; score every one \(0 is a score\)",
        ),
        ("ultrafeedback", completions(None, None), r"'completions\[0\].overall_score': got null"),
        ("ultrafeedback", completions(NAN, 1), r"'completions\[0\].overall_score': got nan"),
        (
            "ultrafeedback",
            {"completions": [{"overall_score": 1}]},
            r"field 'completions\[0\].response': got None; expected text",
        ),
        (
            "ultrafeedback",
            {**ULTRAFEEDBACK_PAIR, "completions": None, "score_rejected": None},
            "field 'score_rejected': missing or null",
        ),
        (
            "ultrafeedback",
            {**PAIR, "completions": None},
            "field 'score_chosen': missing or null",
        ),
        ("stack_exchange", {"question": None}, "field 'question': missing or null"),
        ("stack_exchange", {"question": 3}, "field 'question': got 3"),
        ("stack_exchange", {"answers": None}, "field 'response_j': missing or null"),
        ("stack_exchange", {"answers": {}}, "field 'answers': got {}; expected a list of {text"),
        ("stack_exchange", answers(1, None), r"field 'answers\[1\].pm_score': got null"),
        (
            "chatllama_reward",
            {"score": None},
            r"field 'score': got null; score every completion \(0 is a score\), or remove the row",
        ),
        ("chatllama_reward", {"score": NAN}, "field 'score': got nan"),
        ("chatllama_reward", {"score": "4"}, "field 'score': got '4'"),
        ("chatllama_reward", {"completion": None}, "field 'completion': missing or null"),
        ("chatllama_reward", {"user_input": None}, "field 'user_input': missing or null"),
    ],
)
def test_malformed_row_stops_with_file_row_and_field(tmp_path, format, change, message):
    with pytest.raises(InputError, match=f"rows.jsonl, row 2, .*{message}"):
        load(tmp_path, format, GOOD[format], {**GOOD[format], **change})


@pytest.mark.parametrize(
    "format, change, reason",
    [
        ("ranked", {"responses": ["a"], "scores": [1]}, "only one response"),
        ("ranked", {"responses": [], "scores": []}, "no response"),
        ("ranked", {"scores": [0.0, 0.0]}, "all ranks tied"),
        ("ranked", {"responses": ["a", " "]}, "empty response"),
        ("ranked", {"responses": ["a", "a"]}, "identical responses ranked differently"),
        ("ranked", {"prompt": ""}, "empty prompt"),
        (
            "ranked",
            {"prompt": [assistant("x")]},
            "conversation does not start with a user turn",
        ),
        ("ranked", {**SOFT, "probability": 0.5}, "all ranks tied"),
        ("ratings", {"ratings": [4, 4, 4]}, "all ranks tied"),
        ("pair", {"rejected": "a"}, "identical responses ranked differently"),
        ("pair", {"chosen": ""}, "empty response"),
        ("pair", {"score_chosen": 1, "score_rejected": 2}, "scores contradict the preference"),
        ("pair", {"probability": 0.5}, "all ranks tied"),
        ("hh", {"rejected": HH["chosen"]}, "identical responses ranked differently"),
        ("hh", {"rejected": "\n\nHuman: b\n\nAssistant: c"}, "prompts differ"),
        ("hh", {"rejected": "\n\nHuman: a"}, "last turn not the assistant's"),
        ("alpaca_farm", {"preference": 0}, "all ranks tied"),
        ("alpaca_farm", {"preference": 0.0}, "all ranks tied"),
        ("alpaca_farm", {"preference": 1.5}, "all ranks tied"),
        ("alpaca_farm", {"output_1": "Bonjour"}, "identical responses ranked differently"),
        ("alpaca_farm", {"output_1": " "}, "empty response"),
        ("ultrafeedback", completions(), "no response"),
        ("ultrafeedback", completions(3.0), "only one response"),
        ("ultrafeedback", completions(3.0, 3), "all ranks tied"),
        (
            "ultrafeedback",
            {**ULTRAFEEDBACK_PAIR, "completions": None, "score_rejected": 9.0},
            "scores contradict the preference",
        ),
        (
            "ultrafeedback",
            {**ULTRAFEEDBACK_PAIR, "completions": None, "score_rejected": 8},
            "all ranks tied",
        ),
        ("stack_exchange", answers(2), "only one response"),
        ("stack_exchange", answers(2, 2), "all ranks tied"),
        (
            "stack_exchange",
            {**STACK_EXCHANGE_PAIR, "answers": None, "response_k": "Run ls."},
            "identical responses ranked differently",
        ),
        ("chatllama_reward", {"score": 1.0}, "identical responses ranked differently"),
        ("chatllama_reward", {"score": 1.0, "completion": ""}, "empty response"),
    ],
)
def test_unusable_row_is_dropped_and_counted(tmp_path, format, change, reason):
    good = GOOD[format]
    kept, dropped = load(tmp_path, format, good, {**good, **change})
    merged = format == "chatllama_reward"  # both rows belong to the ranking that is dropped
    assert len(kept) == (0 if merged else 1)
    assert dropped == {reason: 1}


def test_a_repeated_response_counts_once(tmp_path):
    row = {"prompt": "p", "responses": list("abacb"), "scores": [2.0, 0.0, 2.0, 1.0, 0.0]}
    [kept], dropped = load(tmp_path, "ranked", row)
    assert kept == {
        "prompt": "p",
        "responses": ["a", "b", "c"],
        "scores": [2.0, 0.0, 1.0],
        "ranks": [0, 2, 1],
    }
    assert describe_dropped(dropped) == ("dropped 0 rows; 2 single responses that repeat another")
    again = [CHATLLAMA, CHATLLAMA, {**CHATLLAMA, "completion": "A car.", "score": 0}]
    [kept], dropped = load(tmp_path, "chatllama_reward", *again)
    assert kept["responses"] == ["Apple.", "A car."] and kept["scores"] == [4.0, 0]
    assert dropped == {"single responses that repeat another": 1}


def test_null_scores_inside_parquet_rows_are_refused(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [ULTRAFEEDBACK, {**ULTRAFEEDBACK, **completions(1.0, None)}]
    rows = [{name: row[name] for name in ("instruction", "completions")} for row in rows]
    path = str(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:1]), path)
    [kept], _ = load_rows(path, "ultrafeedback", "train", "reward")
    assert kept["scores"] == [8.5, 1.0, 8.5]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    with pytest.raises(
        InputError, match=r"row 2, field 'completions\[1\].overall_score': got null"
    ):
        load_rows(path, "ultrafeedback", "train", "reward")


# --- Canonical rows of a Python source ----------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"responses": "ab"}, "field 'responses': got 'ab'; expected a list"),
        ({"ranks": 0}, "field 'ranks': got 0; expected a list"),
        ({"ranks": [0.0, 1.0]}, "field 'ranks': got .*expected whole numbers"),
        ({"ranks": [0, 1, 2]}, "field 'ranks': 3 for 2 responses"),
        ({"scores": [1.0]}, "field 'scores': 1 for 2 responses; give one score per response"),
        ({"scores": [0.0, 1.0]}, "field 'ranks': disagree with 'scores'"),
        ({"margin": True}, "field 'margin': got True"),
        ({"probability": 0.2}, r"field 'probability': 0.2 contradicts the ranks \[0, 1\]"),
    ],
)
def test_canonical_reward_rows_are_checked(change, message):
    row = {"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1]}
    full = {**row, "scores": [1, 0.0], "margin": 0.0, "probability": 1}
    check_row(full, "reward")
    check_row({**row, "ranks": [7, 3], "scores": [-2, -1], "probability": 0}, "reward")
    with pytest.raises(InputError, match=message):
        check_row({**row, **change}, "reward")


def test_strength_columns_of_other_stages_are_not_checked():
    check_row({"prompt": "p", "completion": "c", "scores": "any", "margin": "any"}, "sft")


# --- Real files ---------------------------------------------------------------------------------


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
    [kept], dropped = load(tmp_path, "chatllama_reward", *rows)
    assert kept["prompt"] == "here type the user input" and not dropped
    assert kept["scores"] == [4.0, 0.0] and kept["ranks"] == [0, 1]
    assert kept["responses"] == [row["completion"] for row in rows]
