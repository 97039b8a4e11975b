"""Columns of the rows reach Python scorers by the names of their parameters.

Run: python -m pytest tests/scorers/test_columns.py
"""

from __future__ import annotations

import asyncio
import json

import pytest
from helpers.scorers import PROMPTS, RESPONSES, TOKENS
from helpers.tiny_ppo import make_config

from rlhf import train_ppo
from rlhf.config import InputError, ScorerComponent, ScorerConfig
from rlhf.scorers import CombinedScorer, load_scorer, score_responses

COLUMNS = {"answer": ["dog", "blue", "pear"], "level": [1, 2, None]}


def score(scorer, columns=COLUMNS, tokens=TOKENS):
    return score_responses(scorer, PROMPTS, RESPONSES, "x", tokens, columns).total.tolist()


def has_answer(responses, answer):
    return [float(a in r) for r, a in zip(responses, answer, strict=True)]


def by_order(questions, texts, answer):
    assert questions is PROMPTS
    return has_answer(texts, answer)


def of_responses(prompts, responses, answer):
    assert prompts is PROMPTS
    return has_answer(responses, answer)


def of_completions(completions, answer, **others):
    assert set(others) == {"prompts", "level"} and others["level"] == [1, 2, None]
    return has_answer(completions, answer)


def of_anything(**given):
    assert set(given) == {"prompts", "responses", "completions", "answer", "level"}
    return has_answer(given["completions"], given["answer"])


def with_default(prompts, completions, answer=None, missing="default"):
    assert missing == "default"
    return has_answer(completions, answer)


async def not_at_once(prompts, responses, answer):
    await asyncio.sleep(0)
    return has_answer(responses, answer)


class Judge:
    """Counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, prompts, responses, answer):
        self.calls += 1
        return has_answer(responses, answer)


class NeedsArguments:
    def __init__(self, model):
        pass


@pytest.mark.parametrize(
    "scorer",
    [by_order, of_responses, of_completions, of_anything, with_default, not_at_once, Judge()],
    ids=lambda scorer: getattr(scorer, "__name__", "Judge"),
)
def test_a_parameter_named_like_a_column_gets_its_values(scorer):
    assert score(scorer) == [1.0, 1.0, 0.0]


def test_every_component_gets_its_columns():
    parts = {"one": of_completions, "two": lambda p, r, level: [float(x or 0) for x in level]}
    assert score(CombinedScorer(parts, [1.0, 10.0])) == [11.0, 21.0, 0.0]


def test_an_asynchronous_scorer_may_be_called_where_a_loop_runs():
    async def notebook():
        return score(not_at_once)

    assert asyncio.run(notebook()) == [1.0, 1.0, 0.0]


def test_a_column_does_not_replace_prompts_or_responses():
    columns = COLUMNS | {"responses": [["a", "b"]] * 3, "prompts": ["c"] * 3}
    assert score(of_responses, columns) == [1.0, 1.0, 0.0]
    assert score(lambda p, r, **given: [float(len(given))] * 3, columns) == [2.0] * 3


def test_a_column_that_is_not_there_is_named():
    message = "x: no row has a column for its parameter `answer`; the columns are prompt, level"
    with pytest.raises(InputError, match=message):
        score(of_responses, {"level": [1, 2, 3]})


def test_a_class_is_made_once_and_keeps_its_state():
    scorer = load_scorer(ScorerConfig(f"{__name__}.Judge"))
    score(scorer)
    score(scorer)
    assert scorer.calls == 2
    with pytest.raises(InputError, match=r"scorer.path=.*NeedsArguments is a class that cannot be"):
        load_scorer(ScorerConfig(f"{__name__}.NeedsArguments"))


# --- In PPO ---------------------------------------------------------------------------------------


def run_config(policy_dir, folder, scorer):
    """A run on questions with answers; `answer` is read by the format too."""
    config = make_config(policy_dir, folder, num_updates=1)
    rows = [{"instruction": f"{i} + 1 =", "output": str(i), "answer": i + 1} for i in range(24)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "questions.jsonl").write_text(text)
    config.dataset.path, config.dataset.format = str(folder / "questions.jsonl"), "alpaca"
    config.scorer, config.evaluation.scorer = scorer, f"{__name__}.right"
    config.preflight = True
    config.watchdog.eos_rate = None
    return config


def right(prompts, responses, answer, output):
    """Score by length and by the row; fail if the columns are those of other rows."""
    rows = zip(prompts, answer, output, strict=True)
    assert all(f"{o} + 1 =" in str(p) and a == int(o) + 1 for p, a, o in rows)
    return [len(r) / 10 + a / 100 for r, a in zip(responses, answer, strict=True)]


def test_training_preflight_and_evaluation_give_the_columns(policy_dir, tmp_path):
    scorer = ScorerConfig(
        components=[ScorerComponent(f"{__name__}.right"), ScorerComponent(f"{__name__}.Judge")]
    )
    with pytest.raises(InputError, match="'int' is not|requires string|failed on a batch"):
        train_ppo(run_config(policy_dir, tmp_path, scorer))  # Judge takes the answer for a text
    result = train_ppo(run_config(policy_dir, tmp_path, ScorerConfig(f"{__name__}.right")))
    assert result.after["eval_independent_score"] == result.after["eval_score"]


@pytest.mark.parametrize("where", ["path", "components", "evaluation", "library"])
def test_a_column_that_no_row_has_is_refused_before_models_load(
    policy_dir, tmp_path, where, monkeypatch
):
    monkeypatch.setattr("rlhf.ppo.stage.load_actors", None)
    name, own = f"{__name__}.of_solution", None
    config = run_config(policy_dir, tmp_path, ScorerConfig(f"{__name__}.right"))
    label = f"scorer.path={name}"
    if where == "components":
        part = ScorerComponent(f"{__name__}.right")
        config.scorer = ScorerConfig(components=[part, ScorerComponent(name)])
        label = rf"scorer.components\[1\].path={name}"
    elif where == "evaluation":
        config.evaluation.scorer, label = name, f"evaluation.scorer={name}"
    elif where == "library":
        own, label = of_solution, "the scorer"
    else:
        config.scorer = ScorerConfig(name)
    message = f"{label}: no row has .* `solution`; the columns are .*answer"
    with pytest.raises(InputError, match=message):
        train_ppo(config, scorer=own)


def of_solution(prompts, responses, solution):
    """Never called."""
    raise AssertionError
