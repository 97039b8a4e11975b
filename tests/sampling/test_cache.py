"""The cache of the loop against that of transformers, which copies everything for each token.

Run: pytest tests/sampling/test_cache.py
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.tiny import tiny_model, tiny_tokenizer
from transformers import DynamicCache

import rlhf.sampling.cache as cache
from rlhf.sampling import generate, sampling_for, uniform_noise

TOKENIZER = tiny_tokenizer()
PROMPTS = [[40, 41, 42], [50], [60, 61, 62, 63, 64], [50], [70, 71]]


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "mistral_window"])
def test_room_for_tokens_changes_no_token_and_no_logprob(family, monkeypatch):
    model = tiny_model(family, TOKENIZER)
    stops = tuple(range(3, 320, 8))  # rows end at different steps
    sampling = replace(sampling_for(model, TOKENIZER, 24, temperature=1.0), stop_ids=stops)
    noise = uniform_noise((1,), range(5), 24)
    monkeypatch.setattr(cache, "BLOCK", 5)
    made = generate(model, PROMPTS, sampling, noise)
    monkeypatch.setattr("rlhf.sampling.token_loop.roomy_cache", lambda c: DynamicCache(config=c))
    expected = generate(model, PROMPTS, sampling, noise)
    assert len(set(map(len, made.ids))) > 2
    assert made == expected


def test_tokens_before_a_new_one_are_copied_once_in_a_block():
    layer, places = cache.RoomyLayer(), []
    for _ in range(1 + 2 * cache.BLOCK):
        keys, values = layer.update(torch.ones(2, 3, 1, 4), torch.zeros(2, 3, 1, 4))
        places.append(keys.data_ptr())
    assert len(set(places)) == 2
    assert keys.shape == values.shape == (2, 3, 1 + 2 * cache.BLOCK, 4)
    layer.batch_select_indices(torch.tensor([1]))
    keys, _ = layer.update(torch.full((1, 3, 1, 4), 7.0), torch.zeros(1, 3, 1, 4))
    assert keys.shape == (1, 3, 2 + 2 * cache.BLOCK, 4) and keys.data_ptr() not in places
    assert (keys[..., :-1, :] == 1).all() and (keys[..., -1, :] == 7).all()


@pytest.mark.parametrize("num_new", [1, 64, 65, 129, 130])
def test_the_room_of_a_layer_is_what_the_preflight_reckons(num_new):
    layer = cache.RoomyLayer()
    layer.update(torch.zeros(1, 1, 100, 2), torch.zeros(1, 1, 100, 2))
    for _ in range(num_new):
        layer.update(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
    assert layer.room["keys"].shape[2] == cache.room_of(100, num_new)
