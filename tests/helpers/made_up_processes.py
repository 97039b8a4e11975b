"""One of several processes that do not exist, and the slices that it has of a model."""

from contextlib import contextmanager

import torch.distributed as dist
from helpers.families import exact
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def process(rank, world=2):
    """Be one of several processes, the others of which do not exist."""
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def assert_slices(model, whole, rank, world=2):
    """Each tensor of a sharded model is the process's share of that of a whole one."""
    expected = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor) and parameter.dtype == expected[name].dtype
        assert parameter.requires_grad == expected[name].requires_grad
        parts = expected.pop(name).detach().chunk(world)
        mine = parts[rank] if rank < len(parts) else parts[0][:0]
        exact(parameter.detach().to_local(), mine)
    assert not expected
    buffers = dict(whole.named_buffers())
    assert buffers.keys() == dict(model.named_buffers()).keys()
    for name, buffer in model.named_buffers():
        exact(buffer, buffers[name])
