"""Fixtures of several files of this folder."""

import functools

import huggingface_hub
import pytest
import torch.distributed as dist
from helpers.families import TOKENIZER, save
from helpers.tiny import tiny_model


@pytest.fixture(scope="session")
def saved_policy(tmp_path_factory):
    """family -> ModelConfig of a saved policy; each is written once."""
    folder = tmp_path_factory.mktemp("policies")
    return functools.cache(lambda family: save(folder / family, tiny_model(family, TOKENIZER)))


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty Hub cache, without a network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def group():
    """A group of one process, in which slices are real."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()
