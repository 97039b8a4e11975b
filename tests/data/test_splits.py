"""Held-out rows: split by prompt, or from a source of their own."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from helpers.rows import assistant, user, write

from rlhf.config import DatasetConfig, InputError
from rlhf.data import few_rows, load_rows, load_splits, prompt_of
from rlhf.data.sources import split_by_prompt


def test_split_by_prompt_shares_no_prompt_and_ignores_order():
    rows = [{"prompt": f"p{i % 300}", "n": i} for i in range(900)]
    rows += [{"messages": [user(f"q{i % 50}"), assistant(str(i))]} for i in range(100)]
    train, evaluation = split_by_prompt(rows, 0.2, seed=1)
    keys = [{str(prompt_of(row)) for row in side} for side in (train, evaluation)]
    assert not keys[0] & keys[1] and len(train) + len(evaluation) == 1000
    assert 40 <= len(keys[1]) <= 100  # 350 prompts, 70 expected, sd 7.5
    again = split_by_prompt(rows[::-1], 0.2, seed=1)
    assert again == (train[::-1], evaluation[::-1])
    assert split_by_prompt(rows, 0.2, seed=2)[1] != evaluation
    assert split_by_prompt(rows, 0.0, seed=1)[1] == []


@pytest.mark.parametrize("fraction", [0.001, 0.9])
def test_a_small_file_has_a_prompt_on_each_side_and_its_rows_stay_together(fraction):
    for seed in range(20):
        rows = [{"prompt": f"p{i % 2}", "n": i} for i in range(6)]
        sides = split_by_prompt(rows, fraction, seed)
        assert [{row["prompt"] for row in side} for side in sides] in (
            [{"p0"}, {"p1"}],
            [{"p1"}, {"p0"}],
        )
        assert [len(side) for side in sides] == [3, 3]
    assert split_by_prompt(rows[:1], fraction, seed) == (rows[:1], [])


def test_the_prompt_that_a_small_file_holds_out_is_the_first_of_a_larger_share():
    rows = [{"prompt": str(i)} for i in range(12)]
    (only,) = split_by_prompt(rows, 1e-9, seed=3)[1]
    larger = next(
        side
        for side in (split_by_prompt(rows, share / 50, 3)[1] for share in range(1, 50))
        if len(side) > 1
    )
    assert only in larger


def test_figures_of_fewer_than_20_held_out_rows_say_so():
    assert few_rows(20, "row") == ""
    assert few_rows(19, "row").startswith("these figures are of only 19 held-out rows and say")
    assert "only 1 held-out prompt and" in few_rows(1, "prompt")


def test_split_is_the_same_in_another_process():
    program = (
        "from rlhf.data.sources import split_by_prompt\n"
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


def test_single_prompt_is_trained_on_and_evaluated_on_with_a_warning(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "c"}])
    splits = load_splits(DatasetConfig(path=path, eval_fraction=0.5), "sft", seed=1)
    assert splits.train == splits.eval and len(splits.eval) == 1
    assert "single prompt, which is trained on and evaluated on" in capsys.readouterr().err


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


def test_text_prompts_become_conversations_where_the_parent_stage_saw_conversations(
    tmp_path, capsys
):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "Hi"}])
    config = DatasetConfig(path=path, eval_path=path, format="prompt_completion")
    for parent in ("text", "mixed", None):
        assert load_splits(config, "ppo", 1, parent_prompts=parent).prompts == "text"
    assert capsys.readouterr().out == ""
    splits = load_splits(config, "ppo", 1, parent_prompts="conversation")
    assert splits.train[0]["prompt"] == splits.eval[0]["prompt"] == [user("Hi")]
    assert "(dataset.as_conversation=false keeps them text)" in capsys.readouterr().out
    config.as_conversation = False
    assert load_splits(config, "ppo", 1, parent_prompts="conversation").prompts == "text"
    config.as_conversation = None
    write(tmp_path / "rows.jsonl", [{"prompt": [user("Hi")]}])
    assert load_splits(config, "ppo", 1, parent_prompts="conversation").prompts == "conversation"
    assert capsys.readouterr().out == ""  # there is no text


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


def test_held_out_rows_are_needed_only_where_they_are_used(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "p"}])
    config = DatasetConfig(path=path, format="prompt_completion", eval_fraction=0.0)
    assert load_splits(config, "ppo", 1, needs_eval=False).train == [{"prompt": "p"}]
    config.eval_path = str(tmp_path / "absent.jsonl")
    assert load_splits(config, "ppo", 1, needs_eval=False).eval == []
    with pytest.raises(InputError, match="dataset.eval_path="):
        load_splits(config, "ppo", 1)
