"""Dropout of any model: set for training, off for PPO."""

from __future__ import annotations

import copy
import re
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf.config import InputError

_RATE = re.compile(r"(\w+_)?(dropout|pdrop)")  # attention_dropout, dropout, resid_pdrop, ...


def set_dropout(model: nn.Module, rate: float) -> None:
    """Give every dropout of a model this rate, in [0, 1), in place; the config that is saved keeps
    its own. Refuse a model without dropout."""
    if not _set_rates(model, rate):
        raise InputError(
            f"model.dropout={rate} would do nothing: {type(model).__name__} has no dropout; set "
            "model.dropout=null"
        )


def disable_dropout(model: nn.Module) -> None:
    """Switch off every dropout, LoRA's too, in place; gradient checkpointing keeps working.

    The model is put in eval mode. Checkpointed layers keep `training=True`, but not their children:
    transformers only checkpoints layers in training mode.
    """
    _set_rates(model, 0.0)
    model.eval()
    for module in model.modules():
        if hasattr(module, "layerdrop"):  # OPT skips whole layers
            module.layerdrop = 0.0  # type: ignore[assignment]
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


def _set_rates(model: nn.Module, rate: float) -> bool:
    """Set the rate of dropout layers, of modules that hold a number, and of configs that modules
    read (Falcon); True if there were any layers or numbers."""
    layers = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    for layer in layers:
        layer.p = rate
    numbers = [(module, name) for module in model.modules() for name in _rates(module)]
    for module, name in numbers:
        setattr(module, name, rate)
    copies: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        config = vars(module).get("config")
        # The config of the whole model is saved with it, so its layers get a copy.
        is_whole = isinstance(module, PreTrainedModel) or hasattr(module, "get_base_model")
        if is_whole or not isinstance(config, PreTrainedConfig):
            continue
        if any(old != rate for old in _rates(config).values()):
            changed = copies.setdefault(id(config), copy.copy(config))
            changed.__dict__.update(dict.fromkeys(_rates(config), rate))
            module.__dict__["config"] = changed
    return bool(layers or numbers)


def _rates(holder: Any) -> dict[str, float]:
    return {
        name: value
        for name, value in vars(holder).items()
        if _RATE.fullmatch(name) and isinstance(value, int | float)
    }
