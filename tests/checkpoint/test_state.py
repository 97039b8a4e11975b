"""The content of a PPO checkpoint: resumed training is bit-identical.

Run: python -m pytest tests/checkpoint/test_state.py
"""

import random

import numpy as np
import pytest
import torch
from helpers.checkpoints import names

from rlhf.checkpoint import prune_checkpoints
from rlhf.checkpoint.state import load_modules, load_training_state, save_training_state
from rlhf.config import InputError, SFTStageConfig


def small_network(seed, hidden=5):
    torch.manual_seed(seed)
    network = torch.nn.Sequential(
        torch.nn.Linear(3, hidden), torch.nn.Linear(hidden, hidden), torch.nn.Linear(hidden, 1)
    )
    network[1].requires_grad_(False)
    optimizer = torch.optim.AdamW(
        [p for p in network.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1
    )
    return network, optimizer


def train(network, optimizer, steps):
    for step in steps:
        batch = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        network(batch).square().mean().backward()
        optimizer.step()


def test_resumed_training_is_bit_identical_to_uninterrupted(tmp_path):
    network, optimizer = small_network(seed=0)
    train(network, optimizer, range(6))
    frozen = network[1].weight.clone()
    save_training_state(
        *(tmp_path / "checkpoint-6", {"policy": network}, {"policy": optimizer}),
        *({"update": 6}, SFTStageConfig()),
    )
    train(network, optimizer, range(6, 12))

    resumed, fresh = small_network(seed=1)
    resumed[1].load_state_dict(network[1].state_dict())
    state = load_training_state(tmp_path / "checkpoint-6", {"policy": resumed}, {"policy": fresh})
    assert state == {"update": 6}
    train(resumed, fresh, range(6, 12))
    for (name, expected), actual in zip(
        network.named_parameters(), resumed.parameters(), strict=True
    ):
        assert torch.equal(expected, actual), name
    assert torch.equal(resumed[1].weight, frozen)
    for expected, actual in zip(
        optimizer.state_dict()["state"].values(), fresh.state_dict()["state"].values(), strict=True
    ):
        assert {k: v.tolist() for k, v in expected.items()} == {
            k: v.tolist() for k, v in actual.items()
        }


def test_frozen_parameters_are_neither_written_nor_overwritten(tmp_path):
    from safetensors.torch import load_file

    network, optimizer = small_network(seed=0)
    save_training_state(
        tmp_path / "checkpoint-1", {"policy": network}, {"policy": optimizer}, {}, SFTStageConfig()
    )
    saved = load_file(tmp_path / "checkpoint-1" / "policy.safetensors")
    assert sorted(saved) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    other, fresh = small_network(seed=1)
    before = other[1].weight.clone()
    load_training_state(tmp_path / "checkpoint-1", {"policy": other}, {"policy": fresh})
    assert torch.equal(other[1].weight, before)
    assert torch.equal(other[0].weight, network[0].weight)


def test_state_of_another_model_is_refused(tmp_path):
    network, optimizer = small_network(seed=0)
    save_training_state(
        tmp_path / "checkpoint-1", {"policy": network}, {"policy": optimizer}, {}, SFTStageConfig()
    )
    larger, fresh = small_network(seed=0, hidden=6)
    with pytest.raises(InputError, match="the policy weights there belong to another model"):
        load_training_state(tmp_path / "checkpoint-1", {"policy": larger}, {"policy": fresh})
    unfrozen, fresh = small_network(seed=0)
    unfrozen.requires_grad_(True)
    with pytest.raises(InputError, match="the policy weights there belong to another model"):
        load_training_state(tmp_path / "checkpoint-1", {"policy": unfrozen}, {"policy": fresh})


def test_dict_of_tensors_is_saved_and_loaded_in_place(tmp_path):
    averages = {"a.weight": torch.randn(2, 3), "b": torch.randn(4)}
    expected = {name: tensor.clone() for name, tensor in averages.items()}
    save_training_state(tmp_path / "checkpoint-1", {"averages": averages}, {}, {}, SFTStageConfig())
    for tensor in averages.values():
        tensor.zero_()
    load_modules(tmp_path / "checkpoint-1", {"averages": averages})
    assert all(torch.equal(averages[name], expected[name]) for name in expected)


def test_modules_are_loaded_alone_and_by_name(tmp_path):
    network, optimizer = small_network(seed=0)
    critic, _ = small_network(seed=1)
    modules = {"policy": network, "critic": critic}
    save_training_state(
        tmp_path / "checkpoint-1", modules, {"policy": optimizer}, {}, SFTStageConfig()
    )
    fresh, _ = small_network(seed=2)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    load_modules(tmp_path / "checkpoint-1", {"critic": fresh})
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(fresh[0].weight, critic[0].weight)


def test_global_random_numbers_continue_where_they_were(tmp_path):
    def draw():
        normal = (random.gauss(0, 1), float(np.random.standard_normal()))
        return [random.random(), np.random.rand(), float(torch.rand(())), *normal]

    draw()  # an odd number of normal ones: one more is in store
    save_training_state(tmp_path / "checkpoint-1", {}, {}, {}, SFTStageConfig())
    expected = [draw() for _ in range(3)]
    load_training_state(tmp_path / "checkpoint-1", {}, {})
    assert [draw() for _ in range(3)] == expected


def test_state_names_the_best_checkpoint_that_is_kept(tmp_path):
    for step, state in {1: {"best": {"update": 1}}, 2: {"best": {"update": 1}}, 3: {}}.items():
        save_training_state(tmp_path / f"checkpoint-{step}", {}, {}, state, SFTStageConfig())
        prune_checkpoints(tmp_path, 1)
        assert (
            names(tmp_path)
            == {1: ["checkpoint-1"], 2: ["checkpoint-1", "checkpoint-2"], 3: ["checkpoint-3"]}[step]
        )


def test_training_state_holds_nothing_pickled(tmp_path):
    network, optimizer = small_network(seed=0)
    train(network, optimizer, range(2))
    save_training_state(
        *(
            tmp_path / "checkpoint-1",
            {"policy": network},
            {"policy": optimizer},
            {},
            SFTStageConfig(),
        )
    )
    suffixes = {path.suffix for path in (tmp_path / "checkpoint-1").iterdir()}
    assert suffixes == {".safetensors", ".json", ".yaml"}
