"""Copies of a model that sample in its place, whole or in slices: they have its weights, masks and
frequencies, and give the same numbers in the same type.

One process has all slices here; two of them are in tests/sampling/test_in_step.py.

Run: python -m pytest tests/models/test_plain_copies.py
"""

import pytest
import torch
import torch.distributed as dist
from helpers.families import LORA, TOKENIZER, exact, logits_of
from helpers.tiny import FAMILIES, tiny_model

from rlhf.distributed import is_sharded
from rlhf.models import add_lora, copy_weights, plain_copy, shard, sliced_copy


@pytest.fixture
def group():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def adapted(model):
    """The model with adapters that add something, and rows of tables that train."""
    model = add_lora(model, LORA, "CAUSAL_LM", 0, [5, 6])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02)
    return model


@pytest.mark.parametrize("device", [None, "meta"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_in_a_smaller_type_has_the_frequencies_of_its_model(family, device):
    model = tiny_model(family, TOKENIZER)
    expected = dict(model.named_buffers())
    copied = plain_copy(adapted(model), torch.bfloat16, device)
    assert all(p.is_meta == (device == "meta") for p in copied.parameters())
    buffers = dict(copied.named_buffers())
    assert buffers.keys() == expected.keys()
    for name, buffer in buffers.items():
        exact(buffer, expected[name].to(buffer.dtype))
        if buffer.ndim:  # not the scale of Gemma's embeddings
            assert buffer.dtype == torch.float32
        assert buffer.data_ptr() != expected[name].data_ptr()


@pytest.mark.parametrize("with_adapter", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_in_slices_gives_the_logits_of_a_whole_one(family, with_adapter, group):
    model = adapted(tiny_model(family, TOKENIZER))
    shard(model)
    assert is_sharded(model)
    for dtype in (torch.float32, torch.bfloat16):
        whole, slices = plain_copy(model, dtype), sliced_copy(model, dtype)
        assert is_sharded(slices) and not is_sharded(whole)
        for copied in (whole, slices):
            copy_weights(model, copied, with_adapter)
            assert {p.dtype for p in copied.parameters()} == {dtype}
            assert not any(p.requires_grad for p in copied.parameters())
        logits = logits_of(whole)
        assert logits.float().std() > 0.1
        exact(logits_of(slices), logits)
