"""One base, four roles: models whose frozen weights are the same tensors in memory.

Policy, critic and reward model differ in their adapters and heads. With `ppo.share_base`, each is a
model of its own all the same, but the layers below its adapters are those of the policy: the same
objects, not copies. So no adapter is switched on or off between two roles, none can be active at
the wrong time, and gradients reach only the adapters and the head that were read. The reference is
the policy with its adapters off.

    base = load_policy(...)                  # plain, without adapters
    critic = scalar_role(base, config)       # its backbone is the base's
    reward = stored_role(base, config, adapter, label)
    policy, critic = add_lora(base, ...), add_lora(critic, ..., "SEQ_CLS")
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf.config import InputError, ModelConfig
from rlhf.distributed import compute_device
from rlhf.models.forward import HEAD, linear_head, unwrap_peft
from rlhf.models.load import recompute_activations
from rlhf.models.plain import STORED_DTYPE
from rlhf.models.shared_slices import run_in_slices
from rlhf.models.stacked import without_adapter
from rlhf.models.weights import new_classifier, put_stored_adapter

# What loaders set on a quantised model, and PEFT reads.
MARKS = (STORED_DTYPE, "is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "hf_quantizer")


def scalar_role(base: PreTrainedModel, config: ModelConfig, bare: bool = False) -> PreTrainedModel:
    """Return a classifier with one label on the layers of a causal LM; its float32 head is 0.

    Args:
        base: without adapters. It may get them later, and so may the result.
        bare: leave out the adapter that the layers keep (`ppo.base=stacked`).

    Raises:
        InputError: the family has no classifier with a linear head.
    """
    label = f"ppo.share_base=true: model.path={config.path}"
    model = new_classifier(base, label, config.trust_remote_code)
    _tie(model.base_model, base.base_model, bare)
    width = getattr(model, HEAD).in_features
    model.score = linear_head(torch.zeros(1, width), device=compute_device(base))
    run_in_slices(model, base)
    for name in MARKS:
        if hasattr(base, name):
            setattr(model, name, getattr(base, name))
    model.name_or_path = base.name_or_path
    lost = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if lost:
        raise InputError(
            f"{label}: {type(model).__name__} has weights that {type(base).__name__} lacks "
            f"({lost[0]}), so they cannot share a base; set ppo.share_base=false"
        )
    if config.gradient_checkpointing:
        recompute_activations(model)
    return model


def stored_role(
    base: PreTrainedModel,
    config: ModelConfig,
    adapter: Path,
    label: str,
    trains: bool = False,
    bare: bool = False,
) -> Any:
    """Return the reward model or critic whose adapter and head are in a directory, on the layers of
    a causal LM.

    Args:
        base: without adapters.
        label: the setting that names the directory and its value, for messages.
        trains: whether adapter and head get gradients.
        bare: see `scalar_role`.
    """
    return put_stored_adapter(scalar_role(base, config, bare), adapter, label, "SEQ_CLS", trains)


def own_parameters(model: nn.Module, base: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a model that are not those of the base too, by name."""
    shared = {id(parameter) for parameter in unwrap_peft(base).parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) not in shared}


def _tie(target: nn.Module, source: nn.Module, bare: bool) -> None:
    """Give a module the tensors of another one of the same kind, in place.

    A layer without layers inside, such as a linear one, is taken whole: a quantised one keeps more
    than its weight. The modules around them stay apart, because adapters and attention go there.
    """
    if source._parameters:  # the same dict: FSDP2 puts whole weights and slices there in turn
        target._parameters = source._parameters
    target._buffers.update(source._buffers)
    for name, child in source.named_children():
        if any(True for _ in child.children()):
            _tie(target.get_submodule(name), child, bare)
        elif [*child.parameters(), *child.buffers()]:
            setattr(target, name, without_adapter(child) if bare else child)
