"""Plant what can go wrong where roles share a base: a test of them must fail for each.

Bugs of several processes are planted in tests/end_to_end/test_process_mutants.py.

Run: python -m pytest tests/models/test_role_mutants.py
"""

from __future__ import annotations

import contextlib
import copy

import peft
import pytest
import test_roles
import torch
from peft.utils import ModulesToSaveWrapper

from rlhf.models import roles

MERGED = test_roles.test_each_role_gives_what_a_merged_model_of_its_own_gives
APART = test_roles.test_roles_are_models_of_their_own_to_the_last_bit
GRADIENTS = test_roles.test_gradients_are_those_of_the_merged_weights_of_that_role_alone
TRAINING = test_roles.test_training_one_role_leaves_all_others_as_they_were
MEMORY = test_roles.test_the_base_is_in_memory_once_whatever_trains


def blocks_of_all_roles_are_the_same(monkeypatch):
    """So an adapter is active in the other roles."""

    def tie(target, source, bare):
        for name, child in source.named_children():
            setattr(target, name, child)

    monkeypatch.setattr(roles, "_tie", tie)


def heads_of_all_roles_are_the_same(monkeypatch):
    change_roles(monkeypatch, "SEQ_CLS", share_head)


def share_head(model, heads):
    classifier = model.base_model.model
    assert isinstance(classifier.score, ModulesToSaveWrapper)
    heads.append(classifier.score)
    classifier.score = heads[0]


def a_weight_of_the_base_trains(monkeypatch):
    change_roles(monkeypatch, "SEQ_CLS", train_a_norm)


def train_a_norm(model, _):
    model.base_model.model.model.norm.requires_grad_(True)


def adapters_stay_on_for_the_reference(monkeypatch):
    monkeypatch.setattr(peft.PeftModel, "disable_adapter", lambda _: contextlib.nullcontext())


def each_role_has_a_copy_of_the_base(monkeypatch):
    plain = roles._tie

    def tie(target, source, bare):
        plain(target, copy.deepcopy(source), bare)

    monkeypatch.setattr(roles, "_tie", tie)


def change_roles(monkeypatch, task, change):
    """Change each role that gets an adapter for a task; `change` also gets a list of its own."""
    plain, kept = test_roles.add_lora, []

    def add_lora(model, config, kind, seed):
        model = plain(model, config, kind, seed)
        if kind == task:
            change(model, kept)
        return model

    monkeypatch.setattr(test_roles, "add_lora", add_lora)


BUGS = [
    (blocks_of_all_roles_are_the_same, APART),
    (blocks_of_all_roles_are_the_same, GRADIENTS),
    (heads_of_all_roles_are_the_same, TRAINING),
    (a_weight_of_the_base_trains, TRAINING),
    (a_weight_of_the_base_trains, MEMORY),
    (adapters_stay_on_for_the_reference, MERGED),
    (each_role_has_a_copy_of_the_base, MEMORY),
]


@pytest.mark.parametrize(("plant", "test"), BUGS, ids=lambda x: x.__name__.removeprefix("test_"))
def test_bug_of_roles_is_found(plant, test, monkeypatch):
    plant(monkeypatch)
    arguments = {MEMORY: (), APART: ("llama", torch.float32)}.get(test, ("llama",))
    with pytest.raises(AssertionError):
        test(*arguments)
