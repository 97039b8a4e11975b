"""Policy, reference, critic and reward model on one base: the numbers and gradients of models of
their own with merged weights, from weights that are in memory once.

Run: python -m pytest tests/models/test_roles.py
"""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.families import (
    LORA,
    SEQUENCES,
    TOKENIZER,
    close,
    every_family,
    exact,
    logits_of,
    near,
    padded,
    scores_of,
    train_policy,
    train_scores,
)
from helpers.tiny import tiny_model
from peft.tuners.lora import LoraLayer

from rlhf.config import InputError, ModelConfig
from rlhf.models import (
    ScalarModel,
    add_lora,
    merged,
    own_parameters,
    scalar_role,
    stored_role,
    unwrap_peft,
    what_to_save,
)

CONFIG = ModelConfig(path="base")
IDS, MASK = padded(SEQUENCES, "right")
ROLES = ("policy", "critic", "reward")


def move(model, seed):
    """Take adapter and head away from where they began, each role elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def on_one_base(family="llama", config=CONFIG, dtype=torch.float32):
    """The base before it got adapters, and the roles on it by name."""
    base = tiny_model(family, TOKENIZER).to(dtype)
    before = copy.deepcopy(base)
    scalars = {name: scalar_role(base, config) for name in ROLES[1:]}
    roles = {"policy": add_lora(base, LORA, "CAUSAL_LM", 0)}
    roles |= {name: add_lora(model, LORA, "SEQ_CLS", 0) for name, model in scalars.items()}
    for seed, model in enumerate(roles.values()):
        move(model, seed)
        model.eval()
    return before, roles


def outputs(roles):
    """What each role gives, the reference too: (rows, tokens, ...) or (rows,)."""
    found = {name: scores_of(model) for name, model in roles.items() if name != "policy"}
    found["policy"] = logits_of(roles["policy"])
    if hasattr(roles["policy"], "disable_adapter"):
        with roles["policy"].disable_adapter():
            found["reference"] = logits_of(roles["policy"])
    return found


@every_family
def test_each_role_gives_what_a_merged_model_of_its_own_gives(family):
    before, roles = on_one_base(family)
    found = outputs(roles)
    alone = outputs({name: merged(model).eval() for name, model in roles.items()})
    for name in ROLES:
        near(found[name], alone[name])
    exact(found["reference"], logits_of(before))
    assert (found["critic"] - found["reward"]).abs().max() > 0.01  # not each other's
    assert (found["policy"] - found["reference"]).abs().max() > 0.01


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon_40b", "gemma2"])
def test_a_base_in_bfloat16_gives_what_merged_weights_give_to_four_percent(family):
    before, roles = on_one_base(family, dtype=torch.bfloat16)
    found = outputs_in_bfloat16(roles)
    alone = outputs({name: merged(model.float()).eval() for name, model in roles.items()})
    for name in ROLES:
        assert distance(found[name], alone[name]) < 0.04
    for one, other in (("critic", "reward"), ("policy", "reference")):  # which is far from
        assert distance(found[one], found[other]) > 0.08


def outputs_in_bfloat16(roles):
    with torch.autocast("cpu", torch.bfloat16):
        return {name: found.float() for name, found in outputs(roles).items()}


def distance(one, two):
    """Of the size of the second."""
    return float((one - two).norm() / two.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_roles_are_models_of_their_own_to_the_last_bit(family, dtype):
    """Each with a base and adapters of its own, read under bfloat16 autocast: outputs and
    gradients."""
    bases = [tiny_model(family, TOKENIZER).to(dtype) for _ in ROLES]
    apart = {"policy": bases[0]} | {
        name: scalar_role(base, CONFIG) for name, base in zip(ROLES[1:], bases[1:], strict=True)
    }
    for seed, (name, model) in enumerate(apart.items()):
        apart[name] = add_lora(model, LORA, "CAUSAL_LM" if name == "policy" else "SEQ_CLS", 0)
        move(apart[name], seed)
        apart[name].eval()
    _, roles = on_one_base(family, dtype=dtype)
    found, expected = outputs_in_bfloat16(roles), outputs_in_bfloat16(apart)
    for name in found:
        exact(found[name], expected[name])
    for model in (roles["critic"], apart["critic"]):
        with torch.autocast("cpu", torch.bfloat16):
            ScalarModel(model)(IDS, MASK)[MASK].square().sum().backward()
    for name, parameter in apart["critic"].named_parameters():
        gradient = roles["critic"].get_parameter(name).grad
        assert (gradient is None) is (parameter.grad is None) is not parameter.requires_grad
        if gradient is not None:
            exact(gradient, parameter.grad)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_are_those_of_the_merged_weights_of_that_role_alone(family):
    """With W' = W + s B A, the gradients are dA = s B^T dW' and dB = s dW' A^T."""
    _, roles = on_one_base(family)
    ids = torch.tensor([SEQUENCES[0]])
    for name, model in roles.items():
        plain = merged(model).eval().requires_grad_(True)
        for one in (model, plain):
            if name == "policy":
                one(input_ids=ids, labels=ids).loss.backward()
            else:
                ScalarModel(one)(IDS, MASK)[MASK].square().sum().backward()
        layers = [item for item in unwrap_peft(model).named_modules()]
        checked = 0
        for path, layer in layers:
            if isinstance(layer, LoraLayer):
                of_weight = plain.get_parameter(f"{path}.weight").grad
                of_weight = of_weight.T if layer.fan_in_fan_out else of_weight  # GPT-2
                a, b = (getattr(layer, x)["default"].weight for x in ("lora_A", "lora_B"))
                scale = layer.scaling["default"]
                close(a.grad, scale * b.detach().T @ of_weight, atol=1e-5 * of_weight.abs().max())
                close(b.grad, scale * of_weight @ a.detach().T, atol=1e-5 * of_weight.abs().max())
                checked += 1
        assert checked >= 8
        if name != "policy":
            head = unwrap_peft(model).score.modules_to_save["default"].weight.grad
            close(head, plain.score.weight.grad, atol=1e-5 * head.abs().max())
        for other in roles.values():  # nothing else has a gradient
            assert all(p.grad is None for p in other.parameters() if not p.requires_grad)
            assert other is model or all(p.grad is None for p in other.parameters())
        model.zero_grad()


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon_40b", "gemma2"])
def test_training_one_role_leaves_all_others_as_they_were(family):
    before, roles = on_one_base(family)
    for name, train in zip(ROLES, (train_policy, train_scores, train_scores), strict=True):
        old = outputs(roles)
        train(roles[name])
        new = outputs(roles)
        assert (new.pop(name) - old.pop(name)).abs().max() > 1e-3
        for other, numbers in new.items():
            exact(numbers, old[other])
    exact(outputs(roles)["reference"], logits_of(before))


def test_the_base_is_in_memory_once_whatever_trains():
    before, roles = on_one_base()
    policy = roles["policy"]
    size = sum(p.numel() for p in before.parameters())
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    everything = {id(p): p for model in roles.values() for p in model.parameters()}.values()
    storages = {p.untyped_storage().data_ptr(): p.numel() for p in everything}
    heads = 2 * 2 * 32  # PEFT keeps the head that it replaces
    assert sum(storages.values()) == size + 3 * trained + heads
    own = own_parameters(roles["critic"], policy)
    assert sum(p.numel() for p in own.values() if p.requires_grad) == trained + 32
    assert not any("lora" not in name and "score" not in name for name in own)


def test_a_stored_adapter_with_its_head_is_the_model_that_was_stored(tmp_path):
    _, roles = on_one_base()
    _, write = what_to_save(roles["reward"], LORA, "base")
    write(tmp_path)
    base = tiny_model("llama", TOKENIZER)
    frozen = stored_role(base, CONFIG, tmp_path, "scorer.path=x")
    critic = stored_role(base, CONFIG, tmp_path, "critic.init=x", trains=True)
    expected = scores_of(roles["reward"])
    for model in (frozen, critic):
        close(scores_of(model.eval()), expected)
    assert not any(p.requires_grad for p in frozen.parameters())
    train_scores(critic)
    close(scores_of(frozen), expected)
    assert (scores_of(critic) - expected).abs().max() > 0.01
    _, write = what_to_save(critic, LORA, "base")  # and can be stored again
    write(tmp_path)
    again = stored_role(base, CONFIG, tmp_path, "critic.init=x")
    exact(scores_of(again.eval()), scores_of(critic))


def test_an_adapter_of_another_model_is_refused_by_name(tmp_path):
    _, roles = on_one_base()
    what_to_save(roles["reward"], LORA, "base")[1](tmp_path)
    other = tiny_model("gpt2", TOKENIZER)
    with pytest.raises(InputError, match=f"scorer.path=x: the adapter in {tmp_path} does not fit"):
        stored_role(other, CONFIG, tmp_path, "scorer.path=x")


def test_a_role_recomputes_activations_where_the_policy_does():
    _, roles = on_one_base(config=ModelConfig(path="base", gradient_checkpointing=True))
    critic = roles["critic"].train()
    assert unwrap_peft(critic).is_gradient_checkpointing
    assert not unwrap_peft(roles["policy"]).is_gradient_checkpointing  # its loader decides
    ScalarModel(critic)(IDS, MASK).sum().backward()
    recomputed = {n: p.grad.clone() for n, p in critic.named_parameters() if p.grad is not None}
    critic.zero_grad()
    ScalarModel(critic.eval())(IDS, MASK).sum().backward()
    assert len(recomputed) > 8
    for name, gradient in recomputed.items():
        close(gradient, critic.get_parameter(name).grad, atol=1e-5 * gradient.abs().max())
