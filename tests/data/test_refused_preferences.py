"""Preference rows that are refused or dropped."""

from __future__ import annotations

import pytest
from helpers.preferences import (
    ALPACA_FARM,
    CHATLLAMA,
    HH,
    PAIR,
    RANKED,
    RATINGS,
    STACK_EXCHANGE,
    STACK_EXCHANGE_PAIR,
    ULTRAFEEDBACK,
    ULTRAFEEDBACK_PAIR,
    load_ranked,
)
from helpers.rows import assistant

from rlhf.config import InputError
from rlhf.data import check_row, describe_dropped, load_rows

NAN, INF = float("nan"), float("inf")


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
        ("ultrafeedback", {**PAIR, "completions": None}, "field 'score_chosen': missing or null"),
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
        load_ranked(tmp_path, format, GOOD[format], {**GOOD[format], **change})


@pytest.mark.parametrize(
    "format, change, reason",
    [
        ("ranked", {"responses": ["a"], "scores": [1]}, "only one response"),
        ("ranked", {"responses": [], "scores": []}, "no response"),
        ("ranked", {"scores": [0.0, 0.0]}, "all ranks tied"),
        ("ranked", {"responses": ["a", " "]}, "empty response"),
        ("ranked", {"responses": ["a", "a"]}, "identical responses ranked differently"),
        ("ranked", {"prompt": ""}, "empty prompt"),
        ("ranked", {"prompt": [assistant("x")]}, "conversation does not start with a user turn"),
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
    kept, dropped = load_ranked(tmp_path, format, good, {**good, **change})
    merged = format == "chatllama_reward"  # both rows belong to the ranking that is dropped
    assert len(kept) == (0 if merged else 1)
    assert dropped == {reason: 1}


def test_a_repeated_response_counts_once(tmp_path):
    row = {"prompt": "p", "responses": list("abacb"), "scores": [2.0, 0.0, 2.0, 1.0, 0.0]}
    [kept], dropped = load_ranked(tmp_path, "ranked", row)
    assert kept == {
        "prompt": "p",
        "responses": ["a", "b", "c"],
        "scores": [2.0, 0.0, 1.0],
        "ranks": [0, 2, 1],
    }
    assert describe_dropped(dropped) == ("dropped 0 rows; 2 single responses that repeat another")
    again = [CHATLLAMA, CHATLLAMA, {**CHATLLAMA, "completion": "A car.", "score": 0}]
    [kept], dropped = load_ranked(tmp_path, "chatllama_reward", *again)
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


# --- Canonical rows of a Python source ------------------------------------------------------------


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
