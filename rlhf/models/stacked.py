"""A LoRA adapter that stays apart from its base: frozen, below the adapters that train.

With `ppo.base=stacked`, that is the adapter of SFT: the base in memory is then the model that SFT
started from. Each layer adds what the adapter gives to its own output, so all that comes later sees
a plain frozen model. Left out: adapters on anything but linear layers.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, cast

import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf.config import InputError
from rlhf.distributed import whole

DOWN, UP = "stacked_down", "stacked_up"  # parameters of a layer, (rank, inputs), (outputs, rank)
ADDS = "_rlhf_adds"  # attribute of such a layer: whether it adds what the two give


def keep_apart(wrapper: Any, label: str) -> Any:
    """Return the model below a stored adapter; its layers keep what the adapter adds, frozen.

    Args:
        wrapper: a PEFT model.
        label: name of the adapter in messages.
    """
    kept = {}
    for name, module in wrapper.base_model.model.named_modules():
        if isinstance(module, ModulesToSaveWrapper | TrainableTokensWrapper):
            raise _unfit(label, f"trains {name} itself, not a sum of two factors")
        if isinstance(module, LoraLayer):
            kept[name] = _factors(module, wrapper.active_adapter, label, name)
    model = wrapper.unload()
    for name, factors in kept.items():
        layer = model.get_submodule(name)
        for key, tensor in zip((DOWN, UP), factors, strict=True):
            layer.register_parameter(key, nn.Parameter(tensor, requires_grad=False))
        layer.register_forward_hook(_add)
        setattr(layer, ADDS, True)
    return model


def _factors(module: Any, adapter: str, label: str, name: str) -> tuple[Tensor, Tensor]:
    """Return what an adapter adds to a layer's weight as two factors; the second is scaled."""
    if adapter not in module.lora_A or hasattr(module, "parameter_name"):
        raise _unfit(label, f"adapts {name}, which is no linear layer")
    up = module.lora_B[adapter]
    if adapter in getattr(module, "lora_variant", {}) or up.bias is not None:
        raise _unfit(label, f"adds more than a product of two factors to {name}")
    scaled = up.weight.detach() * module.scaling[adapter]
    return module.lora_A[adapter].weight.detach().clone(), scaled


def _unfit(label: str, why: str) -> InputError:
    return InputError(
        f"ppo.base=stacked: {label} cannot stay apart from its base, because it {why}; set "
        "ppo.base=merged"
    )


def _add(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    down, up = getattr(layer, DOWN), getattr(layer, UP)
    return output + F.linear(F.linear(inputs[0].to(down.dtype), down), up).to(output.dtype)


def kept_delta(layer: nn.Module) -> Tensor | None:
    """Return what the adapter that a layer keeps adds to its weight; None if it keeps none."""
    if not getattr(layer, ADDS, False):
        return None
    delta = whole(cast(Any, layer).stacked_up) @ whole(cast(Any, layer).stacked_down)
    return delta.T if isinstance(layer, Conv1D) else delta  # GPT-2 stores its weights transposed


def without_adapter(layer: nn.Module) -> nn.Module:
    """Return a layer with the same weights that does not add what its adapter gives."""
    if not hasattr(layer, DOWN):
        return layer
    bare = copy.copy(layer)  # with the same dict of parameters
    bare._forward_hooks = OrderedDict()
    setattr(bare, ADDS, False)
    return bare
