"""Policy, critic and reward model on a base in slices give the numbers and gradients of those on a
whole base, whichever runs first, and leave nothing gathered behind.

The group has one process, so that gathered weights are real; two of them are in
tests/end_to_end/test_sharded.py.

Run: python -m pytest tests/models/test_shared_slices.py
"""

import pytest
import torch
from helpers.families import LORA, SEQUENCES, TOKENIZER, close, logits_of, padded, save, scores_of
from helpers.made_up_processes import process
from helpers.tiny import FAMILIES, tiny_model
from torch.distributed.tensor import DTensor

from rlhf.config import ModelConfig
from rlhf.distributed import is_sharded
from rlhf.models import (
    ScalarModel,
    add_lora,
    load_policy,
    merged,
    model_memory,
    scalar_role,
    shard_base,
    slices_of,
    unwrap_peft,
)
from rlhf.models.stacked import keep_apart
from rlhf.slices import gathered_bytes

IDS, MASK = padded(SEQUENCES, "right")
CONFIG = ModelConfig(path="base")


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr("rlhf.models.load.loads_in_slices", lambda: True)


def move(model, seed):
    """Take adapter and head away from where they began."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def roles_on(base, rows=()):
    """Policy, critic and reward model, each with an adapter that adds something."""
    scalars = {name: scalar_role(base, CONFIG) for name in ("critic", "reward")}
    roles = {"policy": add_lora(base, LORA, "CAUSAL_LM", 0, rows)}
    roles |= {name: add_lora(model, LORA, "SEQ_CLS", 0) for name, model in scalars.items()}
    for seed, model in enumerate(roles.values()):
        move(model, seed)
        model.eval()
    return roles


def on_both(family, group, rows=(), **values):
    """Roles on a whole base, and on the same base in slices."""
    whole, sliced = (tiny_model(family, TOKENIZER, **values) for _ in range(2))
    shard_base(sliced, whole_tables=bool(rows))
    return roles_on(whole, rows), roles_on(sliced, rows)


def gradients(roles):
    """Of one loss that reads the critic, then the policy."""
    values = ScalarModel(roles["critic"])(IDS, MASK)[MASK]
    loss = roles["policy"](input_ids=IDS, labels=IDS).loss + values.square().mean()
    loss.backward()
    return {
        (role, name): parameter.grad
        for role, model in roles.items()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def assert_same(whole, sliced):
    close(logits_of(sliced["policy"]), logits_of(whole["policy"]))
    for name in ("critic", "reward"):
        close(scores_of(sliced[name]), scores_of(whole[name]))
    expected, found = gradients(whole), gradients(sliced)
    assert found.keys() == expected.keys() and {role for role, _ in found} == {"policy", "critic"}
    for key, gradient in found.items():
        close(gradient, expected[key], atol=1e-5 * expected[key].abs().max())
    for model in sliced.values():
        assert is_sharded(model), "nothing stays gathered"


QUICK = ("llama", "gpt2", "opt", "falcon_40b")
EVERY = [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in FAMILIES]


@pytest.mark.parametrize("family", EVERY)
def test_roles_on_slices_give_numbers_and_gradients_of_roles_on_a_whole_base(family, group):
    assert_same(*on_both(family, group))


@pytest.mark.parametrize("values", [{"tie_word_embeddings": True}, {"num_hidden_layers": 3}])
def test_tied_tables_stay_whole(values, group):
    whole, sliced = on_both("llama", group, **values)
    assert_same(whole, sliced)
    base = unwrap_peft(sliced["policy"])
    tied = base.lm_head.weight is base.get_input_embeddings().weight
    assert tied == ("tie_word_embeddings" in values) != isinstance(base.lm_head.weight, DTensor)


def test_tables_with_rows_that_train_stay_whole(group):
    whole, sliced = on_both("llama", group, rows=[5, 9])
    assert_same(whole, sliced)


def test_activations_are_recomputed_on_slices(group):
    whole, sliced = on_both("llama", group)
    for roles in (whole, sliced):
        for model in roles.values():
            unwrap_peft(model).activation_checkpointing_enable()
            model.train()
    assert_same(whole, sliced)


def test_a_merged_model_on_slices_is_that_on_a_whole_base(group):
    whole, sliced = on_both("gpt2", group)
    for name in ("policy", "critic"):
        expected = merged(whole[name]).state_dict()
        for key, tensor in merged(sliced[name]).state_dict().items():
            close(tensor, expected[key])


def test_a_role_below_the_adapter_of_sft_reads_the_same_slices_without_it(group):
    found = []
    for shards in (False, True):
        wrapper = add_lora(tiny_model("llama", TOKENIZER), LORA, "CAUSAL_LM", 0)
        move(wrapper, 3)
        base = keep_apart(wrapper, "sft")
        if shards:
            shard_base(base)
        roles = {
            "critic": scalar_role(base, CONFIG, bare=True),
            "reward": scalar_role(base, CONFIG),
        }
        roles["policy"] = add_lora(base, LORA, "CAUSAL_LM", 0)
        for name in ("critic", "reward"):
            roles[name] = add_lora(roles[name], LORA, "SEQ_CLS", 0)
        for seed, model in enumerate(roles.values()):
            move(model, seed)
            model.eval()
        found.append(roles)
    assert_same(*found)
    assert (scores_of(found[1]["critic"]) - scores_of(found[1]["reward"])).abs().max() > 0.01
    for name in ("policy", "critic", "reward"):
        expected = merged(found[0][name]).state_dict()
        for key, tensor in merged(found[1][name]).state_dict().items():
            close(tensor, expected[key])


@pytest.mark.parametrize("tied", [False, True])
def test_each_process_reads_its_slice_of_the_base_alone(tied, tmp_path):
    config = save(tmp_path / "m", tiny_model("llama", TOKENIZER, tie_word_embeddings=tied))
    expected = dict(load_policy(config, TOKENIZER).named_parameters())
    for rank in (0, 1):
        with process(rank):
            base = load_policy(config, TOKENIZER, in_slices=True)
            shard_base(base)
            assert base.state_dict().keys() == load_policy(config, TOKENIZER).state_dict().keys()
            found = dict(base.named_parameters())
            assert found.keys() == expected.keys()
            for name, parameter in found.items():
                mine = expected[name].detach()
                is_slice = "layers" in name or not (tied or name == "model.norm.weight")
                assert isinstance(parameter, DTensor) == is_slice, name
                if is_slice:
                    parameter, mine = parameter.to_local(), mine.chunk(2)[rank]
                torch.testing.assert_close(parameter.detach(), mine, rtol=0, atol=0)


def test_memory_is_that_of_a_slice_a_layer_and_whole_adapters():
    with process(0, world=4):
        base = tiny_model("llama", TOKENIZER, num_hidden_layers=4)
        size = sum(p.nbytes for p in base.parameters())
        shard_base(base)
        roles = roles_on(base)
        policy = model_memory(roles["policy"], True)
        critic = model_memory(roles["critic"], True, besides=roles["policy"])
    layer = gathered_bytes(slices_of(base))
    assert layer < size / 2
    adapters = sum(p.nbytes for p in roles["policy"].parameters() if p.requires_grad)
    norm = base.model.norm.weight.nbytes
    assert policy.weights == (size - norm) // 4 + norm + layer + adapters
    assert policy.gradients == policy.adam == 2 * adapters
    assert critic.weights < 2 * adapters, "the base counts once"
