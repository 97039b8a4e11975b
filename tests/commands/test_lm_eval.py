"""`python -m rlhf.evaluate mode=lm_eval`: tasks of lm-evaluation-harness on a stage directory.

Run: python -m pytest tests/commands/test_lm_eval.py; with -m slow the harness itself, offline
"""

from __future__ import annotations

import importlib.util
import json
from types import SimpleNamespace

import pytest
from helpers.tiny import tiny_model, tiny_tokenizer

from rlhf.evaluate import harness
from rlhf.evaluate.__main__ import main
from rlhf.evaluate.options import EvaluateOptions

TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
CHOICE = """task: fruits
dataset_path: json
dataset_kwargs: {data_files: {test: fruits.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "Is {{word}} a fruit?"
doc_to_choice: [" yes", " no"]
doc_to_target: answer
metric_list: [{metric: acc}]
"""
OPEN = """task: words
dataset_path: json
dataset_kwargs: {data_files: {test: fruits.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "Name {{word}}."
doc_to_target: word
generation_kwargs: {max_gen_toks: 8, until: ["."]}
metric_list: [{metric: exact_match}]
"""


def test_a_missing_package_is_one_line_before_anything_is_loaded(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["mode=lm_eval", "path=nowhere", "tasks=arc_easy"]) == 2
    assert "mode=lm_eval needs the lm-eval package: pip install 'rlhf[eval]'" in (
        capsys.readouterr().err
    )
    assert main(["mode=lm_eval"]) == 2
    said = capsys.readouterr().err
    assert "path is missing" in said and "tasks is missing; add tasks=[" in said


def test_results_have_a_value_and_an_error_for_each_metric():
    values = {
        "alias": "x",
        "acc,none": 0.5,
        "acc_stderr,none": 0.1,
        "exact_match,strict": 1.0,
        "exact_match_stderr,strict": "N/A",
        "sample_len": 4,
    }
    found = {
        "results": {"mine": values},
        "n-samples": {"mine": {"original": 9, "effective": 4}},
        "n-shot": {"mine": 2},
        "versions": {"mine": 1.0},
    }
    ((name, result),) = harness.results_of(found, EvaluateOptions(limit=4))
    assert name == "mine" and result["num_rows"] == 4 and result["num_fewshot"] == 2
    assert result["metrics"] == {
        "acc": {"value": 0.5, "stderr": 0.1},
        "exact_match (strict)": {"value": 1.0, "stderr": None},
    }


def test_results_of_the_same_model_stay_and_those_of_another_go(tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval", reason="needs rlhf[eval]")
    monkeypatch.chdir(tmp_path)
    policy = SimpleNamespace(why_text="it has no chat template", tokenizer=None)
    first = EvaluateOptions(path="org/model", out="x")
    harness.save(first, policy, {"a": {"metrics": {}}})
    harness.save(first, policy, {"b": {"metrics": {}}})
    read = lambda: json.loads((tmp_path / "x/lm_eval.json").read_text())["tasks"]  # noqa: E731
    assert list(read()) == ["a", "b"]
    harness.save(EvaluateOptions(path="org/other", out="x"), policy, {"c": {"metrics": {}}})
    assert list(read()) == ["c"]


@pytest.mark.slow
def test_local_tasks_run_offline_with_the_template_and_stop_strings(tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval", reason="needs rlhf[eval]")
    from lm_eval.models.huggingface import HFLM

    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tiny_model("llama", tokenizer).save_pretrained("model")
    tokenizer.save_pretrained("model")
    rows = [{"word": word, "answer": i % 2} for i, word in enumerate("apple stone pear".split())]
    (tmp_path / "fruits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "fruits.yaml").write_text(CHOICE)
    (tmp_path / "words.yaml").write_text(OPEN)
    asked = []
    generate = HFLM.generate_until

    def spied(self, requests, disable_tqdm=False):
        asked.extend(request.args for request in requests)
        return generate(self, requests, disable_tqdm)

    monkeypatch.setattr(HFLM, "generate_until", spied)
    assert main(["mode=lm_eval", "path=model", "tasks=[fruits.yaml,words.yaml]"]) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "model/lm_eval.json").read_text())
    assert list(found["tasks"]) == ["fruits", "words"] and found["template"]
    assert found["tasks"]["fruits"]["num_rows"] == 3
    assert 0 <= found["tasks"]["fruits"]["metrics"]["acc"]["value"] <= 1
    assert "fruits" in said and "standard error" in said and "saved model/lm_eval.json" in said
    context, settings = asked[0]
    assert context == "<user>Name apple.\n<assistant>" and settings["until"] == [".", "<eos>"]
