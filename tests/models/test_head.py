"""Log-probs and entropy by the head on the tokens that a loss reads: those of `model(...).logits`.

Run: pytest tests/models/test_head.py
"""

from __future__ import annotations

import pytest
import torch
from helpers.allocations import most_allocated
from helpers.families import (
    LORA,
    NONE_FORBIDDEN,
    PROMPTS,
    RESPONSES,
    SEQUENCES,
    TOKENIZER,
    VOCAB,
    close,
    every_family,
    response_logits,
    rollout_of,
)
from helpers.tiny import FAMILIES, tiny_model
from torch.distributions import Categorical

from rlhf.equivalence import choose_forward
from rlhf.models import (
    Reading,
    add_lora,
    choose_chunk_tokens,
    disable_padding_free,
    ends_with_head,
    is_causal,
    response_logprobs,
)
from rlhf.ppo.rollout import policy_logprobs
from rlhf.sampling import Sampling

# Models that change the logits after the head, by type.
CHANGES_LOGITS = {
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 30.0},
    "cohere": {"num_key_value_heads": 2, "logit_scale": 0.25},
    "granite": {"num_key_value_heads": 2, "logits_scaling": 4.0},
}
TEMPERATURE, FORBIDDEN = 0.7, torch.tensor([0, VOCAB - 1])
ROLLOUT = rollout_of(PROMPTS, RESPONSES)
NUM_TOKENS = sum(map(len, RESPONSES))


def gradients(model, numbers):
    """Of a loss that reads log-probs and entropy of the real tokens, each with another weight."""
    weights = torch.linspace(-1, 2, numbers[0].numel()).view_as(numbers[0]) / NUM_TOKENS
    model.zero_grad()
    (numbers[0] * weights + numbers[1] * weights.flip(0))[ROLLOUT.response_mask].sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def read(model):
    sampling = Sampling(6, (9,), FORBIDDEN, TEMPERATURE)
    return policy_logprobs(model, ROLLOUT, sampling, with_entropy=True)


def expected(model):
    """By torch's distribution, from all logits of the model."""
    ids, mask = ROLLOUT.sequence_ids, ROLLOUT.sequence_mask
    logits = response_logits(model, ids, mask, ROLLOUT.state_positions, NONE_FORBIDDEN)
    allowed = torch.ones(logits.shape[-1], dtype=torch.bool)
    allowed[FORBIDDEN] = False
    distribution = Categorical(logits=logits[..., allowed] / TEMPERATURE)
    # the first id is forbidden, so that all others move by one
    tokens = (ROLLOUT.response_ids - 1).where(ROLLOUT.response_mask, 0)
    return distribution.log_prob(tokens), distribution.entropy()


def require_equal(model):
    real, plain, numbers = ROLLOUT.response_mask, expected(model), read(model)
    wanted, found = gradients(model, plain), gradients(model, numbers)
    for one, other in zip(numbers, plain, strict=True):
        close(one.detach()[real], other.detach()[real], atol=1e-5)
        assert (one[~real] == 0).all()
    assert len(found) == len(wanted) > 0
    for one, other in zip(found, wanted, strict=True):
        close(one, other, atol=1e-5)


@every_family
@pytest.mark.parametrize("chunk", [2, 1024])
def test_log_probs_entropy_and_gradients_are_those_of_all_logits(family, chunk):
    model = tiny_model(family, TOKENIZER)
    choose_chunk_tokens(model, chunk)
    assert ends_with_head(model) == (family != "gemma2")
    require_equal(model)


@pytest.mark.parametrize("chunk", [1, 5, NUM_TOKENS, NUM_TOKENS + 1])
def test_chunks_of_any_size_give_the_same_without_padding(chunk):
    model = tiny_model("llama", TOKENIZER)
    assert choose_forward(model, TOKENIZER, "padding_free") == "padding-free"
    choose_chunk_tokens(model, chunk)
    numbers = read(model)
    disable_padding_free(model)
    for one, other in zip(numbers, read(model), strict=True):
        close(one, other, atol=1e-5)
    require_equal(model)


@pytest.mark.parametrize("family", CHANGES_LOGITS)
def test_a_model_that_changes_its_logits_after_the_head_is_found(family, monkeypatch):
    monkeypatch.setitem(FAMILIES, family, (family, CHANGES_LOGITS[family]))
    model = tiny_model(family, TOKENIZER)
    choose_chunk_tokens(model, 2)
    assert not ends_with_head(model)
    require_equal(model)


def test_a_head_with_adapters_and_checkpointed_layers_reads_chunks():
    lora = add_lora(tiny_model("qwen3", TOKENIZER), LORA, "CAUSAL_LM", seed=0)
    lora.gradient_checkpointing_enable()
    lora.train()
    choose_chunk_tokens(lora, 3)
    require_equal(lora)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("chunk", [4, 1024])
def test_the_head_reads_only_tokens_that_a_loss_reads_and_keeps_at_most_a_chunk(lora, chunk):
    model = tiny_model("llama", TOKENIZER)
    if lora:
        model = add_lora(model, LORA, "CAUSAL_LM", seed=0)
    choose_chunk_tokens(model, chunk)
    assert ends_with_head(model) and is_causal(model)  # measured before
    head, sizes, kept = model.get_output_embeddings(), [], []
    plain = head.forward

    def counted(hidden):
        sizes.append(len(hidden))
        return plain(hidden)

    head.forward = counted

    def pack(tensor):
        if tensor.dim() == 3 and tensor.shape[-1] == VOCAB:
            kept.append(tensor.numel() // VOCAB)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        read(model)
    assert sum(sizes) == NUM_TOKENS and max(sizes) == min(chunk, NUM_TOKENS)
    assert sum(kept) == (NUM_TOKENS if chunk > NUM_TOKENS else 0)
    assert head.forward is counted  # as it was before


def test_at_a_vocabulary_of_128k_a_chunk_of_logits_is_in_memory_and_not_all():
    """In float32, the logits of 128 tokens take 64 MiB, and those of 16 take 8."""
    num_tokens, vocabulary = 128, 1 << 17
    sizes = {"vocab_size": vocabulary, "hidden_size": 16, "max_position_embeddings": 256}
    model = tiny_model("llama", TOKENIZER, **sizes)
    ids = torch.arange(5, 6 + num_tokens)[None]
    positions, wanted = torch.arange(num_tokens)[None], torch.ones(1, num_tokens, dtype=torch.bool)

    def step():
        mask = torch.ones_like(ids, dtype=torch.bool)
        read = Reading(ids, mask, positions, ids[:, 1:], wanted, NONE_FORBIDDEN, with_entropy=True)
        logprobs, entropy = response_logprobs(model, read)
        (logprobs + entropy).sum().backward()

    taken = {}
    for chunk in (16, num_tokens):
        choose_chunk_tokens(model, chunk)
        step()  # gradients exist from here on
        taken[chunk] = most_allocated(step) / 2**20
    assert taken[16] < 64 and taken[num_tokens] > 192, taken


def test_the_head_is_as_it_was_after_an_error():
    model = tiny_model("llama", TOKENIZER)
    ids = torch.tensor([SEQUENCES[0]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    far = torch.tensor([[99]])  # a position that the row does not have
    with pytest.raises(IndexError):
        response_logprobs(model, Reading(ids, mask, far, far, far > 0, NONE_FORBIDDEN))
    assert "forward" not in model.get_output_embeddings().__dict__
