"""One documented row of each preference set, and its loading."""

from __future__ import annotations

from helpers.rows import assistant, user, write

from rlhf.data import load_rows

# openbmb/UltraFeedback, shortened: the fields that are not read are kept as in the original.
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


def load_ranked(tmp_path, format, *rows):
    return load_rows(write(tmp_path / "rows.jsonl", rows), format, "train", "reward")
