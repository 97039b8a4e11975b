"""Policy, critic and reward model on one base in 4 bits: the numbers of quantised models of their
own and of merged weights, from weights that are in memory once.

Run: python -m pytest tests/models/test_quantized_roles.py
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.families import LORA, SEQUENCES, TOKENIZER, close, logits_of, padded, save, scores_of
from helpers.tiny import tiny_model
from helpers.tiny_ppo import make_config, make_trainer

pytest.importorskip("bitsandbytes")

from rlhf.models import (  # noqa: E402
    ScalarModel,
    add_lora,
    init_reward_model,
    load_policy,
    merged,
    own_parameters,
    scalar_role,
    unwrap_peft,
)
from rlhf.models.quantization import is_quantized  # noqa: E402

WIDE = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """ModelConfig of a policy in float32."""
    return save(tmp_path_factory.mktemp("base") / "final", tiny_model("llama", TOKENIZER, **WIDE))


@pytest.fixture(scope="module")
def config(plain):
    return dataclasses.replace(plain, quantization="4bit")


def adapted(model, task, seed):
    """Adapter and head away from where they began, the same for each model."""
    model = add_lora(model, LORA, task, 0).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad and "score" not in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
            elif parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def roles(config):
    base = load_policy(config, TOKENIZER)
    critic = scalar_role(base, config)
    return adapted(base, "CAUSAL_LM", 1), adapted(critic, "SEQ_CLS", 2)


def test_each_role_is_the_quantised_model_of_its_own_in_the_same_memory(config):
    policy, critic = roles(config)
    close(logits_of(policy), logits_of(adapted(load_policy(config, TOKENIZER), "CAUSAL_LM", 1)))
    alone = adapted(init_reward_model(config, TOKENIZER, 0), "SEQ_CLS", 2)
    close(scores_of(critic), scores_of(alone))
    layers = [m for m in unwrap_peft(critic).modules() if is_quantized(m)]
    assert len(layers) == 14
    assert {id(m.weight) for m in layers} <= {id(p) for p in policy.parameters()}
    assert not any("quant" in name for name in own_parameters(critic, policy))
    assert {type(p) for p in own_parameters(critic, policy).values()} == {torch.nn.Parameter}
    ids, mask = padded(SEQUENCES, "right")
    for model in (critic, alone):
        ScalarModel(model)(ids, mask)[mask].square().sum().backward()
    gradients = {n: p.grad for n, p in critic.named_parameters() if p.grad is not None}
    assert len(gradients) == 2 * 14 + 1
    for name, gradient in gradients.items():
        expected = alone.get_parameter(name).grad
        close(gradient, expected, atol=1e-5 * expected.abs().max())
    assert all(p.grad is None for p in policy.parameters())


def test_each_role_gives_what_its_merged_and_dequantised_weights_give(config):
    for role, read in zip(roles(config), (logits_of, scores_of), strict=True):
        expected = read(merged(role).eval())
        assert (read(role) - expected).norm() < 1e-5 * expected.norm()


def test_ppo_trains_adapters_on_one_base_in_4_bits(config, tmp_path):
    settings = make_config(config.path, tmp_path, share_base=True, response_length=6)
    settings.model, settings.peft = config, LORA
    trainer = make_trainer(settings, tmp_path)
    first, second = trainer.step(), trainer.step()
    assert first["kl"] == 0.0 and first["first_ratio_deviation"] < 1e-5
    assert second["kl"] != 0.0 and second["value_loss"] > 0
