"""Compiled decoder blocks: training passes only, the same numbers or none, and a refusal without a
compiler. The compiler itself takes minutes: it runs in a slow test alone.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers.families import TOKENIZER
from helpers.tiny import tiny_model
from helpers.tiny_ppo import make_config

from rlhf import train_ppo
from rlhf.config import InputError
from rlhf.equivalence import compile_if_same
from rlhf.metrics import read_jsonl
from rlhf.sampling import Sampling, generate


@pytest.fixture
def calls(monkeypatch):
    """Calls of compiled functions; a stand-in for the compiler runs them as they are."""
    made: list[str] = []

    def compiler(function, dynamic):
        assert dynamic

        def compiled(*arguments, **keywords):
            made.append(type(function.__self__).__name__)
            return function(*arguments, **keywords)

        return compiled

    monkeypatch.setattr(torch, "compile", compiler)
    return made


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "gptj"])
def test_blocks_are_compiled_for_training_passes_and_not_for_the_sampler(family, calls):
    model = tiny_model(family, TOKENIZER)
    assert compile_if_same(model, TOKENIZER) == "compiled"
    calls.clear()
    model(input_ids=torch.tensor([[4, 5, 6]]), use_cache=False).logits.sum().backward()
    assert len(calls) == 2 and len(set(calls)) == 1  # two layers
    calls.clear()
    generate(model, [[40, 41], [42]], Sampling(4, (9,), torch.empty(0, dtype=torch.long)), None)
    assert not calls


def test_a_model_whose_numbers_change_keeps_its_blocks(monkeypatch):
    def compiler(function, dynamic):
        return lambda *arguments, **keywords: function(*arguments, **keywords) * 1.5

    monkeypatch.setattr(torch, "compile", compiler)
    model, ids = tiny_model("llama", TOKENIZER), torch.tensor([[4, 5, 6]])
    expected = model(input_ids=ids, use_cache=False).logits
    found = compile_if_same(model, TOKENIZER)
    assert found.startswith("not compiled, because its numbers change by")
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected)


def test_a_compiler_that_fails_leaves_the_blocks(monkeypatch):
    def compiler(function, dynamic):
        def fail(*_, **__):
            raise RuntimeError("no room for the cache\nlong trace")

        return fail

    monkeypatch.setattr(torch, "compile", compiler)
    model = tiny_model("llama", TOKENIZER)
    found = compile_if_same(model, TOKENIZER)
    assert found.startswith("not compiled, because") and "no room for the cache" in found
    assert model(input_ids=torch.tensor([[4, 5]]), use_cache=False).logits.isfinite().all()


def test_a_run_says_what_it_compiled_and_keeps_its_metrics(policy_dir, tmp_path, calls, capsys):
    rows = []
    for compiles in (True, False):
        config = make_config(policy_dir, tmp_path, num_updates=1)
        config.run_name, config.compile = f"compile-{compiles}", compiles
        directory = train_ppo(config).directory
        rows.append(read_jsonl(directory.parent / "metrics.jsonl"))
        said = json.loads((directory / "rlhf.json").read_text())["compiled"]
        assert said == (
            "policy compiled, reference compiled, critic compiled" if compiles else None
        )
    assert rows[0] == rows[1] and calls
    assert "     compile: policy compiled, reference compiled, critic compiled (warm-up: " in (
        capsys.readouterr().out
    )


def test_without_a_compiler_the_run_is_refused_before_anything_loads(
    policy_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.delenv("CXX", raising=False)
    config = make_config(policy_dir, tmp_path)
    config.compile = True
    message = "compile=true: there is no C.. compiler .g.., clang.., c...; install one, or set comp"
    with pytest.raises(InputError, match=message):
        train_ppo(config)


@pytest.mark.slow
def test_the_real_compiler_gives_the_numbers_of_the_plain_blocks(policy_dir, tmp_path):
    rows = []
    for compiles in (True, False):
        config = make_config(policy_dir, tmp_path, num_updates=1)
        config.run_name, config.compile = f"compile-{compiles}", compiles
        directory = train_ppo(config).directory
        rows.append(read_jsonl(directory.parent / "metrics.jsonl")[-1])
        said = json.loads((directory / "rlhf.json").read_text())["compiled"]
        assert not compiles or said == "policy compiled, reference compiled, critic compiled"
    for name in ("score", "policy_loss", "value_loss", "grad_norm", "kl_k3"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-3, abs=1e-4), name
