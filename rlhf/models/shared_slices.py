"""The frozen base of several roles in slices: each process holds its rows of every weight, and a
block is whole while one of the roles runs it.

FSDP2 and DeepSpeed gather weights around the forward pass of one module, but a block of the base
has one in each role, with adapters of its own around the same layers. So the layers of a block are
the parts of a `Block`, which is sharded once, and the block of each role runs inside that.

Adapters and heads stay whole on each process, and `rlhf.distributed` averages their gradients once
in an optimiser step. They are small: rank 16 on a 7 B base is 40 M numbers, 0.6 GB with gradients
and Adam states. Norms outside of the blocks stay whole too, and so do tables whose weights are read
without their own forward pass: tied ones, and those with rows that train.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

from rlhf.distributed import zero_stage
from rlhf.models.forward import decoder_blocks

SLICES = "_rlhf_slices"  # attribute of a role: the `Gathered` of its base


class Gathered(nn.Module):
    """Layers whose weights are gathered while a function runs that reads them."""

    _no_split_modules = ("Block",)  # as models of transformers name them

    def __init__(self, parts: Sequence[nn.Module]):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, read: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return read(*args, **kwargs)


class Block(Gathered):
    """The layers of a decoder block, whose weights are gathered together."""


def slice_base(base: Any, on_cpu: bool, whole_tables: bool = False) -> None:
    """Freeze a causal LM without adapters and let FSDP2 give each process a slice of its weights,
    in place. Weights on the meta device stay there. For DeepSpeed, only say which weights.

    Args:
        on_cpu: slices wait in main memory, where passes run on a GPU.
        whole_tables: rows of the embedding tables will train.
    """
    base.requires_grad_(False)
    units = [
        Block([module for module in block.modules() if module._parameters])
        for block in decoder_blocks(base)
    ]
    tables = [base.get_input_embeddings(), base.get_output_embeddings()]
    if whole_tables or tables[0].weight is tables[1].weight:
        tables = []
    root = Gathered([*units, *tables])
    base.__dict__[SLICES] = root  # not a submodule: names of weights stay
    if zero_stage() == 3:
        return
    offload = CPUOffloadPolicy(torch.cuda.is_available()) if on_cpu else OffloadPolicy()
    for unit in [*units, *tables, root]:
        fully_shard(unit, reshard_after_forward=True, offload_policy=offload)
    run_in_slices(base, base)


def run_in_slices(role: Any, base: Any) -> None:
    """Have the blocks of a role gather those of its base, in place, if that is in slices."""
    root = base.__dict__.get(SLICES)
    if root is None:
        return
    role.__dict__[SLICES] = root
    for unit, block in zip(root.parts, decoder_blocks(role), strict=False):  # tables come last
        block.forward = partial(unit, block.forward)
    backbone = role.base_model
    backbone.forward = partial(root, backbone.forward)  # the next block comes while one runs


def slices_of(model: nn.Module) -> Gathered | None:
    """The `Gathered` of the base of a role; None without a base in slices."""
    found = (module.__dict__.get(SLICES) for module in model.modules())
    return next(filter(None, found), None)
