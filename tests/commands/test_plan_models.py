"""`rlhf.plan` with all kinds of models: mixtures of experts, tied tables, heads of their own size,
quantised files, and what is no causal language model.

Run: python -m pytest tests/commands/test_plan_models.py
"""

import json
import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf.models import ModelMemory, kept_bytes
from rlhf.plan.__main__ import main
from rlhf.plan.counting import measure
from rlhf.plan.work import Shape
from rlhf.ppo.preflight.memory import MemoryEstimate

SIZES = dict(hidden_size=64, intermediate_size=160, num_hidden_layers=4, vocab_size=128)
SIZES |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
LENGTH = 64
ATTENTION = 2 * 64 * 64 + 2 * 64 * 32  # numbers of q and o, k and v in a block


def kept(settings, rows: int) -> int:
    """Bytes that autograd keeps of a pass over rows of a real model under bfloat16 autocast."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa")
    ids = torch.randint(0, 128, (rows, LENGTH))

    def forward() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            model.eval().base_model(ids, use_cache=False)

    return kept_bytes(forward, model)


@pytest.mark.parametrize(
    ("family", "experts"),
    [
        ("mixtral", {"num_local_experts": 8}),
        ("qwen3_moe", {"num_experts": 8, "moe_intermediate_size": 96, "head_dim": 16}),
        ("granitemoe", {"num_local_experts": 8}),
    ],
)
def test_a_mixture_keeps_what_its_real_experts_keep(family, experts):
    settings = AutoConfig.for_model(family, **SIZES, **experts, num_experts_per_tok=2)
    found = measure(settings, LENGTH, lora=False, dtype="float32")
    assert found.per_row == kept(settings, 2) - kept(settings, 1)


def test_a_mixture_computes_with_the_experts_of_a_token_alone():
    settings = AutoConfig.for_model(
        "mixtral", **SIZES, num_local_experts=8, num_experts_per_tok=2, tie_word_embeddings=False
    )
    found = measure(settings, LENGTH, lora=False, dtype="float32")
    expert, norms = 3 * 64 * 160, 9 * 64
    outside = 4 * (ATTENTION + 8 * 64) + norms + 128 * 64  # the router, and one of two tables
    assert found.parameters == outside + 4 * 8 * expert + 128 * 64
    assert found.multiplied == outside + 4 * 2 * expert


@pytest.mark.parametrize("tied", [True, False])
def test_a_token_is_not_multiplied_by_the_table_in_which_it_is_looked_up(tied):
    settings = AutoConfig.for_model("llama", **SIZES, tie_word_embeddings=tied)
    block = ATTENTION + 3 * 64 * 160
    for lora in (False, True):
        found = measure(settings, LENGTH, lora, dtype="float32")
        assert found.multiplied == 4 * block + 9 * 64 + 128 * 64 + lora * found.trained
    known = Shape.of_settings(settings)
    assert (known.multiplied, known.width) == (4 * block + 9 * 64 + 128 * 64, 64)
    tokens, length = 10, 32
    operations = tokens * (2 * known.multiplied + 4 * 4 * 64 * length)
    assert known.forward(tokens, length) == operations


def test_attention_is_as_wide_as_the_heads_and_the_sampler_keeps_bfloat16():
    settings = AutoConfig.for_model("qwen3", **SIZES, head_dim=32)
    for dtype in ("float32", "bfloat16"):
        found = measure(settings, LENGTH, lora=False, dtype=dtype)
        assert found.width == 4 * 32
        assert found.cache_per_token == 4 * 2 * 2 * 32 * 2  # keys and values, bytes
    known = Shape.of_settings(settings)
    assert (known.width, known.cache_per_token) == (found.width, found.cache_per_token)


def test_the_moment_that_needs_most_is_named():
    training = MemoryEstimate({"policy": ModelMemory(10, 10, 10, 10)}, 5, 5)
    assert training.moment() == "training"
    assert MemoryEstimate({"policy": ModelMemory(10)}, 5, 4).moment() == "sampling"
    assert MemoryEstimate({"policy": ModelMemory(10)}, 5, 4, visiting=2).moment() == "scoring"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model_type": "t5"}, "model_type=t5 is no causal language model"),
        ({"model_type": "bert", **SIZES}, "model_type=bert keeps no keys and values of earlier"),
        ({"model_type": "llama", **SIZES, "num_hidden_layers": 0}, "has no decoder blocks"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "a.B"}}, "needs Python code of its own"),
        (
            {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 1},
            "model_type=mamba keeps no keys and values, with which PPO samples",
        ),
    ],
)
def test_a_model_that_cannot_be_planned_is_refused_in_one_line(given, message, tmp_path, capfd):
    (tmp_path / "config.json").write_text(json.dumps(given))
    assert main([f"model={tmp_path}", "prompt_length=8", "response_length=8"]) == 2
    out, err = capfd.readouterr()
    assert not out and message in err and err.count("\n") == 1 and len(err) < 300


def test_rates_count_the_tokens_of_each_epoch_and_quantised_files_are_named(tmp_path, capsys):
    given = {"model_type": "llama", **SIZES, "quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "config.json").write_text(json.dumps(given))
    lengths = ["prompt_length=8", "response_length=8"]
    assert main([f"model={tmp_path}", "stage=sft", "epochs=3", "rows=1000000000", *lengths]) == 0
    out = capsys.readouterr().out
    assert "its files are quantised (gptq): reckoned as if they held float32" in out
    hours = float(re.search(r"\nall +([\d.]+)", out)[1])
    rate = float(re.search(r"at most ([\d,]+) tokens/s", out)[1].replace(",", ""))
    assert rate * hours * 3600 == pytest.approx(3 * 1e9 * 16, rel=1e-3)
