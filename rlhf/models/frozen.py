"""Frozen weights in the type in which autocast reads them, to save memory and time.

Under autocast, every linear layer rounds its float32 weights to bfloat16 in every forward pass.
Weights that are not trained can be stored rounded: the same numbers come out, to the last bit, from
half of the bytes and without the rounding. Embeddings, norms and a scalar head stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rlhf.models.forward import HEAD


@torch.no_grad()
def round_linear_weights(model: nn.Module, dtype: torch.dtype) -> Callable[[], None]:
    """Store the float32 weights of frozen linear layers in `dtype`, in place; tied tables stay.

    Returns: a function that gives the model its old weights again. They are kept in main memory as
        long as the function is.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D) or name.rpartition(".")[2] == HEAD:
            continue
        for parameter in (module.weight, module.bias):
            if parameter is None or id(parameter) in tables or parameter.requires_grad:
                continue
            if parameter.dtype == torch.float32:
                kept.append((parameter, parameter.data.cpu()))
                parameter.data = parameter.data.to(dtype)

    def undo() -> None:
        for parameter, weight in kept:
            parameter.data = weight.to(parameter.device)

    return undo
