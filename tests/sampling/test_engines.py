"""The engines against one another: `graph` samples what `loop` does, in every family, and neither
does work that it need not do. `test_generation.py` holds what every engine must do.

Run: pytest tests/sampling/test_engines.py
"""

from __future__ import annotations

import pytest
import torch
from helpers.families import LORA
from helpers.tiny import FAMILIES, tiny_model, tiny_tokenizer
from torch.testing import assert_close

from rlhf.models import add_lora
from rlhf.sampling import Sampling, engine_of, generate, uniform_noise, use_engine
from rlhf.sampling.graph import GraphDecoder, bucket_length, bucket_rows
from rlhf.tokenizer import forbidden_token_ids

TOKENIZER = tiny_tokenizer()
SHORT = [[40, 41, 42, 43, 44], [50], [60, 61, 62], [70, 71, 72, 73, 74, 75, 76], [80, 81], [90, 7]]
PROMPTS = [[*prompt, 100 + i] for i in range(4) for prompt in SHORT]  # 24 rows: 24, 16 and 8
BUDGET = 14
MANY_STOPS = tuple(range(3, 320, 6))
NOISE = uniform_noise((3,), range(24), BUDGET)


def sampling_for(model, stop_ids=MANY_STOPS, budget=BUDGET, **knobs):
    forbidden = forbidden_token_ids(TOKENIZER, model.config.vocab_size)
    return Sampling(budget, tuple(stop_ids), forbidden, temperature=3.0, **knobs)


def both(model, sampling, prompts=PROMPTS, noise=NOISE, **options):
    """What the loop and the graph give."""
    made = []
    for name in ("loop", "graph"):
        use_engine(model, name, check_every=4, **options)
        made.append(generate(model, prompts, sampling, noise))
    return made


def assert_same(actual, expected):
    assert actual.ids == expected.ids and actual.finished == expected.finished
    for mine, theirs in zip(actual.logprobs, expected.logprobs, strict=True):
        assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


class Staggered:
    """Used as `StopStrings`: 24 responses end after 2 to 10 tokens, by the order of their rows."""

    strings = ("",)

    def __init__(self):
        self.lengths = {}

    def end(self, ids):
        if len(ids) == 1 and len(self.lengths) == 24:
            self.lengths.clear()  # the next call begins
        return len(ids) >= self.lengths.setdefault(id(ids), 2 + len(self.lengths) % 9)


class Watched:
    """Counts the tokens of each forward pass, (rows, tokens)."""

    def __init__(self, model):
        self.shapes = []
        model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module, arguments, keywords):
        self.shapes.append(tuple(keywords["input_ids"].shape))


@pytest.mark.parametrize("family", FAMILIES)
def test_graph_samples_the_tokens_of_the_loop(family):
    model = tiny_model(family, TOKENIZER)
    choice = {"top_k": 300, "top_p": 0.98, "stop_strings": Staggered()}
    expected, actual = both(model, sampling_for(model, (5,), **choice))
    assert_same(actual, expected)
    watched = Watched(model)
    generate(model, PROMPTS, sampling_for(model, (5,), **choice), NOISE)
    assert {24, 16, 8} == {rows for rows, _ in watched.shapes}  # through all three buckets


@pytest.mark.parametrize("family", ["llama", "mistral_window", "gemma3"])
def test_graph_equals_the_loop_across_buckets_of_length(family, monkeypatch):
    """Far beyond the windows of 4 tokens, with a cache of another length every 8 tokens."""
    monkeypatch.setattr("rlhf.sampling.graph.LENGTH_STEP", 8)
    model = tiny_model(family, TOKENIZER)
    noise = uniform_noise((4,), range(24), 40)
    sampling = sampling_for(model, stop_ids=(5, 50), budget=40)
    expected, actual = both(model, sampling, noise=noise)
    assert_same(actual, expected)
    assert not all(actual.finished)


def test_graph_equals_the_loop_in_batches_and_with_larger_ones_later():
    model = tiny_model("llama", TOKENIZER)
    use_engine(model, "graph", check_every=5)
    made = [
        generate(model, PROMPTS[:3], sampling_for(model), NOISE),
        generate(model, PROMPTS, sampling_for(model), NOISE, batch_size=10),
        generate(model, PROMPTS, sampling_for(model), NOISE),
        generate(model, [PROMPTS[0] * 25], sampling_for(model), None),
    ]
    use_engine(model, "loop")
    assert_same(made[0], generate(model, PROMPTS[:3], sampling_for(model), NOISE))
    assert_same(made[1], generate(model, PROMPTS, sampling_for(model), NOISE))
    assert_same(made[2], made[1])
    assert_same(made[3], generate(model, [PROMPTS[0] * 25], sampling_for(model), None))


@pytest.mark.parametrize("name", ["loop", "graph"])
def test_a_finished_row_costs_nothing(name):
    model = tiny_model("llama", TOKENIZER)
    use_engine(model, name, check_every=1)
    watched = Watched(model)
    made = generate(model, PROMPTS, sampling_for(model), NOISE)
    active = [sum(len(row) > t for row in made.ids) for t in range(1, max(map(len, made.ids)))]
    sizes, rows = [], 24
    for count in active:
        rows = count if name == "loop" else bucket_rows(count, rows)
        sizes.append(rows)
    assert [rows for rows, _ in watched.shapes[1:]] == sizes
    assert min(sizes) <= 8


class AfterTwo:
    """Used as `StopStrings`: every response ends after two tokens."""

    strings = ("",)

    def end(self, ids):
        return len(ids) == 2


@pytest.mark.parametrize("check_every", [1, 5])
def test_graph_looks_for_finished_rows_every_so_many_tokens(check_every):
    model = tiny_model("llama", TOKENIZER)
    use_engine(model, "graph", check_every=check_every)
    watched = Watched(model)
    made = generate(model, PROMPTS, sampling_for(model, (-1,), stop_strings=AfterTwo()), NOISE)
    assert {len(row) for row in made.ids} == {2} and all(made.finished)
    assert len(watched.shapes) == 1 + check_every  # with the prompts'


@pytest.mark.parametrize("name", ["loop", "graph"])
def test_prompts_that_are_sampled_several_times_are_read_once(name):
    model = tiny_model("llama", TOKENIZER)
    use_engine(model, name, check_every=4)
    repeated = [prompt for prompt in SHORT for _ in range(4)]
    alone = [
        generate(model, [prompt], sampling_for(model), NOISE[i : i + 1])
        for i, prompt in enumerate(repeated)
    ]
    watched = Watched(model)
    made = generate(model, repeated, sampling_for(model), NOISE)
    assert watched.shapes[0] == (6, 7) and all(tokens == 1 for _, tokens in watched.shapes[1:])
    assert made.ids == [one.ids[0] for one in alone]
    assert len({*map(tuple, made.ids)}) > 12


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("name", ["loop", "graph"])
def test_the_next_call_sees_weights_that_have_changed(name, dtype):
    model = tiny_model("llama", TOKENIZER)
    use_engine(model, name, check_every=4, dtype=dtype)
    before = generate(model, PROMPTS, sampling_for(model), NOISE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    after = generate(model, PROMPTS, sampling_for(model), NOISE)
    assert after.ids != before.ids
    use_engine(model, "loop")
    assert_same(after, generate(model, PROMPTS, sampling_for(model), NOISE))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_a_float32_copy_with_merged_adapters_samples_what_the_adapters_do(family):
    model = add_lora(tiny_model(family, TOKENIZER), LORA, "CAUSAL_LM", 0, [5, 6])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.manual_seed(len(name))
                parameter.normal_(std=0.2)
    sampling = sampling_for(model.get_base_model())
    plain = both(model, sampling)
    copied = both(model, sampling, dtype=torch.float32)
    for made in (plain[1], *copied):
        assert_same(made, plain[0])
    with model.disable_adapter():
        use_engine(model, "loop")
        assert generate(model, PROMPTS, sampling, NOISE).ids != plain[0].ids
    assert not any("lora" in name for name, _ in model.named_modules() if "_rlhf" in name)


def test_a_bfloat16_copy_samples_nearly_what_the_model_does():
    model = tiny_model("llama", TOKENIZER)
    expected = generate(model, PROMPTS, sampling_for(model), NOISE)
    loop, graph = both(model, sampling_for(model), dtype=torch.bfloat16)
    assert engine_of(model).copy.dtype == torch.bfloat16 and model.dtype == torch.float32
    for made in (loop, graph):
        first = [row[0] for row in made.logprobs]
        assert first != [row[0] for row in expected.logprobs]
        same = [a[0] == b[0] for a, b in zip(made.ids, expected.ids, strict=True)]
        assert sum(same) >= 20
        pairs = zip(first, expected.logprobs, same, strict=True)
        assert all(abs(mine - theirs[0]) < 0.1 for mine, theirs, equal in pairs if equal)


def test_the_copy_is_no_part_of_the_model():
    model = tiny_model("llama", TOKENIZER)
    names = [*model.state_dict()]
    use_engine(model, "graph", dtype=torch.bfloat16)
    assert [*model.state_dict()] == names


def test_a_cache_of_another_kind_is_refused():
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 320, "state_size": 4}
    mamba = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **sizes))
    with pytest.raises(ValueError, match="its cache has layers of another kind"):
        GraphDecoder(mamba, 8)


def test_buckets_of_rows_halve_and_never_exceed_what_is_asked():
    assert [bucket_rows(n, 64) for n in (64, 33, 32, 17, 16, 9, 8, 1)] == [
        64,
        64,
        32,
        32,
        16,
        16,
        8,
        8,
    ]
    assert [bucket_rows(n, 24) for n in (24, 17, 16, 8, 1)] == [24, 24, 16, 8, 8]
    assert bucket_rows(1, 5) == 5


def test_buckets_of_length_leave_little_over():
    assert [bucket_length(n) for n in (1, 128, 129, 1000, 1024)] == [128, 128, 256, 1024, 1024]
    assert [bucket_length(n) for n in (1025, 2000, 2049, 4097)] == [1280, 2048, 2560, 5120]
    assert all(n <= bucket_length(n) <= max(1.25 * n, n + 128) for n in range(1, 9000))
