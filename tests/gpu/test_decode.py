"""The engine `graph` on a GPU: steps that are captured as CUDA graphs sample what the loop samples,
also after the weights have changed. On a CPU the same tests run without graphs.

Run: pytest tests/gpu/test_decode.py -m gpu
"""

from __future__ import annotations

import pytest
import torch
from helpers.families import LORA
from helpers.tiny import FAMILIES, tiny_model, tiny_tokenizer
from torch.testing import assert_close

from rlhf.engine_choice import choose_engine
from rlhf.models import add_lora
from rlhf.sampling import Sampling, engine_of, generate, uniform_noise, use_engine
from rlhf.sampling.engine import Engine

DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"]
TOKENIZER = tiny_tokenizer()
PROMPTS = [[40 + i, *range(60, 60 + i % 7)] for i in range(24)]
BUDGET = 20
SAMPLING = Sampling(BUDGET, tuple(range(3, 320, 9)), torch.tensor([0]), temperature=3.0)
NOISE = uniform_noise((3,), range(24), BUDGET)


@pytest.fixture(autouse=True)
def exact_products():
    """Float32 products without TF32, so that tokens can be compared."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def assert_same(actual, expected):
    assert actual.ids == expected.ids and actual.finished == expected.finished
    for mine, theirs in zip(actual.logprobs, expected.logprobs, strict=True):
        assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def graphs_of(engine: Engine) -> int:
    return engine._steps.num_captured


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_graphs_sample_what_the_loop_does_after_an_update(device, family):
    model = tiny_model(family, TOKENIZER).to(device)
    use_engine(model, "graph", check_every=4)
    first = generate(model, PROMPTS, SAMPLING, NOISE)
    num_graphs = graphs_of(engine_of(model))
    assert (num_graphs > 0) == (device == "cuda")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    second = generate(model, PROMPTS, SAMPLING, NOISE)
    greedy = generate(model, PROMPTS, SAMPLING, None)
    use_engine(model, "loop")
    assert second.ids != first.ids
    assert_same(second, generate(model, PROMPTS, SAMPLING, NOISE))
    assert_same(greedy, generate(model, PROMPTS, SAMPLING, None))


@pytest.mark.parametrize("device", DEVICES)
def test_a_graph_is_captured_once_for_each_bucket(device):
    model = tiny_model("llama", TOKENIZER).to(device)
    engine = use_engine(model, "graph", check_every=4)
    generate(model, PROMPTS, SAMPLING, NOISE)
    num_graphs = graphs_of(engine)
    for _ in range(3):
        generate(model, PROMPTS, SAMPLING, NOISE)
    assert graphs_of(engine) == num_graphs <= 3  # 24, 16 and 8 rows


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_keeps_no_weights_of_before_an_update(device):
    """Autocast's cache would hand the graph the weights as they were when it was captured."""
    model = tiny_model("llama", TOKENIZER).to(device)
    use_engine(model, "graph", check_every=4)
    with torch.autocast(device, torch.bfloat16):
        before = generate(model, PROMPTS, SAMPLING, NOISE)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        after = generate(model, PROMPTS, SAMPLING, NOISE)
        use_engine(model, "graph", check_every=4)
        fresh = generate(model, PROMPTS, SAMPLING, NOISE)
    assert after.ids == fresh.ids != before.ids


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lora", [False, True])
def test_the_choice_on_a_gpu_is_graph_by_a_bfloat16_copy(device, lora):
    model = tiny_model("llama", TOKENIZER).to(device)
    if lora:
        model = add_lora(model, LORA, "CAUSAL_LM", 0)
    with torch.autocast(device, torch.bfloat16):
        said = choose_engine(model, TOKENIZER, dtype=torch.bfloat16)
    assert said.startswith("graph" if device == "cuda" else "loop, because engine=auto")
    assert said.endswith("by a copy of the policy in bfloat16")
