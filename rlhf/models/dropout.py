"""Dropout of any model: set for training, switched off for PPO."""

from __future__ import annotations

import copy
import re
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from rlhf.config import InputError

_RATE = re.compile(r"(\w+_)?(dropout|pdrop)")  # attention_dropout, dropout, resid_pdrop, ...


def set_dropout(model: nn.Module, rate: float) -> None:
    """Give every dropout of a model this rate, in place; the config that is saved keeps its own.

    Args:
        rate: share of the activations that are zeroed in training mode, in [0, 1).

    Raises:
        InputError: the model has no dropout anywhere.
    """
    if not _set_rates(model, rate):
        raise InputError(
            f"model.dropout={rate} would do nothing: {type(model).__name__} has no dropout; set "
            "model.dropout=null"
        )


def disable_dropout(model: nn.Module) -> None:
    """Switch off every dropout, LoRA's too, in place; gradient checkpointing keeps working.

    The model is put in eval mode; checkpointed layers keep `training=True` for themselves (not for
    their children), since transformers only checkpoints layers in training mode.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    _set_rates(model, 0.0)
    model.eval()
    for module in model.modules():
        if hasattr(module, "layerdrop"):  # OPT skips whole layers
            module.layerdrop = 0.0  # type: ignore[assignment]
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


def _set_rates(model: nn.Module, rate: float) -> bool:
    """Set modules, numbers on modules, and configs that modules read (Falcon); True if any."""
    found = False
    copies: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p, found = rate, True
        for name in _rates(module):
            setattr(module, name, rate)
            found = True
        config = vars(module).get("config")
        # The config of the model itself is saved with it, so that of its layers becomes a copy.
        whole = isinstance(module, PreTrainedModel) or hasattr(module, "get_base_model")
        if whole or not isinstance(config, PreTrainedConfig):
            continue
        changed = {name: rate for name, old in _rates(config).items() if old != rate}
        if changed:
            if id(config) not in copies:
                copies[id(config)] = copy.copy(config)
                copies[id(config)].__dict__.update(changed)
            module.__dict__["config"] = copies[id(config)]
    return found


def _rates(holder: Any) -> dict[str, float]:
    return {
        name: value
        for name, value in vars(holder).items()
        if _RATE.fullmatch(name) and isinstance(value, int | float)
    }
