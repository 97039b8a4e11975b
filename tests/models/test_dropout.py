"""Dropout and gradient checkpointing, in every model family.

Run: python -m pytest tests/models/test_dropout.py
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.families import (
    BLOCKS,
    LORA,
    SEQUENCES,
    TOKENIZER,
    VOCAB,
    close,
    every_family,
    exact,
    logits_of,
    padded,
)
from helpers.tiny import FAMILIES, tiny_model
from torch import nn

from rlhf.config import InputError, PeftConfig
from rlhf.models import (
    ScalarModel,
    add_lora,
    disable_dropout,
    init_reward_model,
    load_policy,
    merged,
    sequence_scores,
)
from rlhf.models.dropout import set_dropout


def model_with_dropout(family, lora=False, layerdrop=0.5):
    """Every rate that the family's config has is a half."""
    from transformers import AutoConfig

    values = AutoConfig.for_model(FAMILIES[family][0]).to_dict()
    rates = {name: 0.5 for name in values if "drop" in name}
    if "layerdrop" in rates:  # OPT's share of layers that are skipped
        rates["layerdrop"] = layerdrop
    model = tiny_model(family, TOKENIZER, **rates)
    if lora:
        config = PeftConfig(enabled=True, r=4, dropout=0.5)
        model = add_lora(model, config, "CAUSAL_LM", seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
    return model.train()


@every_family
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_disable_dropout_reaches_every_dropout(family, lora, checkpointing):
    model = model_with_dropout(family, lora)
    torch.manual_seed(0)
    assert not torch.equal(logits_of(model), logits_of(model))
    expected = logits_of(model.eval())
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    disable_dropout(model)
    ids = torch.tensor([SEQUENCES[0]])
    for training in (False, True):  # what a caller's train() does must not bring it back
        exact(model(input_ids=ids, use_cache=False).logits, expected)
        exact(model(input_ids=ids, use_cache=False).logits, expected)
        if training is False:
            model.train()


def gradients_and_recomputations(model, block):
    """Gradients by name, and how often a block's first part was entered in the backward pass."""
    calls = {"forward": 0, "backward": 0}
    phase = "forward"
    blocks = [module for module in model.modules() if type(module).__name__ == block]
    assert len(blocks) == 2
    for module in blocks:
        first = next(
            child
            for child in module.modules()
            if isinstance(child, nn.Linear) or ("Conv1D" in type(child).__name__)
        )
        first.register_forward_pre_hook(lambda *_: calls.update({phase: calls[phase] + 1}))
    ids = torch.tensor([SEQUENCES[0]])
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    phase = "backward"
    loss.backward()
    assert calls["forward"] == 2
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}, calls["backward"]


@every_family
@pytest.mark.parametrize("lora", [False, True])
def test_checkpointing_stays_active_without_dropout_and_gives_the_same_gradients(family, lora):
    plain = model_with_dropout(family, lora)
    disable_dropout(plain)
    expected, recomputed = gradients_and_recomputations(plain, BLOCKS[family])
    assert recomputed == 0
    model = model_with_dropout(family, lora)
    model.gradient_checkpointing_enable()
    disable_dropout(model)
    actual, recomputed = gradients_and_recomputations(model, BLOCKS[family])
    assert recomputed == 2
    assert any(gradient.abs().max() > 0.01 for gradient in expected.values())
    close(actual, expected)


@every_family
def test_model_dropout_is_that_of_the_config_and_is_not_saved(family, saved_policy, tmp_path):
    base = saved_policy(family)
    model = load_policy(dataclasses.replace(base, dropout=0.5), TOKENIZER)
    expected = model_with_dropout(family, layerdrop=0.0)
    drawn = []
    for each in (model.train(), expected):
        torch.manual_seed(0)
        drawn.append(logits_of(each))
    exact(*drawn)
    assert not torch.equal(logits_of(model), logits_of(model))
    plain = load_policy(base, TOKENIZER)
    exact(logits_of(model.eval()), logits_of(plain.eval()))
    exact(logits_of(model), logits_of(model))
    assert model.config.to_dict() == plain.config.to_dict()
    adapted = add_lora(model, LORA, "CAUSAL_LM", seed=0)
    assert merged(adapted).config.to_dict() == plain.config.to_dict()


@every_family
def test_model_dropout_of_a_reward_model_changes_gradients(family, saved_policy):
    gradients = []
    for dropout in (None, 0.0, 0.3):
        config = dataclasses.replace(saved_policy(family), dropout=dropout)
        scalar = ScalarModel(init_reward_model(config, TOKENIZER, seed=3)).train()
        torch.manual_seed(0)
        sequence_scores(scalar, *padded(SEQUENCES, "right")).sum().backward()
        gradients.append(scalar.model.score.weight.grad)
    assert (gradients[2] - gradients[1]).abs().max() > 0.01
    own = [rate for name, rate in scalar.model.config.to_dict().items() if "drop" in name]
    if not any(own):
        exact(gradients[0], gradients[1])


def test_dropout_of_a_model_that_has_none_is_refused():
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("mamba", vocab_size=VOCAB, hidden_size=8, num_hidden_layers=1)
    with pytest.raises(InputError, match="model.dropout=0.1 would do nothing: MambaForCausalLM"):
        set_dropout(AutoModelForCausalLM.from_config(config), 0.1)
