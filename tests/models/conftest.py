"""Fixtures of several files of this folder."""

import functools

import huggingface_hub
import pytest
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
