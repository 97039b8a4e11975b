"""Padding-free reading: the numbers and gradients of padded reading, for each family that can.

Run: pytest tests/models/test_padding_free.py
"""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
from helpers.families import (
    LORA,
    NONE_FORBIDDEN,
    PROMPTS,
    RESPONSES,
    SEQUENCES,
    TOKENIZER,
    close,
    every_family,
    exact,
    near,
    padded,
    positions_before_last,
    response_logits,
    rollout_of,
)
from helpers.scorers import write_reward_model
from helpers.stages import WORLD, ppo_config, reward_config, sft_config
from helpers.tiny import tiny_model
from helpers.tiny_ppo import make_config, write_policy
from torch.distributed.tensor import DTensor
from transformers import AutoModelForSequenceClassification

from rlhf import train_ppo, train_reward, train_sft
from rlhf.checkpoint import read_record
from rlhf.config import InputError, ScorerConfig
from rlhf.distributed import slice_weights, whole
from rlhf.equivalence import choose_forward
from rlhf.metrics import read_jsonl
from rlhf.models import (
    ScalarModel,
    add_lora,
    attention,
    disable_dropout,
    disable_padding_free,
    forward_inputs,
    is_padding_free,
    sequence_scores,
)
from rlhf.models.attention import NAME
from rlhf.ppo.rollout import critic_values, policy_logprobs
from rlhf.sampling import Sampling, generate, uniform_noise
from rlhf.tokenizer import load_tokenizer

# Why a family of tests/helpers/tiny.py is padded.
PADDED = {
    "gptj": "its attention is eager, not sdpa",
    "falcon_7b": "its attention cannot be replaced",
    "falcon_40b": "its attention cannot be replaced",
    "gemma2": "its attention is eager, not sdpa",
}
RAGGED = [*SEQUENCES, [33], [34, 35], list(range(40, 60))]


def chosen(family, scalar=False):
    """A model after the choice, or a skip."""
    if family in PADDED:
        pytest.skip(PADDED[family])
    model = tiny_model(family, TOKENIZER)
    if scalar:
        model = ScalarModel(scalar_of(model))
    assert choose_forward(model, TOKENIZER, "padding_free") == "padding-free"
    return model


def why_padded(model):
    """The reason in the refusal."""
    with pytest.raises(InputError) as refusal:
        choose_forward(model, TOKENIZER, "padding_free")
    assert not is_padding_free(model)
    return str(refusal.value).partition(", because ")[2].partition("; ")[0]


def scalar_of(policy):
    torch.manual_seed(0)
    policy.config.num_labels = 1
    return AutoModelForSequenceClassification.from_config(policy.config).eval()


def both_ways(model, read):
    """What `read` returns without padding and with it; and the gradients of its mean square."""
    results, inner = [], model.model if isinstance(model, ScalarModel) else model
    for _ in range(2):
        numbers = read()
        numbers.float().square().mean().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        results.append((numbers.detach(), gradients))
        disable_padding_free(inner)
    return results


@every_family
def test_the_choice_is_stated_for_each_family(family):
    model = tiny_model(family, TOKENIZER)
    before = model.config._attn_implementation
    if family in PADDED:
        assert why_padded(model) == PADDED[family]
    else:
        assert choose_forward(model, TOKENIZER, "padding_free") == "padding-free"
        assert is_padding_free(model)
    disable_padding_free(model)
    assert model.config._attn_implementation == before != NAME


@every_family
def test_logits_and_gradients_are_those_of_padded_rows(family):
    model = chosen(family)
    ids, mask = padded(RAGGED, "right", fill=77)
    assert forward_inputs(model, ids, mask)["input_ids"].shape == (1, sum(map(len, RAGGED)))
    positions = positions_before_last(ids, ids.shape[1] - 1)
    real = mask[:, 1:]

    def read():
        return response_logits(model, ids, mask, positions, NONE_FORBIDDEN)[real]

    (free, free_gradients), (plain, plain_gradients) = both_ways(model, read)
    near(free, plain)
    assert len(free_gradients) == len(plain_gradients)
    for one, other in zip(free_gradients, plain_gradients, strict=True):
        near(one, other)


@every_family
def test_values_and_their_gradients_are_those_of_padded_rows(family):
    model = chosen(family, scalar=True)
    ids, mask = padded(RAGGED, "right", fill=77)
    reads = [lambda: model(ids, mask)[mask], lambda: sequence_scores(model, ids, mask)]
    for read in reads:
        (free, free_gradients), (plain, plain_gradients) = both_ways(model, read)
        near(free, plain)
        for one, other in zip(free_gradients, plain_gradients, strict=True):
            near(one, other)
        choose_forward(model, TOKENIZER, "padding_free")


@every_family
def test_a_rollout_is_read_as_with_padding_and_sampling_stays_the_same(family):
    model, sampling = chosen(family), Sampling(6, (9,), NONE_FORBIDDEN, temperature=0.7)
    rollout, noise = rollout_of(PROMPTS, RESPONSES), uniform_noise((0,), range(3), 6)
    critic = ScalarModel(scalar_of(model))
    assert choose_forward(critic, TOKENIZER, "padding_free") == "padding-free"
    results = []
    for _ in range(2):
        with torch.no_grad():
            logprobs, _ = policy_logprobs(model, rollout, sampling)
            values = critic_values(critic, rollout)
        sampled = generate(model, PROMPTS, sampling, noise)
        valid = rollout.response_mask
        results.append((logprobs[valid], values[valid], sampled))
        disable_padding_free(model)
        disable_padding_free(critic.model)
    close(results[0][0], results[1][0], atol=1e-5)
    close(results[0][1], results[1][1], atol=1e-5)
    assert results[0][2] == results[1][2]  # to the last bit


def test_adapters_on_a_padding_free_model_get_the_gradients_of_padded_rows():
    model = chosen("llama")
    adapted = add_lora(model, LORA, "CAUSAL_LM", 0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    ids, mask = padded(RAGGED, "right")
    positions = positions_before_last(ids, ids.shape[1] - 1)

    def gradients():
        logits = response_logits(adapted, ids, mask, positions, NONE_FORBIDDEN)
        logits[mask[:, 1:]].square().mean().backward()
        found = [p.grad.clone() for p in adapted.parameters() if p.grad is not None]
        adapted.zero_grad()
        return found

    free = gradients()
    disable_padding_free(model)
    for one, other in zip(free, gradients(), strict=True):
        near(one, other)


def test_gradient_checkpointing_reads_rows_apart_in_the_backward_pass_too():
    model = chosen("qwen3").train()
    ids, mask = padded(RAGGED, "right")

    def gradients():
        response_logits(
            model, ids, mask, positions_before_last(ids, 19), NONE_FORBIDDEN
        ).square().mean().backward()
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return found

    plain = gradients()
    model.gradient_checkpointing_enable()
    for one, other in zip(gradients(), plain, strict=True):
        near(one, other)


def test_a_window_shorter_than_the_rows_is_kept():
    model = chosen("mistral_window")
    window = model.config.sliding_window
    assert 2 * window < 20  # of RAGGED
    ids, mask = padded(RAGGED, "right")
    with torch.no_grad():
        read = response_logits(model, ids, mask, positions_before_last(ids, 1), NONE_FORBIDDEN)
        far, changed = ids.clone(), 0
        far[-1, changed] = 99  # further away than the window of every layer together
        other = response_logits(model, far, mask, positions_before_last(ids, 1), NONE_FORBIDDEN)
    assert model.config.num_hidden_layers * (window - 1) < 18
    exact(read[-1], other[-1])


def test_rows_of_equal_length_are_read_as_they_are():
    model = chosen("llama")
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    assert forward_inputs(model, ids, torch.ones_like(ids, dtype=torch.bool)).keys() == {
        "input_ids"
    }


# --- The kernel for ragged rows, which only a GPU has ---------------------------------------------


def varlen_of_torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)
):
    """`torch.nn.attention.varlen.varlen_attn` by its documentation, row by row."""
    assert {query.dtype, key.dtype, value.dtype} == {torch.bfloat16}
    assert cu_seq_q is cu_seq_k and cu_seq_q.dtype == torch.int32
    assert query.shape[1] == key.shape[1] and window_size[1] == 0 and max_q == max_k
    rows, left = [], window_size[0]
    for start, end in zip(cu_seq_q[:-1], cu_seq_q[1:], strict=True):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        mask = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        mask = mask.triu(-left) if left >= 0 else mask
        row = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale)
        rows.append(row.transpose(0, 1))
        assert len(rows[-1]) <= max_q
    return torch.cat(rows)


def varlen_of_torch_2_13(query, key, value, *sizes, enable_gqa=False, **options):
    assert enable_gqa == (query.shape[1] > key.shape[1])
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    return varlen_of_torch_2_11(query, key, value, *sizes, **options)


@pytest.mark.parametrize("varlen", [varlen_of_torch_2_11, varlen_of_torch_2_13])
@pytest.mark.parametrize("family", ["llama", "mistral_window"])
def test_under_autocast_the_kernel_reads_the_rows(family, varlen, monkeypatch):
    model, calls = chosen(family), []

    def counted(*arguments, **options):
        calls.append(len(calls))
        return varlen(*arguments, **options)

    counted.__signature__ = inspect.signature(varlen)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", counted)
    half = (torch.bfloat16, torch.float16)
    ids, mask = padded(RAGGED, "right")
    found = []
    for device_has_it in (True, False):
        has_kernel = lambda query, here=device_has_it: here and query.dtype in half  # noqa: E731
        monkeypatch.setattr(attention, "_has_kernel", has_kernel)
        with torch.autocast("cpu", torch.bfloat16):
            logits = response_logits(
                model, ids, mask, positions_before_last(ids, 19), NONE_FORBIDDEN
            )[mask[:, 1:]]
        logits.float().square().mean().backward()
        found.append((logits.detach(), [p.grad.clone() for p in model.parameters()]))
        model.zero_grad()
    assert len(calls) == model.config.num_hidden_layers  # float32 weights, rotary embeddings
    (free, gradients), (rows, expected) = found
    for one, other in zip([free, *gradients], [rows, *expected], strict=True):
        assert (one - other).float().norm() < 0.06 * other.float().norm()  # bfloat16


# --- What must be rejected ------------------------------------------------------------------------


def test_a_model_whose_rows_see_each_other_is_padded(monkeypatch):
    """Attention that ignores where rows begin."""
    model, own = tiny_model("llama", TOKENIZER), attention.sdpa_attention_forward

    def over_all(*arguments, cu_seq_lens_q=None, max_length_q=0, **keywords):
        return own(*arguments, **keywords)

    mapping = attention.AttentionInterface._global_mapping
    monkeypatch.setitem(mapping, NAME, over_all)
    assert why_padded(model).startswith("the rows of a batch see each other")


def test_a_wrong_gradient_is_found(monkeypatch):
    model, own = tiny_model("llama", TOKENIZER), attention._in_rows

    def detached(query, *others):
        return own(query.detach(), *others)

    monkeypatch.setattr(attention, "_in_rows", detached)
    assert why_padded(model).startswith("its gradients change by")


def test_a_torch_without_the_kernel_is_padded(monkeypatch):
    monkeypatch.setattr(attention, "_has_kernel", lambda query: True)
    monkeypatch.delattr("torch.nn.attention.varlen.varlen_attn")
    assert "cannot import name 'varlen_attn'" in why_padded(tiny_model("llama", TOKENIZER))


def test_a_model_in_slices_has_them_again_after_a_pass_that_failed_half_way(group, monkeypatch):
    monkeypatch.setattr(attention, "_has_kernel", lambda query: True)
    monkeypatch.delattr("torch.nn.attention.varlen.varlen_attn")
    model = tiny_model("llama", TOKENIZER)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    slice_weights(model, on_cpu=False)
    assert "cannot import name 'varlen_attn'" in why_padded(model)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(whole(weight), before[name], rtol=0, atol=0)
        assert isinstance(weight, DTensor), name


def test_a_model_in_slices_is_padded_for_the_reason_of_a_whole_one(group):
    model = tiny_model("falcon_7b", TOKENIZER)
    slice_weights(model, on_cpu=False)
    assert why_padded(model) == PADDED["falcon_7b"]


def test_a_window_that_only_the_mask_has_is_found(monkeypatch):
    model, own = tiny_model("mistral_window", TOKENIZER), attention.attention

    def without_window(*arguments, sliding_window=None, **keywords):
        return own(*arguments, **keywords)

    mapping = attention.AttentionInterface._global_mapping
    monkeypatch.setitem(mapping, NAME, without_window)
    monkeypatch.setattr(model.config, "sliding_window", 4096)  # longer than the rows of the probe
    assert why_padded(model) == "its sliding window is in the mask alone"


def test_what_is_asked_for_by_hand_is_done_or_refused():
    model = tiny_model("llama", TOKENIZER)
    assert choose_forward(model, TOKENIZER, "padded") == "padded, because model.forward=padded"
    assert not is_padding_free(model)
    assert choose_forward(model, TOKENIZER, "auto") == "padding-free" and is_padding_free(model)
    falcon = tiny_model("falcon_7b", TOKENIZER)
    assert choose_forward(falcon, TOKENIZER, "auto") == f"padded, because {PADDED['falcon_7b']}"
    with pytest.raises(InputError, match="model.forward=padding_free: FalconForCausalLM cannot be"):
        choose_forward(falcon, TOKENIZER, "padding_free")


# --- The three stages -----------------------------------------------------------------------------


def test_each_stage_trains_on_the_numbers_of_padded_rows(tmp_path):
    rows = dataclasses.replace(WORLD, max_rows=24, max_eval_rows=4)
    few = {"max_steps": 2, "logging_steps": 1, "eval_steps": 2}
    metrics = {}
    for forward in ("padding_free", "padded"):
        folder = tmp_path / forward
        stages = []
        for make, train in ((sft_config, train_sft), (reward_config, train_reward)):
            config = make(folder, dataset=rows)
            config.model.forward, config.trainer = forward, config.trainer | few
            if train is train_sft:
                config.num_samples = 0
            train(config)
            stages.append(config.stage_dir("sft" if train is train_sft else "reward"))
        config = ppo_config(folder, dataset=rows)
        config.model.forward, config.ppo.num_updates = forward, 1
        config.ppo.missing_eos_penalty = None
        train_ppo(config)
        stages.append(config.stage_dir("ppo"))
        metrics[forward] = [read_jsonl(stage / "metrics.jsonl") for stage in stages]
        record = (stages[0] / "final" / "rlhf.json").read_text()
        assert ('"forward": "padding-free"' in record) == (forward == "padding_free")
        assert NAME not in (stages[0] / "final/config.json").read_text()
    for free, plain in zip(*metrics.values(), strict=True):
        assert len(free) == len(plain) > 0
        for one, other in zip(free, plain, strict=True):
            for name in one.keys() & other.keys() & CLOSE:
                assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-4), name


def test_ppo_says_and_stores_which_model_reads_padded_rows(tmp_path, capsys):
    policy = write_policy(tmp_path / "policy")
    for family in ("llama", "falcon_7b"):
        config = make_config(policy, tmp_path, num_updates=1, missing_eos_penalty=None)
        scorer = write_reward_model(tmp_path / family, load_tokenizer(config.model), 1, family)
        config.scorer, config.run_name = ScorerConfig(scorer, "none"), family
        final = train_ppo(config).directory
        record, printed = read_record(final), capsys.readouterr().out
        assert record.forward == "padding-free"
        other = f"{scorer} is padded, because {PADDED[family]}" if family in PADDED else None
        assert record.other_forwards == other
        assert f"forward: {'; '.join(filter(None, ['padding-free', other]))}\n" in printed


CLOSE = {"loss", "grad_norm", "eval_loss", "accuracy", "score", "kl", "policy_loss", "value_loss"}
CLOSE |= {"eval_accuracy", "mean_token_accuracy", "entropy", "critic/grad_norm", "num_tokens"}


@pytest.mark.parametrize(
    ("family", "rate"), [("llama", "attention_dropout"), ("gpt2", "attn_pdrop")]
)
def test_a_model_whose_dropout_was_switched_off_is_read_without_padding(family, rate):
    """Its layers then have copies of the config, which name the attention too."""
    model = tiny_model(family, TOKENIZER, **{rate: 0.5})
    disable_dropout(model)
    assert choose_forward(model, TOKENIZER, "padding_free") == "padding-free"
    disable_padding_free(model)
    layers = [vars(module).get("config") for module in model.modules()]
    assert {own._attn_implementation for own in layers if own is not None} == {"sdpa"}
